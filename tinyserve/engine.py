"""Which sequences run in the next step, and when each one ends: list-and-deque code over token ids.

Knows neither text nor arrays; a runner is handed in, and a fake one of a dozen lines can be.
"""

from collections import deque
from itertools import count
from time import perf_counter
from typing import Protocol

from tinyserve.blocks import BlockAllocator
from tinyserve.errors import RequestError
from tinyserve.sampling_params import SamplingParams
from tinyserve.sequence import Sampled, Scheduled, Sequence


class Runner(Protocol):
    """Computes scheduled tokens; what it samples is None where a prompt is not finished."""

    def execute(self, scheduled: list[Scheduled]) -> list[Sampled | None]: ...


class Engine:
    """Continuous batching, first come first served: decodes first, then as much prefill as the token budget holds.

    A sequence is admitted when the blocks it can come to need are free, so that none is ever stopped halfway.
    """

    def __init__(
        self,
        runner: Runner,
        blocks: BlockAllocator,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ):
        self.runner, self.blocks, self.eos_token_ids = runner, blocks, eos_token_ids
        self.max_model_len, self.max_num_seqs = max_model_len, max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free_slots = deque(range(max_num_seqs))
        self._ids = count()

    def add(self, prompt_token_ids: list[int], params: SamplingParams) -> Sequence:
        """Queue a request; raises RequestError, with the numbers, for one that can never be served."""
        if not prompt_token_ids:
            raise RequestError("The prompt is empty: it has no tokens, and nothing can follow from nothing.")
        if len(prompt_token_ids) >= self.max_model_len:
            raise RequestError(
                f"The prompt has {len(prompt_token_ids)} tokens and the context (max_model_len) holds "
                f"{self.max_model_len}, the answer included: shorten the prompt."
            )
        sequence = Sequence(next(self._ids), list(prompt_token_ids), params)
        needed = self._most_tokens(sequence)
        if self.blocks.blocks_for(needed) > self.blocks.num_blocks:
            raise RequestError(
                f"The request can come to {needed} tokens and the cache holds "
                f"{self.blocks.num_blocks * self.blocks.block_size}: lower max_tokens, or raise kv_cache_memory."
            )
        self.waiting.append(sequence)
        return sequence

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Sequence]:
        """Run one batch; returns the sequences that gained a token or failed, finished ones among them."""
        scheduled = self._schedule()
        grown = []
        try:
            results = self.runner.execute(scheduled)
        except BaseException:
            # A state may have moved on, and cannot go back: whoever tries again reads everything from the start.
            for sequence, _ in scheduled:
                sequence.num_computed = 0
            raise
        for (sequence, num_tokens), sampled in zip(scheduled, results, strict=True):
            sequence.num_computed += num_tokens
            if sampled is None:
                continue
            grown.append(sequence)
            if sampled.error is not None:
                sequence.error = sampled.error
                self.finish(sequence, "error")
                continue
            sequence.append(sampled.token_id, sampled.logprobs)
            if reason := self._finish_reason(sequence):
                self.finish(sequence, reason)
        return grown

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, wherever it is, and give back its blocks and its slot; ending one twice does nothing."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        self.blocks.free(sequence.block_table)
        sequence.block_table = []
        if sequence in self.running:
            self.running.remove(sequence)
            self._free_slots.append(sequence.state_slot)
        else:
            self.waiting.remove(sequence)

    def _most_tokens(self, sequence: Sequence) -> int:
        return min(sequence.most_tokens, self.max_model_len)

    def _schedule(self) -> list[Scheduled]:
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self.blocks.can_allocate(self._most_tokens(sequence)):
                break
            sequence.block_table = self.blocks.allocate(self._most_tokens(sequence))
            sequence.state_slot = self._free_slots.popleft()
            sequence.metrics.first_scheduled = perf_counter()
            self.running.append(self.waiting.popleft())
        budget = self.max_num_batched_tokens
        scheduled = []
        # Those with one token to go are decoding: they come first, so that a long prompt stalls nobody.
        for sequence in sorted(self.running, key=lambda s: len(s.token_ids) - s.num_computed > 1):
            num_tokens = min(len(sequence.token_ids) - sequence.num_computed, budget)
            if num_tokens == 0:
                break
            budget -= num_tokens
            scheduled.append(Scheduled(sequence, num_tokens))
        return scheduled

    def _finish_reason(self, sequence: Sequence) -> str | None:
        token, params = sequence.token_ids[-1], sequence.params
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        if sequence.num_output >= params.max_tokens or len(sequence.token_ids) >= self.max_model_len:
            return "length"
        return None
