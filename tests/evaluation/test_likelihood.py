"""Log-likelihoods beside their formula and transformers, and texts cut into tokens as lm-evaluation-harness does."""

from types import SimpleNamespace

import checkpoints
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from tokenizers.processors import TemplateProcessing

from tinyserve.errors import TinyserveError, UserError
from tinyserve.evaluation.likelihood import Pair, encode, encode_pair, loglikelihoods, prefix_token, rolling_pairs
from tinyserve.evaluation.perplexity import perplexity_of
from tinyserve.text.tokenizer import Tokenizer

PAIRS = [
    Pair([1, 2, 3], [4]),
    Pair([1, 2, 3], [5]),
    Pair([1, 2], [3, 6]),
    Pair([7], [8, 9, 10, 11, 12]),
    Pair(checkpoints.token_ids(90), checkpoints.token_ids(17, seed=1)),
]


class Counted:
    """A model that notes what it was given to read."""

    def __init__(self, llm, max_model_len=None):
        self.llm, self.read = llm, []
        self.name, self.max_model_len = llm.name, max_model_len or llm.max_model_len

    def logits(self, token_ids, last):
        self.read.append(token_ids)
        return self.llm.logits(token_ids, last)


def by_formula(logits, pair):
    """One token after the other, as the textbook has it."""
    powers = np.exp(logits.astype(np.float64))
    p = powers / powers.sum(axis=1, keepdims=True)
    first = len(pair.context) - 1
    places = range(first, first + len(pair.continuation))
    return (
        sum(np.log(p[place, token]) for place, token in zip(places, pair.continuation, strict=True)),
        all(p[place].argmax() == token for place, token in zip(places, pair.continuation, strict=True)),
    )


def test_likelihoods_are_their_formula(llm_of):
    llm = llm_of("llama")
    for got, pair in zip(loglikelihoods(llm, PAIRS), PAIRS, strict=True):
        logprob, is_greedy = by_formula(llm.logits(pair.context + pair.continuation), pair)
        assert got.logprob == pytest.approx(logprob, rel=1e-12)
        assert got.is_greedy == is_greedy


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite-hybrid"])
def test_likelihoods_are_those_of_transformers(llm_of, folder_of, name):
    llm = llm_of(name)
    for got, pair in zip(loglikelihoods(llm, PAIRS), PAIRS, strict=True):
        theirs = checkpoints.transformers_logits(folder_of(name), pair.context + pair.continuation)
        assert got.logprob == pytest.approx(by_formula(theirs, pair)[0], abs=2e-4)


def test_what_greedy_decoding_writes_is_greedy(llm_of):
    llm, written = llm_of("llama"), [1, 2, 3]
    for _ in range(6):
        written.append(int(llm.logits(written)[-1].argmax()))
    other = [*written[3:-1], (written[-1] + 1) % checkpoints.VOCAB]
    right, wrong = loglikelihoods(llm, [Pair(written[:3], written[3:]), Pair(written[:3], other)])
    assert right.is_greedy and not wrong.is_greedy
    assert right.logprob > wrong.logprob


def test_choices_of_one_token_are_read_once(llm_of):
    llm, heard = Counted(llm_of("llama")), []
    pairs = [Pair([1, 2, 3], [token]) for token in range(20)]
    got = loglikelihoods(llm, [*pairs, Pair([1, 2], [3, 4])], lambda *progress: heard.append(progress))
    assert llm.read == [[1, 2, 3]]
    assert heard == [("evaluate", 0, 3), ("evaluate", 3, 3)]
    (alone,) = loglikelihoods(llm, [Pair([1, 2, 3], [4])])
    assert got[4] == alone
    assert got[20].logprob < got[4].logprob


def test_of_a_long_context_the_end_is_read(llm_of, caplog):
    llm = Counted(llm_of("llama"), max_model_len=8)
    pair = Pair(list(range(20)), [20, 21, 22])
    (got,) = loglikelihoods(llm, [pair])
    assert llm.read == [[14, 15, 16, 17, 18, 19, 20, 21]]
    assert "of 22 tokens the last 8 are read" in caplog.text
    assert (got,) == tuple(loglikelihoods(llm_of("llama"), [Pair(list(range(14, 20)), [20, 21, 22])]))
    with refused("continuation", "reads 8: raise max_model_len"):
        loglikelihoods(llm, [Pair([1], list(range(9)))])


