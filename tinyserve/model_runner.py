"""From scheduled sequences to sampled tokens: builds the batch, runs the model, has it sampled. Owns the cache.

The highest floor that knows arrays. It does not choose what runs, and has never heard of text.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
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
from tinyserve.progress import Progress, size
from tinyserve.sampler import Sampler, logprobs_of
from tinyserve.scheduling.sequence import Sampled, Scheduled, Sequence
from tinyserve.tensor import _jit

Array = np.ndarray
T = TypeVar("T")

MAX_SNAPSHOTS = 64
DRAFT_SNAPSHOTS = 3  # for each sequence: behind the text, behind the guesses, and while it reads a prompt
_EXACT = 1e5  # bytes below which a refusal tells each: what is needed may be one more than there is
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

    def execute(self, scheduled: list[Scheduled]) -> list[Sampled | None]:
        """Compute each sequence's next `num_tokens` tokens; a token is sampled where its newest one is reached."""
        complete = [i for i, (seq, num) in enumerate(scheduled) if seq.num_computed + num == len(seq.token_ids)]
        matchers = [scheduled[i].sequence.matcher for i in complete]
        filler = self.masks if any(matchers) else None
        if filler is not None:
            filler.start(matchers, [scheduled[i].sequence.draft for i in complete])  # while the model works
        with _jit.one_at_a_time(self.num_threads):
            batch = self._batch(scheduled)
            hidden = self.model(batch, self.cache)  # (tokens, hidden)
            for (sequence, num_tokens), first in zip(scheduled, batch.starts, strict=False):
                if sequence.params.prompt_logprobs is not None:
                    self._read_prompt(sequence, hidden[first : first + num_tokens])
            # What follows a sequence's last token, and each guess behind it.
            places = [(i, ahead) for i in complete for ahead in range(len(scheduled[i].sequence.draft) + 1)]
            rows = [batch.starts[i] + scheduled[i].num_tokens - 1 + ahead for i, ahead in places]
            logits = self.model.logits(hidden[rows])  # (places, vocab)
            sequences = [scheduled[i].sequence for i, _ in places]
            filled: Iterable[Array] = filler.wait() if filler is not None else []
            masks = [mask if s.matcher else None for mask, s in zip(filled, sequences, strict=False)]
            sampled = self.sampler.sample(sequences, logits, masks, [ahead for _, ahead in places])
        results: list[Sampled | None] = [None] * len(scheduled)
        chosen = iter(sampled)
        for i, matcher in zip(complete, matchers, strict=True):
            draft = scheduled[i].sequence.draft
            result = _followed(draft, [next(chosen) for _ in range(len(draft) + 1)])
            results[i] = result if matcher is None else _obeyed(matcher, result)
        return results

    def _read_prompt(self, sequence: Sequence, hidden: Array) -> None:
        """Log-probabilities of the prompt's tokens that follow these, if they are not known; hidden (tokens, H)."""
        prompt, known, start = sequence.prompt_token_ids, sequence.prompt_logprobs, sequence.num_computed
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

    def scratch(self, token_ids: list[int], blocks: list[int]) -> "Scratch":
        """A text to be read in blocks that no sequence holds; one at a time, as all have one state."""
        return Scratch(token_ids, blocks, state_slot=self.cache.num_slots - 1)

    def read(self, text: "Scratch", chunk: int, of: Callable[[Array], T]) -> T:
        """What `of` makes of the hidden states (tokens, hidden) of a text's next tokens, `chunk` of them at most."""
        num_tokens = min(chunk, len(text.token_ids) - text.num_computed)
        with _jit.one_at_a_time(self.num_threads):
            made = of(self.model(self._batch([(text, num_tokens)]), self.cache))
        text.num_computed += num_tokens
        return made

    def compile_kernels(self, dtype: str, progress: Progress) -> None:
        """Run two tokens and draw, the first time on a machine: of two processes one compiles, the other waits for it.

        `dtype` is that of the weights. `progress` hears ("wait", 0, 0) when another process has the lock.
        """
        from filelock import FileLock, Timeout

        ready = _jit.cache_folder() / f"{self._kernels(dtype)}.ready"
        if not ready.exists():
            lock = FileLock(_jit.cache_folder() / "compiling.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                progress("wait", 0, 0)
                lock.acquire()
            try:
                self.sampler.run_kernels(self.read(self.scratch([0, 0], blocks=[0]), 2, self.model.logits))
                ready.touch()
            finally:
                lock.release()

    def _kernels(self, dtype: str) -> str:
        """A name for the kernels that this model uses, whichever these are: no other model shares it unawares.

        They follow from the dtypes, the whole config (layers of several kinds have one model_type) and the bits of
        each matrix, which a GGUF file decides: the bytes of all weights tell those apart.
        """
        config, kv_cache_dtype = self.model.config, self.cache.dtype
        told = f"{config!r} {self.model.nbytes}"
        return f"{config.model_type}-{dtype}-{kv_cache_dtype}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def _batch(self, work: "Iterable[tuple[_Tokens, int]]") -> Batch:
        work, block_size = list(work), self.cache.block_size
        for sequence, _ in work:
            if sequence.num_computed == 0:
                self.cache.reset_slot(sequence.state_slot)
        starts, counts = np.array([(s.num_computed, num_tokens + len(s.draft)) for s, num_tokens in work]).T
        rows = np.concatenate(([0], np.cumsum(counts)))  # where each sequence's tokens begin
        parts = (s.token_ids[s.num_computed : s.num_computed + n] + s.draft for s, n in work)
        token_ids = np.fromiter(chain.from_iterable(parts), np.int64, rows[-1])
        sequence_of = np.repeat(np.arange(len(work)), counts)
        positions = np.arange(rows[-1]) + (starts - rows[:-1])[sequence_of]
        width = max(len(sequence.block_table) for sequence, _ in work)
        padding = [0] * width
        tables = np.array([(s.block_table + padding)[:width] for s, _ in work], np.int32)
        slots = tables[sequence_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
        state_slots = np.array([sequence.state_slot for sequence, _ in work])
        return Batch(token_ids, positions, slots, sequence_of, tables, rows, state_slots)


class Masks(Protocol):
    """Finds out which tokens come next, in a thread of its own."""

    def start(self, matchers: list[Any], drafts: list[list[int]]) -> None:
        """Begin; a matcher may be None, and has guesses behind its place."""

    def wait(self) -> Array:
        """The masks (places, words) uint32 of the last `start`: each matcher's own, and one behind each guess."""


def _followed(draft: list[int], sampled: list[Sampled]) -> Sampled:
    """The first token, and those after it as long as the guesses were right."""
    right = 0
    while right < len(draft) and sampled[right].token_id == draft[right] and sampled[right + 1].error is None:
        right += 1
    return sampled[0]._replace(then=tuple(sampled[1 : right + 1])) if right else sampled[0]


def _obeyed(matcher: Any, sampled: Sampled) -> Sampled:
    """The tokens, taken in by their grammar, as far as it goes; or why there is none."""
    for right, one in enumerate((sampled, *sampled.then)):
        if one.error is None:
            matcher.advance(one.token_id)
        if matcher.error is not None:  # the next step comes here again where there are tokens before
            return sampled._replace(then=sampled.then[: right - 1]) if right else Sampled(-1, error=matcher.error)
    return sampled


class _Tokens(Protocol):
    token_ids: list[int]
    num_computed: int
    block_table: list[int]
    state_slot: int
    draft: list[int]


class Scratch:
    """The part of a sequence that a batch is made from."""

    def __init__(self, token_ids: list[int], block_table: list[int], state_slot: int):
        self.token_ids, self.block_table, self.state_slot, self.num_computed = token_ids, block_table, state_slot, 0
        self.draft: list[int] = []


class DraftNeeds(NamedTuple):
    """What a draft model keeps beside: its weights, a block of its own for each of the model's, and states."""

    config: ModelConfig
    dtype: str
    kv_cache_dtype: str
    max_num_seqs: int  # that it guesses for at once

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
    num_spares: int = 0  # of states, for while guesses are checked
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
        text = f"{self.num_blocks} blocks of {self.block_size} tokens, {size(self.num_blocks * self.block_nbytes)}"
        if self.state_nbytes:
            text += f"; {self.num_states + 1} states, {self.num_snapshots} of them snapshots"
            text += f", {size((self.num_states + 1) * self.state_nbytes)}"
        if self.draft_nbytes:
            text += f"; the draft model's, {size(self.draft_nbytes)}"
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
            f"{size(budget, _EXACT)} are too little for the states of {max_num_seqs} sequences, which take "
            f"{size(states, _EXACT)}: lower max_num_seqs, or raise kv_cache_memory, or free some memory."
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
            f"{size(budget, _EXACT)} are too little for a cache of {max_model_len or 2} tokens, which takes "
            f"{size(least, _EXACT)} in blocks of {block_size} tokens: raise kv_cache_memory or free some memory, or "
            f"lower max_model_len."
        )
    return CachePlan(
        num_blocks, block_size, min(wanted, tokens), max_num_seqs, num_snapshots, own_block, state, spares, draft_block,
        draft_states,
    )  # fmt: skip


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
