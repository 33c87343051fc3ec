"""Sampling against its NumPy twin, against exact probabilities, and every row against itself in other batches."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyserve.tensor import reference
from tinyserve.tensor.sampling import CHUNK, log_probabilities, sample

pytestmark = pytest.mark.usefixtures("threads")

NEAR = 2e-6  # what rounding can do to a probability


def arguments(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    kinds = (float, np.int64, float, float)
    return [np.full(rows, x, kind) for x, kind in zip((temperature, top_k, top_p, min_p), kinds, strict=True)]


def logits_of(shape, vocab, seed):
    """Random logits (vocab,) of a shape that is hard in some way."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(vocab).astype(np.float32)
    match shape:
        case "plain":
            return x * np.float32(3)
        case "flat":
            return np.full(vocab, x[0], np.float32)
        case "tied":
            return np.rint(x)
        case "tied, with two zeros":
            return np.where(x < 0, np.float32(-0.0), np.rint(x))
        case "one peak":
            x[random.integers(vocab)] += 1000
            return x
        case "one left":
            y = np.full(vocab, -np.inf, np.float32)
            y[random.integers(vocab)] = x[0]
            return y
        case "masked":
            return np.where(np.arange(vocab) % 3 == random.integers(3) % min(vocab, 3), x, np.float32(-np.inf))
        case "far from zero":
            return x + np.float32(1e4)
        case "huge":
            return x * np.float32(1e30)


SHAPES = ("plain", "flat", "tied", "tied, with two zeros", "one peak", "one left", "masked", "far from zero", "huge")


