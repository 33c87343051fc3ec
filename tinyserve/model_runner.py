"""From scheduled sequences to sampled tokens: builds the batch, runs the model, has it sampled. Owns the cache.

The highest layer that knows arrays. It does not choose what runs, and has never heard of text.
"""

import os
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from tinyserve.errors import UserError
from tinyserve.models.base import Model
from tinyserve.models.batch import Batch
from tinyserve.models.config import ModelConfig
from tinyserve.models.config.costs import state_bytes_per_sequence, weight_bytes
from tinyserve.models.kv_cache import KV_DTYPES, KVCache
from tinyserve.sampler import Sampler, logprobs_of
from tinyserve.scheduling.sequence import CacheState, PrefillOnlySequence, Sampled, Scheduled, Sequence
from tinyserve.tensor import _jit

Array = np.ndarray
T = TypeVar("T")

MAX_SNAPSHOTS = 64
DRAFT_SNAPSHOTS = 3  # for each sequence: behind the text, behind its draft, and while it prefills a prompt
_ROWS = 64  # of a prompt's logits at a time: 13 MB for a vocabulary of 49,152


class ModelRunner:
    """Runs one model over one cache. One thread at a time may call it; of two runners in a process, one waits."""

    def __init__(
        self,
        model: Model,
        num_blocks: int,
        block_size: int,
        num_threads: int | None = None,
        kv_cache_dtype: str = "float32",
        num_states: int = 1,
        eos_token_ids: frozenset[int] = frozenset(),
    ):
        self.model = model
        self.num_threads = _jit.set_threads(num_threads)
        # States for running sequences and for snapshots, and the last one for `logits`.
        self.cache = KVCache(model.config, num_blocks, block_size, kv_cache_dtype, num_states + 1)
        self.sampler = Sampler(eos_token_ids)
        self.masks: Masks | None = None  # for sequences that have a grammar

    def execute(self, scheduled: list[Scheduled]) -> list[list[Sampled]]:
        """Compute what is scheduled. For each sequence the tokens that follow: none in the middle of its prompt, else
        the accepted draft tokens, as if each had been sampled after those before it, and one more.
        """
        complete = [work for work in scheduled if work.is_complete]
        filler = self.masks if any(work.sequence.matcher for work in complete) else None
        if filler is not None:  # while the model works
            filler.start([work.sequence.matcher for work in complete], [work.draft_tokens for work in complete])
        with _jit.one_at_a_time(self.num_threads):
            batch = self._batch([(work.token_ids, work.sequence.cache) for work in scheduled])
            hidden = self.model(batch, self.cache)  # (tokens, hidden)
            for work, first in zip(scheduled, batch.starts[:-1], strict=True):
                if work.sequence.params.prompt_logprobs is not None:
                    self._read_prompt(work.sequence, hidden[first : first + work.num_tokens])
            places = _places_to_sample(scheduled, batch.starts)
            logits = self.model.logits(hidden[[place.row for place in places]])  # (places, vocab)
            sequences, masks = [place.sequence for place in places], list[Array | None]()
            if filler is not None:
                filled = zip(sequences, filler.wait(), strict=True)
                masks = [mask if sequence.matcher else None for sequence, mask in filled]
            sampled = self.sampler.sample(sequences, logits, masks, [place.draft_tokens for place in places])
        results, end = list[list[Sampled]](), 0
        for work in scheduled:
            first, end = end, end + (len(work.draft_tokens) + 1 if work.is_complete else 0)
            tokens = accept_draft(work.draft_tokens, sampled[first:end])
            matcher = work.sequence.matcher
            results.append(tokens if matcher is None else advance_grammar(matcher, tokens))
        return results

    def _read_prompt(self, sequence: Sequence, hidden: Array) -> None:
        """Log-probabilities of the prompt's tokens that follow these, if they are not known; hidden (tokens, H)."""
        prompt, known, start = sequence.prompt_token_ids, sequence.prompt_logprobs, sequence.cache.num_computed
        end = min(start + len(hidden), len(prompt) - 1)
        for first in range(max(start, len(known) - 1), end, _ROWS):
            last = min(first + _ROWS, end)
            logits = self.model.logits(hidden[first - start : last - start])
            counts = [sequence.params.prompt_logprobs or 0] * (last - first)
            known += logprobs_of(logits, prompt[first + 1 : last + 1], counts)

    def copy_block(self, source: int, target: int) -> None:
        self.cache.copy_block(source, target)

    def copy_state(self, source: int, target: int) -> None:
        self.cache.copy_slot(source, target)

    @property
    def scratch_slot(self) -> int:
        """The state slot of a text that is only read; one at a time."""
        return self.cache.num_slots - 1

    def prefill(self, sequence: PrefillOnlySequence, max_tokens: int, reduce: Callable[[Array], T]) -> T:
        """What `reduce` makes of the hidden states (tokens, hidden) of a text's next tokens, at most so many."""
        start = sequence.cache.num_computed
        token_ids = sequence.token_ids[start : start + max_tokens]
        with _jit.one_at_a_time(self.num_threads):
            reduced = reduce(self.model(self._batch([(token_ids, sequence.cache)]), self.cache))
        sequence.cache.num_computed += len(token_ids)
        return reduced

    def compile_kernels(self, key: str, waiting: Callable[[], None]) -> None:
        """Run two tokens and draw, the first time on a machine: of two processes one compiles, the other waits for it.

        `key` names what the kernels depend on beside the processor: the architecture and the dtype. `waiting` is
        called when another process has the lock.
        """
        from filelock import FileLock, Timeout

        ready = _jit.cache_folder() / f"{key}.ready"
        if not ready.exists():
            lock = FileLock(_jit.cache_folder() / "compiling.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                waiting()
                lock.acquire()
            try:
                text = PrefillOnlySequence([0, 0], CacheState([0], self.scratch_slot))
                self.sampler.run_kernels(self.prefill(text, 2, self.model.logits))
                ready.touch()
            finally:
                lock.release()

    def _batch(self, work: list[tuple[list[int], CacheState]]) -> Batch:
        """New tokens of some sequences, each with where they go in the cache: behind its `num_computed`."""
        caches, block_size = [cache for _, cache in work], self.cache.block_size
        for cache in caches:
            if cache.num_computed == 0:
                self.cache.reset_slot(cache.state_slot)
        starts = np.array([cache.num_computed for cache in caches])
        counts = np.array([len(token_ids) for token_ids, _ in work])
        rows = np.concatenate(([0], np.cumsum(counts)))  # where each sequence's tokens begin
        token_ids = np.fromiter(chain.from_iterable(token_ids for token_ids, _ in work), np.int64, rows[-1])
        sequence_of = np.repeat(np.arange(len(work)), counts)
        positions = np.arange(rows[-1]) + (starts - rows[:-1])[sequence_of]
        width = max(len(cache.block_table) for cache in caches)
        padding = [0] * width
        tables = np.array([(cache.block_table + padding)[:width] for cache in caches], np.int32)
        slot_mapping = tables[sequence_of, positions // block_size].astype(np.int64) * block_size
        slot_mapping += positions % block_size
        state_indices = np.array([cache.state_slot for cache in caches])
        return Batch(token_ids, positions, slot_mapping, sequence_of, tables, rows, state_indices)


class Masks(Protocol):
    """Fills the bit masks of grammars, in a thread of its own."""

    def start(self, matchers: list[Any], drafts: SequenceOf[SequenceOf[int]]) -> None:
        """Begin; a matcher may be None, and has draft tokens behind its place."""

    def wait(self) -> Array:
        """The masks (places, words) uint32 of the last `start`: each matcher's own, and one behind each draft token."""


class _Place(NamedTuple):
    """A place that is sampled from: behind a sequence's last token, or behind some of its draft tokens."""

    sequence: Sequence
    row: int  # of the batch: the token before it
    draft_tokens: SequenceOf[int]


def _places_to_sample(scheduled: list[Scheduled], starts: Array) -> list[_Place]:
    return [
        _Place(work.sequence, start + work.num_tokens - 1 + i, work.draft_tokens[:i])
        for work, start in zip(scheduled, starts[:-1], strict=True)
        if work.is_complete
        for i in range(len(work.draft_tokens) + 1)
    ]


def accept_draft(draft_tokens: SequenceOf[int], sampled: list[Sampled]) -> list[Sampled]:
    """The tokens before the first rejection and the one sampled there; of what was sampled behind each draft token.

    A draft token is accepted where it is what was sampled in its place (greedily, or with the request's own random
    numbers), which keeps every answer as it would be without it.
    """
    for i, draft_token in enumerate(draft_tokens):
        if sampled[i].token_id != draft_token or sampled[i + 1].error is not None:
            return sampled[: i + 1]
    return sampled


def advance_grammar(matcher: Any, sampled: list[Sampled]) -> list[Sampled]:
    """The tokens, taken in by their grammar, as far as it goes; or why there is none."""
    for i, one in enumerate(sampled):
        if one.error is None:
            matcher.advance(one.token_id)
        if matcher.error is not None:  # where there are tokens before, the next step comes here again
            return sampled[:i] or [Sampled(-1, error=matcher.error)]
    return sampled


class DraftNeeds(NamedTuple):
    """What a draft model keeps beside: its weights, a block of its own for each of the model's, and states."""

    config: ModelConfig
    dtype: str
    kv_cache_dtype: str
    max_num_seqs: int  # that it drafts for at once

    @property
    def num_states(self) -> int:
        """Slots for running sequences and for snapshots."""
        return self.max_num_seqs * (1 + DRAFT_SNAPSHOTS)

    @property
    def state_nbytes(self) -> int:
        """Of one sequence."""
        return state_bytes_per_sequence(self.config)

    @property
    def weight_nbytes(self) -> int:
        """Of its weights."""
        return weight_bytes(self.config, self.dtype)


class CachePlan(NamedTuple):
    """What the memory for keys, values and states is divided into."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    num_snapshots: int  # of states, for prefixes to go on from
    block_nbytes: int
    state_nbytes: int  # of one sequence
    num_spares: int = 0  # of states, for while draft tokens are checked
    draft_block_nbytes: int = 0  # of a draft model, which has as many blocks
    draft_states_nbytes: int = 0  # of all its states

    @property
    def num_states(self) -> int:
        """Slots for running sequences, for snapshots, and spare ones, in this order."""
        return self.max_num_seqs + self.num_snapshots + self.num_spares

    @property
    def nbytes(self) -> int:
        """All of it, with the state that `logits` has for itself, and a draft model's."""
        return self.num_blocks * self.block_nbytes + (self.num_states + 1) * self.state_nbytes + self.draft_nbytes

    @property
    def draft_nbytes(self) -> int:
        """The draft model's part."""
        return self.num_blocks * self.draft_block_nbytes + self.draft_states_nbytes

    def __str__(self) -> str:
        text = (
            f"{self.num_blocks} blocks of {self.block_size} tokens, {self.num_blocks * self.block_nbytes / 1e6:.1f} MB"
        )
        if self.state_nbytes:
            text += f"; {self.num_states + 1} states, {self.num_snapshots} of them snapshots"
            text += f", {(self.num_states + 1) * self.state_nbytes / 1e6:.1f} MB"
        if self.draft_nbytes:
            text += f"; the draft model's, {self.draft_nbytes / 1e6:.1f} MB"
        return text


def plan_cache(
    config: ModelConfig,
    dtype: str,
    block_size: int,
    max_model_len: int | None,
    max_num_seqs: int,
    kv_cache_memory: int | None,
    kv_cache_dtype: str = "float32",
    snapshots: bool = True,
    spares: int = 0,
    draft: DraftNeeds | None = None,
) -> CachePlan:
    """How many blocks the cache has, how many tokens a sequence may come to, and how many snapshots are kept.

    Enough for `max_num_seqs` full sequences, or what the memory holds: `kv_cache_memory`, or half of what is free
    beside the weights; states of recurrent layers come first, and snapshots of them have an eighth at most of what is
    left, and nothing that `max_model_len` needs. A draft model's blocks and states come out of the same memory. Raises
    UserError, with the numbers, when that is too little for one sequence.
    """
    limit = config.max_position_embeddings
    if max_model_len is not None and not 2 <= max_model_len <= limit:
        raise UserError(f"max_model_len is {max_model_len}; this model has positions for 2 to {limit} tokens.")
    budget = kv_cache_memory
    if budget is None:
        weights = weight_bytes(config, dtype) + (draft.weight_nbytes if draft else 0)
        budget = max(0, available_memory() - weights) // 2
    spares = spares if state_bytes_per_sequence(config) else 0
    draft_block = KVCache.block_nbytes(draft.config, block_size, draft.kv_cache_dtype) if draft else 0
    draft_states = state_nbytes(draft.config, draft.num_states) if draft else 0
    states = state_nbytes(config, max_num_seqs + spares) + draft_states
    if states > budget:
        raise UserError(
            f"{_size(budget)} are too little for the states of {max_num_seqs} sequences, which take {_size(states)}: "
            f"lower max_num_seqs, or raise kv_cache_memory, or free some memory."
        )
    budget -= states
    own_block, state = KVCache.block_nbytes(config, block_size, kv_cache_dtype), state_bytes_per_sequence(config)
    block = own_block + draft_block
    wanted = max_model_len or limit
    least = block * -(-(max_model_len or 2) // block_size)
    num_snapshots = 0
    if state and snapshots:
        num_snapshots = min(MAX_SNAPSHOTS, max(0, min(budget // 8, budget - least)) // state)
        budget -= num_snapshots * state
    num_blocks = max_num_seqs * -(-wanted // block_size)
    if block:  # a model with no attention has no keys and values
        num_blocks = min(num_blocks, budget // block)
    tokens = num_blocks * block_size
    if tokens < (max_model_len or 2):
        raise UserError(
            f"{_size(budget)} are too little for a cache of {max_model_len or 2} tokens, which takes {_size(least)} in "
            f"blocks of {block_size} tokens: raise kv_cache_memory or free some memory, or lower max_model_len."
        )
    return CachePlan(
        num_blocks, block_size, min(wanted, tokens), max_num_seqs, num_snapshots, own_block, state, spares, draft_block,
        draft_states,
    )  # fmt: skip


def _size(nbytes: int) -> str:
    """For people, who should never read that 0.0 MB are too little."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes} bytes"


def state_nbytes(config: ModelConfig, max_num_seqs: int) -> int:
    """Bytes that a runner keeps for recurrent layers: a state for each sequence, and one for `logits`."""
    return (max_num_seqs + 1) * state_bytes_per_sequence(config)


def resolve_kv_cache_dtype(name: str, dtype: str) -> str:
    """What keys and values are kept in: "auto" is float32 for a float32 model, else bfloat16; raises UserError."""
    if name == "auto":
        return "float32" if dtype == "float32" else "bfloat16"
    if name not in KV_DTYPES:
        raise UserError(f"kv_cache_dtype {name!r} does not exist; there are auto, {', '.join(KV_DTYPES)}.")
    return name


def available_memory() -> int:
    """Bytes that can still be used: what the system has free, or the container's limit leaves."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 4 << 30
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            # Files that were read count as used, the model's own among them; they go when memory is needed.
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, left + int(counts.get("inactive_file", 0)))
        except (OSError, ValueError):
            continue
    return max(0, free)
