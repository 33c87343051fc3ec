"""Who holds which block, and what is remembered of a text until somebody else needs its block."""

import pytest

from tinyserve.scheduling.block_manager import ROOT, BlockManager

pytestmark = pytest.mark.fast


def test_blocks_are_handed_out_and_come_back() -> None:
    blocks = BlockManager(4, 16)
    assert [blocks.blocks_for(tokens) for tokens in (0, 1, 16, 17, 64, 65)] == [0, 1, 1, 2, 4, 5]
    first, second = blocks.allocate(2), blocks.allocate(2)
    assert sorted(first + second) == [0, 1, 2, 3] and blocks.num_free == 0
    blocks.free(first)
    assert blocks.num_free == 2 and sorted(blocks.allocate(2)) == sorted(first)


def test_a_double_free_raises() -> None:
    blocks = BlockManager(4, 16)
    held = blocks.allocate(2)
    blocks.free(held)
    for wrong in (held, [99], [-1]):
        with pytest.raises(KeyError):
            blocks.free(wrong)
    assert blocks.num_free == 4


def test_a_shared_block_is_free_when_all_have_given_it_up() -> None:
    blocks = BlockManager(1, 16)
    held = blocks.allocate(1)
    blocks.share(held)
    blocks.free(held)
    assert blocks.num_free == 0 and blocks.holders(held[0]) == 1
    blocks.free(held)
    assert blocks.num_free == 1
    with pytest.raises(KeyError):
        blocks.share(held)  # nobody holds it and it remembers nothing


def test_a_text_is_found_until_its_block_is_needed() -> None:
    forgotten: list[int] = []
    blocks = BlockManager(3, 2)
    blocks.on_forget = forgotten.append
    table = blocks.allocate(2)
    first = blocks.remember(table[0], ROOT, (1, 2))
    second = blocks.remember(table[1], first.key, (3, 4))
    assert blocks.find(ROOT, (1, 2)) == first and blocks.find(first.key, (3, 4)) == second
    assert blocks.find(ROOT, (3, 4)) is None
    blocks.free(table)
    assert blocks.num_free == 3 and not forgotten
    blocks.allocate(1)  # the blank one
    assert not forgotten
    assert blocks.allocate(1) == [table[1]]  # an ending goes before its beginning
    assert forgotten == [second.key]
    assert blocks.find(ROOT, (1, 2)) == first and blocks.find(first.key, (3, 4)) is None
    blocks.share([first.block])
    assert blocks.num_free == 0
    blocks.free([first.block])
    assert blocks.allocate(1) == [first.block] and forgotten == [second.key, first.key]
    again = blocks.remember(first.block, ROOT, (1, 2))
    assert again.key not in forgotten, "a key is given out once"


def test_the_least_recently_used_is_forgotten_first() -> None:
    blocks = BlockManager(3, 1)
    held = blocks.allocate(3)
    for block in held:
        blocks.remember(block, ROOT, (block,))
        blocks.free([block])
    blocks.share([0])
    blocks.free([0])
    assert [blocks.allocate(1)[0] for _ in range(3)] == [1, 2, 0]


def test_a_text_that_is_known_keeps_its_block() -> None:
    blocks = BlockManager(2, 2)
    one, other = blocks.allocate(2)
    known = blocks.remember(one, ROOT, (1, 2))
    assert blocks.remember(other, ROOT, (1, 2)) == known
    blocks.free([other])
    assert blocks.allocate(1) == [other] and blocks.find(ROOT, (1, 2)) == known


def test_a_block_knows_every_beginning_it_was_noted_for() -> None:
    forgotten: list[int] = []
    blocks = BlockManager(1, 4)
    blocks.on_forget = forgotten.append
    held = blocks.allocate(1)
    keys = [blocks.remember(held[0], ROOT, tokens).key for tokens in ((1,), (1, 2), (1, 2, 3, 4))]
    blocks.free(held)
    blocks.allocate(1)
    assert forgotten == keys and blocks.find(ROOT, (1, 2)) is None
