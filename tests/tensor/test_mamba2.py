"""Mamba2's kernels against their NumPy twins, against transformers, and against themselves in other batches."""

import numpy as np
import pytest
from arrays import random
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve.tensor import _jit, mamba2
from tinyserve.tensor import program as programs
from tinyserve.tensor import reference_mamba2 as reference
from tinyserve.tensor.mamba2 import Convolution, Scan, Sequences

pytestmark = pytest.mark.usefixtures("threads")

NO_LIMIT = np.float32(0.0), np.float32(np.inf)
LIMIT = np.float32(0.001), np.float32(0.1)
EPS = np.float32(1e-5)


def close(got, expected, tolerance=2e-6):
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    assert np.abs(got - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=1e-20)


class Mixer:
    """One layer's weights, and sequences that begin with a past: everything between `in_proj` and `out_proj`."""

    def __init__(self, heads=5, d_head=24, d_state=16, groups=1, d_conv=4, seed=0):
        self.heads, self.d_head, self.d_state, self.groups, self.d_conv = heads, d_head, d_state, groups, d_conv
        self.inner = heads * d_head
        self.channels = self.inner + 2 * groups * d_state
        self.weight, self.bias = random(seed, d_conv, self.channels), random(seed + 1, self.channels)
        self.A, self.D = -np.exp(random(seed + 2, heads)), random(seed + 3, heads)
        self.dt_bias, self.norm = random(seed + 4, heads), random(seed + 5, self.inner)

    def memory(self, slots, seed=9):
        """What `slots` sequences remember: windows and states."""
        windows = random(seed, slots, self.d_conv - 1, self.channels)
        return windows, random(seed + 1, slots, self.heads, self.d_state, self.d_head)

    def tokens(self, count, seed=20):
        """The product of in_proj: z | x, B, C | dt."""
        return random(seed, count, self.inner + self.channels + self.heads)

    def run(self, module, projected, lengths, slots, memory, limit=NO_LIMIT):
        """projected (tokens, width) -> (xBC, y, normed y) of sequences of these lengths, side by side."""
        sequences = Sequences(np.concatenate([[0], np.cumsum(lengths)]), np.array(slots))
        return self.layer(module, projected, sequences, memory, limit)

    def layer(self, module, projected, sequences, memory, limit=NO_LIMIT):
        """The same of these sequences."""
        windows, states = memory
        convolution = Convolution(self.weight, self.bias)
        scan = Scan(self.A, self.D, self.dt_bias, *limit, self.groups)
        xBC = module.causal_conv1d(projected, self.inner, convolution, windows, sequences)
        y = module.selective_scan(xBC, projected, scan, states, sequences)
        return xBC, y, module.gated_rms_norm(y, projected, self.norm, EPS, self.groups)


SHAPES = [
    {},
    {"heads": 1, "d_head": 7, "d_state": 16, "d_conv": 3},
    {"heads": 6, "d_head": 32, "d_state": 128, "groups": 2},
    {"heads": 4, "d_head": 64, "d_state": 128, "groups": 2, "d_conv": 3},
    {"heads": 5, "d_head": 24, "d_state": 7, "groups": 5, "d_conv": 2},  # no multiple of a register tile
    {"heads": 12, "d_head": 32, "d_state": 128},
    {"heads": 3, "d_head": 80, "d_state": 13},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[1], [33], [5, 1, 70], [1, 1, 1], [0, 3], [64, 2]])
