"""Every kernel against its NumPy twin, on shapes that fit no tile, and every row against itself in other batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve.tensor import _jit, activation, attention, matmul, norm, quant, reference, rope

EMPTY = np.empty(0, np.float32)
SHAPES = [(1, 1, 1), (1, 17, 24), (2, 64, 64), (3, 50, 100), (7, 130, 72), (13, 65, 576), (49, 96, 40), (50, 259, 65)]


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def close(got, expected, tolerance=2e-6):
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    scale = max(1e-20, np.abs(expected).max(initial=0))
    assert np.abs(got - expected).max(initial=0) <= tolerance * scale


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    _jit.set_threads(request.param)
    yield request.param
    _jit.set_threads(None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_matmul_float(shape, bfloat16, biased):
    M, N, K = shape
    x, w, bias = random(1, M, K), random(2, N, K), random(3, N) if biased else EMPTY
    packed = quant.pack_float(w, bfloat16)
    np.testing.assert_array_equal(packed, reference.pack_float(w, bfloat16))
    close(matmul.matmul_float(x, packed, bias, N), reference.matmul_float(x, packed, bias, N))
    if not bfloat16:
        close(matmul.matmul_float(x, packed, bias, N), (x @ w.T + (bias if biased else 0)).astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 64])
def test_matmul_int8(shape, group):
    M, N, K = shape
    x, w, bias = random(1, M, K), random(2, N, K), random(3, N)
    packed, scales = quant.pack_int8(w, group)
    expected_packed, expected_scales = reference.pack_int8(w, group)
    np.testing.assert_array_equal(packed, expected_packed)
    np.testing.assert_array_equal(scales, expected_scales)
    close(matmul.matmul_int8(x, packed, scales, bias, N), reference.matmul_int8(x, packed, scales, bias, N), 1e-5)
    # Eight bits keep a matrix within half a step of the largest weight of its group.
    assert np.abs(reference.unpack_int8(packed, scales, N, K) - w).max() <= np.abs(w).max() / 127 / 2 * 1.001


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 1e30])
def test_matmul_int8_extremes(value):
    """Zeros, denormal scales and huge numbers neither divide by zero nor overflow the accumulators."""
    x = np.full((2, 64), value, np.float32)
    x[1] = 1.0
    w = np.ones((16, 64), np.float32)
    packed, scales = quant.pack_int8(w, 64)
    y = matmul.matmul_int8(x, packed, scales, EMPTY, 16)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[1], 64, rtol=1e-5)
    # Below the smallest scale a group is zero, which is near enough to what it was.
    np.testing.assert_allclose(y[0], 64 * value, rtol=1e-5, atol=1e-30)


def test_matmul_int8_worst_case_accumulator():
    """All bytes at their extremes: the 32-bit sums of a group hold the largest product there is."""
    for sign in (1, -1):
        x, w = np.full((3, 128), sign, np.float32), np.ones((64, 128), np.float32)
        packed, scales = quant.pack_int8(w, 64)
        np.testing.assert_allclose(matmul.matmul_int8(x, packed, scales, EMPTY, 64), sign * 128, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(2, 33), N=st.sampled_from([5, 64, 130]), K=st.sampled_from([24, 64, 200]), seed=st.integers(0, 9)
)
def test_a_row_does_not_depend_on_its_batch(batch, N, K, seed):
    """Bit for bit, for every kernel that works on rows: the promise that batching changes nobody's answer."""
    x, w, bias = random(seed, batch, K), random(seed + 1, N, K), random(seed + 2, N)
    floats, halves, (packed, scales) = quant.pack_float(w, False), quant.pack_float(w, True), quant.pack_int8(w, 32)
    weight, shift = random(3, K), random(4, K)
    functions = [
        lambda rows: matmul.matmul_float(rows, floats, bias, N),
        lambda rows: matmul.matmul_float(rows, halves, bias, N),
        lambda rows: matmul.matmul_int8(rows, packed, scales, bias, N),
        lambda rows: norm.rms_norm(rows, weight, np.float32(1e-5)),
        lambda rows: norm.layer_norm(rows, weight, shift, np.float32(1e-5)),
        activation.silu_mul,
        activation.gelu_tanh,
        activation.gelu,
    ]
    for function in functions:
        together = function(x)
        for m in {0, batch // 2, batch - 1}:
            np.testing.assert_array_equal(function(x[m : m + 1].copy()), together[m : m + 1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 24), (3, 16), (5, 577), (40, 100)])
def test_norms(shape):
    x, weight, bias = random(1, *shape) * 3 + 1, random(2, shape[1]), random(3, shape[1])
    close(norm.rms_norm(x, weight, np.float32(1e-5)), reference.rms_norm(x, weight, 1e-5))
    if shape[1] > 1:
        close(norm.layer_norm(x, weight, bias, np.float32(1e-5)), reference.layer_norm(x, weight, bias, 1e-5), 1e-5)


@pytest.mark.parametrize("shape", [(1, 2), (1, 48), (3, 34), (40, 200)])
def test_activations(shape):
    x = random(1, *shape) * 10
    x.ravel()[:2] = (-200.0, 90.0)
    close(activation.silu_mul(x), reference.silu_mul(x))
    close(activation.gelu_tanh(x), reference.gelu_tanh(x))
    close(activation.gelu(x), reference.gelu(x))


