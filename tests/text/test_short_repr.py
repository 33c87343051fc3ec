"""What a notebook shows of answers: a line or two, with what is worth seeing in it."""

import copy
from dataclasses import fields

import numpy as np
import pytest

from tinyserve.scheduling.sequence import Logprob, Metrics
from tinyserve.text.beam_search import BeamSearchOutput, BeamSearchSequence
from tinyserve.text.pooling import EmbeddingOutput
from tinyserve.text.request import CompletionOutput, RequestOutput, StreamChunk

pytestmark = pytest.mark.fast

IDS = list(range(1000, 2000))
METRICS = Metrics(arrival=1.5, first_scheduled=2.0, token_times=[2.5 + i for i in range(1000)], prompt_tokens=1000)
LOGPROBS = [{i: Logprob(-1.0, 1)} for i in IDS]
ANSWER = CompletionOutput(0, "a word " * 1000, IDS, LOGPROBS, "length", metrics=METRICS)
REQUEST = RequestOutput(7, "a prompt " * 1000, IDS, [ANSWER, ANSWER], True, METRICS, [None, *LOGPROBS])
BEAM = BeamSearchSequence(IDS, LOGPROBS, -9.5, "a word " * 1000, "length", -0.5)


@pytest.mark.parametrize(
    "output",
    [
        ANSWER,
        REQUEST,
        StreamChunk("a word " * 1000, IDS, LOGPROBS, None, METRICS),
        BEAM,
        BeamSearchOutput([BEAM] * 20, "a prompt", IDS),
        EmbeddingOutput("a text " * 1000, IDS, np.zeros(4096, np.float32)),
        METRICS,
    ],
    ids=lambda output: type(output).__name__,
)
def test_none_fills_the_screen(output: object) -> None:
    assert len(repr(output)) < 4000 if isinstance(output, BeamSearchOutput) else len(repr(output)) < 2000
    assert "1010" not in repr(output)
    assert repr(output) == repr(copy.deepcopy(output))


def test_an_answer_shows_its_text_its_end_and_how_many_tokens_it_has() -> None:
    assert repr(CompletionOutput(text="Hi", token_ids=[1, 2], finish_reason="stop")) == (
        "CompletionOutput(text='Hi', token_ids=[1, 2], finish_reason='stop')"
    )
    assert repr(ANSWER).startswith("CompletionOutput(text='a word a word ")
    assert repr(ANSWER).endswith(
        "token_ids=[1000, 1001, 1002, 1003, 1004, 1005, ... 1000 in all], finish_reason='length')"
    )
    assert repr(REQUEST).startswith("RequestOutput(request_id=7, prompt='a prompt ")
    assert repr(REQUEST).count("CompletionOutput(") == 2
    assert repr(REQUEST).endswith("finished=True)")


def test_metrics_have_no_list_of_times() -> None:
    assert repr(METRICS) == (
        "Metrics(arrival=1.5, first_scheduled=2.0, prompt_tokens=1000, cached_tokens=0, preemptions=0)"
    )


def test_what_is_not_shown_still_counts_in_a_comparison() -> None:
    other = copy.deepcopy(ANSWER)
    assert other == ANSWER and repr(other) == repr(ANSWER)
    other.token_ids[-1] = 5
    assert other != ANSWER and repr(other) == repr(ANSWER)
    other = copy.deepcopy(ANSWER)
    other.logprobs = None
    assert other != ANSWER
    assert [field.name for field in fields(ANSWER)][:4] == ["index", "text", "token_ids", "logprobs"]
