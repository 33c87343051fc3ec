"""Structured outputs: grammars compiled for a vocabulary, and for each sequence a matcher in its grammar.

Knows llguidance and a tokenizer's bytes; nothing about models, batches or requests.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import takewhile
from threading import Lock
from typing import TYPE_CHECKING

from tinyserve.errors import RequestError
from tinyserve.sampling_params import StructuredOutputs
from tinyserve.text.grammar_probe import GrammarProbe, Vocabulary, compiled, vocabulary_of
from tinyserve.text.json_schema import with_options
from tinyserve.text.limited_process import POLL, CancelledError
from tinyserve.text.masks import TokenMatcher, allow_only, fill_masks, words_of
from tinyserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

    from tinyserve.text.masks import Masks

_LONGEST_REASON = 500  # characters: a name of the client's may stand in it
_KEPT = 64  # compiled grammars; a service asks for the same few again and again


class GrammarCompiler:
    """Compiles structured outputs for one vocabulary; llguidance's copy of it is made by the first."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Iterable[int]) -> None:
        """`vocab_size` is the model's, which may be larger than the tokenizer's; `end_tokens` are its ends of answers.

        Raises RequestError if llguidance is missing, or this tokenizer does not spell its tokens as bytes.
        """
        try:
            import llguidance  # noqa: F401
        except ImportError:
            raise RequestError(
                "Structured outputs need llguidance: pip install 'tinyserve[structured]'.", param="structured_outputs"
            ) from None
        if not tokenizer.spells_bytes:
            raise RequestError(
                f"{tokenizer.source}: structured outputs need a tokenizer whose tokens are bytes (byte-level or "
                "SentencePiece BPE), and the decoder of this one is neither.",
                param="structured_outputs",
            )
        self.vocab_size = vocab_size
        self.end_tokens = frozenset(token for token in end_tokens if 0 <= token < vocab_size)
        if not self.end_tokens:
            raise RequestError(
                f"{tokenizer.source}: structured outputs need a model with an end token; this has none.",
                param="structured_outputs",
            )
        self._tokenizer = tokenizer
        self._grammars: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()
        self._compiling: dict[StructuredOutputs, Future[Grammar]] = {}
        self._lock = Lock()

    def knows(self, spec: StructuredOutputs) -> bool:
        """Whether this grammar is compiled."""
        with self._lock:
            return spec in self._grammars

    def compile(self, spec: StructuredOutputs, is_cancelled: Callable[[], bool] = lambda: False) -> Grammar:
        """The grammar of a spec, compiled once; who asks for another one does not wait for it.

        Raises RequestError, which says what llguidance has against it, and CancelledError once `is_cancelled`.
        """
        while True:
            with self._lock:
                if (grammar := self._grammars.get(spec)) is not None:
                    self._grammars.move_to_end(spec)
                    return grammar
                others = self._compiling.get(spec)
                if others is None:
                    mine = self._compiling[spec] = Future()
            if others is None:
                return self._compile(spec, mine, is_cancelled)
            with suppress(CancelledError):  # who began does not wait any more: begin again
                return _result(others, is_cancelled)
            if is_cancelled():
                raise CancelledError

    def close(self) -> None:
        """End the process in which grammars are tried."""
        if "_probe" in vars(self):
            self._probe.close()

    def _compile(self, spec: StructuredOutputs, done: Future[Grammar], is_cancelled: Callable[[], bool]) -> Grammar:
        try:
            grammar = self._compiled(spec, is_cancelled)
        except BaseException as error:
            with self._lock:
                del self._compiling[spec]
            done.set_exception(error)
            raise
        with self._lock:
            self._grammars[spec] = grammar
            if len(self._grammars) > _KEPT:
                self._grammars.popitem(last=False)
            del self._compiling[spec]
        done.set_result(grammar)
        return grammar

    def _compiled(self, spec: StructuredOutputs, is_cancelled: Callable[[], bool]) -> Grammar:
        source = _source(spec)
        if reason := self._probe.check(source, is_cancelled):
            raise RequestError(f"{spec.kind} is refused: {_sentence(reason)}.", param="structured_outputs")
        matcher = compiled(self._vocabulary, source)
        grammar = Grammar(matcher, self.vocab_size, self.end_tokens)
        # The first mask finds what the compiler does not: that no text matches, or none that these tokens spell.
        if matcher.is_error() or (reason := grammar.first_error()):
            reason = _sentence(matcher.get_error()) if matcher.is_error() else reason
            raise RequestError(f"{spec.kind} is refused: {reason}.", param="structured_outputs")
        return grammar

    @cached_property
    def _probe(self) -> GrammarProbe:
        return GrammarProbe(_bytes_of(self._tokenizer, self.vocab_size, self.end_tokens))

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        return _vocabulary(self._tokenizer, self.vocab_size, self.end_tokens)


