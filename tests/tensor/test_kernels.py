"""Every kernel against its NumPy twin, on shapes that fit no tile, and every row against itself in other batches."""

import numpy as np
import pytest
from arrays import random, with_minimums
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve.models import matrix as matrices
from tinyserve.tensor import _jit, activation, attention, kv_cache, matmul, norm, quant, reference, rope
from tinyserve.tensor.arena import Arena
from tinyserve.tensor.program import capture, instruction
from tinyserve.tensor.simd import load_first, store_first

pytestmark = pytest.mark.usefixtures("threads")

EMPTY = np.empty(0, np.float32)
NO_ALIBI = np.empty((0, 0), np.float32)
SHAPES = [(1, 1, 1), (1, 17, 24), (2, 64, 64), (3, 50, 100), (7, 130, 72), (13, 65, 576), (49, 96, 40), (50, 259, 65)]
INTEGERS = ["w8a16", "w8a8", "w4a16", "w4a8"]
DTYPES = ["float32", "bfloat16", *INTEGERS]


def close(got, expected, tolerance=2e-6):
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    scale = max(1e-20, np.abs(expected).max(initial=0))
    assert np.abs(got - expected).max(initial=0) <= tolerance * scale


class InReference:
    """Makes a packed matrix multiply by the reference's functions instead of the kernels."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("matmul_float", "matmul_integer"):
            self.patch.setattr(matmul, name, getattr(reference, name))

    def __exit__(self, *_):
        self.patch.undo()


def in_reference(matrix, *arguments, **options):
    with InReference():
        return matrix.matmul(*arguments, **options)


# A sum of float32 is right to a few roundings; one of 16-bit integers too; of 8-bit ones, whole steps may round apart.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-6, "w8a16": 1e-5, "w4a16": 1e-5, "w8a8": 2e-3, "w4a8": 2e-3}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul(shape, dtype):
    M, N, K = shape
    x, bias = random(1, M, K), random(3, N)
    matrix = matrices.pack(random(2, N, K), dtype)
    close(matrix.matmul(x), in_reference(matrix, x), TOLERANCE[dtype])
    close(matrix.matmul(x, bias), in_reference(matrix, x, bias), TOLERANCE[dtype])
    if dtype == "float32":
        close(matrix.matmul(x, bias), x @ random(2, N, K).T + bias)


@pytest.mark.parametrize("activated", [matmul.PLAIN, matmul.SILU_MUL, matmul.GELU, matmul.GELU_TANH])
@pytest.mark.parametrize("normed", [norm.NONE, norm.RMS, norm.LAYER])
@pytest.mark.parametrize("dtype", ["float32", "w8a16"])
def test_what_comes_before_and_after_a_product(dtype, normed, activated):
    K, width = 100, 77
    N = 160 if activated == matmul.SILU_MUL else width
    before = norm.Norm(normed, random(5, K), random(6, K), np.float32(1e-5))
    for M in (1, 5, 50):
        x, residual = random(1, M, K) * 3, random(4, M, width)
        matrix = matrices.pack(random(2, N, K), dtype)
        options = {"norm": before, "activation": activated, "width": width, "scale": np.float32(0.25)}
        for more in ({}, {"residual": residual}):
            for bias in (EMPTY, random(3, N)):
                expected = in_reference(matrix, x, bias, **options, **more)
                # A norm rounded otherwise may tip an activation over, by a step in 32,512.
                close(matrix.matmul(x, bias, **options, **more), expected, 4e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_pack_float(shape, bfloat16):
    w = random(2, *shape[1:])
    np.testing.assert_array_equal(quant.pack_float(w, bfloat16), reference.pack_float(w, bfloat16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 64])
def test_pack_bytes(shape, group):
    _, N, K = shape
    w = random(2, N, K)
    packed = quant.pack_bytes(w, group)
    np.testing.assert_array_equal(packed.stream, reference.pack_bytes(w, group))
    # Eight bits keep a matrix within half a step of the largest weight of its group.
    back = reference.unpack(packed, N, K)
    assert np.abs(back - w).max() <= np.abs(w).max() / 127 / 2 * 1.002


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_nibbles(shape):
    """Four bits keep each group as near as the simple rule would, a step being an eighth of its largest weight."""
    _, N, K = shape
    w = random(2, N, K)
    back = reference.unpack(quant.pack_nibbles(w, 32), N, K)
    for k in range(0, K, 32):
        group, error = w[:, k : k + 32], (back - w)[:, k : k + 32]
        step = np.abs(group).max(1, keepdims=True) / 8
        simple = np.clip(np.rint(group / step), -8, 7) * step - group
        assert (np.square(error).sum(1) <= np.square(simple).sum(1) * 1.01 + np.square(group).sum(1) * 1e-6).all()


def test_weights_of_zero_are_zero():
    for dtype in INTEGERS:
        np.testing.assert_array_equal(matrices.pack(np.zeros((17, 40), np.float32), dtype).matmul(random(1, 3, 40)), 0)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 1e30])
def test_extremes_neither_divide_by_zero_nor_overflow(dtype, value):
    x = np.full((2, 64), value, np.float32)
    x[1] = 1.0
    y = matrices.pack(np.ones((16, 64), np.float32), dtype).matmul(x)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[1], 64, rtol=1e-3)
    # Below the smallest scale a group is zero, which is near enough to what it was.
    np.testing.assert_allclose(y[0], 64 * value, rtol=1e-3, atol=1e-30)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("x_sign", [1, -1])
@pytest.mark.parametrize("w_sign", [1, -1])
def test_the_largest_sums_there_are(dtype, x_sign, w_sign):
    """All integers at their extremes: the sums of a group hold the largest product there is."""
    x, w = np.full((3, 128), x_sign, np.float32), np.full((64, 128), w_sign, np.float32)
    np.testing.assert_allclose(matrices.pack(w, dtype).matmul(x), x_sign * w_sign * 128, rtol=1e-3)


def test_minimums_are_added_to_every_weight():
    """What GGUF's Q4_1 needs: w = scale · nibble + minimum."""
    w, x = random(1, 70, 96), random(2, 5, 96)
    packed = with_minimums(quant.pack_nibbles(w, 32), w.shape)
    for bits in (16, 8):
        matrix = matrices.IntegerMatrix(w.shape, packed, bits)
        close(matrix.matmul(x), in_reference(matrix, x), TOLERANCE[f"w4a{bits}"])
        close(matrix.rows(np.arange(70)), reference.unpack(packed, 70, 96))


