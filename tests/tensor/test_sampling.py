"""Sampling against its NumPy twin, against exact probabilities, and every row against itself in other batches."""

from itertools import product

import numpy as np
import pytest
from arrays import assert_drawn_from
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import Oracle

from tinyserve import SamplingParams
from tinyserve.tensor import _jit, sampling
from tinyserve.tensor import reference_sampling as reference
from tinyserve.tensor.arena import Arena
from tinyserve.tensor.program import capture
from tinyserve.tensor.sampling import CHUNK, FILTERS, SETTINGS, find_largest, log_probabilities, sample

pytestmark = pytest.mark.usefixtures("threads")

NEAR = 2e-6  # what rounding can do to a probability


NEUTRAL = {name: SamplingParams.rows[name].default for name in ("temperature", *FILTERS)}


def settings_of(rows, **asked):
    """A row of SETTINGS for each of so many, with numbers or arrays for some, and what changes nothing for the rest."""
    made = np.zeros(rows, SETTINGS)
    for name, value in (NEUTRAL | asked).items():
        made[name] = value
    return made


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


VOCABULARIES = [1, 2, 15, 16, 17, 100, CHUNK - 1, CHUNK, CHUNK + 1, 1000, 5000]
LOGITS = {
    "shape": st.sampled_from(SHAPES),
    "vocab": st.sampled_from(VOCABULARIES),
    "seed": st.integers(0, 99),
}
ASKED = {
    "temperature": st.sampled_from([1e-300, 1e-6, 0.1, 0.7, 1.0, 2.0, 100.0, 1e30]),
    "top_k": st.sampled_from([-1, 0, 1, 2, 7, 40, 999, 10**9]),
    "top_p": st.sampled_from([1e-300, 1e-6, 0.1, 0.5432, 0.9, 0.999, 1 - 1e-16, 1.0]),
    "top_n_sigma": st.sampled_from([-1.0, 0.0, 1e-300, 0.1, 0.5, 1.0, 1.7, 3.0, 1e300]),
    "min_p": st.sampled_from([0.0, 1e-300, 1e-3, 0.1, 0.5, 1.0]),
    "typical_p": st.sampled_from([1e-300, 0.1, 0.5432, 0.9, 0.999, 1.0]),
}


def near(asked):
    """What is asked for, and that with each limit on a sum, or made of one, a rounding earlier and later."""
    limits = {"top_p": 1.0, "typical_p": 1.0, "top_n_sigma": np.inf}
    values = [
        sorted({asked[name] * (1 - NEAR), asked[name], min(most, asked[name] * (1 + NEAR))})
        for name, most in limits.items()
    ]
    return [asked | dict(zip(limits, some, strict=True)) for some in product(*values)]


@settings(max_examples=300, deadline=None)
@given(**LOGITS, asked=st.fixed_dictionaries(ASKED), uniform=st.floats(0, 1, exclude_max=True))
@example("plain", 5000, 0, NEUTRAL, 1 - 2**-53)
@example("masked", 1000, 0, NEUTRAL, 1 - 2**-53)
@example("tied", 5000, 0, NEUTRAL | {"top_k": 999, "top_p": 0.9}, 1 - 2**-53)
@example("tied", 5000, 0, NEUTRAL | {"top_k": 999, "top_p": 0.9, "typical_p": 0.5}, 1 - 2**-53)
def test_the_kernel_is_its_twin(shape, vocab, seed, asked, uniform):
    """Or, where a sum ends within rounding of its limit, what the twin says a rounding further on."""
    logits = logits_of(shape, vocab, seed)[None]
    [got] = sample(logits, settings_of(1, **asked, uniform=uniform))
    assert np.isfinite(logits[0, got])
    twins = {
        int(reference.sample(logits, settings_of(1, **other, uniform=u))[0])
        for other in near(asked)
        for u in (max(0.0, uniform - NEAR), uniform, uniform + NEAR)
    }
    assert min(twins) <= got <= max(twins)
    if len(twins) == 1:
        assert got in twins


def greedy(logits):
    return find_largest(logits)[0]


keep = _jit.cached_kernel(sampling.keep.py_func)


