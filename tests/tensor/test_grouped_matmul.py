"""The experts' products in one pass against their NumPy twin, and against each expert's own product, bit for bit."""

import numpy as np
import pytest
from arrays import random, with_minimums
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve.models import matrix as kept
from tinyserve.tensor import grouped_matmul, matmul, norm, quant, reference

pytestmark = pytest.mark.usefixtures("threads")

ONE = np.float32(1.0)
# A sum of float32 is right to a few roundings; one of 16-bit integers too; of 8-bit ones, whole steps may round apart.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-6, "w8a16": 4e-5, "w4a16": 4e-5, "w8a8": 4e-3, "w4a8": 4e-3}
COUNTS = [
    [1],  # one expert, one row
    [0, 1, 0, 0],  # empty ones around it
    [1, 1, 1, 0, 1],  # a token that is decoded
    [3, 0, 7, 1],
    [0, 49, 2, 100, 5, 0],  # more than a chunk
    [0, 0],
]


def matrices(experts, N, K, dtype):
    """Each expert's matrix by itself, and all of them one above the other, in whole blocks."""
    rows = quant.padded(N, quant.BLOCK)
    whole = np.zeros((experts, rows, K), np.float32)
    whole[:, :N] = random(2, experts, N, K)
    alone = [kept.pack(one[:N], dtype) for one in whole]
    return alone, kept.pack(whole.reshape(-1, K), dtype)


def together(matrix, x, counts, width, **options):
    offsets = np.cumsum([0, *counts])
    given = {"norm": norm.NO_NORM, "scale": ONE, "activation": matmul.PLAIN} | options
    return matrix.grouped_matmul(x, offsets, width=width, **given)


def one_by_one(alone, x, counts, width, **options):
    rows = np.split(x, np.cumsum(counts)[:-1])
    parts = [
        one.matmul(mine.copy(), width=width, **options) for one, mine in zip(alone, rows, strict=True) if len(mine)
    ]
    return np.concatenate([np.empty((0, width), np.float32), *parts])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_each_experts_own_product_bit_for_bit(dtype, counts):
    for N, K, width, activation in ((50, 100, 50, matmul.PLAIN), (160, 72, 77, matmul.SILU_MUL)):
        x = random(1, sum(counts), K)
        alone, whole = matrices(len(counts), N, K, dtype)
        for before in (norm.NO_NORM, norm.Norm(norm.RMS, random(5, K), random(6, K), np.float32(1e-5))):
            options = {"norm": before, "activation": activation, "scale": np.float32(0.22)}
            got = together(whole, x, counts, width, **options)
            assert (got.dtype, got.shape) == (np.float32, (len(x), width))
            np.testing.assert_array_equal(got, one_by_one(alone, x, counts, width, **options))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_kernel_is_its_twin(dtype, counts, monkeypatch):
    N, K, width = 160, 65, 77
    x = random(1, sum(counts), K)
    _, whole = matrices(len(counts), N, K, dtype)
    before = norm.Norm(norm.RMS, random(5, K), random(6, K), np.float32(1e-5))
    options = {"norm": before, "activation": matmul.SILU_MUL, "scale": np.float32(0.5)}
    got = together(whole, x, counts, width, **options)
    for name in ("grouped_matmul_float", "grouped_matmul_integer"):
        monkeypatch.setattr(grouped_matmul, name, getattr(reference, name))
    expected = together(whole, x, counts, width, **options)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max(initial=0) <= TOLERANCE[dtype] * np.abs(expected).max(initial=0)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=7),
    N=st.integers(1, 140),
    K=st.integers(1, 200),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_whatever_the_shapes(counts, N, K, dtype):
    x = random(1, sum(counts), K)
    alone, whole = matrices(len(counts), N, K, dtype)
    np.testing.assert_array_equal(together(whole, x, counts, N), one_by_one(alone, x, counts, N))


def test_weights_with_minimums():
    """Those that GGUF's Q4_1 has: the integers' scales and what is added to them lie expert by expert too."""
    experts, N, K, counts = 3, 64, 96, [4, 0, 1]
    shape = experts * N, K
    packed = with_minimums(quant.pack_nibbles(random(2, *shape), 32), shape)
    whole = kept.IntegerMatrix(shape, packed, 16)
    alone = [
        kept.IntegerMatrix((N, K), packed._replace(stream=stream.copy()), 16)
        for stream in np.split(packed.stream, experts)
    ]
    x = random(1, sum(counts), K)
    np.testing.assert_array_equal(together(whole, x, counts, N), one_by_one(alone, x, counts, N))


@pytest.mark.parametrize("dtype", ["float32", "w8a16"])
def test_a_number_that_is_none_stays_with_its_row(dtype):
    counts = [2, 3]
    x = random(1, 5, 40)
    _, whole = matrices(2, 20, 40, dtype)
    clean = together(whole, x, counts, 20)
    x[2, 7] = np.nan
    got = together(whole, x, counts, 20)
    assert np.isnan(got[2]).all()
    np.testing.assert_array_equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