@instruction
def _copy_halves(team, halves, out):
    from_array = quant.as_float
    for i in range(halves.size):
        out[i] = from_array(halves[i])


def test_every_float16_is_read_as_it_is():
    every = np.arange(65536, dtype=np.uint16).view(np.int16)
    out = np.empty(every.size, np.float32)
    _copy_halves(every, out)
    expected = every.view(np.float16).astype(np.float32)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(out[finite], expected[finite])


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(2, 33), N=st.sampled_from([5, 64, 130]), K=st.sampled_from([24, 64, 200]), seed=st.integers(0, 9)
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype, batch, N, K, seed):
    """Bit for bit, on one thread and on several: the promise that batching changes nobody's answer."""
    x, bias, residual = random(seed, batch, K), random(seed + 2, N), random(seed + 3, batch, N)
    matrix = matrices.pack(random(seed + 1, N, K), dtype)
    before = norm.Norm(norm.RMS, random(3, K), EMPTY, np.float32(1e-5))

    def product(rows, threads):
        with _jit.one_at_a_time(threads):
            return matrix.matmul(
                x[rows].copy(), bias, norm=before, activation=matmul.GELU_TANH, residual=residual[rows].copy()
            )

    together = product(slice(None), 2)
    np.testing.assert_array_equal(product(slice(None), 1), together)
    for m in {0, batch // 2, batch - 1}:
        row = slice(m, m + 1)
        for threads in (1, 2):
            np.testing.assert_array_equal(product(row, threads), together[row])


@pytest.mark.parametrize("batch", [2, 7, 33])
def test_a_normalised_row_does_not_depend_on_its_batch(batch):
    x, weight, bias = random(1, batch, 100), random(3, 100), random(4, 100)
    for function in (
        lambda rows: norm.norm_rows(rows, norm.Norm(norm.RMS, weight, EMPTY, np.float32(1e-5))),
        lambda rows: norm.norm_rows(rows, norm.Norm(norm.LAYER, weight, bias, np.float32(1e-5))),
    ):
        together = function(x)
        for m in range(batch):
            np.testing.assert_array_equal(function(x[m : m + 1].copy()), together[m : m + 1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 24), (3, 16), (5, 577), (40, 100)])
def test_norms(shape):
    x, weight, bias = random(1, *shape) * 3 + 1, random(2, shape[1]), random(3, shape[1])
    eps = np.float32(1e-5)
    close(norm.norm_rows(x, norm.Norm(norm.RMS, weight, EMPTY, eps)), reference.rms_norm(x, weight, eps))
    if shape[1] > 1:
        normed = norm.norm_rows(x, norm.Norm(norm.LAYER, weight, bias, eps))
        close(normed, reference.layer_norm(x, weight, bias, eps), 1e-5)