@settings(max_examples=300, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    vocab=st.sampled_from([1, 2, 15, 16, 17, 100, CHUNK - 1, CHUNK, CHUNK + 1, 1000, 5000]),
    temperature=st.sampled_from([1e-300, 1e-6, 0.1, 0.7, 1.0, 2.0, 100.0, 1e30]),
    top_k=st.sampled_from([-1, 0, 1, 2, 7, 40, 999, 10**9]),
    top_p=st.sampled_from([1e-300, 1e-6, 0.1, 0.5432, 0.9, 0.999, 1 - 1e-16, 1.0]),
    min_p=st.sampled_from([0.0, 1e-300, 1e-3, 0.1, 0.5, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 99),
)
@example("plain", 5000, 1.0, 0, 1.0, 0.0, 1 - 2**-53, 0)
@example("masked", 1000, 1.0, 0, 1.0, 0.0, 1 - 2**-53, 0)
@example("tied", 5000, 1.0, 999, 0.9, 0.0, 1 - 2**-53, 0)
def test_the_kernel_is_its_twin(shape, vocab, temperature, top_k, top_p, min_p, uniform, seed):
    """Or, where a sum ends within rounding of its limit, what the twin says a rounding further on."""
    logits = logits_of(shape, vocab, seed)[None]
    [got] = sample(logits, *arguments(1, temperature, top_k, top_p, min_p), np.array([uniform]))
    assert np.isfinite(logits[0, got])
    near = {
        int(reference.sample(logits, *arguments(1, temperature, top_k, p, m), np.array([u]))[0])
        for p in (top_p * (1 - NEAR), top_p, min(1.0, top_p * (1 + NEAR)))
        for m in (min_p * (1 - NEAR), min_p)
        for u in (max(0.0, uniform - NEAR), uniform, uniform + NEAR)
    }
    assert min(near) <= got <= max(near)
    if len(near) == 1:
        assert got in near


def test_the_twins_agree_nearly_always():
    """What is near a limit is an exception: of 2,000 draws at most a few may fall there, whatever is asked for."""
    random = np.random.default_rng(1)
    logits = random.standard_normal((2000, 700), dtype=np.float32) * 2
    given = (
        random.choice([0.0, 0.5, 1.0, 1.7], 2000),
        random.choice([0, 1, 30, 300], 2000),
        random.choice([0.3, 0.9, 1.0], 2000),
        random.choice([0.0, 0.02], 2000),
        random.random(2000),
    )
    assert (sample(logits, *given) != reference.sample(logits, *given)).sum() <= 3


def exact(logits, temperature, top_k, top_p, min_p):
    """Each token's probability, token by token, as the papers put it."""
    weights = [float(np.exp(np.float64(x - max(logits)) / temperature)) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        ranked = ranked[:top_k]
    total, kept, mass = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        if mass / total < top_p and weights[i] >= min_p * weights[ranked[0]]:
            kept.append(i)
        mass += weights[i]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = [weights[i] / sum(weights[k] for k in kept) for i in kept]
    return probabilities


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [(1, 0, 1, 0), (0.5, 0, 1, 0), (3, 0, 1, 0), (1, 5, 1, 0), (1, 0, 0.8, 0), (1, 0, 1, 0.1), (1.3, 20, 0.9, 0.05)],
)
def test_tokens_come_as_often_as_they_should(temperature, top_k, top_p, min_p):
    """Chi-square over 40,000 draws: the seed is fixed, and one in a few million would fail."""
    random, draws = np.random.default_rng(5), 40_000
    logits = (random.standard_normal(300) * 2).astype(np.float32)
    logits[7] = logits[200] = logits.max() - 1  # equals
    given = arguments(draws, temperature, top_k, top_p, min_p)
    ids = sample(np.tile(logits, (draws, 1)), *given, random.random(draws))
    expected = draws * exact(logits, temperature, top_k, top_p, min_p)
    counts = np.bincount(ids, minlength=300)
    assert not counts[expected == 0].any()
    rare = expected < 10  # together in one class
    classes = [*zip(counts[~rare], expected[~rare], strict=True), (counts[rare].sum(), expected[rare].sum())]
    classes = [(count, share) for count, share in classes if share > 0]
    freedom = len(classes) - 1
    assert freedom >= 4
    statistic = sum((count - share) ** 2 / share for count, share in classes)
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_greedy_takes_the_first_of_equals():
    logits = np.array([[1, 3, 2, 3], [5, 5, 5, 5], [-np.inf, -np.inf, 0, -np.inf]], np.float32)
    np.testing.assert_array_equal(sample(logits, *arguments(3, temperature=0), np.full(3, 0.9)), [1, 0, 2])


def test_of_equals_top_k_and_top_p_keep_the_lower_ids():
    logits, uniform = np.zeros((100, 1000), np.float32), np.linspace(0, 1, 100, endpoint=False)
    for limit in ({"top_k": 3}, {"top_p": 0.0025}):
        assert set(sample(logits, *arguments(100, **limit), uniform)) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_a_number_is_reported_for_its_row_alone(temperature):
    random = np.random.default_rng(2)
    logits = random.standard_normal((6, 400), dtype=np.float32)
    logits[1, 300], logits[2, 0], logits[3] = np.nan, np.inf, -np.inf
    logits[4, :390] = -np.inf
    given = arguments(6, temperature), random.random(6)
    ids = sample(logits, *given[0], given[1])
    np.testing.assert_array_equal(ids, reference.sample(logits, *given[0], given[1]))
    np.testing.assert_array_equal(ids == -1, [False, True, True, True, False, False])
    assert ids[4] >= 390


def test_a_row_does_not_depend_on_its_batch():
    """Nor on who in it is greedy, and who wants what."""
    random = np.random.default_rng(3)
    logits = random.standard_normal((40, 3000), dtype=np.float32)
    given = [
        random.choice([0.0, 0.9, 1.5], 40),
        random.choice([0, 50], 40),
        random.choice([0.7, 1.0], 40),
        random.choice([0.0, 0.1], 40),
        random.random(40),
    ]
    together = sample(logits, *given)
    for m in range(40):
        assert sample(logits[m : m + 1], *(x[m : m + 1] for x in given)) == together[m : m + 1]


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from([shape for shape in SHAPES if shape != "huge"]),
    vocab=st.sampled_from([1, 15, 16, 100, CHUNK, CHUNK + 1, 1000, 30_000]),
    counts=st.lists(st.sampled_from([0, 1, 2, 20, 100]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_log_probabilities(shape, vocab, counts, seed):
    """The same tokens in the same order; the numbers as near as the logits' own rounding."""
    logits = np.stack([logits_of(shape, vocab, seed + row) for row in range(len(counts))])
    chosen = np.random.default_rng(seed).integers(vocab, size=len(counts))
    got = log_probabilities(logits, chosen, np.array(counts))
    for mine, expected in zip(got, reference.log_probabilities(logits, chosen, counts), strict=True):
        assert list(mine) == list(expected)
        np.testing.assert_allclose(list(mine.values()), list(expected.values()), rtol=0, atol=1e-6)
