"""What a notebook shows: answers with their tokens' probabilities, streams that grow, explanations, progress."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyserve import LLM, SamplingParams
from tinyserve.text.glass_box import HEATS, answer_html
from tinyserve.text.request import MOST_SHOWN, CompletionOutput, RequestOutputs

LLMOf = Callable[..., LLM]


def shown(markup: str) -> str:
    """What is read of some HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def test_tokens_have_their_probabilities(llm_of: LLMOf) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, ignore_eos=True)
    outputs = llm_of("llama").generate(["the <cat>"], params)
    answer = outputs[0].outputs[0]
    markup = outputs[0]._repr_html_()
    spans = re.findall(r'<span title="([^"]*)" style="background:([^;]*)', markup)
    assert len(spans) == len(answer.token_ids) == 6
    assert shown(markup).startswith("the <cat>") and "<cat>" not in markup
    assert all("rank 1" in title and color in dict(map(reversed, HEATS)) for title, color in spans)
    assert answer.text in shown(markup) and "6 tokens" in markup and "length" in markup


def test_without_probabilities_the_text_stands_and_how_to_have_them(llm_of: LLMOf) -> None:
    outputs = llm_of("llama").generate(["the"], SamplingParams(temperature=0, max_tokens=3))
    markup = outputs[0].outputs[0]._repr_html_()
    assert "<span" not in markup and "logprobs=5" in markup and outputs[0].outputs[0].text in shown(markup)


def test_markup_in_an_answer_stays_text() -> None:
    answer = CompletionOutput(text="<script>x</script>", token_ids=[1], finish_reason="stop", reasoning="<b>")
    markup = answer_html(answer)
    assert "<script" not in markup and "<b>" not in markup and "<script>x</script>" in shown(markup)


def test_many_outputs_are_shown_as_the_first_ones(llm_of: LLMOf) -> None:
    outputs = llm_of("llama").generate(["the"] * (MOST_SHOWN + 2), SamplingParams(max_tokens=1))
    assert isinstance(outputs, list) and isinstance(outputs, RequestOutputs)
    assert outputs._repr_html_().endswith("and 2 more") and outputs._repr_html_().count("<hr>") == MOST_SHOWN


def test_a_notebook(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """In a real kernel: outputs, a stream, and an explanation as last lines of cells."""
    import nbclient
    import nbformat

    sources = [
        f"from tinyserve import LLM, SamplingParams\nllm = LLM({str(folder_of('llama'))!r}, num_threads=1)",
        "params = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)",
        "llm.generate('the', params)",
        "llm.stream('the', params)",
        "llm.explain('the cat')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))

    def displayed(cell: int) -> list[Any]:
        return [
            output.data["text/html"] for output in notebook.cells[cell].outputs if "text/html" in output.get("data", {})
        ]

    (answers,), (stream,), (page,) = displayed(2), displayed(3), displayed(4)
    assert answers.count("<span") == 12 and page.startswith("<iframe")
    tokens = shown(re.search(r"<div style=[^>]*>(<span.*?)</div>", answers, re.DOTALL)[1])  # type: ignore[index]
    assert shown(stream) == tokens != ""
