"""Which sequences run in the next step, and when each one ends: list-and-deque code over token ids.

Knows neither text nor arrays; a runner is handed in, and a fake one of a few dozen lines can be.
"""

from bisect import insort
from collections import Counter, deque
from dataclasses import replace
from itertools import count
from time import perf_counter
from typing import NamedTuple, Protocol

from tinyserve.errors import RequestError
from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.prefix_cache import NoPrefixCache, Prefix
from tinyserve.scheduling.sequence import Sampled, Scheduled, Sequence
from tinyserve.scheduling.speculative import MOST_TOKENS, Speculation


class Runner(Protocol):
    """Computes scheduled tokens; what it samples is None where a prompt is not finished."""

    def execute(self, scheduled: list[Scheduled]) -> list[Sampled | None]: ...

    def copy_block(self, source: int, target: int) -> None:
        """Make a block hold what another does."""

    def copy_state(self, source: int, target: int) -> None:
        """Make a slot remember what another does."""


class EngineStats(NamedTuple):
    """What an engine is doing, and what it has done since it was built."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int  # what they remember counts as free
    steps: int = 0
    step_seconds: float = 0.0
    requests: int = 0  # that ended
    prompt_tokens: int = 0  # of requests that have begun, and how many of them were in the cache
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    guessed_tokens: int = 0  # by speculation, and how many of them the model would have chosen
    right_tokens: int = 0


class Engine:
    """Continuous batching, by priority and then first come first served.

    Each step computes a token for every sequence that decodes, then as much prefill as the token budget holds. Blocks
    are handed out as sequences grow; when they run out, the one that came last gives its own back and waits again.
    """

    def __init__(
        self,
        runner: Runner,
        blocks: BlockManager,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefixes: NoPrefixCache | None = None,
        speculation: Speculation | None = None,
    ):
        self.runner, self.blocks, self.eos_token_ids = runner, blocks, eos_token_ids
        self.max_model_len = max_model_len
        # Each that decodes gets a token in every step: forks could be more than the budget holds, and would stall all
        # those behind them until they end.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefixes = prefixes or NoPrefixCache(blocks)
        self.speculation = speculation
        self.waiting: list[Sequence] = []  # both by place in the queue
        self.running: list[Sequence] = []
        self.scheduled: list[Scheduled] = []  # in the last step
        self.totals: Counter[str] = Counter()
        self.step_seconds = 0.0
        self._free_slots = deque(range(max_num_seqs))
        self._ids = count()

    def add(self, prompt_token_ids: list[int], params: SamplingParams, priority: int = 0) -> Sequence:
        """Queue a request, those of a lower `priority` first; raises RequestError for one that can never be served."""
        sequence = self.make(prompt_token_ids, params, priority)
        self.submit(sequence)
        return sequence

    def make(self, prompt_token_ids: list[int], params: SamplingParams, priority: int = 0) -> Sequence:
        """A request that can be served, not yet queued; any thread may call this. Raises RequestError for any other.

        With `params.n` or `best_of` above 1 the other answers are the sequence's `forks`.
        """
        if not prompt_token_ids:
            raise RequestError(
                "The prompt is empty: it has no tokens, and nothing can follow from nothing.", param="prompt"
            )
        if len(prompt_token_ids) >= self.max_model_len:
            raise RequestError(
                f"The prompt has {len(prompt_token_ids)} tokens and the context (max_model_len) holds "
                f"{self.max_model_len}, the answer included: shorten the prompt.",
                param="prompt",
            )
        needed = min(len(prompt_token_ids) + params.max_tokens, self.max_model_len)
        if self.blocks.blocks_for(needed) > self.blocks.num_blocks:
            raise RequestError(
                f"The request can come to {needed} tokens and the cache holds "
                f"{self.blocks.num_blocks * self.blocks.block_size}: lower max_tokens, or raise kv_cache_memory.",
                param="max_tokens",
            )
        first, *forks = (
            Sequence(next(self._ids), list(prompt_token_ids), _params_of_answer(params, i), priority)
            for i in range(params.best_of or params.n)
        )
        first.forks = forks
        return first

    def submit(self, sequence: Sequence) -> None:
        """Queue a request that was made."""
        self._wait(sequence)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Sequence]:
        """Run one batch; returns the sequences that gained a token or failed, finished ones among them.

        Nothing is `scheduled`, and nothing happens, where none of them finds blocks: others than they have some.
        """
        start = perf_counter()
        self.scheduled = []
        self._schedule()
        if not self.scheduled:
            return []
        rows = sum(num_tokens + len(sequence.draft) for sequence, num_tokens in self.scheduled)
        grown = []
        try:
            results = self.runner.execute(self.scheduled)
            for (sequence, num_tokens), sampled in zip(self.scheduled, results, strict=True):
                if sampled is not None:
                    grown.append(sequence)
                self._advance(sequence, num_tokens, sampled)
        except BaseException:
            # A state may have moved on, and cannot go back: whoever tries again reads everything from the start.
            for sequence, _ in self.scheduled:
                if sequence.is_running:
                    self._requeue(sequence, keep_state=False)
            raise
        self.totals["steps"] += 1
        self.step_seconds += (seconds := perf_counter() - start)
        if self.speculation is not None:
            self.speculation.measure(rows, seconds)
        return grown

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, wherever it is, and give back its blocks and its slot; ending one twice does nothing."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        self.totals["requests"] += 1
        if sequence.is_running:
            self._stop_running(sequence, keep_state=reason != "error")
        elif sequence in self.waiting:  # else it is a fork, and is left out when its time comes
            self.waiting.remove(sequence)
        self._queue_forks(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks: it waits in its old place, to be computed again where nothing is left."""
        sequence.metrics.preemptions += 1
        self.totals["preemptions"] += 1
        self._requeue(sequence, keep_state=True)

    def stats(self) -> EngineStats:
        """What it is doing; any thread may ask, and gets counts that may be a step apart."""
        return EngineStats(
            len(self.running), len(self.waiting), self.blocks.num_blocks, self.blocks.num_free,
            step_seconds=self.step_seconds, **self.totals,
        )  # fmt: skip

    # --- one step -----------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        for sequence in list(self.running):
            if sequence.forks:
                self._fork_when_ready(sequence)
        preemptions = self.totals["preemptions"]
        # Those that decode come first, so that a long prompt stalls nobody, and guesses when all of them have a token.
        running = sorted(self.running, key=lambda sequence: _tokens_to_go(sequence) > 1)
        budget = self._take([sequence for sequence in running if _is_decoding(sequence)], self.max_num_batched_tokens)
        if self.speculation is not None:
            newcomers = min(len(self.waiting), self.max_num_seqs - len(self.running))
            others = len(self.running) - len(self.scheduled) + newcomers  # a guess does not take the token of one
            budget -= self.speculation.add_guesses(self.scheduled, len(self.running), budget - others)
        budget = self._take([sequence for sequence in self.running if not _is_decoding(sequence)], budget)
        # Where blocks have run out, a newcomer would only take those of the next in need.
        is_full = self.totals["preemptions"] > preemptions
        while budget and not is_full and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self._fork_when_ready(sequence)
            num_tokens = self._chunk(sequence, budget)
            budget -= num_tokens
            self.scheduled.append(Scheduled(sequence, num_tokens))

    def _take(self, sequences: list[Sequence], budget: int) -> int:
        """Schedule what comes next of those that run; returns how many tokens the budget has left."""
        for sequence in sequences:
            if budget == 0:
                break
            num_tokens = self._chunk(sequence, budget)
            if sequence.is_running and self._grow(sequence, num_tokens):
                self.scheduled.append(Scheduled(sequence, num_tokens))
                budget -= num_tokens
        return budget

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """How many of a sequence's tokens come next; forks and those who reuse states wait at places of their own."""
        done, end = sequence.num_computed, len(sequence.token_ids)
        if sequence.forks:
            end = len(sequence.prompt_token_ids) - 1
        if done < sequence.split_at:
            end = min(end, sequence.split_at)
        return min(end - done, budget)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence the blocks for its next tokens, by preempting the last; False where that is itself."""
        needed = self.blocks.blocks_for(sequence.num_computed + num_tokens) - len(sequence.block_table)
        if needed <= 0:
            return True
        while needed > self.blocks.num_free:
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return False
        sequence.block_table += self.blocks.allocate(needed)
        return True

    def _admit(self, sequence: Sequence) -> bool:
        if self.running and self._reserve() >= self.blocks.num_free:
            return False  # before anything is looked up: this may be asked at every step
        if self._start(sequence, self._prefix(sequence)):
            self.waiting.remove(sequence)
            return True
        if self.running:
            return False
        # A block to be copied and its copy may be one more than there are: all of it is computed then.
        if not self._start(sequence, Prefix()):
            return False  # a text that is being read has the others
        self.waiting.remove(sequence)
        return True

    def _prefix(self, sequence: Sequence) -> Prefix:
        """What need not be computed: nothing, as long as the prompt's own logits are asked for."""
        asks = sequence.params.prompt_logprobs is not None
        if asks and len(sequence.prompt_logprobs) < len(sequence.prompt_token_ids):
            return Prefix()
        return self.prefixes.reusable_prefix(sequence.token_ids)

    def _reserve(self) -> int:
        """Blocks that a newcomer leaves to those who run, or it would be the next that is preempted."""
        return len(self.running) // 4

    def _start(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Let a sequence run from the end of `prefix`; False where not all its tokens find blocks."""
        tail = [] if prefix.tail is None else [prefix.tail]
        shared = [*prefix.blocks]
        self.blocks.share(shared + tail)
        needed = self.blocks.blocks_for(len(sequence.token_ids)) - len(shared)
        if needed + self._reserve() > self.blocks.num_free:
            self.blocks.free(shared + tail)
            return False
        table, slot = shared + self.blocks.allocate(needed), self._free_slots.popleft()
        try:
            if prefix.tail is not None:
                self.runner.copy_block(prefix.tail, table[len(shared)])
            if prefix.state_slot is not None:
                self.runner.copy_state(prefix.state_slot, slot)
        except BaseException:
            self.blocks.free(table)
            self._free_slots.append(slot)
            raise
        finally:
            self.blocks.free(tail)
        sequence.block_table, sequence.state_slot, sequence.num_computed = table, slot, prefix.num_tokens
        sequence.num_recorded, sequence.key = len(shared), prefix.key
        sequence.split_at, sequence.last_snapshot = prefix.split_at, prefix.num_tokens
        if sequence.metrics.first_scheduled is None:
            sequence.metrics.first_scheduled = perf_counter()
            sequence.metrics.cached_tokens = prefix.num_tokens
            self.totals.update(prompt_tokens=sequence.metrics.prompt_tokens, cached_tokens=prefix.num_tokens)
        insort(self.running, sequence, key=_place)
        return True

    def _fork_when_ready(self, sequence: Sequence) -> None:
        """Where all but the last token of a prompt is computed, its other answers go on from there.

        Each computes the last token itself, since a state cannot be wound back to it.
        """
        done, size = sequence.num_computed, self.blocks.block_size
        if not sequence.forks or done < len(sequence.prompt_token_ids) - 1:
            return
        table, full = sequence.block_table, done // size
        tail = table[full] if done % size else None
        prefix = Prefix(done, tuple(table[:full]), sequence.key, tail, sequence.state_slot)
        while sequence.forks:  # one by one, so that none is lost where a copy fails
            fork = sequence.forks[0]
            if fork.finish_reason is None and not (len(self.running) < self.max_num_seqs and self._start(fork, prefix)):
                self._wait(fork)
            del sequence.forks[0]

    def _advance(self, sequence: Sequence, num_tokens: int, sampled: Sampled | None) -> None:
        """Take in what a step has computed of a sequence."""
        if sampled is not None and sampled.error is not None:
            sequence.error = sampled.error
            self.blocks.forget(sequence.block_table)  # earlier chunks may be what is wrong: nobody goes on from them
            self.finish(sequence, "error")
            return
        if sequence.draft and sampled is not None:
            self._check_guesses(sequence, num_tokens, sampled)
            return
        sequence.num_computed += num_tokens
        self.prefixes.record(sequence, self.runner.copy_state)
        if sampled is not None and (reason := self._append(sequence, sampled)):
            self.finish(sequence, reason)

    def _check_guesses(self, sequence: Sequence, num_tokens: int, sampled: Sampled) -> None:
        """Keep what the model has chosen as guessed, and the token after it; a state that went farther goes back."""
        assert self.speculation is not None
        guessed, length, reason = len(sequence.draft), len(sequence.token_ids), None
        for one in (sampled, *sampled.then):
            if reason := self._append(sequence, one):
                break
        right = min(len(sampled.then), len(sequence.token_ids) - length)  # the last of them may have ended it
        self.speculation.learn(sequence, guessed, right)
        self.totals.update(guessed_tokens=guessed, right_tokens=right)
        if sequence.spare_slot is not None and right < guessed:
            self.runner.copy_state(sequence.spare_slot, sequence.state_slot)  # the next step comes here again
        else:
            sequence.num_computed += num_tokens + right
        sequence.draft, sequence.spare_slot = [], None
        self.prefixes.record(sequence, self.runner.copy_state)
        if reason is not None:
            self.finish(sequence, reason)

    def _append(self, sequence: Sequence, sampled: Sampled) -> str | None:
        """Take in a token; returns why the sequence ends with it, if it does."""
        sequence.append(sampled.token_id, sampled.logprobs)
        self.totals["output_tokens"] += 1
        return self._finish_reason(sequence)

    def _finish_reason(self, sequence: Sequence) -> str | None:
        token, params, length = sequence.token_ids[-1], sequence.params, len(sequence.token_ids)
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        if length - len(sequence.prompt_token_ids) >= params.max_tokens or length >= self.max_model_len:
            return "length"
        return None

    # --- comings and goings -------------------------------------------------------------------------------------

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_place)

    def _requeue(self, sequence: Sequence, keep_state: bool) -> None:
        self._stop_running(sequence, keep_state)
        self._wait(sequence)

    def _stop_running(self, sequence: Sequence, keep_state: bool) -> None:
        self.running.remove(sequence)
        if self.speculation is not None:
            self.speculation.forget(sequence)
        self._free_slots.append(self.prefixes.keep_state(sequence) if keep_state else sequence.state_slot)
        self.blocks.free(sequence.block_table)
        sequence.stop_running()

    def _queue_forks(self, sequence: Sequence) -> None:
        for fork in sequence.forks:
            if fork.finish_reason is None:
                self._wait(fork)
        sequence.forks = []


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.place


def _tokens_to_go(sequence: Sequence) -> int:
    return len(sequence.token_ids) - sequence.num_computed


def _is_decoding(sequence: Sequence) -> bool:
    """Whether it has one token to go, or those of a step whose guesses were wrong, when its state went back."""
    return _tokens_to_go(sequence) <= 1 + (MOST_TOKENS if sequence.num_output else 0)


def _params_of_answer(params: SamplingParams, index: int) -> SamplingParams:
    """Each answer to a prompt draws from a stream of its own: the seed and the answer's number, as in vLLM."""
    return params if params.seed is None else replace(params, seed=params.seed + index)
