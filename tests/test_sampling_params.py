"""SamplingParams: each value outside its range and each contradiction is refused with names and numbers."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tinyserve
from tinyserve import BeamSearchParams, SamplingParams, StructuredOutputs
from tinyserve.errors import RequestError
from tinyserve.models.config import GenerationConfig
from tinyserve.sampling_params import Options

ANY_OBJECT = StructuredOutputs(json_object=True)

pytestmark = pytest.mark.fast


def test_the_defaults_change_nothing_and_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p, params.max_tokens) == (
        1,
        1,
        1,
        0,
        0,
        16,
    )
    assert (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1, 0, 0)
    assert (params.typical_p, params.min_tokens, params.logit_bias, params.allowed_token_ids) == (1, 0, None, None)
    assert not params.changes_logits and not params.has_penalties


@pytest.mark.parametrize(
    ("params", "shown"),
    [
        (SamplingParams(), "SamplingParams()"),
        (SamplingParams(temperature=0, max_tokens=3), "SamplingParams(temperature=0, max_tokens=3)"),
        (SamplingParams(stop="a", logit_bias={5: 1.5}), "SamplingParams(logit_bias={5: 1.5}, stop=('a',))"),
        (
            SamplingParams(structured_outputs=StructuredOutputs(regex="a+")),
            "SamplingParams(structured_outputs=StructuredOutputs(regex='a+'))",
        ),
        (BeamSearchParams(beam_width=2, max_tokens=3), "BeamSearchParams(beam_width=2, max_tokens=3)"),
    ],
)
def test_parameters_show_what_differs_from_the_defaults_and_can_be_copied(params: Options, shown: str) -> None:
    assert repr(params) == shown
    assert eval(shown) == params


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [
        ("typical_p", 0, "above 0 and at most 1"),
        ("typical_p", 1.01, "above 0 and at most 1"),
        ("top_n_sigma", float("nan"), "a finite number"),
        ("top_n_sigma", float("inf"), "a finite number"),
        ("repetition_penalty", 0, "a finite number above 0"),
        ("repetition_penalty", -1.2, "a finite number above 0"),
        ("repetition_penalty", float("inf"), "a finite number above 0"),
        ("repetition_penalty", float("nan"), "a finite number above 0"),
        ("repetition_penalty", "high", "a finite number above 0"),
        ("frequency_penalty", 2.5, "between -2 and 2"),
        ("presence_penalty", -2.5, "between -2 and 2"),
        ("presence_penalty", None, "between -2 and 2"),
        ("logit_bias", {5: 101}, "numbers between -100 and 100"),
        ("logit_bias", {5: -100.5}, "numbers between -100 and 100"),
        ("logit_bias", {5: float("nan")}, "numbers between -100 and 100"),
        ("logit_bias", {-1: 1}, "numbers between -100 and 100"),
        ("logit_bias", {"the": 1}, "numbers between -100 and 100"),
        ("logit_bias", {1.5: 1}, "numbers between -100 and 100"),
        ("logit_bias", [5, 1], "numbers between -100 and 100"),
        ("allowed_token_ids", (), "at least one"),
        ("allowed_token_ids", (3, -1), "whole numbers from 0 on"),
        ("allowed_token_ids", "yes", "a list"),
        ("banned_token_ids", (2.0,), "whole numbers from 0 on"),
        ("banned_token_ids", {3}, "a list"),
        ("bad_words", ("a", ""), "texts of at least one character"),
        ("bad_words", (3,), "texts of at least one character"),
        ("bad_words", {"a"}, "a list"),
        ("min_tokens", -1, "a whole number of at least 0"),
        ("min_tokens", 1.0, "a whole number of at least 0"),
        ("best_of", 0, "a whole number of at least 1"),
        ("prompt_logprobs", -1, "a whole number between 0 and 100"),
        ("prompt_logprobs", 101, "a whole number between 0 and 100"),
        ("include_stop_str_in_output", 1, "True or False"),
    ],
)
def test_a_value_outside_its_range(name: str, value: Any, range_: str) -> None:
    with pytest.raises(RequestError, match=rf"^{name} is {re.escape(repr(value))}; it must be .*{range_}") as error:
        SamplingParams(**{name: value})
    assert error.value.param == name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_tokens": 20}, "min_tokens is 20 and max_tokens 16"),
        ({"n": 3, "best_of": 2}, "best_of is 2 and n 3"),
        ({"allowed_token_ids": [1, 2], "banned_token_ids": [3, 2, 1]}, "banned_token_ids has every token of allowed"),
        ({"ignore_eos": True, "stop": "\n"}, r"stop is ('\n',) and ignore_eos True"),
        ({"ignore_eos": True, "stop_token_ids": [4]}, "stop_token_ids is (4,) and ignore_eos True"),
        ({"structured_outputs": ANY_OBJECT, "min_tokens": 2}, "min_tokens is 2 beside structured_outputs"),
        ({"structured_outputs": ANY_OBJECT, "ignore_eos": True}, "ignore_eos is True beside structured_outputs"),
    ],
)
def test_what_contradicts_itself(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)) as error:
        SamplingParams(**options)
    assert error.value.param == says.split()[0]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("repetiton_penalty", "repetition_penalty"),
        ("logits_bias", "logit_bias"),
        ("min_token", "min_tokens"),
        ("allowed_tokens", "allowed_token_ids"),
        ("banned_tokens", "banned_token_ids"),
        ("bad_word", "bad_words"),
        ("prompt_logprob", "prompt_logprobs"),
        ("include_stop_string_in_output", "include_stop_str_in_output"),
    ],
)
def test_an_unknown_name_brings_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(RequestError, match=f"no option {name!r}. Did you mean {nearest!r}") as error:
        SamplingParams(**{name: 1})
    assert error.value.param == name


def test_bad_words_change_logits() -> None:
    params = SamplingParams(bad_words=["a", "b c"])
    assert params.bad_words == ("a", "b c") and params.changes_logits
    assert SamplingParams(bad_words="a").bad_words == ("a",)
    assert SamplingParams(bad_words=None).bad_words == () and not SamplingParams(bad_words=[]).changes_logits


def test_a_bias_may_come_from_json() -> None:
    params = SamplingParams(logit_bias=json.loads('{"50256": -100, "7": 2.5}'))
    assert params.logit_bias == {50256: -100, 7: 2.5} and params.changes_logits
    assert replace(params, seed=1).logit_bias == params.logit_bias
    assert {params: 1}[replace(params)] == 1  # can be a key, as before
    numpy = SamplingParams(
        logit_bias={np.int64(3): np.float32(1)}, min_tokens=np.int64(2), banned_token_ids=[np.int32(1)]
    )
    assert numpy.logit_bias == {3: 1}


@pytest.mark.parametrize("options", [{"logit_bias": {9: 1}}, {"allowed_token_ids": [3, 9]}, {"banned_token_ids": [9]}])
def test_a_token_that_the_model_does_not_have(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    params.check_vocabulary(10)
    name = next(iter(options))
    with pytest.raises(RequestError, match=f"{name} has token id 9, and the model's vocabulary ends at 8") as error:
        params.check_vocabulary(9)
    assert error.value.param == name


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SamplingParams, BeamSearchParams])
def test_every_parameter_has_a_row_and_a_line_in_the_docstring(kind: type[Options]) -> None:
    assert list(kind.rows) == [each.name for each in fields(kind)]  # type: ignore[arg-type]
    for name, row in kind.rows.items():
        assert f"\n    {name}: {row.help}\n" in (kind.__doc__ or "")


def test_a_default_is_in_its_range_and_none_is_where_it_is_the_default() -> None:
    for name, row in SamplingParams.rows.items():
        SamplingParams(**{name: row.default})
        if row.default is not None and row.default != ():
            with pytest.raises(RequestError, match=f"^{name} is None; it must be"):
                SamplingParams(**{name: None})


def test_beam_search_refuses_what_samples_and_names_it() -> None:
    for name, row in SamplingParams.rows.items():
        if name in BeamSearchParams.rows:
            continue
        reason = "does not sample" if row.stage in ("bias", "penalty", "draw") else "SamplingParams has"
        with pytest.raises(RequestError, match=f"has no option {name!r}.*{reason}") as error:
            BeamSearchParams(beam_width=1, max_tokens=1, **{name: row.default})
        assert error.value.param == name


def test_the_kinds_are_those_of_the_annotations() -> None:
    kinds = {name: row.kind for name, row in SamplingParams.rows.items()}
    assert (kinds["n"], kinds["best_of"], kinds["top_p"], kinds["ignore_eos"]) == (int, int, float, bool)
    assert (kinds["stop"], kinds["bad_words"], kinds["allowed_token_ids"]) == (list[str], list[str], list[int])
    assert kinds["structured_outputs"] is StructuredOutputs


def test_http_bodies_have_its_fields_and_pass_them_on() -> None:
    protocol = pytest.importorskip("tinyserve.server.protocol")
    sampling = pytest.importorskip("tinyserve.server.sampling")
    llm = SimpleNamespace(generation_config=GenerationConfig(source="x"), max_model_len=128)
    examples: dict[Any, Any] = {int: 3, float: 0.5, bool: True, list[int]: [7], list[str]: ["a"], str | list[str]: "a"}
    taken = {name: row for name, row in SamplingParams.rows.items() if row.http is not None}
    assert {"n", "top_n_sigma", "stop", "logit_bias"} < taken.keys() and "logprobs" not in taken
    for name, row in taken.items():
        value = examples.get(row.http, {"5": 1.0})
        wanted = getattr(SamplingParams(**{name: value}), name)
        chat = protocol.parse(protocol.ChatBody, json.dumps({"messages": [], name: value}).encode())[0]
        assert getattr(sampling.chat_params(chat, llm), name) == wanted
        completion = protocol.parse(protocol.CompletionBody, json.dumps({"prompt": "a", name: value}).encode())[0]
        assert getattr(sampling.completion_params(completion, llm), name) == wanted


def test_the_page_asks_for_what_the_server_takes() -> None:
    """Its fields are parameters, their bounds are in range, and those that OpenAI's client does not know are marked."""
    script = (Path(tinyserve.__file__).parent / "server" / "page" / "server.js").read_text()
    listed = script.partition("const FIELDS = [")[2].partition("];")[0]
    shown = re.findall(r'\{ name: "(\w+)"(.*?)\n', listed)
    assert {"temperature", "max_tokens", "stop"} < {name for name, _ in shown}
    openai = {"max_tokens", "temperature", "top_p", "seed", "stop"}
    for name, rest in shown:
        assert SamplingParams.rows[name].http is not None
        assert ("isExtra: true" in rest) is (name not in openai)
        for bound in re.findall(r"(?:value|min|max): ([\d.]+)", rest):
            SamplingParams(**{name: SamplingParams.rows[name].kind(bound)})
