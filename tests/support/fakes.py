"""Stand-ins for what is slow: a runner that computes nothing, so that the engine's rules are tested alone."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from copy import copy

from tinyserve.scheduling.sequence import Sampled, Scheduled, Sequence

NOTHING = 0


class FakeRunner:
    """Answers with `next_token`, and keeps each batch as (request id, tokens computed) pairs.

    Its memory is like the real one's, with a number in each place that stands for a token and all tokens before it: a
    sequence that reads anything but its own text is caught at once.
    """

    def __init__(
        self,
        next_token: Callable[[Sequence], int] = lambda sequence: 1,
        block_size: int = 16,
        has_states: bool = True,
    ):
        self.next_token, self.block_size, self.has_states = next_token, block_size, has_states
        self.batches: list[list[tuple[int, int]]] = []
        self.pages: dict[int, list[int]] = {}  # of each block
        self.states: dict[int, int] = {}  # of each slot
        self._texts: dict[Sequence, list[int]] = {}

    def execute(self, scheduled: list[Scheduled]) -> list[list[Sampled]]:
        self.batches.append([(work.sequence.request_id, work.num_tokens) for work in scheduled])
        slots = [work.sequence.cache.state_slot for work in scheduled]
        assert len(slots) == len(set(slots)) and min(slots, default=0) >= 0, "two sequences share a slot"
        for work in scheduled:
            self._compute(work)
        for work in scheduled:  # when all have written, so that nobody's writing harms another
            self._read(work)
        return [self._sample(work) if work.is_complete else [] for work in scheduled]

    def copy_block(self, source: int, target: int) -> None:
        self.pages[target] = list(self._page(source))

    def copy_state(self, source: int, target: int) -> None:
        self.states[target] = self.states.get(source, NOTHING)

    def _page(self, block: int) -> list[int]:
        return self.pages.setdefault(block, [NOTHING] * self.block_size)

    def _text(self, work: Scheduled) -> list[int]:
        """The numbers of a sequence's text, its draft tokens among them."""
        text = self._texts.setdefault(work.sequence, [])
        extend(text, work.sequence.token_ids)
        if not work.draft_tokens:
            return text
        drafted = list(text)
        extend(drafted, [*work.sequence.token_ids, *work.draft_tokens])
        return drafted

    def _sample(self, work: Scheduled) -> list[Sampled]:
        """The accepted draft tokens, and what comes behind them."""
        sampled, said = [Sampled(self.next_token(work.sequence))], copy(work.sequence)
        for draft_token in work.draft_tokens:
            if draft_token != sampled[-1].token_id:
                break
            said.token_ids = [*said.token_ids, draft_token]
            sampled.append(Sampled(self.next_token(said)))
        return sampled

    def _compute(self, work: Scheduled) -> None:
        sequence, cache = work.sequence, work.sequence.cache
        assert 0 < work.num_tokens <= sequence.num_uncomputed
        assert not work.draft_tokens or work.is_complete
        text, start = self._text(work), cache.num_computed
        end = start + work.num_tokens + len(work.draft_tokens)
        assert work.token_ids == [*sequence.token_ids, *work.draft_tokens][start:end]
        assert end <= len(cache.block_table) * self.block_size, "a token has no block to go to"
        if start == 0:
            self.states[cache.state_slot] = NOTHING
        expected = text[start - 1] if start else NOTHING
        if self.has_states:
            assert self.states[cache.state_slot] == expected, "a state of another text"
        self.states[cache.state_slot] = text[end - 1]
        for i in range(start, end):
            self._page(cache.block_table[i // self.block_size])[i % self.block_size] = text[i]

    def _read(self, work: Scheduled) -> None:
        text, cache = self._text(work), work.sequence.cache
        end = cache.num_computed + work.num_tokens + len(work.draft_tokens)
        for start in range(0, end, self.block_size):
            stop = min(start + self.block_size, end)
            page = self._page(cache.block_table[start // self.block_size])
            assert page[: stop - start] == text[start:stop], "keys and values of another text"


def extend(text: list[int], token_ids: SequenceOf[int]) -> None:
    """Go on with the numbers of a text: each stands for its token and all before it."""
    for token in token_ids[len(text) :]:
        text.append(hash((text[-1] if text else NOTHING, token)))