def test_take_rows():
    w, ids = random(1, 70, 100), np.array([0, 69, 3, 3, 64])
    floats, (packed, scales) = quant.pack_float(w, False), quant.pack_int8(w, 64)
    np.testing.assert_array_equal(quant.take_rows_float(floats, ids, 100), w[ids])
    halves = quant.pack_float(w, True)
    np.testing.assert_array_equal(quant.take_rows_float(halves, ids, 100), reference.take_rows_float(halves, ids, 100))
    np.testing.assert_array_equal(
        quant.take_rows_int8(packed, scales, ids, 100), reference.take_rows_int8(packed, scales, ids, 100)
    )


@pytest.mark.parametrize("head_dim", [2, 24, 64])
@pytest.mark.parametrize("tokens", [1, 9])
def test_rope(head_dim, tokens):
    frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    cosines, sines = rope.rope_table(frequencies, 200)
    positions = np.random.default_rng(0).integers(0, 200, tokens)
    x = random(1, tokens, 5 * head_dim)
    expected = x.copy()
    rope.apply_rope(x, cosines, sines, positions, 3, head_dim)
    reference.apply_rope(expected, cosines, sines, positions, 3, head_dim)
    close(x, expected)


class Paged:
    """Several sequences' keys and values in shuffled pages, and one batch of their last tokens."""

    def __init__(self, lengths, heads, kv_heads, head_dim, block_size, seed=0):
        generator = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        most = -(-max(lengths) // block_size)
        blocks = generator.permutation(len(lengths) * most + 1).astype(np.int32)
        self.tables = blocks[: len(lengths) * most].reshape(len(lengths), most)
        width = quant.padded(head_dim, 16)
        # What no token has written may be anything: the kernels must not read it into a result.
        self.keys = np.full((len(blocks), kv_heads, head_dim, block_size), np.nan, np.float32)
        self.values = np.full((len(blocks), kv_heads, block_size, width), np.nan, np.float32)
        self.positions = np.concatenate([np.arange(n) for n in lengths])
        self.sequence_of = np.repeat(np.arange(len(lengths)), lengths)
        self.slots = self.tables[self.sequence_of, self.positions // block_size].astype(np.int64) * block_size
        self.slots += self.positions % block_size
        self.qkv = random(seed, len(self.slots), (heads + 2 * kv_heads) * head_dim)

    def store(self, module, rows=slice(None)):
        module.store_kv(
            self.qkv[rows], self.heads, self.kv_heads, self.head_dim, self.slots[rows], self.keys, self.values
        )

    def attend(self, module, rows=slice(None), window=0):
        scale = np.float32(self.head_dim**-0.5)
        return module.attention(
            self.qkv[rows], self.heads, self.keys, self.values, self.tables, self.sequence_of[rows],
            self.positions[rows], scale, window,
        )  # fmt: skip


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(1, 1, 64), (9, 3, 64), (71, 1, 64), (4, 2, 24), (2, 2, 80), (3, 3, 1)]
)
@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize("window", [0, 1, 64, 65])
def test_attention(heads, kv_heads, head_dim, block_size, window):
    paged = Paged([1, 16, 17, 64, 65, 130], heads, kv_heads, head_dim, block_size)
    paged.store(attention)
    keys, values = paged.keys.copy(), paged.values.copy()
    paged.store(reference)
    np.testing.assert_array_equal(keys, paged.keys)
    np.testing.assert_array_equal(values, paged.values)
    close(paged.attend(attention, window=window), paged.attend(reference, window=window), 5e-6)


def test_attention_alone_in_chunks_and_together_is_the_same_bit_for_bit():
    paged = Paged([33, 130, 7], 4, 2, 24, 16)
    paged.store(attention)
    together = paged.attend(attention)
    for size in (1, 7, 64):
        chunks = [paged.attend(attention, slice(i, i + size)) for i in range(0, len(together), size)]
        np.testing.assert_array_equal(np.concatenate(chunks), together)


def test_attention_with_one_huge_score():
    """A softmax that does not subtract its maximum overflows here."""
    paged = Paged([100], 2, 2, 32, 16)
    paged.qkv *= 60
    paged.store(attention)
    # Scores near 20,000 carry float32 errors near 0.002, which the exponential turns into relative ones.
    close(paged.attend(attention), paged.attend(reference), 0.01)


def test_what_is_not_a_number_is_not_hidden():
    """A nan in a query, a key or a gate comes out as nan: kernels that clamp must not turn damage into an answer."""
    paged = Paged([20], 2, 2, 32, 16)
    paged.qkv[5, 3] = np.nan
    paged.store(attention)
    assert np.isnan(paged.attend(attention)[5, :32]).all()
    x = random(1, 1, 64)
    x[0, 7] = np.nan
    assert np.isnan(activation.silu_mul(x)[0, 7])
    assert np.isnan(activation.gelu(x)[0, 7])
    assert np.isnan(activation.gelu_tanh(x)[0, 7])


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_a_damaged_row_stays_damaged_in_eight_bits_and_alone(damage):
    """Integers have no nan: the scale carries it, into its own row and into no other."""
    x, w = random(1, 3, 100), random(2, 70, 100)
    x[1, 77] = damage
    packed, scales = quant.pack_int8(w, 64)
    y = matmul.matmul_int8(x, packed, scales, EMPTY, 70)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()
