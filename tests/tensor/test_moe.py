"""The routing of a mixture of experts against its NumPy twin, against torch, and against itself in other batches."""

import numpy as np
import pytest
from arrays import random
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve.tensor import moe
from tinyserve.tensor import program as programs
from tinyserve.tensor import reference_mamba2 as reference

pytestmark = pytest.mark.usefixtures("threads")


@pytest.mark.parametrize("tokens, experts, k", [(1, 1, 1), (1, 64, 6), (9, 5, 5), (40, 32, 8), (3, 100, 20)])
@pytest.mark.parametrize("hidden", [1, 24, 64, 300])
def test_every_kernel_is_its_twin(tokens, experts, k, hidden):
    logits, x, onto = random(1, tokens, experts), random(2, tokens, hidden), random(3, tokens, hidden)
    ids, weights = moe.route(logits, k)
    expected_ids, expected_weights = reference.route(logits, k)
    assert (ids.dtype, weights.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6)
    row_of, offsets = moe.group_by_expert(ids, experts)
    expected_row_of, expected_offsets = reference.group_by_expert(ids, experts)
    np.testing.assert_array_equal(row_of, expected_row_of)
    np.testing.assert_array_equal(offsets, expected_offsets)
    rows = moe.gather_rows(x, row_of)
    np.testing.assert_array_equal(rows, reference.gather_rows(x, row_of))
    y = moe.combine(rows, row_of, weights, onto)
    np.testing.assert_allclose(y, reference.combine(rows, row_of, weights, onto), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, onto + x, rtol=1e-5, atol=1e-6)  # the weights sum to one


def test_of_equal_logits_the_lower_expert_comes_first():
    logits = np.array([[1, 3, 3, 0, 3], [2, 2, 2, 2, 2]], np.float32)
    ids, weights = moe.route(logits, 4)
    np.testing.assert_array_equal(ids, [[1, 2, 4, 0], [0, 1, 2, 3]])
    np.testing.assert_array_equal(weights[1], 0.25)


def test_an_expert_that_nobody_goes_to_has_no_rows():
    row_of, offsets = moe.group_by_expert(np.array([[3, 1], [1, 3]]), 5)
    np.testing.assert_array_equal(offsets, [0, 0, 2, 2, 4, 4])
    np.testing.assert_array_equal(row_of, [[2, 0], [1, 3]])


def experts_of(x, logits, k, matrices):
    """A whole mixture, its experts as plain as can be: a function of a row's own numbers, whoever stands beside it."""
    ids, weights = moe.route(logits, k)
    row_of, offsets = moe.group_by_expert(ids, len(matrices))
    rows = moe.gather_rows(x, row_of)
    for e, matrix in enumerate(matrices):
        for row in range(offsets[e], offsets[e + 1]):
            rows[row] = matrix @ rows[row]
    return moe.combine(rows, row_of, weights, x)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(2, 30), k=st.integers(1, 6), hidden=st.sampled_from([16, 24]), seed=st.integers(0, 9))
def test_a_token_does_not_depend_on_its_batch(tokens, k, hidden, seed):
    """Bit for bit: its rows are added by rank, not by the order in which experts happen to be computed."""
    x, logits, matrices = random(seed, tokens, hidden), random(seed + 1, tokens, 6), random(seed + 2, 6, hidden, hidden)
    together = experts_of(x, logits, k, matrices)
    for m in range(tokens):
        alone = experts_of(x[m : m + 1].copy(), logits[m : m + 1].copy(), k, matrices)
        np.testing.assert_array_equal(alone[0], together[m])


def test_a_program_reads_its_arrays_each_time_it_runs():
    """Recorded for some logits, and run for others, which send the tokens elsewhere."""
    x, logits, onto = random(1, 9, 24), random(2, 9, 6), random(3, 9, 24)

    def mixture():
        ids, weights = moe.route(logits, 2)
        row_of, offsets = moe.group_by_expert(ids, 6)
        return offsets, moe.combine(moe.gather_rows(x, row_of), row_of, weights, onto)

    with programs.capture(programs.Arena()) as program:
        results = mixture()
    logits[:] = random(4, 9, 6)
    program.run()
    for a, b in zip(results, mixture(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_what_is_not_a_number_is_not_hidden(damage):
    logits = random(1, 3, 10)
    logits[1, 7] = damage
    ids, weights = moe.route(logits, 2)
    assert ids[1, 0] == 7
    assert np.isnan(weights[1]).any()
    assert np.isfinite(weights[[0, 2]]).all()
    row_of, _ = moe.group_by_expert(ids, 10)
    y = moe.combine(random(2, 6, 20), row_of, weights, random(3, 3, 20))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_a_mixture_is_that_of_transformers():
    import torch
    from transformers import GraniteMoeHybridConfig
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMoE

    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        hidden_size=32, intermediate_size=24, num_local_experts=8, num_experts_per_tok=3, mamba_n_heads=4
    )
    block = GraniteMoeHybridMoE(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 11, 32)
    with torch.no_grad():
        expected = block(x)[0].numpy()
        logits = (x[0] @ block.router.weight.T).numpy()
    gate_up, down = block.experts.gate_up_proj.detach().numpy(), block.experts.down_proj.detach().numpy()
    ids, weights = moe.route(logits, 3)
    row_of, offsets = moe.group_by_expert(ids, 8)
    rows = moe.gather_rows(x[0].numpy(), row_of)
    for e in range(8):
        mine = slice(offsets[e], offsets[e + 1])
        gate, up = np.split(rows[mine] @ gate_up[e].T, 2, axis=1)
        rows[mine] = (reference.silu(gate) * up) @ down[e].T
    y = moe.combine(rows, row_of, weights, np.zeros((11, 32), np.float32))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