def _result(compiling: Future[Grammar], is_cancelled: Callable[[], bool]) -> Grammar:
    """What another thread compiles; raises what it raises, and CancelledError once `is_cancelled`."""
    while not is_cancelled():
        with suppress(NotYet):
            return compiling.result(POLL)
    raise CancelledError


class Grammar:
    """One compiled grammar; every sequence that must match it gets a matcher of its own."""

    def __init__(self, start: llguidance.LLMatcher, vocab_size: int, end_tokens: frozenset[int]) -> None:
        self._start, self._vocab_size, self._end_tokens = start, vocab_size, end_tokens

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        return Matcher(self._start.deep_copy(), self._vocab_size, self._end_tokens)

    def first_error(self) -> str | None:
        """Why no answer can begin, or None."""
        import numpy as np

        matcher = self.matcher()
        fill_masks([matcher], np.empty((1, words_of(self._vocab_size)), np.uint32))
        return matcher.reason


class Matcher(TokenMatcher):
    """How far one sequence has come in its grammar."""

    def __init__(self, at: llguidance.LLMatcher, vocab_size: int, end_tokens: frozenset[int]) -> None:
        self.vocab_size, self.end_tokens = vocab_size, end_tokens
        self._at = at
        # llguidance counts an end token in some states and not in others, so it never sees one.
        self._ended = False
        self._stuck = False  # seen when a mask is filled

    def copy(self) -> Matcher:
        twin = Matcher(self._at.deep_copy(), self.vocab_size, self.end_tokens)
        twin._ended, twin._stuck = self._ended, self._stuck
        return twin

    def start_mask(self, row: Masks) -> llguidance.LLMatcher | None:
        if self._ended or self.reason:
            allow_only(row, self.end_tokens)
            return None
        return self._at

    def finish_mask(self, row: Masks) -> None:
        # llguidance offers an end where nothing goes on, although the text is not complete.
        offered = min(self.end_tokens)
        self._stuck = bool(row[offered // 32] >> offered % 32 & 1) and not self._at.is_accepting()
        if self.reason:
            allow_only(row, self.end_tokens)

    def advance(self, token: int) -> bool:
        if self._ended:
            return False
        if token in self.end_tokens:
            self._ended = bool(self._at.is_accepting())
            return self._ended
        return bool(self._at.try_consume_tokens([token]) == 1)

    def count_valid(self, tokens: Sequence[int]) -> int:
        if self._ended:
            return 0
        text = list(takewhile(lambda token: token not in self.end_tokens, tokens))
        valid: int = self._at.validate_tokens(text)
        if valid < len(text) or len(text) == len(tokens):
            return valid
        ahead = self._at.deep_copy()
        ahead.consume_tokens(text)
        return valid + bool(ahead.is_accepting())

    def rollback(self, count: int) -> None:
        """Take back the last tokens that `advance` took in."""
        if count and self._ended:
            self._ended = False
            count -= 1
        self._stuck = self._stuck and not count
        if count and not self._at.rollback(count):
            raise ValueError(f"{count} tokens cannot be taken back: {_sentence(self._at.get_error())}.")

    def forced_tokens(self) -> list[int]:
        """The tokens, as the tokenizer cuts them, that must come next."""
        return [] if self._ended else list(self._at.compute_ff_tokens())

    @property
    def is_complete(self) -> bool:
        """The text so far matches the grammar, and an end token is allowed."""
        return self._ended or bool(self._at.is_accepting())

    @property
    def is_finished(self) -> bool:
        """An end token came, or nothing else can come."""
        return self._ended or bool(self._at.is_stopped())

    @property
    def reason(self) -> str | None:
        """Why the grammar gave up: a limit of llguidance's, or a dead end. None as long as all is well."""
        if self._at.is_error():
            return _sentence(self._at.get_error())
        return "no token goes on to a text that matches it" if self._stuck else None

    @property
    def error(self) -> str | None:
        """`reason` as a sentence."""
        return self.reason and f"The structured output cannot go on: {self.reason}."


def _source(spec: StructuredOutputs) -> str:
    """A spec as llguidance's own description of grammars."""
    from llguidance import LLMatcher

    match spec.kind:
        case "json":
            return str(LLMatcher.grammar_from_json_schema(json.dumps(with_options(json.loads(spec.json)))))
        case "json_object":
            return str(LLMatcher.grammar_from_json_schema(json.dumps(with_options({"type": "object"}))))
        case "regex":
            return str(LLMatcher.grammar_from_regex(str(spec.regex)))
        case "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in spec.choice or ())
            return str(LLMatcher.grammar_from_lark("start: " + " | ".join(texts)))
        case _:
            return str(LLMatcher.grammar_from_lark(str(spec.grammar)))


def _bytes_of(tokenizer: Tokenizer, vocab_size: int, end_tokens: frozenset[int]) -> Vocabulary:
    """The bytes of each of the model's ids, none beyond the tokenizer's own."""
    pieces = [tokenizer.token_bytes(i, skip_special_tokens=False) for i in range(vocab_size)]
    special = sorted(i for i in tokenizer.special_ids | end_tokens if i < vocab_size)
    return Vocabulary(pieces, special, sorted(end_tokens))


def _vocabulary(tokenizer: Tokenizer, vocab_size: int, end_tokens: frozenset[int]) -> llguidance.LLTokenizer:
    """The tokenizer as llguidance knows it."""
    vocabulary = _bytes_of(tokenizer, vocab_size, end_tokens)
    special = frozenset(vocabulary.special)
    plain = {i: piece for i, piece in enumerate(vocabulary.pieces) if piece and i not in special}
    by_bytes = {piece: i for i, piece in plain.items()}
    longest = max(map(len, by_bytes), default=0)

    @lru_cache(4096)  # the same keys are forced again and again, and asked for with each mask
    def spell(text: str) -> list[int]:
        """The tokens whose bytes are this text in the middle of another one; no special tokens, whatever it says."""
        data = text.encode()
        # SentencePiece puts a space before a text; behind a line's end there is none.
        for before in ("", "\n"):
            ids = tokenizer.encode(before + text, add_special_tokens=False)
            for start in range(min(len(ids), 4) + 1):
                if b"".join([plain.get(i, b"\xff") for i in ids[start:]]) == data:
                    return ids[start:]
        # A normalizer changed the text, or the name of a special token is in it: the longest pieces will do.
        ids, at = [], 0
        while size := next((n for n in range(min(longest, len(data) - at), 0, -1) if data[at : at + n] in by_bytes), 0):
            ids.append(by_bytes[data[at : at + size]])
            at += size
        return ids

    return vocabulary_of(vocabulary, spell, tokenizer.bos_token_id)


def _sentence(error: str) -> str:
    """llguidance's reason on one line, without its drawings of where in the grammar it is, and of its state."""
    if not error or error.startswith("NoExtension"):
        return "no text matches it"
    error = error.replace("panic: ", "the compiler fails on it: ").split("<backtrace>")[0]
    lines = [line.strip() for line in error.split("<state>")[0].splitlines()]
    kept = [line for line in lines if line.strip("^ ") and line != "<non-verbose/>" and not _DRAWN.match(line)]
    text = " ".join(kept).split("(in regex): ")[-1].rstrip(".")
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


_DRAWN = re.compile(r"\d+ \|")  # a line of the grammar, as a compiler shows it