def kept(logits, asked):
    """The kernel's set, without what is impossible anyway."""
    [largest], [peaks] = find_largest(logits[None])
    assert largest == logits.argmax()
    ids, values = keep(logits, peaks, logits.max(), settings_of(1, **asked)[0])
    ids = ids if ids.size else np.arange(logits.size)
    assert (np.diff(ids) > 0).all() and (logits[ids] == (values if values.size == ids.size else logits)).all()
    return set(ids[logits[ids] > -np.inf].tolist())


def kept_by_twin(logits, asked):
    ids = reference.keep(logits, settings_of(1, **asked)[0])
    return set(ids[logits[ids] > -np.inf].tolist())


@settings(max_examples=300, deadline=None)
@given(**LOGITS, asked=st.fixed_dictionaries(ASKED))
@example("huge", 1000, 3, NEUTRAL | {"temperature": 100.0, "typical_p": 0.5})
@example("one peak", 5000, 3, NEUTRAL | {"temperature": 1e30, "top_p": 0.999, "typical_p": 0.999})
# Two as far from the mean as each other.
@example("one peak", 2, 1, NEUTRAL | {"temperature": 1e30, "top_p": 1e-300, "typical_p": 1e-300})
@example("masked", 16, 0, NEUTRAL | {"temperature": 1e30, "top_k": 2, "top_p": 1e-300, "typical_p": 1e-300})
def test_the_filters_keep_what_their_twins_keep(shape, vocab, seed, asked):
    logits = logits_of(shape, vocab, seed)
    twins = [kept_by_twin(logits, other) for other in near(asked)]
    got = kept(logits, asked)
    assert set.intersection(*twins) <= got <= set.union(*twins)


@pytest.mark.parametrize("vocab", [1, 17, 1000, 32_003])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 40}, {"min_p": 0.03}, {"top_p": 0.9}, {"typical_p": 0.9}, {"typical_p": 0.2},
        {"top_n_sigma": 1.0}, {"top_n_sigma": 2.5}, {"top_n_sigma": 1.5, "top_k": 9, "top_p": 0.9},
        {"top_k": 300, "min_p": 1e-4, "typical_p": 0.95, "top_p": 0.9},
    ],
    ids=lambda filters: "+".join(filters),
)  # fmt: skip
def test_the_kept_sets_are_equal_bit_for_bit(vocab, filters):
    """On 40 rows of random logits none of these sums ends within rounding of its limit."""
    for seed in range(40):
        logits = logits_of("plain", vocab, seed)
        asked = {"temperature": 0.8} | filters
        assert kept(logits, asked) == kept_by_twin(logits, asked)


@pytest.mark.parametrize(
    "filters, warper",
    [
        ({"top_k": 40}, "TopKLogitsWarper"),
        ({"min_p": 0.03}, "MinPLogitsWarper"),
        ({"top_p": 0.9}, "TopPLogitsWarper"),
        ({"typical_p": 0.9}, "TypicalLogitsWarper"),
        ({"typical_p": 0.3}, "TypicalLogitsWarper"),
    ],
)
def test_the_filters_keep_what_transformers_keeps(filters, warper, oracle: Oracle):
    """Its sums are float32 ones: of 200 rows a few may end a token earlier or later."""
    torch = oracle("torch")
    theirs = getattr(oracle("transformers").generation.logits_process, warper)
    logits = np.random.default_rng(4).standard_normal((200, 3001), dtype=np.float32) * 3
    [filtered] = [theirs(*filters.values())(None, torch.from_numpy(logits)).numpy()]
    differences = [
        len(kept(row, filters) ^ set(np.flatnonzero(np.isfinite(other)).tolist()))
        for row, other in zip(logits, filtered, strict=True)
    ]
    assert max(differences) <= 1 and sum(differences) <= 3


