"""Grammars are first compiled in a process of its own, of limited time, memory and stack: what ends it would end ours.

llguidance recurses for each link of a chain of definitions, and a few patterns that must all match can take all memory;
its own limits count neither. Knows llguidance, nothing of requests: a vocabulary goes in first, then
grammars, and for each the reason comes out why it is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tinyserve.text.limited_process import EndedError, Excess, LimitedProcesses, Limits, limit_processor

if TYPE_CHECKING:
    import llguidance

MAX_BYTES = 1_000_000  # of a grammar as llguidance reads it
MAX_SECONDS = 10.0  # of the processor
MAX_WAIT = 15.0  # by the clock: on a busy server whoever is being answered has the processor
HASTE = 2.0  # seconds of the processor, after which all others come first
MAX_MEMORY = 2 << 30  # bytes, its vocabulary among them
STACK = 1 << 20 if sys.platform == "win32" else 4 << 20  # bytes, half of what a thread of the server has


class Vocabulary(NamedTuple):
    """The bytes of each token id; ids that are special, and those of them that end an answer."""

    pieces: Sequence[bytes]
    special: Sequence[int]
    end_tokens: Sequence[int]


class GrammarProbe:
    """Tells whether grammars compile, several at a time if need be; a process that is idle is kept for the next."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        pieces = [piece.decode("latin-1") for piece in vocabulary.pieces]
        setup = json.dumps([pieces, list(vocabulary.special), list(vocabulary.end_tokens)]).encode()
        # Whoever is being answered comes first; what an honest grammar takes it has soon all the same.
        limits = Limits(MAX_MEMORY, STACK, haste=HASTE, slow=19)
        self._processes = LimitedProcesses(__name__, "compiles grammars", limits, setup=setup)

    def check(self, source: str, is_cancelled: Callable[[], bool] = lambda: False) -> str | None:
        """Why a grammar does not compile within the limits, or None; `source` is llguidance's description of it.

        Raises CancelledError as soon as `is_cancelled`, and TinyserveError where no process can be started.
        """
        if len(source) > MAX_BYTES:
            return f"it comes to {len(source)} characters, and {MAX_BYTES} are the most"
        try:
            answer = self._processes.ask(json.dumps([source, MAX_SECONDS]).encode(), MAX_WAIT, is_cancelled)
        except EndedError as error:
            if error.excess in (Excess.PROCESSOR, Excess.WAIT):
                return f"it takes longer than {MAX_SECONDS:g} s to compile"
            return "it takes more memory, or a deeper stack, than there is for compiling one"
        reason: str | None = json.loads(answer)
        return reason

    def close(self) -> None:
        """End the process that waits."""
        self._processes.close()


# --- in the process ---------------------------------------------------------------------------------------------------


def answerer(setup: bytes) -> Callable[[bytes], bytes]:
    """From a vocabulary the function that tries a grammar."""
    import llguidance
    import numpy as np

    pieces, special, end_tokens = json.loads(setup)
    vocabulary = vocabulary_of(Vocabulary([piece.encode("latin-1") for piece in pieces], special, end_tokens))
    executor, mask = llguidance.LLExecutor(1), np.empty((1, (len(pieces) + 31) // 32), np.uint32)

    def answer(question: bytes) -> bytes:
        source, seconds = json.loads(question)
        limit_processor(seconds)
        matcher = compiled(vocabulary, source)
        reason = matcher.get_error() if matcher.is_error() else None
        if reason is None:  # the first mask takes memory, too, and finds what the compiler does not
            executor.unsafe_compute_mask_ptr([(matcher, 0)], mask.ctypes.data, 4 * mask.shape[1], 1)
        limit_processor(0)
        return json.dumps(reason).encode()

    return answer


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
