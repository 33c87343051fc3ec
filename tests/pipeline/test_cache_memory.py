"""What the caches of all slices may take, by what is free where they are."""

from dataclasses import replace

import pytest
from checkpoints import CONFIGS

from tinyserve.errors import UserError
from tinyserve.models.cache_plan import CacheNeeds, plan_cache
from tinyserve.models.config import parse_config
from tinyserve.pipeline.partition import Place, cache_memory, partition


def needs_of(name: str, count: int = 2) -> tuple[CacheNeeds, list[CacheNeeds]]:
    config = parse_config(CONFIGS[name])
    whole = CacheNeeds(config, "float32", "float32", 16, max_num_seqs=4)
    return whole, [replace(whole, layers=layers) for layers in partition(config, "float32", count)]


@pytest.mark.parametrize("name", ["llama", "granite-hybrid", "granite-hybrid-moe"])
def test_no_machine_gives_more_than_half_of_what_is_left(name: str) -> None:
    whole, parts = needs_of(name)
    frees = [part.weight_nbytes + 20_000_000 for part in parts]
    frees[0] -= 15_000_000
    budget = cache_memory(parts, [Place(str(i), free) for i, free in enumerate(frees)])
    plan = plan_cache(whole, kv_cache_memory=budget)
    for part, free in zip(parts, frees, strict=True):
        own = part.plan(plan.num_blocks, plan.max_model_len, plan.num_snapshots, None)
        assert own.nbytes <= (free - part.weight_nbytes) // 2
    own = parts[0].plan(plan.num_blocks + 4 * 8, plan.max_model_len, plan.num_snapshots, None)
    assert plan.num_blocks == 4 * 8 or own.nbytes > (frees[0] - parts[0].weight_nbytes) // 2, "nor much less"


def test_slices_of_one_machine_share_what_is_free() -> None:
    whole, parts = needs_of("llama")
    here = Place("here", whole.weight_nbytes + 10_000_000)
    assert abs(cache_memory(parts, [here, here]) - 5_000_000) <= 1
    assert cache_memory(parts, [here, Place("there", 10**12)]) > 5_000_000


def test_a_draft_model_is_beside_the_last_slice() -> None:
    _, parts = needs_of("llama")
    _, (draft, *_) = needs_of("gpt2", 1)
    places = [Place("there", 10**12), Place("here", 10**8), Place("here", 10**8)]
    assert cache_memory([*parts, draft], places) < cache_memory(parts, places[:2])


def test_weights_that_do_not_fit_are_told_with_the_machine() -> None:
    _, parts = needs_of("llama")
    with pytest.raises(UserError, match=r"The weights on there take .* MB, and it has 1.0 kB free"):
        cache_memory(parts, [Place("there", 1000), Place("here", 10**12)])