def test_the_twins_agree_nearly_always():
    """What is near a limit is an exception: of 2,000 draws at most a few may fall there, whatever is asked for."""
    random = np.random.default_rng(1)
    logits = random.standard_normal((2000, 700), dtype=np.float32) * 2
    asked = settings_of(
        2000,
        temperature=random.choice([0.0, 0.5, 1.0, 1.7], 2000),
        top_k=random.choice([0, 1, 30, 300], 2000),
        top_p=random.choice([0.3, 0.9, 1.0], 2000),
        top_n_sigma=random.choice([0.0, 1.5, 3.0], 2000),
        min_p=random.choice([0.0, 0.02], 2000),
        typical_p=random.choice([0.7, 1.0], 2000),
        uniform=random.random(2000),
    )
    assert (sample(logits, asked) != reference.sample(logits, asked)).sum() <= 3


def exact(logits, temperature=1, top_k=0, top_p=1, min_p=0, typical_p=1, top_n_sigma=0):
    """Each token's probability, token by token, as the papers put it."""
    weights = [float(np.exp(np.float64(x - max(logits)) / temperature)) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_n_sigma > 0:
        mean = sum(map(float, logits)) / len(logits)
        deviation = (sum((x - mean) ** 2 for x in map(float, logits)) / len(logits)) ** 0.5
        ranked = [i for i in ranked if logits[i] >= logits[ranked[0]] - top_n_sigma * deviation]
    ranked = [i for i in ranked if weights[i] >= min_p * weights[ranked[0]]]
    if top_k:
        ranked = ranked[:top_k]
    if typical_p < 1:
        total = sum(weights[i] for i in ranked)
        surprise = {i: -np.log(weights[i] / total) for i in ranked}
        entropy = sum(weights[i] / total * surprise[i] for i in ranked)
        typical, mass = [], 0.0
        for i in sorted(ranked, key=lambda i: abs(surprise[i] - entropy)):
            if mass / total < typical_p:
                typical.append(i)
            mass += weights[i]
        ranked = [i for i in ranked if i in typical]
    total, kept, mass = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        if mass / total < top_p:
            kept.append(i)
        mass += weights[i]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = [weights[i] / sum(weights[k] for k in kept) for i in kept]
    return probabilities


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.7},
        {"top_n_sigma": 1},
        {"temperature": 3, "top_n_sigma": 1.5},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "top_n_sigma": 2},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.8},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(asked):
    """Chi-square over 40,000 draws: the seed is fixed, and one in a few million would fail."""
    random, draws = np.random.default_rng(5), 40_000
    logits = (random.standard_normal(300) * 2).astype(np.float32)
    logits[7] = logits[200] = logits.max() - 1  # equals
    ids = sample(np.tile(logits, (draws, 1)), settings_of(draws, **asked, uniform=random.random(draws)))
    assert_drawn_from(exact(logits, **asked), ids)


def test_top_n_sigma_is_that_of_llama_cpp():
    """Impossible tokens count neither in the mean nor in the deviation, which is of all others, not of a sample."""
    random = np.random.default_rng(7)
    for masked in (0.0, 0.3, 0.99):
        for n in (0.5, 1.0, 2.0):
            logits = random.standard_normal(5000, dtype=np.float32) * 3 + 8
            logits[random.random(5000) < masked] = -np.inf
            possible = logits[logits > -np.inf].astype(np.float64)
            deviation = np.sqrt(((possible - possible.mean()) ** 2).mean())
            wanted = set(np.flatnonzero(logits >= possible.max() - n * deviation).tolist())
            for temperature in (0.3, 1.0, 4.0):  # which divides both sides
                assert kept(logits, {"temperature": temperature, "top_n_sigma": n}) == wanted


@pytest.mark.parametrize("off", [0.0, -0.0, -1.0, -1e300])
def test_top_n_sigma_off_changes_no_bit(off):
    """Beside other filters, and alone, where nothing is gathered."""
    logits = logits_of("plain", 5000, 1)
    for others in ({}, {"top_k": 40}, {"min_p": 0.01}, {"typical_p": 0.9, "top_p": 0.9}):
        assert kept(logits, others | {"top_n_sigma": off}) == kept(logits, others)
    _, [peaks] = find_largest(logits[None])
    ids, values = keep(logits, peaks, logits.max(), settings_of(1, top_n_sigma=off)[0])
    assert not ids.size and values.size == logits.size