HEADS = [(1, 1, 1), (5, 5, 24), (6, 2, 20), (3, 1, 100), (16, 8, 128)]  # heads, kv_heads, head_dim


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_norms_of_heads(heads, kv_heads, head_dim, tokens):
    qkv = random(1, tokens, (heads + 2 * kv_heads) * head_dim) * 3 + 1
    weights = random(2, head_dim), random(3, head_dim)
    expected, values = qkv.copy(), qkv[:, (heads + kv_heads) * head_dim :].copy()
    reference.rms_norm_heads(expected, heads, kv_heads, *weights, 1e-6)
    norm.rms_norm_heads(qkv, heads, kv_heads, *weights, np.float32(1e-6))
    close(qkv, expected)
    np.testing.assert_array_equal(qkv[:, (heads + kv_heads) * head_dim :], values)


@pytest.mark.parametrize("batch", [2, 7, 33])
def test_a_token_whose_heads_are_normalised_does_not_depend_on_its_batch(batch):
    x, weights = random(1, batch, 10 * 24), (random(2, 24), random(3, 24))

    def normed(rows, threads):
        _jit.set_threads(threads)
        rows = rows.copy()
        norm.rms_norm_heads(rows, 6, 2, *weights, np.float32(1e-6))
        return rows

    together = normed(x, 2)
    np.testing.assert_array_equal(normed(x, 1), together)
    for m in range(batch):
        np.testing.assert_array_equal(normed(x[m : m + 1], 1), together[m : m + 1])


@instruction
def _apply(team, x, y, which):
    for i in range(0, x.size, 16):
        v = load_first(x, i, x.size - i)
        if which == matmul.GELU:
            v = activation.gelu_vector(v)
        elif which == matmul.GELU_TANH:
            v = activation.gelu_tanh_vector(v)
        else:
            v = activation.silu_vector(v)
        store_first(y, i, v, x.size - i)


@pytest.mark.parametrize("which", [matmul.SILU_MUL, matmul.GELU, matmul.GELU_TANH])
def test_activations(which):
    x = np.concatenate([np.linspace(-12, 12, 999), [-200.0, 90.0, 0.0, -0.0, 1e-30, np.inf]]).astype(np.float32)
    y = np.empty_like(x)
    _apply(x, y, which)
    function = {matmul.SILU_MUL: "silu", matmul.GELU: "gelu", matmul.GELU_TANH: "gelu_tanh"}[which]
    expected = getattr(reference, function)(x.astype(np.float64))
    np.testing.assert_allclose(y, expected, rtol=3e-6, atol=3e-6)
    x[7] = np.nan
    _apply(x, y, which)
    assert np.isnan(y[7])
    assert np.isfinite(np.delete(y, [7, len(y) - 1])).all()


@pytest.mark.parametrize("dtype", ["float32", "w8a8", "w4a16"])
@pytest.mark.parametrize("rows", [255, 256, 400, 641])
def test_a_product_of_many_rows_is_the_same_on_any_number_of_threads(dtype, rows):
    """Each thread has a part of them, and all weights."""
    x, w = random(1, rows, 70), matrices.pack(random(2, 150, 70), dtype)
    _jit.set_threads(1)
    expected = w.matmul(x)
    np.testing.assert_array_equal(w.matmul(x[100:103]), expected[100:103])
    for threads in (2, 3, 5):
        _jit.set_threads(threads)
        np.testing.assert_array_equal(w.matmul(x), expected)


def test_take_rows():
    w, ids = random(1, 70, 100), np.array([0, 69, 3, 3, 64])
    floats, halves = quant.pack_float(w, False), quant.pack_float(w, True)
    np.testing.assert_array_equal(quant.take_rows_float(floats, ids, 100), w[ids])
    np.testing.assert_array_equal(quant.take_rows_float(halves, ids, 100), reference.take_rows_float(halves, ids, 100))
    for packed in (quant.pack_bytes(w, 64), quant.pack_nibbles(w, 32)):
        got, expected = quant.take_rows_integer(packed, ids, 100), reference.take_rows_integer(packed, ids, 100)
        np.testing.assert_array_equal(got, expected)


# What an element of the cache is, and how many numbers it holds.
KV_DTYPES = {"float32": (np.float32, 1), "bfloat16": (np.uint32, 2), "int8": (np.int8, 1)}


