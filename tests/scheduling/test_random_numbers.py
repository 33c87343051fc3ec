"""Numbers that are computed: even, unrelated between neighbours, and the same on every machine for ever."""

import itertools

import numpy as np
import pytest

from tinyserve.scheduling.random_numbers import _GOLDEN, _mix, uniform

pytestmark = pytest.mark.fast

COUNT = 100_000
LARGE = (123 << 64) + 5
DRAWS = {
    "places of one seed": [(7, place) for place in range(COUNT)],
    "first places of neighbouring seeds": [(seed, 0) for seed in range(COUNT)],
    "seeds and places together": [(seed, place) for seed in range(250) for place in range(400)],
    "seeds of more than 64 bits": [(LARGE + (seed << 61), 3) for seed in range(COUNT)],
}


def test_it_is_splitmix64() -> None:
    """The stream of the reference implementation, begun at 1234567."""
    expected = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)
    assert tuple(_mix(1234567 + i * _GOLDEN) for i in range(1, 5)) == expected


def test_a_seed_gives_the_same_numbers_everywhere() -> None:
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(LARGE, 9)] == [
        0.6524484863740322, 0.7012121095215252, 0.36818951565166946, 0.4604328466867129,
    ]  # fmt: skip


@pytest.mark.parametrize("draws", DRAWS.values(), ids=DRAWS)
def test_the_numbers_are_even(draws: list[tuple[int, int]]) -> None:
    """Kolmogorov and Smirnov: the fixed numbers are as far from even as one sample in a thousand may be, or less."""
    numbers = np.sort([uniform(*draw) for draw in draws])
    assert numbers[0] >= 0 and numbers[-1] < 1
    ranks = np.arange(COUNT)
    distance = max(np.max((ranks + 1) / COUNT - numbers), np.max(numbers - ranks / COUNT))
    assert distance * np.sqrt(COUNT) < 1.95
    counts = np.bincount((numbers * 1000).astype(int), minlength=1000)
    assert abs(np.sum((counts - 100) ** 2 / 100) - 999) < 4 * np.sqrt(2 * 999)


@pytest.mark.parametrize("draws", DRAWS.values(), ids=DRAWS)
def test_neighbours_are_unrelated(draws: list[tuple[int, int]]) -> None:
    """Pairs fill a square of 16 by 16 evenly, for neighbours and for those a few further on."""
    numbers = np.array([uniform(*draw) for draw in draws])
    for step in (1, 2, 16, 400):
        a, b = numbers[:-step], numbers[step:]
        counts = np.bincount((a * 16).astype(int) * 16 + (b * 16).astype(int), minlength=256)
        expected = len(a) / 256
        assert abs(np.sum((counts - expected) ** 2 / expected) - 255) < 4 * np.sqrt(2 * 255)
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))


def test_every_bit_of_a_seed_counts() -> None:
    seeds = [0, *(1 << bit for bit in range(200))]
    assert len({uniform(seed, 0) for seed in seeds}) == len(seeds)


def test_the_bits_of_a_number_are_as_often_1_as_0() -> None:
    for bit, place in itertools.product((1, 20, 52), (0, 5)):
        ones = sum(int(uniform(seed, place) * 2**53) >> bit & 1 for seed in range(20_000))
        assert abs(ones - 10_000) < 4 * np.sqrt(5000)
