"""How memory is shared out: every slot of states has one owner, and a plan takes what it says and no more."""

import checkpoints
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyserve.errors import UserError
from tinyserve.models.cache_plan import CacheNeeds, CachePlan, plan_cache
from tinyserve.models.config import parse_config
from tinyserve.models.kv_cache import KVCache

HYBRID, PLAIN = (parse_config(checkpoints.CONFIGS[name]) for name in ("granite-hybrid", "llama"))


def needs(config: object = HYBRID, **options: object) -> CacheNeeds:
    defaults = {"dtype": "float32", "kv_cache_dtype": "float32", "block_size": 16, "max_num_seqs": 3}
    return CacheNeeds(config, **defaults | options)  # type: ignore[arg-type]


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_each_state_slot_has_one_owner(running: int, snapshots: int, rollback: int) -> None:
    plan = CachePlan(
        num_blocks=1, block_size=16, max_model_len=16, kv_cache_dtype="float32", max_num_seqs=running,
        num_snapshots=snapshots, num_rollback_slots=rollback,
    )  # fmt: skip
    slots = [*plan.running_slots, *plan.snapshot_slots, *plan.rollback_slots, plan.scratch_slot]
    assert slots == list(range(plan.num_slots))
    assert [len(plan.running_slots), len(plan.snapshot_slots), len(plan.rollback_slots)] == [
        running, snapshots, rollback,
    ]  # fmt: skip


@pytest.mark.parametrize("config", [HYBRID, PLAIN])
@pytest.mark.parametrize("draft", [None, HYBRID, PLAIN])
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8"])
def test_a_plan_takes_what_it_says(config: object, draft: object, kept: str) -> None:
    """The arrays of both caches come to the plan's bytes, which are within the budget."""
    own = needs(config, kv_cache_dtype=kept, num_rollback_slots=2)
    other = needs(draft, max_snapshots=6) if draft else None
    budget = 2_500_000
    plan = plan_cache(own, kv_cache_memory=budget, draft=other)
    plans = [(config, plan)] + ([(draft, plan.draft)] if draft else [])
    caches = [KVCache(c, p.num_blocks, p.block_size, p.kv_cache_dtype, p.num_slots) for c, p in plans]  # type: ignore
    assert sum(array.nbytes for cache in caches for layer in cache.layers for array in layer) == plan.nbytes <= budget
    assert plan.num_rollback_slots == (2 if config is HYBRID else 0)
    assert plan.num_snapshots > 0 or config is PLAIN
    if plan.draft is not None:
        assert plan.draft.num_blocks == plan.num_blocks
        assert plan.draft.num_snapshots == (6 if draft is HYBRID else 0)


def test_without_a_prefix_cache_there_are_no_snapshots() -> None:
    assert plan_cache(needs(max_snapshots=0), kv_cache_memory=10_000_000).num_snapshots == 0


def test_what_is_too_little_is_refused_with_its_numbers() -> None:
    states = needs().without_blocks().nbytes
    with pytest.raises(UserError, match=r"too little for the states of 3 sequences, which take .*: lower max_num_seqs"):
        plan_cache(needs(), kv_cache_memory=states - 1)
    with pytest.raises(UserError, match=r"too little for a cache of 64 tokens, which takes"):
        plan_cache(needs(), max_model_len=64, kv_cache_memory=states)
    with pytest.raises(UserError, match="max_model_len is 129; this model has positions for 2 to 128 tokens"):
        plan_cache(needs(), max_model_len=129)