def test_greedy_takes_the_first_of_equals():
    logits = np.array([[1, 3, 2, 3], [5, 5, 5, 5], [-np.inf, -np.inf, 0, -np.inf]], np.float32)
    np.testing.assert_array_equal(sample(logits, settings_of(3, temperature=0, uniform=0.9)), [1, 0, 2])


@settings(max_examples=200, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    vocab=st.sampled_from([*VOCABULARIES, 49_152]),
    rows=st.integers(1, 5),
    seed=st.integers(0, 99),
    odd=st.dictionaries(st.integers(0, 10**6), st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 0.0, 3e38]), max_size=4),
)
def test_greedy_is_its_twin_wherever_something_odd_is(shape, vocab, rows, seed, odd):
    logits = np.stack([logits_of(shape, vocab, seed + row) for row in range(rows)])
    for place, value in odd.items():
        logits.flat[place % logits.size] = value
    expected = reference.sample(logits, settings_of(rows, temperature=0))
    np.testing.assert_array_equal(greedy(logits), expected)
    np.testing.assert_array_equal(sample(logits, settings_of(rows, temperature=0)), expected)


def test_greedy_is_a_part_of_a_program():
    logits = np.zeros((3, 5000), np.float32)
    with capture(Arena()) as program:
        ids = greedy(logits)
    for seed in range(20):
        logits[:] = [logits_of("tied", 5000, seed + row) for row in range(3)]
        program.run()
        np.testing.assert_array_equal(ids, logits.argmax(axis=1))


def test_of_equals_top_k_and_top_p_keep_the_lower_ids():
    logits, uniform = np.zeros((100, 1000), np.float32), np.linspace(0, 1, 100, endpoint=False)
    for limit in ({"top_k": 3}, {"top_p": 0.0025}):
        assert set(sample(logits, settings_of(100, **limit, uniform=uniform))) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_a_number_is_reported_for_its_row_alone(temperature):
    random = np.random.default_rng(2)
    logits = random.standard_normal((6, 400), dtype=np.float32)
    logits[1, 300], logits[2, 0], logits[3] = np.nan, np.inf, -np.inf
    logits[4, :390] = -np.inf
    asked = settings_of(6, temperature=temperature, uniform=random.random(6))
    ids = sample(logits, asked)
    np.testing.assert_array_equal(ids, reference.sample(logits, asked))
    np.testing.assert_array_equal(ids == -1, [False, True, True, True, False, False])
    assert ids[4] >= 390


def test_a_row_does_not_depend_on_its_batch():
    """Nor on who in it is greedy, and who wants what."""
    random = np.random.default_rng(3)
    logits = random.standard_normal((40, 3000), dtype=np.float32)
    asked = settings_of(
        40,
        temperature=random.choice([0.0, 0.9, 1.5], 40),
        top_k=random.choice([0, 50], 40),
        top_p=random.choice([0.7, 1.0], 40),
        top_n_sigma=random.choice([-1.0, 0.0, 1.0], 40),
        min_p=random.choice([0.0, 0.1], 40),
        typical_p=random.choice([0.8, 1.0], 40),
        uniform=random.random(40),
    )
    together = sample(logits, asked)
    for m in range(40):
        assert sample(logits[m : m + 1], asked[m : m + 1]) == together[m : m + 1]


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
        assert {token: rank for token, (_, rank) in mine.items()} == {
            token: rank for token, (_, rank) in expected.items()
        }
        assert list(mine) == list(expected)
        values = [[value for value, _ in row.values()] for row in (mine, expected)]
        np.testing.assert_allclose(*values, rtol=0, atol=1e-6)


def test_what_was_asked_before_is_not_asked_again():
    """A captured forward pass ends with the largest logits, and sampling goes on from there."""
    logits = logits_of("plain", 1000, 5)
    rows = np.stack([logits, logits[::-1], np.roll(logits, 7)])
    asked = settings_of(3, temperature=np.array([0.0, 1.0, 0.5]), top_p=0.9, uniform=np.array([0.1, 0.2, 0.3]))
    known = find_largest(rows)
    np.testing.assert_array_equal(known[0], rows.argmax(axis=1))
    expected = sample(rows, asked)
    np.testing.assert_array_equal(sample(rows, asked, known), expected)