def test_every_kernel_is_its_twin(shape, lengths):
    mixer = Mixer(**shape)
    slots = [2, 0, 4][: len(lengths)]
    projected, memory = mixer.tokens(sum(lengths)), mixer.memory(5)
    expected_memory = tuple(array.copy() for array in memory)
    got = mixer.run(mamba2, projected, lengths, slots, memory)
    expected = mixer.run(reference, projected, lengths, slots, expected_memory)
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-5)
    np.testing.assert_array_equal(memory[0], expected_memory[0])
    close(memory[1], expected_memory[1], 1e-5)
    untouched = mixer.memory(5)
    for slot in {0, 1, 2, 3, 4} - set(slots):
        np.testing.assert_array_equal(memory[0][slot], untouched[0][slot])
        np.testing.assert_array_equal(memory[1][slot], untouched[1][slot])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_sequence_in_chunks_and_at_once_is_the_same_bit_for_bit(shape, size):
    mixer = Mixer(**shape)
    projected, memory = mixer.tokens(130), mixer.memory(1)
    chunked = tuple(array.copy() for array in memory)
    together = mixer.run(mamba2, projected, [130], [0], memory)
    parts = [projected[i : i + size].copy() for i in range(0, 130, size)]
    chunks = [mixer.run(mamba2, part, [len(part)], [0], chunked) for part in parts]
    for whole, pieces in zip(together, zip(*chunks, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    for a, b in zip(memory, chunked, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), seed=st.integers(0, 9), shape=st.sampled_from(SHAPES)
)
def test_a_sequence_alone_and_in_company_is_the_same_bit_for_bit(lengths, seed, shape):
    mixer = Mixer(**shape)
    slots = np.random.default_rng(seed).permutation(len(lengths) + 1)[: len(lengths)]
    projected, memory = mixer.tokens(sum(lengths), seed), mixer.memory(len(lengths) + 1)
    alone = tuple(array.copy() for array in memory)
    together = mixer.run(mamba2, projected, lengths, slots, memory)
    ends = np.cumsum(lengths)
    for slot, length, end in zip(slots, lengths, ends, strict=True):
        rows = slice(end - length, end)
        for a, b in zip(mixer.run(mamba2, projected[rows].copy(), [length], [slot], alone), together, strict=True):
            np.testing.assert_array_equal(a, b[rows])
    for a, b in zip(memory, alone, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_number_of_threads_changes_no_bit():
    mixer = Mixer(heads=12, d_head=32, d_state=128)
    results = []
    for count in (1, 2):
        _jit.set_threads(count)
        memory = mixer.memory(3)
        results.append((*mixer.run(mamba2, mixer.tokens(80), [1, 70, 9], [0, 1, 2], memory), *memory))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_program_reads_its_arrays_each_time_it_runs():
    """Recorded for one division into sequences and one choice of slots, and run for another."""
    mixer = Mixer(heads=3, d_head=16)
    projected, memory = mixer.tokens(9), mixer.memory(4)
    sequences = Sequences(np.array([0, 4, 9]), np.array([1, 3]))
    with programs.capture(programs.Arena()) as program:
        results = mixer.layer(mamba2, projected, sequences, memory)
    projected[:] = mixer.tokens(9, seed=30)
    sequences.starts[:], sequences.slots[:] = [0, 1, 9], [2, 0]
    expected_memory = tuple(array.copy() for array in memory)
    program.run()
    expected = mixer.run(mamba2, projected, [1, 8], [2, 0], expected_memory)
    for a, b in zip((*results, *memory), (*expected, *expected_memory), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_not_a_number_is_not_hidden():
    """A nan in dt, x or the gate comes out as nan in its own head, sequence and channels, and nowhere else."""
    mixer = Mixer(heads=3, d_head=16)
    projected = mixer.tokens(10)
    projected[2, -3] = np.nan  # the first head's dt
    projected[7, mixer.inner + 20] = np.nan  # the second head's x
    projected[1, 40] = np.nan  # a gate
    memory = mixer.memory(2)
    xBC, y, normed = mixer.run(mamba2, projected, [5, 5], [0, 1], memory, LIMIT)
    assert np.isnan(xBC[7:, 20]).all()
    assert np.isnan(y[2:5, :16]).all()
    assert np.isnan(memory[1][0, 0]).all()
    assert np.isnan(y[7:, 20]).all()
    assert np.isnan(normed[1]).all()
    assert np.isfinite(y[:2]).all()
    assert np.isfinite(y[2:5, 16:]).all()
    assert np.isfinite(np.delete(y[5:], 20, axis=1)).all()


@pytest.mark.parametrize("dt", [-1e30, -200.0, -87.0, -30.0, 0.0, 30.0, 90.0, 1e4, 1e12])
@pytest.mark.parametrize("limit", [NO_LIMIT, LIMIT])
def test_extremes_of_dt_are_finite(dt, limit):
    """A step so small that the state stays, or so large that it forgets everything: never an overflow on the way."""
    mixer = Mixer(heads=3, d_head=16)
    projected, memory = mixer.tokens(20), mixer.memory(1)
    projected[:, -3:] = dt
    expected_memory = tuple(array.copy() for array in memory)
    _, y, normed = mixer.run(mamba2, projected, [20], [0], memory, limit)
    _, expected, _ = mixer.run(reference, projected, [20], [0], expected_memory, limit)
    assert np.isfinite(y).all()
    assert np.isfinite(memory[1]).all()
    assert np.isfinite(normed).all()
    close(y, expected, 1e-5)


def test_softplus_keeps_its_relative_precision_when_it_is_tiny():
    """log(1 + e^v) taken literally is zero below -17; through y = dt·x·B·C, with B = C = 1, it is seen as it is."""
    dt = np.linspace(-80, 20, 3001, dtype=np.float32)[:, None]
    xBC, one, zero = np.ones((len(dt), 3), np.float32), np.ones(1, np.float32), np.zeros(1, np.float32)
    states = np.zeros((len(dt), 1, 1, 1), np.float32)
    sequences = Sequences(np.arange(len(dt) + 1), np.arange(len(dt)))
    y = mamba2.selective_scan(xBC, dt, Scan(-one, zero, zero, *NO_LIMIT, 1), states, sequences)
    np.testing.assert_allclose(y, np.logaddexp(0, dt.astype(np.float64)), rtol=1e-6)


def test_a_layer_is_that_of_transformers():
    import torch
    from transformers import GraniteMoeHybridConfig
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        hidden_size=80, num_hidden_layers=1, layer_types=["mamba"], mamba_n_heads=10, mamba_d_head=16, mamba_d_state=24,
        mamba_n_groups=2, mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=32, rms_norm_eps=1e-5,
    )  # fmt: skip
    layer = GraniteMoeHybridMambaLayer(config, 0).eval()
    for name in ("A_log", "D", "dt_bias", "norm.weight"):
        torch.nn.init.normal_(layer.get_parameter(name))
    x = torch.randn(1, 75, 80)
    with torch.no_grad():
        expected = layer(x)[0].numpy()
        projected = np.ascontiguousarray(layer.in_proj(x)[0].numpy())
    weights = {name: tensor.detach().numpy() for name, tensor in layer.named_parameters()}
    mixer = Mixer(heads=10, d_head=16, d_state=24, groups=2)
    mixer.weight, mixer.bias = np.ascontiguousarray(weights["conv1d.weight"][:, 0].T), weights["conv1d.bias"]
    mixer.A, mixer.D, mixer.dt_bias = -np.exp(weights["A_log"]), weights["D"], weights["dt_bias"]
    mixer.norm = weights["norm.weight"]
    memory = tuple(np.zeros_like(array) for array in mixer.memory(1))
    y = mixer.run(mamba2, projected, [75], [0], memory)[-1]
    close(y @ weights["out_proj.weight"].T, expected, 1e-5)


def test_the_scan_goes_on_from_a_state_as_that_of_transformers():
    import torch
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan

    mixer = Mixer(heads=6, d_head=24, d_state=16, groups=2)
    xBC, dt, (_, states) = random(1, 50, mixer.channels), random(2, 50, 6), mixer.memory(1)
    x, B, C = np.split(xBC, [mixer.inner, mixer.inner + 32], axis=1)
    expected, last = mamba2_chunk_scan(
        torch.tensor(x).view(1, 50, 6, 24), torch.tensor(dt)[None], torch.tensor(mixer.A),
        torch.tensor(B).view(1, 50, 2, 16), torch.tensor(C).view(1, 50, 2, 16), chunk_size=16,
        D=torch.tensor(mixer.D), dt_bias=torch.tensor(mixer.dt_bias), dt_softplus=True, dt_limit=(0.05, 2.0),
        initial_states=torch.tensor(states.transpose(0, 1, 3, 2)), return_final_states=True,
    )  # fmt: skip
    scan = Scan(mixer.A, mixer.D, mixer.dt_bias, np.float32(0.05), np.float32(2.0), 2)
    y = mamba2.selective_scan(xBC, dt, scan, states, Sequences(np.array([0, 50]), np.array([0])))
    close(y, expected.numpy().reshape(50, -1), 1e-5)
    close(states.transpose(0, 1, 3, 2), last.numpy(), 1e-5)
