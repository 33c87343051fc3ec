"""Thinking steered in its tokens: what an answer must look like begins behind it, and it ends where its budget does.

Knows a tokenizer's bytes and the matcher of what comes behind; nothing of text that is shown (reasoning.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from tinyserve.errors import RequestError
from tinyserve.text.masks import TokenMatcher, allow_only, words_of
from tinyserve.text.reasoning import CLOSES, OPENS, Thinking
from tinyserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

    from tinyserve.text.masks import Masks

_CLOSES = CLOSES.encode()
_OPENS = OPENS.encode()


class ThinkingTokens:
    """How one model's tokens open and close its thinking."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Iterable[int]) -> None:
        """`vocab_size` is the model's; `end_tokens` are its ends of answers."""
        self.vocab_size, self.end_tokens = vocab_size, frozenset(end_tokens)
        self._tokenizer = tokenizer
        opening = tokenizer.encode(OPENS, add_special_tokens=False)
        self.opening = opening[0] if len(opening) == 1 else None  # the token that is <think> as a whole

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text, special or not."""
        return self._tokenizer.token_bytes(token, skip_special_tokens=False)

    @cached_property
    def closing(self) -> list[int]:
        """The tokens of </think>; RequestError where it cannot be written."""
        tokens = self._tokenizer.encode(CLOSES, add_special_tokens=False)
        if _CLOSES not in b"".join(map(self.bytes_of, tokens)) or max(tokens) >= self.vocab_size:
            raise RequestError(
                f"{self._tokenizer.source}: thinking_token_budget needs a tokenizer that spells {CLOSES}, and this one "
                "does not.",
                param="thinking_token_budget",
            )
        return tokens

    @cached_property
    def blank(self) -> Masks:
        """The mask of tokens that are white space."""
        return self._mask(token for token, piece in enumerate(self._pieces) if piece and not piece.strip())

    @lru_cache(len(_CLOSES))  # noqa: B019  # as many as there are beginnings, for as long as the model is there
    def overlong(self, begun: int) -> Masks:
        """The mask of tokens that close the thinking and go on with more than white space.

        begun: so many characters of </think> are there. What came behind it no grammar would have seen.
        """
        beginning = _CLOSES[:begun]

        def goes_on(piece: bytes) -> bool:
            _, closed, rest = (beginning + piece).partition(_CLOSES)
            return bool(closed and rest.strip())

        return self._mask(token for token, piece in enumerate(self._pieces) if b">" in piece and goes_on(piece))

    @cached_property
    def _pieces(self) -> list[bytes]:
        return [self.bytes_of(token) for token in range(self.vocab_size)]

    def _mask(self, tokens: Iterable[int]) -> Masks:
        mask = np.zeros(words_of(self.vocab_size), np.uint32)
        allow_only(mask, tokens)
        return mask


class ReasoningMatcher(TokenMatcher):
    """Lets a model think, at most so long; then its answer is another matcher's, or free."""

    def __init__(
        self,
        tokens: ThinkingTokens,
        thinking: Thinking,
        answer: TokenMatcher | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """`thinking` is what the prompt leaves open; behind `max_tokens` of it, </think> is all that may come.

        Raises RequestError where a budget cannot be kept.
        """
        self.vocab_size, self.end_tokens = tokens.vocab_size, tokens.end_tokens
        self._tokens, self._answer, self._max_tokens = tokens, answer, max_tokens
        self._place: Literal["start", "inside", "behind", "answer"] = "start"
        if thinking is Thinking.OPENED:
            self._place = "inside"
        elif thinking is Thinking.NONE or (answer is not None and tokens.opening is None):
            self._place = "answer"
        self._text = b""  # at the start all of it; inside the end of it, which may be the beginning of </think>
        self._count = 0  # tokens inside
        if max_tokens is not None:
            tokens.closing  # noqa: B018  # raises now, and not in the middle of an answer

    def copy(self) -> ReasoningMatcher:
        answer = self._answer.copy() if self._answer is not None else None
        twin = ReasoningMatcher(self._tokens, Thinking.NONE, answer, self._max_tokens)
        twin._place, twin._text, twin._count = self._place, self._text, self._count
        return twin

    def advance(self, token: int) -> bool:
        match self._place:
            case "start" if self._answer is None:
                self._begin(self._text + self._tokens.bytes_of(token))
                return True
            case "start" if token == self._tokens.opening:
                self._place = "inside"
                return True
            case "inside":
                return self._think(token)
            case "behind" if (piece := self._tokens.bytes_of(token)) and not piece.strip():
                self._place = "answer"  # one token of white space, as models write it, is not the answer's
                return True
        is_taken = self._answer is None or self._answer.advance(token)
        if is_taken:
            self._place = "answer"
        return is_taken

    def start_mask(self, row: Masks) -> llguidance.LLMatcher | None:
        if self._place == "inside":
            self._fill_inside(row)
            return None
        if self._answer is None:
            row[:] = 0xFFFFFFFF
            return None
        at = self._answer.start_mask(row)
        if at is None:
            self._add(row)
        return at

    def finish_mask(self, row: Masks) -> None:
        if self._answer is not None:
            self._answer.finish_mask(row)
        self._add(row)

    def forced_tokens(self) -> list[int]:
        if self._place == "inside" and self._forced:
            return self._forced
        return self._answer.forced_tokens() if self._answer is not None and self._place == "answer" else []

    @property
    def error(self) -> str | None:
        return self._answer.error if self._answer is not None and self._place != "inside" else None

    @property
    def _forced(self) -> list[int]:
        """What is left of </think> in tokens, where the budget is used up."""
        if self._max_tokens is None or self._count < self._max_tokens:
            return []
        return self._tokens.closing[self._count - self._max_tokens :]

    def _begin(self, text: bytes) -> None:
        begun = text.lstrip()
        if begun.startswith(_OPENS):
            self._place, self._text = "inside", begun[len(_OPENS) :]
        elif _OPENS.startswith(begun):
            self._text = text
        else:
            self._place = "answer"

    def _think(self, token: int) -> bool:
        if self._forced and token != self._forced[0]:
            return False
        if self._answer is not None and token in self.end_tokens:
            return False
        _, closed, rest = (self._text + self._tokens.bytes_of(token)).partition(_CLOSES)
        if self._answer is not None and closed and rest.strip():
            return False
        self._count += 1
        if closed:
            self._place = "behind" if self._answer is not None and not rest else "answer"
        else:
            self._text = (self._text + self._tokens.bytes_of(token))[-len(_CLOSES) + 1 :]
        return True

    def _fill_inside(self, row: Masks) -> None:
        if self._forced:
            allow_only(row, self._forced[:1])
            return
        row[:] = 0xFFFFFFFF
        if self._answer is not None:  # which there is none of where thinking ends the answer
            for token in self.end_tokens:
                row[token // 32] &= ~np.uint32(1 << token % 32)
            begun = next((n for n in range(len(_CLOSES) - 1, 0, -1) if self._text.endswith(_CLOSES[:n])), 0)
            row &= ~self._tokens.overlong(begun)

    def _add(self, row: Masks) -> None:
        """Allow what may stand before the answer, too."""
        if self._place == "start" and self._tokens.opening is not None:
            row[self._tokens.opening // 32] |= np.uint32(1 << self._tokens.opening % 32)
        elif self._place == "behind":
            row |= self._tokens.blank
