"""POST /explain: a forward pass looked into over HTTP, as numbers and as a page."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Running, running

from tinyserve.explain.page import shown

QUESTION = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def server(folder_of: Callable[[str], Path]) -> Iterator[Running]:
    with running({"tiny": folder_of("granite-hybrid")}, dtype="float32", num_threads=1, max_num_seqs=4) as one:
        yield one


def test_a_prompt_is_explained_as_python_does(server: Running) -> None:
    told = server.post("/explain", {"prompt": "the cat", "temperature": 1, "top_k": 3}).json()
    llm = server.engine.llm
    assert told.pop("object") == "explanation"
    assert told["pieces"] == ["the", " ", "c", "a", "t"] and told["ids"] == llm.tokenizer.encode("the cat")
    assert [layer["kind"] for layer in told["layers"]] == ["mamba2", "attention", "mamba2"]
    assert [step["name"] for step in told["sampling"]] == ["logits", "top_k"] and told["sampling"][1]["left"] == 3
    rest = {name: value for name, value in told.items() if name != "sampling"}
    same = shown(llm.explain("the cat"))
    assert rest == {name: value for name, value in same.items() if name != "sampling"}


def test_an_answer_is_explained_up_to_a_token(server: Running) -> None:
    llm = server.engine.llm
    body: dict[str, Any] = {"messages": QUESTION, "temperature": 0}
    ids = llm.chat_prompt(QUESTION)
    assert server.post("/explain", body).json()["ids"] == ids
    told = server.post("/explain", {**body, "answer": "the"}).json()
    assert told["ids"] == [*ids, *llm.tokenizer.encode("the", add_special_tokens=False)]
    # What it says comes next is what comes next.
    tokens = server.post("/v1/completions", {"prompt": told["ids"], "max_tokens": 1, "temperature": 0, "logprobs": 0})
    assert told["sampling"][-1]["likeliest"][0][0] == tokens.json()["choices"][0]["text"]


def test_a_page_of_it(server: Running) -> None:
    told = server.post("/explain", {"prompt": "the </script><b>cat", "format": "html"}).json()
    assert told["html"].startswith("<!doctype html>") and "<b>cat" not in told["html"]
    assert told["html"].count("</script>") == 2


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "give one of the two"),
        ({"prompt": "a", "messages": QUESTION}, "give one of the two"),
        ({"prompt": "a" * 600}, "600"),
        ({"prompt": "a", "format": "pdf"}, "format"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "no structured outputs"),
        ({"prompt": "a", "top_p": 7}, "top_p is 7"),
    ],
)
def test_what_cannot_be_explained_is_refused(server: Running, body: dict[str, Any], sentence: str) -> None:
    response = server.post("/explain", body)
    assert response.status_code == 400 and sentence in response.json()["error"]["message"]
