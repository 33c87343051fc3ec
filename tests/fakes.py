"""Stand-ins for what is slow: a runner that computes nothing, so that the engine's rules are tested alone."""

from collections.abc import Callable

from tinyserve.sequence import Sampled, Scheduled, Sequence


class FakeRunner:
    """Answers with `next_token`, and keeps each batch as (request id, tokens computed) pairs."""

    def __init__(self, next_token: Callable[[Sequence], int] = lambda sequence: 1, block_size: int = 16):
        self.next_token, self.block_size = next_token, block_size
        self.batches: list[list[tuple[int, int]]] = []

    def execute(self, scheduled: list[Scheduled]) -> list[Sampled | None]:
        self.batches.append([(sequence.request_id, num_tokens) for sequence, num_tokens in scheduled])
        held = [block for sequence, _ in scheduled for block in sequence.block_table]
        assert len(held) == len(set(held)), "two sequences share a block"
        slots = [sequence.state_slot for sequence, _ in scheduled]
        assert len(slots) == len(set(slots)) and min(slots) >= 0, "two sequences share a slot"
        for sequence, num_tokens in scheduled:
            end = sequence.num_computed + num_tokens
            assert num_tokens > 0 and end <= len(sequence.token_ids)
            assert end <= len(sequence.block_table) * self.block_size, "a token has no block to go to"
        return [
            Sampled(self.next_token(sequence)) if sequence.num_computed + num == len(sequence.token_ids) else None
            for sequence, num in scheduled
        ]
