"""Grammar masks (token bitmasks): for each sequence the tokens that may come next, whoever it is that says so.

A mask is a row of uint32 words: bit t % 32 of word t // 32 is set if token t is allowed. Knows matchers and bits;
nothing of grammars but that llguidance computes the masks of some of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from tinyserve.errors import TinyserveError

if TYPE_CHECKING:
    import llguidance
    import numpy as np
    from numpy.typing import NDArray

    Masks = NDArray[np.uint32]


class TokenMatcher(ABC):
    """Where one sequence is in what its answer must look like, and which tokens may come next."""

    vocab_size: int
    end_tokens: frozenset[int]

    @abstractmethod
    def copy(self) -> TokenMatcher:
        """A matcher at the same place that goes its own way."""

    @abstractmethod
    def advance(self, token: int) -> bool:
        """Take in the chosen token; False, and nothing changes, if it is not allowed here."""

    @abstractmethod
    def start_mask(self, row: Masks) -> llguidance.LLMatcher | None:
        """Write the next token's mask into row (words_of(vocab_size),), or say whose mask llguidance is to write."""

    @abstractmethod
    def finish_mask(self, row: Masks) -> None:
        """Go on where llguidance has written the mask."""

    @abstractmethod
    def forced_tokens(self) -> list[int]:
        """The tokens that must come next; often none."""

    @property
    @abstractmethod
    def error(self) -> str | None:
        """Why no answer can come of it, as a sentence; None as long as all is well."""

    def fill(self, row: Masks) -> None:
        """Write the mask of the next token into row (words_of(vocab_size),); TinyserveError if the grammar gave up."""
        fill_masks([self], row[None])
        if self.error is not None:
            raise TinyserveError(self.error)

    def count_valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, are allowed one after the other; nothing changes."""
        ahead = self.copy()
        return next((i for i, token in enumerate(tokens) if not ahead.advance(token)), len(tokens))

    def fill_draft(self, draft: Sequence[int], masks: Masks) -> int:
        """Write the masks before each token of a draft, and after the last, into masks (len(draft) + 1, words).

        Returns how many tokens of the draft are allowed; rows behind the first that is not are left alone.
        """
        ahead = self.copy()
        ahead.fill(masks[0])
        for i, token in enumerate(draft):
            if not ahead.advance(token):
                return i
            fill_masks([ahead], masks[None, i + 1])
            if ahead.error is not None:  # if the model goes there all the same, it will see for itself
                return i
        return len(draft)


def words_of(vocab_size: int) -> int:
    """The uint32 words of a mask."""
    return (vocab_size + 31) // 32


def fill_masks(matchers: Sequence[TokenMatcher | None], masks: Masks) -> None:
    """Write the next token's mask of each matcher into its row of masks (matchers, words_of(vocab_size)), uint32.

    None allows everything. A matcher that has ended, or that gave up (see its `error`), allows nothing but an end.
    The interpreter's lock is released meanwhile, once for all rows.
    """
    if not masks.flags.c_contiguous or masks.dtype != "uint32" or len(masks) < len(matchers):
        raise ValueError(
            f"masks must be contiguous uint32 of {len(matchers)} rows; they are {masks.dtype} {masks.shape}."
        )
    running: list[tuple[TokenMatcher, llguidance.LLMatcher, int]] = []
    for i, matcher in enumerate(matchers):
        if matcher is None:
            masks[i] = 0xFFFFFFFF
        elif (at := matcher.start_mask(masks[i])) is not None:
            running.append((matcher, at, i))
    if not running:
        return
    tasks = [(at, i) for _, at, i in running]
    _executor().unsafe_compute_mask_ptr(tasks, masks.ctypes.data, 4 * masks.shape[1], len(masks))
    for matcher, _, i in running:
        matcher.finish_mask(masks[i])


class MaskFiller:
    """Fills a batch's masks in a thread of its own, while the model computes the logits they are for."""

    def __init__(self, vocab_size: int) -> None:
        self._words = words_of(vocab_size)
        self._thread = ThreadPoolExecutor(1, "tinyserve-masks")
        self._filling: Future[Masks] | None = None

    def start(self, matchers: Sequence[TokenMatcher | None], drafts: Sequence[Sequence[int]] | None = None) -> None:
        """Begin; until `wait`, nobody else may touch these matchers. drafts: the draft tokens behind each."""
        self._filling = self._thread.submit(self._fill, list(matchers), drafts or [()] * len(matchers))

    def wait(self) -> Masks:
        """The masks (places, words) of the last `start`: of each matcher one, and one behind each draft token.

        Behind a draft token that the grammar forbids, and where it gives up, they allow nothing: no answer goes there.
        """
        if self._filling is None:
            raise ValueError("There are no masks to wait for: call start first.")
        filling, self._filling = self._filling, None
        return filling.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _fill(self, matchers: Sequence[TokenMatcher | None], drafts: Sequence[Sequence[int]]) -> Masks:
        import numpy as np

        masks = np.zeros((len(matchers) + sum(map(len, drafts)), self._words), np.uint32)
        if len(masks) == len(matchers):
            fill_masks(matchers, masks)
            return masks
        first = 0
        for matcher, draft in zip(matchers, drafts, strict=True):
            rows = masks[first : first + 1 + len(draft)]
            fill_masks([matcher] if matcher is not None else [None] * len(rows), rows)
            if matcher is not None and draft and matcher.error is None:
                rows[1 + matcher.fill_draft(draft, rows) :] = 0
            first += len(rows)
        return masks


def allow_only(row: Masks, tokens: Iterable[int]) -> None:
    """Write the mask of these tokens into row."""
    row[:] = 0
    for token in tokens:
        row[token // 32] |= 1 << token % 32


@cache
def _executor() -> llguidance.LLExecutor:
    """One thread: a mask takes microseconds, and the other cores are the model's."""
    import llguidance

    return llguidance.LLExecutor(1)
