"""How the memory for keys, values and states is shared out: blocks, and which slot of states is whose.

Knows what a block and a state cost, and how much memory is free; the arrays themselves are made by kv_cache.py.
"""

from dataclasses import dataclass

from tinyserve.errors import UserError
from tinyserve.models.config import ModelConfig
from tinyserve.models.config.costs import state_bytes_per_sequence, weight_bytes
from tinyserve.models.kv_cache import KVCache
from tinyserve.progress import size
from tinyserve.tensor.cgroups import available_memory

MAX_SNAPSHOTS = 64
_EXACT = 1e5  # bytes below which a refusal tells each: what is needed may be one more than there is


@dataclass(frozen=True)
class CacheNeeds:
    """What one model asks of the memory: how wide its blocks and states are, and how many states it wants."""

    config: ModelConfig
    dtype: str  # of the weights
    kv_cache_dtype: str
    block_size: int
    max_num_seqs: int
    max_snapshots: int = MAX_SNAPSHOTS
    num_rollback_slots: int = 0
    layers: range | None = None  # of a slice of the model; None: all

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block over all attention layers."""
        return KVCache.block_nbytes(self.config, self.block_size, self.kv_cache_dtype, self.layers)

    @property
    def state_nbytes(self) -> int:
        """Bytes of one sequence's recurrent states; 0 for a model of attention alone."""
        return state_bytes_per_sequence(self.config, self.layers)

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weights."""
        return weight_bytes(self.config, self.dtype, self.layers)

    def plan(self, num_blocks: int, max_model_len: int, num_snapshots: int, draft: "CachePlan | None") -> "CachePlan":
        """A plan of so many blocks and snapshots."""
        has_states = self.state_nbytes > 0
        return CachePlan(
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_model_len=max_model_len,
            kv_cache_dtype=self.kv_cache_dtype,
            max_num_seqs=self.max_num_seqs,
            num_snapshots=num_snapshots,
            num_rollback_slots=self.num_rollback_slots if has_states else 0,
            block_nbytes=self.block_nbytes,
            state_nbytes=self.state_nbytes,
            draft=draft,
        )

    def without_blocks(self, draft: "CacheNeeds | None" = None) -> "CachePlan":
        """A plan of what there must be before anything else: states, but no snapshots, which take what is left."""
        return self.plan(0, 0, 0, _draft_plan(draft, 0, 0))


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What the memory for one model's keys, values and states is divided into.

    State slots lie one after the other: running sequences, snapshots, rollback, and one for texts that are only read.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    kv_cache_dtype: str
    max_num_seqs: int
    num_snapshots: int = 0  # of states, for prefixes to go on from
    num_rollback_slots: int = 0  # of states, while draft tokens are checked
    block_nbytes: int = 0
    state_nbytes: int = 0  # of one sequence
    draft: "CachePlan | None" = None  # the draft model's, which has as many blocks

    @property
    def running_slots(self) -> range:
        """The state slots of running sequences."""
        return range(self.max_num_seqs)

    @property
    def snapshot_slots(self) -> range:
        """The state slots of the prefix cache's snapshots."""
        return range(self.running_slots.stop, self.running_slots.stop + self.num_snapshots)

    @property
    def rollback_slots(self) -> range:
        """The state slots of copies to go back to when a draft token is rejected."""
        return range(self.snapshot_slots.stop, self.snapshot_slots.stop + self.num_rollback_slots)

    @property
    def scratch_slot(self) -> int:
        """The state slot of a text that is only read."""
        return self.rollback_slots.stop

    @property
    def num_slots(self) -> int:
        """How many state slots there are in all."""
        return self.scratch_slot + 1

    @property
    def sizes(self) -> tuple[int, int, str, int]:
        """What a KVCache is made by, beside a config."""
        return self.num_blocks, self.block_size, self.kv_cache_dtype, self.num_slots

    @property
    def nbytes(self) -> int:
        """All of it, a draft model's as well."""
        return self._blocks_nbytes + self._states_nbytes + (self.draft.nbytes if self.draft else 0)

    @property
    def _blocks_nbytes(self) -> int:
        return self.num_blocks * self.block_nbytes

    @property
    def _states_nbytes(self) -> int:
        return self.num_slots * self.state_nbytes

    def __str__(self) -> str:
        text = f"{self.num_blocks} blocks of {self.block_size} tokens, {size(self._blocks_nbytes)}"
        if self.state_nbytes:
            text += f"; {self.num_slots} states, {self.num_snapshots} of them snapshots"
            text += f", {size(self._states_nbytes)}"
        if self.draft:
            text += f"; the draft model's, {size(self.draft.nbytes)}"
        return f"{text} (room that is taken only as it is used)"


def plan_cache(
    needs: CacheNeeds,
    max_model_len: int | None = None,
    kv_cache_memory: int | None = None,
    draft: CacheNeeds | None = None,
) -> CachePlan:
    """How many blocks the cache has, how many tokens a sequence may come to, and how many snapshots are kept.

    Enough for `max_num_seqs` full sequences, or what the memory holds: `kv_cache_memory`, or half of what is free
    beside the weights; states of recurrent layers come first, and snapshots of them have an eighth at most of what is
    left, and nothing that `max_model_len` needs. A draft model's blocks and states come out of the same memory. Raises
    UserError, with the numbers, when that is too little for one sequence.
    """
    limit = needs.config.max_position_embeddings
    if max_model_len is not None and not 2 <= max_model_len <= limit:
        raise UserError(f"max_model_len is {max_model_len}; this model has positions for 2 to {limit} tokens.")
    budget = kv_cache_memory
    if budget is None:
        weights = needs.weight_nbytes + (draft.weight_nbytes if draft else 0)
        budget = max(0, available_memory() - weights) // 2
    states = needs.without_blocks(draft).nbytes
    if states > budget:
        raise UserError(
            f"{size(budget, _EXACT)} are too little for the states of {needs.max_num_seqs} sequences, which take "
            f"{size(states, _EXACT)}: lower max_num_seqs, or raise kv_cache_memory, or free some memory."
        )
    budget -= states
    block_size, state = needs.block_size, needs.state_nbytes
    block = needs.block_nbytes + (draft.block_nbytes if draft else 0)
    wanted = max_model_len or limit
    least = block * -(-(max_model_len or 2) // block_size)
    num_snapshots = 0
    if state:
        num_snapshots = min(needs.max_snapshots, max(0, min(budget // 8, budget - least)) // state)
        budget -= num_snapshots * state
    num_blocks = needs.max_num_seqs * -(-wanted // block_size)
    if block:  # a model with no attention has no keys and values
        num_blocks = min(num_blocks, budget // block)
    tokens = num_blocks * block_size
    if tokens < (max_model_len or 2):
        raise UserError(
            f"{size(budget, _EXACT)} are too little for a cache of {max_model_len or 2} tokens, which takes "
            f"{size(least, _EXACT)} in blocks of {block_size} tokens: raise kv_cache_memory or free some memory, or "
            f"lower max_model_len."
        )
    length = min(wanted, tokens)
    return needs.plan(num_blocks, length, num_snapshots, _draft_plan(draft, num_blocks, length))


def _draft_plan(draft: CacheNeeds | None, num_blocks: int, max_model_len: int) -> CachePlan | None:
    """A draft model's plan beside so many blocks of its target's: all the snapshots it wants."""
    if draft is None:
        return None
    length = min(max_model_len, draft.config.max_position_embeddings)
    return draft.plan(num_blocks, length, draft.max_snapshots if draft.state_nbytes else 0, None)
