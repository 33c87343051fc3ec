"""The scheduler: which sequences run in the next step, with how many tokens each, and which gives up its blocks.

All policy is here: order of the queues, token budget, admission, chunked prefill, preemption, draft tokens. Moves
ints, and knows neither how tokens are computed nor when a sequence ends.
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence as SequenceOf
from time import perf_counter
from typing import Protocol

from tinyserve.errors import RequestError
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.prefix_cache import NoPrefixCache, Prefix
from tinyserve.scheduling.sequence import CacheState, PrefillOnlySequence, Scheduled, Sequence
from tinyserve.scheduling.speculative import MAX_DRAFT_TOKENS, MAX_DRAFTING_SEQS, Speculation


class CacheCopier(Protocol):
    """Copies blocks and recurrent states in the cache's memory; the runner does."""

    def copy_block(self, source: int, target: int) -> None:
        """Make a block hold what another does."""

    def copy_state(self, source: int, target: int) -> None:
        """Make a slot hold the state that another does."""


def queue_order(sequence: Sequence) -> tuple[int, int]:
    """The policy of both queues, and of preemption (last first): priority, FCFS. It must not change while queued."""
    return sequence.priority, sequence.request_id


class Scheduler:
    """Continuous batching with chunked prefill over a paged KV cache.

    Each step has at most `max_num_batched_tokens` tokens (the token budget): one for every sequence that decodes, then
    draft tokens behind them, then chunks of the prompts that run, then of those that are admitted. Blocks are allocated
    as sequences grow; when there are none left, the last in the queue is preempted: it gives its blocks back, waits in
    its old place, and is computed again where the prefix cache has nothing of it left.
    """

    def __init__(
        self,
        copier: CacheCopier,
        blocks: BlockManager,
        max_model_len: int,
        running_slots: SequenceOf[int],
        max_num_batched_tokens: int,
        prefix_cache: NoPrefixCache | None = None,
        speculation: Speculation | None = None,
    ):
        """`running_slots` are the state slots of running sequences: so many run at once, if the token budget allows."""
        self.copier, self.blocks, self.max_model_len = copier, blocks, max_model_len
        # Each decoding sequence takes a token of the budget in every step: with more of them than the budget holds,
        # which siblings could be, the last ones would starve.
        self.max_num_seqs = min(len(running_slots), max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefix_cache = prefix_cache or NoPrefixCache(blocks)
        self.speculation = speculation
        self.waiting: list[Sequence] = []  # both in queue_order
        self.running: list[Sequence] = []
        self.scheduled: list[Scheduled] = []  # for the last step, also as far as it came before it failed
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of sequences that have begun, and how many of them the prefix cache had
        self.num_cached_tokens = 0
        self._free_slots = deque(running_slots)
        self._prefill_only: list[PrefillOnlySequence] = []

    # --- the queues ---------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        insort(self.waiting, sequence, key=queue_order)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def remove(self, sequence: Sequence, keep_state: bool) -> None:
        """Take a sequence out of its queue and free what it holds; its siblings wait on their own from now on.

        `keep_state`: its state is valid at `num_computed`, so the prefix cache may take a snapshot of it.
        """
        if sequence.is_running:
            self._stop_running(sequence, keep_state)
        elif sequence in self.waiting:  # else it is a sibling, and is left out when its time comes
            self.waiting.remove(sequence)
        for sibling in sequence.siblings:
            if sibling.finish_reason is None:
                self.add(sibling)
        sequence.siblings = []

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks: it waits again, in its old place in the queue."""
        sequence.metrics.preemptions += 1
        self.num_preemptions += 1
        self._stop_running(sequence, keep_state=True)
        self.add(sequence)

    def requeue_failed(self, scheduled: list[Scheduled]) -> None:
        """Requeue the sequences of a failed step; states may be wrong, so they go on from the prefix cache alone."""
        for work in scheduled:
            if work.sequence.is_running:
                self._stop_running(work.sequence, keep_state=False)
                self.add(work.sequence)

    def forget(self) -> None:
        """The cache's memory is lost: all that run wait again, what is only read begins anew, and nothing is cached."""
        for sequence in list(self.running):
            sequence.metrics.preemptions += 1
            self.num_preemptions += 1
            self._stop_running(sequence, keep_state=False)
            self.add(sequence)
        for text in self._prefill_only:
            text.cache.num_computed = 0
        self.blocks.forget()

    # --- one step -----------------------------------------------------------------------------------------------

    def schedule(self) -> list[Scheduled]:
        """What the next step computes; empty without work, and while prefill-only texts hold the blocks."""
        self.scheduled = []
        for sequence in list(self.running):
            self._start_siblings(sequence)
        num_preemptions = self.num_preemptions
        # Those that decode come first, so that a long prompt stalls nobody; of these first those with one token to go.
        decoding = sorted(filter(_is_decoding, self.running), key=lambda sequence: sequence.num_uncomputed > 1)
        budget = self._schedule_running(decoding, self.max_num_batched_tokens)
        budget = self._add_draft_tokens(budget)
        budget = self._schedule_running([s for s in self.running if not _is_decoding(s)], budget)
        # Admit nobody after a preemption: running sequences need the free blocks next.
        if self.num_preemptions == num_preemptions:
            self._admit(budget)
        return self.scheduled

    def can_repeat(self) -> bool:
        """Whether the next step can be the last one again, a token later, with nothing to schedule.

        All that run decode and have room in their blocks, nobody waits, and nothing is drafted.
        """
        if self.waiting or self.speculation is not None or len(self.scheduled) != len(self.running):
            return False
        return all(map(self._can_repeat, self.scheduled))

    def _can_repeat(self, work: Scheduled) -> bool:
        sequence, cache = work.sequence, work.sequence.cache
        if not sequence.is_running or sequence.siblings:  # which fork from here
            return False
        room = len(cache.block_table) * self.blocks.block_size - cache.num_computed
        return work.num_tokens == sequence.num_uncomputed == 1 and room > 0

    def update(self, work: Scheduled, num_accepted_tokens: int = 0) -> None:
        """A step has computed what was scheduled of a sequence, and accepted so many of its draft tokens."""
        sequence, num_draft_tokens = work.sequence, len(work.draft_tokens)
        if self.speculation is not None and num_draft_tokens:
            self.speculation.update_acceptance(sequence, num_draft_tokens, num_accepted_tokens)
        if work.rollback_slot is not None and num_accepted_tokens < num_draft_tokens:
            # After a rejection the state has gone too far, while keys and values are simply written over. It goes back,
            # and the next step computes the accepted tokens again.
            self.copier.copy_state(work.rollback_slot, sequence.cache.state_slot)
        else:
            sequence.cache.num_computed += work.num_tokens + num_accepted_tokens
        self.prefix_cache.record(sequence, self.copier.copy_state)

    def record_step(self, seconds: float) -> None:
        """The last step took so long, with the time to schedule it."""
        if self.speculation is not None:
            num_tokens = sum(work.num_tokens + len(work.draft_tokens) for work in self.scheduled)
            self.speculation.record_step(num_tokens, seconds)

    def take_snapshot(self, sequence: Sequence) -> None:
        """Have the prefix cache take a snapshot of a sequence at its current position."""
        self.prefix_cache.take_snapshot(sequence, self.copier.copy_state)

    def _schedule_running(self, sequences: list[Sequence], budget: int) -> int:
        """Schedule the next tokens of those that run; returns the budget that is left."""
        for sequence in sequences:
            if budget == 0:
                break
            if not sequence.is_running:  # preempted for one before it
                continue
            num_tokens = self._chunk(sequence, budget)
            if self._grow(sequence, num_tokens):
                self.scheduled.append(Scheduled(sequence, num_tokens))
                budget -= num_tokens
        return budget

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Chunked prefill: how many tokens come next. A chunk also ends where siblings fork or a snapshot is due."""
        done, end = sequence.cache.num_computed, len(sequence.token_ids)
        if sequence.siblings:
            end = len(sequence.prompt_token_ids) - 1
        if done < sequence.cache.chunk_boundary:
            end = min(end, sequence.cache.chunk_boundary)
        return min(end - done, budget)

    # --- draft tokens -------------------------------------------------------------------------------------------

    def _add_draft_tokens(self, budget: int) -> int:
        """Put draft tokens behind those that decode; returns the budget that is left.

        They use only budget that no other sequence has a use for, and blocks that no running sequence needs next.
        """
        if self.speculation is None:
            return budget
        newcomers = min(len(self.waiting), self.max_num_seqs - len(self.running))
        left = budget - (len(self.running) - len(self.scheduled) + newcomers)
        max_draft_lens = {
            i: length for i, work in enumerate(self.scheduled) if (length := self._max_draft_len(work, left)) > 0
        }
        if len(self.running) > MAX_DRAFTING_SEQS:
            max_draft_lens = {}
        sequences = [self.scheduled[i].sequence for i in max_draft_lens]
        drafts = self.speculation.propose(sequences, [*max_draft_lens.values()])
        has_states = self.speculation.rollback_slots is not None
        rollback_slots = list(self.speculation.rollback_slots or ())
        for i, sequence, draft in zip(max_draft_lens, sequences, drafts, strict=True):
            draft, slot = self._with_blocks(sequence, draft[:left]), None
            if not draft or (has_states and not rollback_slots):
                continue
            if has_states:
                slot = rollback_slots.pop()
                self.copier.copy_state(sequence.cache.state_slot, slot)
            self.scheduled[i] = self.scheduled[i]._replace(draft_tokens=draft, rollback_slot=slot)
            left, budget = left - len(draft), budget - len(draft)
        return budget

    def _max_draft_len(self, work: Scheduled, left: int) -> int:
        """How many draft tokens could be of use behind a sequence's last token; 0 in the middle of its prompt."""
        sequence, length = work.sequence, len(work.sequence.token_ids)
        if not work.is_complete or sequence.num_output == 0:
            return 0
        return min(left, self.max_model_len - length - 1, sequence.params.max_tokens - sequence.num_output - 1)

    def _with_blocks(self, sequence: Sequence, draft: list[int]) -> list[int]:
        """As much of a draft as has blocks: new ones where one is left for each sequence that runs."""
        length, table = len(sequence.token_ids), sequence.cache.block_table
        needed = self.blocks.blocks_for(length + len(draft)) - len(table)
        if needed > 0 and needed + len(self.running) <= self.blocks.num_free:
            table += self.blocks.allocate(needed)
        return draft[: len(table) * self.blocks.block_size - length]

    # --- admission ----------------------------------------------------------------------------------------------

    @property
    def watermark_blocks(self) -> int:
        """The watermark: free blocks that admission leaves to running sequences.

        Each of them needs another block within `block_size` steps, a quarter of them within a quarter of that. If there
        were none, the first to need one would preempt the newcomer, and its prefill would have been for nothing.
        """
        return len(self.running) // 4

    def _admit(self, budget: int) -> None:
        """Admit waiting sequences in queue order; one that does not fit is not overtaken."""
        while budget and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self._try_start(sequence):
                return
            self.waiting.remove(sequence)
            self._start_siblings(sequence)
            num_tokens = self._chunk(sequence, budget)
            budget -= num_tokens
            self.scheduled.append(Scheduled(sequence, num_tokens))

    def _try_start(self, sequence: Sequence) -> bool:
        """Start a sequence behind its cached prefix, if blocks allow it."""
        if self.running and self.watermark_blocks >= self.blocks.num_free:
            return False  # before the prefix is looked up, since this may be asked at every step
        if self._start(sequence, self._reusable_prefix(sequence)):
            return True
        # A partial block and its copy may need one block too many: then start without the prefix. If that fails too,
        # a prefill-only text holds the other blocks.
        return not self.running and self._start(sequence, Prefix())

    def _reusable_prefix(self, sequence: Sequence) -> Prefix:
        """The cached prefix to start after; none while prompt log-probabilities are still to be computed."""
        asks = sequence.params.prompt_logprobs is not None
        if asks and len(sequence.prompt_logprobs) < len(sequence.prompt_token_ids):
            return Prefix()
        return self.prefix_cache.reusable_prefix(sequence.token_ids)

    def _start(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Let a sequence run from the end of `prefix`; False where too few blocks are free for the rest."""
        partial = [] if prefix.partial_block is None else [prefix.partial_block]
        shared = [*prefix.blocks]
        self.blocks.incref(shared + partial)
        needed = self.blocks.blocks_for(len(sequence.token_ids)) - len(shared)
        if needed + self.watermark_blocks > self.blocks.num_free:
            self.blocks.free(shared + partial)
            return False
        table, slot = shared + self.blocks.allocate(needed), self._free_slots.popleft()
        try:
            if prefix.partial_block is not None:  # copy on write
                self.copier.copy_block(prefix.partial_block, table[len(shared)])
            if prefix.state_slot is not None:
                self.copier.copy_state(prefix.state_slot, slot)
        except BaseException:
            self.blocks.free(table)
            self._free_slots.append(slot)
            raise
        finally:
            self.blocks.free(partial)
        sequence.cache = CacheState(
            table, slot, prefix.num_tokens, len(shared), prefix.prefix_id, prefix.chunk_boundary, prefix.num_tokens
        )
        if sequence.metrics.first_scheduled is None:
            sequence.metrics.first_scheduled = perf_counter()
            sequence.metrics.cached_tokens = prefix.num_tokens
            self.num_prompt_tokens += sequence.metrics.prompt_tokens
            self.num_cached_tokens += prefix.num_tokens
        insort(self.running, sequence, key=queue_order)
        return True

    def _start_siblings(self, sequence: Sequence) -> None:
        """Fork: when all but the last token of a prompt is computed, its siblings start from there (copy on write).

        Each computes the last token itself, since a state cannot be wound back to it.
        """
        cache, size = sequence.cache, self.blocks.block_size
        done = cache.num_computed
        if not sequence.siblings or done < len(sequence.prompt_token_ids) - 1:
            return
        table, full = cache.block_table, done // size
        partial = table[full] if done % size else None
        prefix = Prefix(done, tuple(table[:full]), cache.prefix_id, partial, cache.state_slot)
        while sequence.siblings:  # one by one, so that none is lost where a copy fails
            sibling = sequence.siblings[0]
            if sibling.finish_reason is None:
                has_place = len(self.running) < self.max_num_seqs
                if not (has_place and self._start(sibling, prefix)):
                    self.add(sibling)
            del sequence.siblings[0]

    # --- blocks and preemption ----------------------------------------------------------------------------------

    def start_prefill_only(self, token_ids: list[int], state_slot: int) -> PrefillOnlySequence:
        """Blocks for a text that is only read, by preemption where too few are free; until `finish_prefill_only`.

        `state_slot` is a slot that no sequence uses. Raises RequestError for a text that does not fit.
        """
        needed = self.blocks.blocks_for(len(token_ids))
        if not self._make_free(needed):
            raise RequestError(
                f"A text of {len(token_ids)} tokens needs {needed} blocks of the cache, and {self.blocks.num_free} "
                "are free.",
                param="prompt",
            )
        text = PrefillOnlySequence(token_ids, CacheState(self.blocks.allocate(needed), state_slot))
        self._prefill_only.append(text)
        return text

    def finish_prefill_only(self, sequence: PrefillOnlySequence) -> None:
        """Free what `start_prefill_only` gave."""
        self._prefill_only.remove(sequence)
        self.blocks.free(sequence.cache.block_table)
        sequence.cache = CacheState()

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence the blocks for its next tokens; False where it was preempted itself."""
        cache = sequence.cache
        needed = self.blocks.blocks_for(cache.num_computed + num_tokens) - len(cache.block_table)
        if needed > 0:
            if not self._make_free(needed, sequence):
                return False
            cache.block_table += self.blocks.allocate(needed)
        return True

    def _make_free(self, needed: int, sequence: Sequence | None = None) -> bool:
        """Preempt until so many blocks are free; False where that took `sequence` itself, or all was not enough."""
        while needed > self.blocks.num_free and self.running:
            victim = self._victim()
            self.scheduled = [work for work in self.scheduled if work.sequence is not victim]
            self.preempt(victim)
            if victim is sequence:
                return False
        return needed <= self.blocks.num_free

    def _victim(self) -> Sequence:
        """Who is preempted: the last in the queue, so that the first always comes nearer to its end."""
        return self.running[-1]

    def _stop_running(self, sequence: Sequence, keep_state: bool) -> None:
        self.running.remove(sequence)
        if self.speculation is not None:
            self.speculation.remove(sequence)
        cache = sequence.cache
        free = self.prefix_cache.release_into_snapshot(sequence) if keep_state else cache.state_slot
        self._free_slots.append(free)
        self.blocks.free(cache.block_table)
        sequence.cache = CacheState()


def _is_decoding(sequence: Sequence) -> bool:
    """Whether it has one token to compute, or also accepted ones that a rollback of its state has taken back."""
    return sequence.num_uncomputed <= 1 + (MAX_DRAFT_TOKENS if sequence.num_output else 0)
