"""The bar over many answers: what it counts, and when it is shown."""

import io
import os
import sys
from collections.abc import Callable

import pytest

from tinyserve import LLM, SamplingParams
from tinyserve.progress import ProgressBar
from tinyserve.text.answer_bar import AnswerBar

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def test_it_counts_what_was_computed(llm_of: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt tokens that were in the cache are not counted, and the bar ends full."""
    llm = llm_of("llama")
    shown: list[tuple[int, str]] = []
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("tinyserve.text.answer_bar.perf_counter", iter(range(1000)).__next__)
    monkeypatch.setattr(
        ProgressBar, "__call__", lambda self, _, done, total, note="": note and shown.append((done, note))
    )
    prompts = [[3] * 40, [4] * 40]
    llm.generate(prompts, PARAMS, progress_bar=True)
    assert [completed for completed, _ in shown][-1] == 2
    seconds = len(shown)  # the clock ticks once for each line
    assert shown[-1][1] == f"2/2, prefill {80 / seconds:.0f}/s, decode {12 / seconds:.0f}/s"
    shown.clear()
    outputs = llm.generate(prompts, PARAMS, progress_bar=True)
    assert all(output.metrics.cached_tokens == 32 for output in outputs)
    assert shown[-1][1] == f"2/2, prefill {16 / len(shown):.0f}/s, decode {12 / len(shown):.0f}/s"


def test_it_is_shown_on_a_terminal_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pytest.importorskip("pty", reason="no terminal to be had").openpty()
    with os.fdopen(child, "w") as terminal:
        for stderr, total, expected in ((terminal, 2, True), (terminal, 1, False), (io.StringIO(), 2, False)):
            monkeypatch.setattr(sys, "stderr", stderr)
            assert AnswerBar(total)._bar.is_shown is expected
            assert AnswerBar(total, not expected)._bar.is_shown is not expected
        monkeypatch.setattr(sys, "stderr", None)  # as in a windowed program
        assert AnswerBar(2)._bar.is_shown is False
    os.close(parent)
