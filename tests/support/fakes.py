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

    def execute(self, scheduled: list[Scheduled]) -> list[Sampled | None]:
        self.batches.append([(sequence.request_id, num_tokens) for sequence, num_tokens in scheduled])
        slots = [sequence.state_slot for sequence, _ in scheduled]
        assert len(slots) == len(set(slots)) and min(slots, default=0) >= 0, "two sequences share a slot"
        for sequence, num_tokens in scheduled:
            self._compute(sequence, num_tokens)
        for sequence, num_tokens in scheduled:  # when all have written, so that nobody's writing harms another
            self._read(sequence, sequence.num_computed + num_tokens + len(sequence.draft))
        return [
            self._sample(sequence) if sequence.num_computed + num == len(sequence.token_ids) else None
            for sequence, num in scheduled
        ]

    def copy_block(self, source: int, target: int) -> None:
        self.pages[target] = list(self._page(source))

    def copy_state(self, source: int, target: int) -> None:
        self.states[target] = self.states.get(source, NOTHING)

    def _page(self, block: int) -> list[int]:
        return self.pages.setdefault(block, [NOTHING] * self.block_size)

    def _text(self, sequence: Sequence) -> list[int]:
        text = self._texts.setdefault(sequence, [])
        extend(text, sequence.token_ids)
        if not sequence.draft:
            return text
        guessed = list(text)
        extend(guessed, sequence.token_ids + sequence.draft)
        return guessed

    def _sample(self, sequence: Sequence) -> Sampled:
        """What comes next, and what comes behind the guesses, as far as they are right."""
        sampled, said = [Sampled(self.next_token(sequence))], copy(sequence)
        for guess in sequence.draft:
            if guess != sampled[-1].token_id:
                break
            said.token_ids = [*said.token_ids, guess]
            sampled.append(Sampled(self.next_token(said)))
        return sampled[0]._replace(then=tuple(sampled[1:]))

    def _compute(self, sequence: Sequence, num_tokens: int) -> None:
        assert num_tokens > 0 and sequence.num_computed + num_tokens <= len(sequence.token_ids)
        assert not sequence.draft or sequence.num_computed + num_tokens == len(sequence.token_ids)
        text, start = self._text(sequence), sequence.num_computed
        end = start + num_tokens + len(sequence.draft)
        assert end <= len(sequence.block_table) * self.block_size, "a token has no block to go to"
        if start == 0:
            self.states[sequence.state_slot] = NOTHING
        expected = text[start - 1] if start else NOTHING
        if self.has_states:
            assert self.states[sequence.state_slot] == expected, "a state of another text"
        self.states[sequence.state_slot] = text[end - 1]
        for i in range(start, end):
            self._page(sequence.block_table[i // self.block_size])[i % self.block_size] = text[i]

    def _read(self, sequence: Sequence, end: int) -> None:
        text = self._text(sequence)
        for start in range(0, end, self.block_size):
            stop = min(start + self.block_size, end)
            page = self._page(sequence.block_table[start // self.block_size])
            assert page[: stop - start] == text[start:stop], "keys and values of another text"


def extend(text: list[int], token_ids: SequenceOf[int]) -> None:
    """Go on with the numbers of a text: each stands for its token and all before it."""
    for token in token_ids[len(text) :]:
        text.append(hash((text[-1] if text else NOTHING, token)))
