"""`explain`: what is printed, its page in a real browser, and the sentences for what cannot be explained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Shell
from playwright.sync_api import Browser, expect

from tinyserve import LLM

FolderOf = Callable[[str], Path]
FAMILIES = ("gpt2", "llama-grouped", "granite-hybrid", "granite-moe", "falcon-7b", "falcon-rw")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("text", ["the cat", "the cat sat on the mat, " * 4])
def test_it_is_told_in_80_columns(name: str, text: str, shell: Shell, folder_of: FolderOf) -> None:
    said = shell("explain", folder_of(name), text, "--top-k", "5", "--repetition-penalty", "1.2")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("the 257   ␣ 32   c 99")  # pieces with their ids
    for title in ("Behind each layer", "Layer ", "From logits to the next token", "What one token costs"):
        assert any(line.startswith(title) for line in lines), title
    assert sum(line.startswith(("embedding  ", "0 ", "1 ", "2 ")) for line in lines) >= 4
    (top_k,) = (line.split() for line in lines if line.startswith("top_k"))
    assert top_k[:2] == ["top_k", "5"] and top_k[3] == "5"
    assert any(line.startswith("penalties") and "moved" in line for line in lines)


def test_a_layer_is_chosen(shell: Shell, folder_of: FolderOf) -> None:
    said = shell("explain", folder_of("granite-hybrid"), "the cat", "--layer", "0")
    assert said.code == 0 and "Layer 0, Mamba2: how fast each head forgets" in said.out
    heads = [line for line in said.out.splitlines() if " tokens " in line and line[0].isdigit()]
    assert len(heads) == 10
    assert "Layer 1: where each head looks" in shell("explain", folder_of("granite-hybrid"), "the cat").out


def test_json(shell: Shell, folder_of: FolderOf) -> None:
    said = shell("explain", folder_of("gpt2"), "the cat", "--json")
    told = json.loads(said.out)
    assert "".join(told["pieces"]) == "the cat" and len(told["ids"]) == len(told["pieces"]) == len(told["lens"])
    assert [layer["kind"] for layer in told["layers"]] == ["attention"] * 3
    for at in told["lens"]:
        assert len(at["norms"]) == len(at["guesses"]) == 4
        assert all(0 < p <= 1 for row in at["guesses"] for _, p in row)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layer", "3"], "--layer is 3; "),
        (["--html", "no/such/folder/out.html"], "there is no folder"),
        (["--html", "."], "it cannot be written"),
        (["--top-p", "7"], "top_p is 7"),
    ],
)
def test_what_is_wrong_is_a_sentence(
    arguments: list[str],
    sentence: str,
    shell: Shell,
    folder_of: FolderOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = shell("explain", folder_of("gpt2"), "the cat", *arguments)
    assert said.code == 2 and sentence in said.sentence


def test_without_a_text_nothing_is_loaded(shell: Shell) -> None:
    said = shell("explain", "gpt2", stdin="")
    assert said.code == 2 and "The prompt is empty" in said.sentence


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_shows_it(
    browser: Browser, shell: Shell, folder_of: FolderOf, tmp_path: Path, scheme: Any, width: int
) -> None:
    said = shell("explain", folder_of("granite-hybrid"), "the <b>cat</b></script> sat", "--html", tmp_path / "out.html")
    assert said.code == 0 and "out.html" in said.out
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, wrong = context.new_page(), list[str]()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    page.goto((tmp_path / "out.html").as_uri())
    tokens = page.get_by_role("group", name="Tokens").get_by_role("button")
    expect(tokens.last).to_have_attribute("aria-pressed", "true")
    rows = page.locator("#lens tr")
    expect(rows).to_have_count(5)
    before = rows.last.inner_text()
    tokens.first.click()
    expect(rows.last).not_to_have_text(before)
    expect(page.locator("#heads canvas")).to_have_count(5)
    page.locator("#heads canvas").first.click(position={"x": 3, "y": 3})
    expect(page.locator("#under")).to_contain_text("head 0: the takes 100% of the")
    page.get_by_role("button", name="0 mamba2").click()
    expect(page.locator("#heads canvas")).to_have_count(1)
    expect(page.locator("#about")).to_contain_text("forgets the rest")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    expect(page.locator("#sampling tr")).not_to_have_count(1)
    context.close()
    assert wrong == []


def test_a_notebook_shows_the_page(llm_of: Callable[..., LLM]) -> None:
    shown = llm_of("gpt2").explain("the cat")._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and 'sandbox="allow-scripts"' in shown and "<script" not in shown
