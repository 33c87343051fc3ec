"""What fewer bits cost: the measures against formulas written out, and the promise kept on a real model."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinyserve import LLM
from tinyserve.errors import UserError
from tinyserve.evaluation.perplexity import (
    ROWS,
    Comparison,
    Row,
    Text,
    compare,
    cross_entropy,
    kl_divergence,
    perplexity,
    perplexity_of,
    run,
    top1_agreement,
)

TEXT = Path(__file__).parents[1] / "data" / "english.txt"


def random_logits(seed, rows, vocab=50, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal((rows, vocab), dtype=np.float32)


def probabilities(logits):
    """Softmax as the textbook has it, for logits small enough for exp."""
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 1, 3 * ROWS + 5])
def test_measures_are_their_formulas(rows):
    a, b = random_logits(1, rows), random_logits(2, rows)
    p, q = probabilities(a), probabilities(b)
    targets = np.random.default_rng(3).integers(0, 50, rows)
    assert cross_entropy(a, targets.tolist()) == pytest.approx(-np.log(p[np.arange(rows), targets]).mean(), rel=1e-12)
    assert kl_divergence(a, b) == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-12)
    assert top1_agreement(a, b) == (p.argmax(axis=1) == q.argmax(axis=1)).mean()


def test_identical_logits_do_not_diverge():
    a = random_logits(1, 40)
    assert kl_divergence(a, a) == 0
    assert top1_agreement(a, a) == 1


def test_a_constant_added_to_a_row_changes_nothing():
    a = random_logits(1, 40)
    assert kl_divergence(a, a + np.float32(64)) == pytest.approx(0, abs=1e-9)


def test_divergence_is_not_symmetric():
    sure, unsure = np.float32([[4, 0]]), np.float32([[0, 0]])
    p = 1 / (1 + np.exp(-4))
    assert kl_divergence(sure, unsure) == pytest.approx(np.log(2) + p * np.log(p) + (1 - p) * np.log(1 - p))
    assert kl_divergence(unsure, sure) == pytest.approx(-np.log(2) - (np.log(p) + np.log(1 - p)) / 2)


def test_thousandths_of_a_nat_survive_a_large_vocabulary():
    a = random_logits(1, 20, vocab=49152)
    b = a + random_logits(2, 20, vocab=49152, scale=0.05)
    p, q = probabilities(a), probabilities(b)
    assert kl_divergence(a, b) == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-9)


def test_large_logits_do_not_overflow():
    a = np.float32([[3e4, 0, -3e4]] * 2)
    assert perplexity(a, [0, 0]) == 1
    assert cross_entropy(a, [1, 1]) == 3e4
    assert kl_divergence(a, a[:, ::-1]) == 6e4


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    assert perplexity(np.zeros((9, 321), np.float32), list(range(9))) == pytest.approx(321, rel=1e-12)


def test_perplexity_reads_each_token_from_the_position_before_it():
    token_ids = [3, 1, 4, 1, 5]
    logits = np.zeros((5, 8), np.float32)
    logits[np.arange(4), token_ids[1:]] = 50
    assert perplexity(logits, token_ids) == pytest.approx(1, abs=1e-12)
    assert perplexity(logits, [1, 2, 6, 5, 3]) > 1e9


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="4 and 5 positions"):
        kl_divergence(random_logits(1, 4), random_logits(1, 5))
    with pytest.raises(ValueError, match="at least one"):
        perplexity(random_logits(1, 1), [0])


class Bigrams:
    """A model whose logits are a table's row for each token; it notes the windows it was shown."""

    def __init__(self, table, max_model_len=100):
        self.name, self.max_model_len = "bigrams", max_model_len
        self.table, self.config = table, SimpleNamespace(vocab_size=table.shape[1])
        self.windows = []

    def logits(self, token_ids):
        assert 1 <= len(token_ids) <= self.max_model_len
        self.windows.append(len(token_ids))
        return self.table[token_ids]


@pytest.mark.parametrize(
    ("window", "windows"), [(1024, [69]), (69, [69]), (68, [68, 1]), (23, [23, 23, 23]), (30, [30, 30, 9])]
)
def test_windows_predict_every_token_but_the_first_once(window, windows):
    a, b = Bigrams(random_logits(1, 50)), Bigrams(random_logits(2, 50))
    token_ids = np.random.default_rng(4).integers(0, 50, 70).tolist()
    got = compare(a, b, token_ids, window)
    whole_a, whole_b = a.table[token_ids], b.table[token_ids]
    assert a.windows == b.windows == windows
    assert got.tokens == 69
    assert got.perplexity_reference == pytest.approx(perplexity(whole_a, token_ids))
    assert got.perplexity == pytest.approx(perplexity(whole_b, token_ids))
    assert perplexity_of(b, token_ids, window) == pytest.approx(got.perplexity, rel=1e-12)
    assert got.kl == pytest.approx(kl_divergence(whole_a[:-1], whole_b[:-1]))
    assert got.top1 == pytest.approx(top1_agreement(whole_a[:-1], whole_b[:-1]))


