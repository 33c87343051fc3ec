"""SamplingParams: each value outside its range and each contradiction is refused with names and numbers."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinyserve import SamplingParams
from tinyserve.errors import RequestError

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
    assert not params.changes_logits and not params.penalises


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [
        ("typical_p", 0, "above 0 and at most 1"),
        ("typical_p", 1.01, "above 0 and at most 1"),
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
    with pytest.raises(RequestError, match=rf"^{name} is {re.escape(repr(value))}; it must be .*{range_}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_tokens": 20}, "min_tokens is 20 and max_tokens 16"),
        ({"n": 3, "best_of": 2}, "best_of is 2 and n 3"),
        ({"allowed_token_ids": [1, 2], "banned_token_ids": [3, 2, 1]}, "banned_token_ids has every token of allowed"),
        ({"ignore_eos": True, "stop": "\n"}, r"stop is ('\n',) and ignore_eos True"),
        ({"ignore_eos": True, "stop_token_ids": [4]}, "stop_token_ids is (4,) and ignore_eos True"),
    ],
)
def test_what_contradicts_itself(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        SamplingParams(**options)


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
    with pytest.raises(RequestError, match=f"no option {name!r}. Did you mean {nearest!r}"):
        SamplingParams(**{name: 1})


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
    with pytest.raises(
        RequestError, match=f"{next(iter(options))} has token id 9, and the model's vocabulary ends at 8"
    ):
        params.check_vocabulary(9)