def test_a_damaged_model_is_said_to_be():
    llm = SimpleNamespace(
        name="broken", max_model_len=8, logits=lambda ids, last: np.full((len(ids), 30), np.nan, "f4")
    )
    with pytest.raises(TinyserveError, match="weights are damaged"):
        loglikelihoods(llm, [Pair([1], [2])])


def spelled(llm, text):
    return llm.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("context", "continuation", "kept", "scored"),
    [
        ("ab", " cd", "ab", " cd"),
        ("ab ", "cd", "ab", " cd"),
        ("ab \n", "cd", "ab", " \ncd"),
        ("<|bos|>ab", "cd", "<|bos|>ab", "cd"),
        ("", "cd", "<|bos|>", "cd"),
        ("", "<|bos|>cd", "<|bos|>", "cd"),
        (" ", "cd", "<|bos|>", " cd"),
    ],
)
def test_where_the_context_ends(llm_of, context, continuation, kept, scored):
    llm = llm_of("llama")
    assert encode_pair(llm, context, continuation) == Pair(spelled(llm, kept), spelled(llm, scored))


def test_a_continuation_that_melts_into_the_context(llm_of):
    """ "the" is one token, and so is "th": what follows is not there to be scored."""
    with refused("continuation", "'e' adds no token to 'th'"):
        encode_pair(llm_of("llama"), "th", "e")


def test_a_template_that_writes_its_bos_gets_no_second_one(tmp_path):
    folder = checkpoints.write_folder(tmp_path, checkpoints.CONFIGS["llama"])
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", checkpoints.BOS)])
    backend.save(str(folder / "tokenizer.json"))
    llm = SimpleNamespace(tokenizer=Tokenizer.from_folder(folder))
    assert encode(llm, "Hi") == encode(llm, "<|bos|>Hi") and encode(llm, "Hi").count(checkpoints.BOS) == 1


def test_the_token_before_a_text():
    def model(bos, eos):
        return SimpleNamespace(name="tiny", tokenizer=SimpleNamespace(bos_token_id=bos, eos_token_ids=frozenset(eos)))

    assert prefix_token(model(0, {3})) == 0
    assert prefix_token(model(None, {3, 5})) == 3
    with pytest.raises(UserError, match="tiny has no token that begins or ends a text"):
        prefix_token(model(None, ()))
    with pytest.raises(UserError, match="tiny has synthetic weights and no tokenizer"):
        prefix_token(SimpleNamespace(name="tiny", tokenizer=None))


def test_rolling_windows_as_the_harness_explains_them():
    """The example of lm_eval.api.model.LM.loglikelihood_rolling."""
    assert rolling_pairs(range(10), -1, 4) == [
        Pair([-1], [0, 1, 2, 3]),
        Pair([3], [4, 5, 6, 7]),
        Pair([5, 6, 7], [8, 9]),
    ]
    assert rolling_pairs([], -1, 4) == []


@given(length=st.integers(1, 50), window=st.integers(1, 20))
def test_rolling_windows_predict_each_token_once(length, window):
    pairs = rolling_pairs(range(length), -1, window)
    assert [token for pair in pairs for token in pair.continuation] == list(range(length))
    for context, continuation in pairs:
        assert context == list(range(continuation[0] - len(context), continuation[0]))
        read = len(context) + len(continuation) - 1
        assert read == window or (context[0] == -1 and read == min(length, window))


def test_a_text_in_one_window_has_the_perplexity_of_eval(llm_of):
    llm, ids = llm_of("llama"), checkpoints.token_ids(60)
    pairs = rolling_pairs(ids, prefix_token(llm), llm.max_model_len)
    (got,) = loglikelihoods(llm, pairs)
    assert np.exp(-got.logprob / 60) == pytest.approx(perplexity_of(llm, [prefix_token(llm), *ids]), rel=1e-12)
