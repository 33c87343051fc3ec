"""Grammars are first compiled in a process of its own, of limited time, memory and stack: what ends it would end ours.

llguidance recurses for each link of a chain of definitions, and a few patterns that must all match can take all memory;
its own limits count neither. Knows llguidance and pipes: a vocabulary goes in first, then a grammar a line, and a line
comes out for each.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from tinyserve.errors import TinyserveError

if TYPE_CHECKING:
    import llguidance

MAX_BYTES = 1_000_000  # of a grammar as llguidance reads it
MAX_SECONDS = 10.0
MAX_MEMORY = 2 << 30  # bytes of addresses, its code and vocabulary among them
STACK = 4 << 20  # half of what a thread of the server has
POLL = 0.05  # seconds between two looks whether anybody still waits


# Modules come from where they come from here, and not from whatever folder this is.
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tinyserve.text import grammar_probe
grammar_probe.main()
"""


class Vocabulary(NamedTuple):
    """The bytes of each token id; ids that are special, and those of them that end an answer."""

    pieces: Sequence[bytes]
    special: Sequence[int]
    end_tokens: Sequence[int]


class CancelledError(Exception):
    """Nobody waits for the grammar any more."""


class GrammarProbe:
    """Tells whether grammars compile, several at a time if need be; a process that is idle is kept for the next."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        pieces = [piece.decode("latin-1") for piece in vocabulary.pieces]
        self._vocabulary = json.dumps([pieces, list(vocabulary.special), list(vocabulary.end_tokens)]).encode() + b"\n"
        self._idle: queue.LifoQueue[subprocess.Popen[bytes]] = queue.LifoQueue(1)

    def check(self, source: str, is_cancelled: Callable[[], bool] = lambda: False) -> str | None:
        """Why a grammar does not compile within the limits, or None; `source` is llguidance's description of it.

        Raises CancelledError as soon as `is_cancelled`, and TinyserveError where no process can be started.
        """
        if len(source) > MAX_BYTES:
            return f"it comes to {len(source)} characters, and {MAX_BYTES} are the most"
        process = self._take()
        try:
            reason = self._ask(process, source, is_cancelled)
        except BaseException:
            _end(process)
            raise
        if process.poll() is None:
            try:
                self._idle.put_nowait(process)
            except queue.Full:
                _end(process)
        return reason

    def close(self) -> None:
        """End the process that waits."""
        with suppress(queue.Empty):
            _end(self._idle.get_nowait())

    def __del__(self) -> None:
        self.close()

    def _take(self) -> subprocess.Popen[bytes]:
        with suppress(queue.Empty):
            process = self._idle.get_nowait()
            if process.poll() is None:
                return process
            _end(process)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise TinyserveError(f"The process that compiles grammars cannot be started ({error.strerror}).") from None
        assert process.stdin is not None
        with suppress(OSError):  # it has ended: asking it tells
            process.stdin.write(self._vocabulary)
        return process

    def _ask(self, process: subprocess.Popen[bytes], source: str, is_cancelled: Callable[[], bool]) -> str | None:
        answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=_exchange, args=(process, source, answers), daemon=True).start()
        end = monotonic() + MAX_SECONDS
        while True:
            with suppress(queue.Empty):
                answer = answers.get(timeout=POLL)
                break
            if is_cancelled():
                raise CancelledError
            if monotonic() > end:
                _end(process)
                return f"it takes longer than {MAX_SECONDS:g} s to compile"
        if not answer:
            _end(process)
            return "it takes more memory, or a deeper stack, than there is for compiling one"
        reason: str | None = json.loads(answer)
        return reason


def _exchange(process: subprocess.Popen[bytes], source: str, answers: queue.Queue[bytes]) -> None:
    """Hand over a grammar, and its answer, which is empty where the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(source).encode() + b"\n")
        process.stdin.flush()
        answers.put(process.stdout.readline())
    except (OSError, ValueError):
        answers.put(b"")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


# --- in the process ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer until standard input ends."""
    _limit()
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


def _limit() -> None:
    with suppress(AttributeError, OSError):
        os.nice(19)  # whoever is being answered comes first
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve() -> None:
    import llguidance
    import numpy as np

    lines = sys.stdin.buffer
    pieces, special, end_tokens = json.loads(lines.readline())
    vocabulary = vocabulary_of(Vocabulary([piece.encode("latin-1") for piece in pieces], special, end_tokens))
    executor, mask = llguidance.LLExecutor(1), np.empty((1, (len(pieces) + 31) // 32), np.uint32)
    while line := lines.readline():
        matcher = compiled(vocabulary, json.loads(line))
        reason = matcher.get_error() if matcher.is_error() else None
        if reason is None:  # the first mask takes memory, too, and finds what the compiler does not
            executor.unsafe_compute_mask_ptr([(matcher, 0)], mask.ctypes.data, 4 * mask.shape[1], 1)
        del matcher
        sys.stdout.write(json.dumps(reason) + "\n")
        sys.stdout.flush()


# --- in both ----------------------------------------------------------------------------------------------------------


def compiled(vocabulary: llguidance.LLTokenizer, source: str) -> llguidance.LLMatcher:
    """A matcher of a grammar, or of its error."""
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    return llguidance.LLMatcher(vocabulary, source, log_level=0, limits=limits)


def vocabulary_of(
    vocabulary: Vocabulary, spell: Callable[[str], list[int]] | None = None, bos_token_id: int | None = None
) -> llguidance.LLTokenizer:
    """A vocabulary as llguidance knows it; `spell` cuts a text into tokens, by default the longest ones."""
    import llguidance

    class Tokens:
        def __init__(self) -> None:
            self.eos_token_id, self.bos_token_id = min(vocabulary.end_tokens), bos_token_id
            self.tokens, self.special_token_ids = list(vocabulary.pieces), list(vocabulary.special)

        def __call__(self, text: str | bytes) -> list[int]:
            return [] if spell is None else spell(text if isinstance(text, str) else text.decode())

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()), eos_token=sorted(vocabulary.end_tokens))
