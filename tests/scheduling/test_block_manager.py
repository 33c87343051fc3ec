"""Reference counts of blocks, and cached prefixes until LRU eviction."""

import pytest

from tinyserve.scheduling.block_manager import ROOT_PREFIX, BlockManager

pytestmark = pytest.mark.fast


def test_blocks_are_handed_out_and_come_back() -> None:
    blocks = BlockManager(4, 16)
    assert [blocks.blocks_for(tokens) for tokens in (0, 1, 16, 17, 64, 65)] == [0, 1, 1, 2, 4, 5]
    first, second = blocks.allocate(2), blocks.allocate(2)
    assert sorted(first + second) == [0, 1, 2, 3] and blocks.num_free == 0
    blocks.free(first)
    assert blocks.num_free == 2 and sorted(blocks.allocate(2)) == sorted(first)


def test_a_block_that_came_back_is_handed_out_before_one_that_was_never_held() -> None:
    """Its memory has been touched: one request after the other takes no more than the largest of them."""
    blocks = BlockManager(100, 16)
    first = blocks.allocate(5)
    blocks.free(first)
    assert blocks.allocate(3) == first[:3] and blocks.allocate(3) == [*first[3:], 5]


def test_a_double_free_raises() -> None:
    blocks = BlockManager(4, 16)
    held = blocks.allocate(2)
    blocks.free(held)
    for wrong in (held, [99], [-1]):
        with pytest.raises(KeyError):
            blocks.free(wrong)
    assert blocks.num_free == 4


def test_reference_counts_of_a_shared_block() -> None:
    blocks = BlockManager(1, 16)
    held = blocks.allocate(1)
    blocks.incref(held)
    blocks.free(held)
    assert blocks.num_free == 0 and blocks.ref_count(held[0]) == 1
    blocks.free(held)
    assert blocks.num_free == 1
    with pytest.raises(KeyError):
        blocks.incref(held)  # free, with no cached prefix


def test_a_prefix_is_cached_until_its_block_is_evicted() -> None:
    evicted: list[int] = []
    blocks = BlockManager(3, 2)
    blocks.on_evict = evicted.append
    table = blocks.allocate(2)
    first = blocks.register(table[0], ROOT_PREFIX, (1, 2))
    second = blocks.register(table[1], first.prefix_id, (3, 4))
    assert blocks.find(ROOT_PREFIX, (1, 2)) == first and blocks.find(first.prefix_id, (3, 4)) == second
    assert blocks.find(ROOT_PREFIX, (3, 4)) is None
    blocks.free(table)
    assert blocks.num_free == 3 and not evicted
    blocks.allocate(1)  # the one without a prefix
    assert not evicted
    assert blocks.allocate(1) == [table[1]]  # the end of a prefix goes before its beginning
    assert evicted == [second.prefix_id]
    assert blocks.find(ROOT_PREFIX, (1, 2)) == first and blocks.find(first.prefix_id, (3, 4)) is None
    blocks.incref([first.block])
    assert blocks.num_free == 0
    blocks.free([first.block])
    assert blocks.allocate(1) == [first.block] and evicted == [second.prefix_id, first.prefix_id]
    again = blocks.register(first.block, ROOT_PREFIX, (1, 2))
    assert again.prefix_id not in evicted, "an id is given out once"


def test_lru_eviction() -> None:
    blocks = BlockManager(3, 1)
    held = blocks.allocate(3)
    for block in held:
        blocks.register(block, ROOT_PREFIX, (block,))
        blocks.free([block])
    blocks.incref([0])
    blocks.free([0])
    assert [blocks.allocate(1)[0] for _ in range(3)] == [1, 2, 0]


def test_registering_a_cached_prefix_keeps_its_block() -> None:
    blocks = BlockManager(2, 2)
    one, other = blocks.allocate(2)
    known = blocks.register(one, ROOT_PREFIX, (1, 2))
    assert blocks.register(other, ROOT_PREFIX, (1, 2)) == known
    blocks.free([other])
    assert blocks.allocate(1) == [other] and blocks.find(ROOT_PREFIX, (1, 2)) == known


def test_a_partial_block_is_found_by_each_registered_beginning() -> None:
    evicted: list[int] = []
    blocks = BlockManager(1, 4)
    blocks.on_evict = evicted.append
    held = blocks.allocate(1)
    ids = [blocks.register(held[0], ROOT_PREFIX, tokens).prefix_id for tokens in ((1,), (1, 2), (1, 2, 3, 4))]
    blocks.free(held)
    blocks.allocate(1)
    assert evicted == ids and blocks.find(ROOT_PREFIX, (1, 2)) is None


def test_forgetting_all_prefixes() -> None:
    """Of blocks that are held, which stay held, and of free ones, which stay free."""
    blocks, evicted = BlockManager(4, 2), list[int]()
    blocks.on_evict = evicted.append
    held, free = blocks.allocate(1), blocks.allocate(2)
    ids = [blocks.register(block, ROOT_PREFIX, (block, 1)).prefix_id for block in held + free]
    ids.append(blocks.register(held[0], ids[0], (7,)).prefix_id)
    blocks.free(free)
    blocks.forget()
    assert sorted(evicted) == sorted(ids) and blocks.num_free == 3
    assert all(blocks.find(ROOT_PREFIX, (block, 1)) is None for block in held + free)
    assert sorted(blocks.allocate(3)) == sorted({0, 1, 2, 3} - set(held))
    blocks.free(held)
    assert blocks.num_free == 1
