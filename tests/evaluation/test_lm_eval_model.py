"""The harness's requests answered, over a stand-in for lm_eval's base class: it weighs 600 MB and is not installed.

The real thing runs in scripts/check_lm_eval.py: the same numbers as `tinyserve eval --task`, and as the harness's own
class for transformers.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import checkpoints
import pytest
from refusals import refused

from tinyserve import LLM, SamplingParams
from tinyserve.errors import UserError
from tinyserve.evaluation.likelihood import Pair, encode_pair, loglikelihoods, prefix_token


class StandIn:
    """lm_eval.api.model.LM as far as a model class sees it."""

    def __init__(self):
        self.kept = []
        self.cache_hook = SimpleNamespace(add_partial=lambda kind, args, answer: self.kept.append((kind, args, answer)))


@pytest.fixture(scope="module")
def module():
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "tinyserve.evaluation.lm_eval_model")
    before = {name: sys.modules.get(name) for name in names}
    for name in names[:3]:
        sys.modules[name] = ModuleType(name)
    sys.modules["lm_eval.api.model"].LM = StandIn
    sys.modules.pop("tinyserve.evaluation.lm_eval_model", None)
    yield importlib.import_module("tinyserve.evaluation.lm_eval_model")
    for name, old in before.items():
        sys.modules.pop(name, None)
        if old is not None:
            sys.modules[name] = old


def test_the_tasks_for_the_harness_are_where_it_says(module):
    assert (Path(module.TASKS_FOLDER) / "cloze.yaml").is_file()


@pytest.fixture
def model(module, llm_of):
    return module.TinyserveLM(llm_of("llama"))


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def test_loglikelihoods_come_in_order_and_are_kept(model):
    asked = [("The cat", " sat"), ("", "sat there"), ("The cat ", "sat"), ("The cat", " ran")]
    got = model.loglikelihood(requests(*asked))
    assert got == [tuple(one) for one in loglikelihoods(model.llm, [encode_pair(model.llm, *pair) for pair in asked])]
    assert got[0] == got[2] != got[3]
    assert all(type(logprob) is float and type(is_greedy) is bool for logprob, is_greedy in got)
    assert model.kept == [("loglikelihood", pair, answer) for pair, answer in zip(asked, got, strict=True)]


def test_long_texts_are_rolled_and_each_is_a_sum(model):
    long, short = "The cat sat there. " * 30, "Hi"
    got = model.loglikelihood_rolling(requests((long,), (short,)))
    assert model.llm.max_model_len == 128
    ids = [prefix_token(model.llm), *model.llm.tokenizer.encode(long)]
    assert len(ids) > 2 * 128
    first = loglikelihoods(model.llm, [Pair(ids[:1], ids[1:129])])[0].logprob
    second = loglikelihoods(model.llm, [Pair(ids[128:129], ids[129:257])])[0].logprob
    assert got[0] < first + second < 0
    assert got[1] == loglikelihoods(model.llm, [encode_pair(model.llm, "", short)])[0].logprob
    assert [(kind, answer) for kind, _, answer in model.kept] == [("loglikelihood_rolling", one) for one in got]


def test_texts_are_written_up_to_a_stop_in_one_batch(model):
    (whole,) = model.generate_until(requests(("The cat", {"max_gen_toks": 12})))
    expected = model.llm.generate("The cat", SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text
    assert whole == expected != ""
    stop = whole[4]
    cut, sampled = model.generate_until(
        requests(
            ("The cat", {"until": [stop, ""], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
            ("The cat", {"max_gen_toks": 5, "do_sample": True, "seed": 1}),
        )
    )
    assert cut == whole.split(stop)[0]
    sampling = SamplingParams(temperature=1, max_tokens=5, seed=1)
    assert sampled == model.llm.generate("The cat", sampling)[0].outputs[0].text
    assert len(model.kept) == 3


def test_a_prompt_makes_room_for_its_answer(model):
    long = "The cat sat there. " * 30
    (got,) = model.generate_until(requests((long, {"max_gen_toks": 20})))
    ids = model.llm.tokenizer.encode(long)[-(128 - 20) :]
    assert got == model.llm.generate(ids, SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text
    with refused("max_gen_toks", "has room for 128, prompt included"):
        model.generate_until(requests(("Hi", {"max_gen_toks": 128})))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"temperature": 0, "max_tokens": 256}),
        ({"until": "\n\n"}, {"temperature": 0, "max_tokens": 256, "stop": "\n\n"}),
        ({"until": None, "max_new_tokens": 7}, {"temperature": 0, "max_tokens": 7}),
        ({"max_gen_toks": 3, "max_tokens": 9}, {"temperature": 0, "max_tokens": 3}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9, "max_tokens": 256}),
        ({"do_sample": True, "top_k": 5}, {"temperature": 1, "top_k": 5, "max_tokens": 256}),
        ({"do_sample": True, "temperature": 0.2}, {"temperature": 0.2, "max_tokens": 256}),
        ({"do_sample": False, "temperature": 0.2}, {"temperature": 0, "max_tokens": 256}),
    ],
)
def test_the_harness_s_options(module, options, expected):
    before = dict(options)
    assert module.sampling_params(options) == SamplingParams(**expected)
    assert options == before


def test_an_unknown_option_is_named(module):
    with refused("top_pp", "no option 'top_pp'. Did you mean 'top_p'"):
        module.sampling_params({"top_pp": 0.5})


def test_conversations(model):
    history = [{"role": "user", "content": "Hi "}]
    assert model.apply_chat_template(history) == "<|bos|><|user|>Hi \n"
    assert model.apply_chat_template(history, add_generation_prompt=False) == "<|bos|><|user|>Hi"
    assert model.chat_template(True) == checkpoints.CHAT_TEMPLATE
    assert model.chat_template() is None
    assert "/" not in model.tokenizer_name and model.tokenizer_name.endswith("__llama")


def test_a_model_without_a_template(module, folder_of, tmp_path):
    folder = checkpoints.write_folder(tmp_path / "plain", checkpoints.CONFIGS["llama"])
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|bos|>", "eos_token": "<|eos|>"}')
    model = module.TinyserveLM(LLM(folder, dtype="float32", num_threads=1))
    with pytest.raises(UserError, match="plain has no chat template: evaluate it with apply_chat_template=False"):
        model.apply_chat_template([{"role": "user", "content": "Hi"}])