def test_a_window_is_no_longer_than_either_model_can_read():
    a, b = Bigrams(random_logits(1, 50)), Bigrams(random_logits(2, 50), max_model_len=8)
    compare(a, b, list(range(20)))
    assert a.windows == b.windows == [8, 8, 3]


def test_progress_counts_the_predicted_tokens():
    a, heard = Bigrams(random_logits(1, 50)), []
    compare(a, a, list(range(50)) + list(range(20)), 30, lambda *told: heard.append(told))
    assert heard == [("evaluate", done, 69) for done in (0, 30, 60, 69)]


def test_a_run_loads_the_reference_once_and_one_dtype_after_the_other():
    tables = {name: random_logits(seed, 50) for seed, name in enumerate(("float32", "w8a16", "bfloat16"))}
    text, loaded, alive, heard = Text(list(range(50)), 70), [], [], set()

    def load(dtype):
        loaded.append((dtype, sum(model() is not None for model in alive)))
        model = Bigrams(tables[dtype])
        model.itself = model  # a cycle, which only the collector takes apart
        alive.append(weakref.ref(model))
        return model

    dtypes = ["w8a16", "bfloat16", "float32", "w8a16"]
    rows = list(run(load, text, dtypes, "float32", 20, lambda *progress: heard.add(progress)))
    assert loaded == [("float32", 0), ("w8a16", 1), ("bfloat16", 1)]
    assert heard == {(dtype, done, 49) for dtype in ("w8a16", "bfloat16") for done in (0, 20, 40, 49)}
    assert [row.dtype for row in rows] == ["float32", "w8a16", "bfloat16"]
    for row in rows:
        got = compare(Bigrams(tables["float32"]), Bigrams(tables[row.dtype]), text.token_ids, 20)
        bits = pytest.approx(np.log2(got.perplexity) * 49 / 70)
        differences = () if row.dtype == "float32" else (got.perplexity_change, got.kl, got.top1)
        assert row == Row(row.dtype, got.perplexity, bits, *differences)


@pytest.mark.parametrize(("reference", "dtypes"), [(None, ["w8a16", "float32"]), ("float32", ["float32"])])
def test_a_run_without_a_comparison_holds_one_model(reference, dtypes):
    loaded = []

    def load(dtype):
        assert all(model() is None for _, model in loaded)
        model = Bigrams(random_logits(1, 50))
        loaded.append((dtype, weakref.ref(model)))
        return model

    rows = list(run(load, Text(list(range(50)), 49), dtypes, reference))
    assert [dtype for dtype, _ in loaded] == [row.dtype for row in rows] == dtypes
    assert all(row.kl is None for row in rows)


def test_what_cannot_be_compared_is_refused():
    a, b = Bigrams(random_logits(1, 50)), Bigrams(random_logits(2, 50, vocab=51))
    with pytest.raises(UserError, match="51 tokens and bigrams 50"):
        compare(a, b, [1, 2, 3])
    with pytest.raises(UserError, match="not 1"):
        compare(a, a, [1])
    with pytest.raises(UserError, match="not 0"):
        compare(a, a, [1, 2], window=0)
    with pytest.raises(UserError, match="Token id 50 is outside bigrams's vocabulary of 50"):
        compare(a, a, [1, 50])


def test_change_of_perplexity_is_relative():
    assert Comparison(1, 20.0, 20.1, 0.0, 1.0).perplexity_change == pytest.approx(0.005)


@pytest.fixture(scope="module")
def float32(smollm2):
    return LLM(smollm2, dtype="float32", max_model_len=1024, max_num_seqs=1)


@pytest.mark.parametrize(
    ("dtype", "cache", "tokens", "perplexity_change", "kl", "top1"),
    [
        pytest.param("int8", "auto", None, 0.005, 0.0025, 0.96, id="int8"),
        pytest.param("int8", "auto", 1025, 0.001, 0.0005, 0.985, id="int8-of-the-file's-own-bits"),
        pytest.param("bfloat16", "float32", 1025, 0.001, 0.0002, 0.985, id="bfloat16"),
    ],
)
def test_a_real_model_keeps_its_word(
    smollm2, float32, monkeypatch, dtype, cache, tokens, perplexity_change, kl, top1
):  # fmt: skip
    """The file has 4 bits, which int8 keeps; the whole text is for 8 bits rounded from its float32 widening."""
    if tokens is None:
        monkeypatch.setattr("tinyserve.models.base.repack", lambda blocks, dtype: None)
    token_ids = float32.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:tokens]
    assert len(token_ids) >= 3500 or len(token_ids) == tokens
    got = compare(
        float32, LLM(smollm2, dtype=dtype, kv_cache_dtype=cache, max_model_len=1024, max_num_seqs=1), token_ids
    )
    assert abs(got.perplexity_change) <= perplexity_change, got
    assert 0 < got.kl <= kl, got
    assert got.top1 >= top1, got