class Paged:
    """Several sequences' keys and values in shuffled pages, and one batch of all their tokens."""

    def __init__(self, lengths, heads, kv_heads, head_dim, block_size, seed=0, dtype="float32", rotated=False):
        generator = np.random.default_rng(seed)
        self.heads = kv_cache.Heads(heads, kv_heads, head_dim)
        most = -(-max(lengths) // block_size)
        blocks = generator.permutation(len(lengths) * most + 1).astype(np.int32)
        self.tables = blocks[: len(lengths) * most].reshape(len(lengths), most)
        width = quant.padded(head_dim, 16)
        # What no token has written may be anything: the kernels must not read it into a result.
        anything = {"float32": np.nan, "bfloat16": 0x7FC07FC0, "int8": 77}[dtype]
        kept, numbers = KV_DTYPES[dtype]
        scales = (len(blocks), kv_heads, block_size) if dtype == "int8" else (0, 0, 0)
        self.pages = kv_cache.Pages(
            np.full((len(blocks), kv_heads, -(-head_dim // numbers), block_size), anything, kept),
            np.full((len(blocks), kv_heads, block_size // numbers, width), anything, kept),
            np.full(scales, np.nan, np.float32),
            np.full(scales, np.nan, np.float32),
        )
        self.rope_table = rope.RopeTable(EMPTY.reshape(0, 0), EMPTY.reshape(0, 0))
        if rotated:
            frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
            self.rope_table = rope.rope_table(frequencies, max(lengths))
        self.positions = np.concatenate([np.arange(n) for n in lengths])
        self.sequence_of = np.repeat(np.arange(len(lengths)), lengths)
        self.slots = self.tables[self.sequence_of, self.positions // block_size].astype(np.int64) * block_size
        self.slots += self.positions % block_size
        self.qkv = random(seed, len(self.slots), (heads + 2 * kv_heads) * head_dim)

    def tokens(self, rows):
        return kv_cache.Tokens(self.positions[rows], self.slots[rows], self.sequence_of[rows], self.tables)

    def store(self, module, rows=slice(None)):
        """Write the cache; returns the queries, keys and values as they were rotated."""
        qkv = self.qkv[rows].copy()
        module.rotate_and_store(qkv, self.heads, self.rope_table, self.tokens(rows), self.pages)
        return qkv

    def attend(self, module, rows=slice(None), window=0, alibi=NO_ALIBI):
        scoring = attention.Scoring(np.float32(self.heads.head_dim**-0.5), window, alibi)
        return module.attention(self.qkv[rows], self.heads, scoring, self.tokens(rows), self.pages)


HEADS = [(1, 1, 64), (9, 3, 64), (71, 1, 64), (4, 2, 24), (2, 2, 80), (3, 3, 2)]


@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("rotated", [False, True])
def test_what_is_written_to_the_cache(heads, kv_heads, head_dim, dtype, rotated):
    paged = Paged([1, 17, 40], heads, kv_heads, head_dim, 16, dtype=dtype, rotated=rotated)
    qkv, ours = paged.store(kv_cache), [array.copy() for array in paged.pages]
    close(qkv, paged.store(reference))
    for mine, its in zip(ours, paged.pages, strict=True):
        if dtype == "float32" or mine.dtype == np.float32:
            np.testing.assert_allclose(mine, its, rtol=1e-5, atol=2e-6)
        else:  # a step apart where a number lies in the middle, and rotation rounds differently
            assert np.abs(mine.astype(np.int64) - its).max(initial=0) <= rotated
    first = paged.store(kv_cache, slice(0, 1))
    np.testing.assert_array_equal(first, qkv[:1])


@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("window", [0, 1, 64, 65, 300])
def test_attention(heads, kv_heads, head_dim, block_size, window):
    paged = Paged([1, 16, 17, 64, 65, 130, 600], heads, kv_heads, head_dim, block_size)
    paged.store(kv_cache)
    last = np.cumsum([1, 16, 17, 64, 65, 130, 600]) - 1
    prompt = np.arange(150 if heads < 5 else 800, len(paged.qkv))
    for rows in (last, prompt):
        got, expected = paged.attend(attention, rows, window), paged.attend(reference, rows, window)
        close(got, expected, 5e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_over_a_narrow_cache_and_with_alibi(dtype, biased):
    paged = Paged([1, 70, 300], 6, 2, 24, 16, dtype=dtype)
    paged.store(kv_cache)
    alibi = np.outer(2.0 ** -np.arange(1, 7), np.arange(320)).astype(np.float32) if biased else NO_ALIBI
    # A weight in the middle between two numbers of bfloat16 may be either.
    tolerance = 2e-4 if dtype == "bfloat16" else 1e-5
    close(paged.attend(attention, alibi=alibi), paged.attend(reference, alibi=alibi), tolerance)
    last = np.array([0, 70, 370])
    close(paged.attend(attention, last, alibi=alibi), paged.attend(reference, last, alibi=alibi), tolerance)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [0, 100])
def test_attention_alone_in_chunks_and_together_is_the_same_bit_for_bit(dtype, window):
    paged = Paged([33, 600, 7], 4, 2, 24, 16, dtype=dtype)
    paged.store(kv_cache)
    together = paged.attend(attention, window=window)
    for size in (1, 7, 64, 65, 200):
        chunks = [paged.attend(attention, slice(i, i + size), window) for i in range(0, len(together), size)]
        np.testing.assert_array_equal(np.concatenate(chunks), together)


@pytest.mark.parametrize("group", range(1, 12))
def test_a_head_has_the_same_bits_whichever_share_its_keys(group):
    """Tiles of one to four queries: a head among eleven that share keys, and among fewer."""
    paged = Paged([700], 11, 1, 24, 16, dtype="bfloat16")
    paged.store(kv_cache)
    together = paged.attend(attention)
    few = Paged([700], group, 1, 24, 16, dtype="bfloat16")
    few.qkv = np.concatenate([paged.qkv[:, : group * 24], paged.qkv[:, 11 * 24 :]], axis=1)
    few.pages = paged.pages
    for rows in (slice(None), slice(699, 700), slice(690, 700)):
        np.testing.assert_array_equal(few.attend(attention, rows), together[rows, : group * 24])


@pytest.mark.parametrize("window", [0, 1, 2, 513, 514, 600])
def test_attention_is_the_same_with_room_for_longer_sequences_and_on_other_threads(window):
    """How many spans a query could have decides who computes them, not what they come to."""
    paged = Paged([1, 513, 40, 1500], 4, 2, 24, 16)
    paged.store(kv_cache)
    rows = np.concatenate([[0], np.arange(500, 520), [553], np.arange(2040, 2054)])
    _jit.set_threads(1)
    expected = paged.attend(attention, rows, window)
    paged.tables = np.concatenate([paged.tables, np.zeros((4, 400), np.int32)], axis=1)
    for threads in (1, 2, 5):
        _jit.set_threads(threads)
        np.testing.assert_array_equal(paged.attend(attention, rows, window), expected)


def test_a_recorded_attention_follows_what_its_arrays_say():
    """A program is recorded once for a shape, and replayed for sequences of other lengths in other blocks."""
    paged = Paged([1500, 900, 30], 6, 2, 24, 16)
    paged.store(kv_cache)
    last = np.array([1499, 2399, 2429])
    tokens = paged.tokens(last)
    tokens = kv_cache.Tokens(*[array.copy() for array in tokens])
    qkv = paged.qkv[last].copy()
    scoring = attention.Scoring(np.float32(0.2), 0, NO_ALIBI)
    with capture(Arena()) as program:
        out = attention.attention(qkv, paged.heads, scoring, tokens, paged.pages)
    for rows in (last, [0, 1500, 2400], [700, 2011, 2012], [511, 512, 2429]):
        now = paged.tokens(np.array(rows))
        for array, new in zip(tokens, now, strict=True):
            array[:] = new
        qkv[:] = paged.qkv[rows]
        program.run()
        np.testing.assert_array_equal(out, attention.attention(qkv, paged.heads, scoring, now, paged.pages))


def test_attention_with_one_huge_score():
    """A softmax that does not subtract its maximum overflows here."""
    paged = Paged([100], 2, 2, 32, 16)
    paged.qkv *= 60
    paged.store(kv_cache)
    # Scores near 20,000 carry float32 errors near 0.002, which the exponential turns into relative ones.
    close(paged.attend(attention), paged.attend(reference), 0.01)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_what_is_not_a_number_is_not_hidden(dtype):
    """A nan in a query or a key comes out as nan: kernels that clamp must not turn damage into an answer."""
    paged = Paged([20], 2, 2, 32, 16, dtype=dtype)
    paged.qkv[5, 3] = np.nan  # a query's
    paged.qkv[9, 64 + 3] = np.nan  # a key's of the first head
    paged.store(kv_cache)
    out = paged.attend(attention)
    assert np.isnan(out[5, :32]).all() and np.isnan(out[9:, :32]).all()
    assert np.isfinite(out[:5]).all() and np.isfinite(out[:, 32:]).all()


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_a_damaged_row_stays_damaged_in_integers_and_alone(dtype, damage):
    """Integers have no nan: the scale carries it, into its own row and into no other."""
    x = random(1, 3, 100)
    x[1, 77] = damage
    y = matrices.pack(random(2, 70, 100), dtype).matmul(x)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()
