"""Thinking is told from the answer the same wherever the text is cut, and nothing else is taken for it."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve.text.reasoning import ReasoningParser, Thinking, thinking_after, thinking_within

pytestmark = pytest.mark.fast

NONE, OPTIONAL, OPENED = Thinking


def read(text: str, thinking: Thinking, cuts: Any = ()) -> tuple[str, str]:
    parser, reasoning, content = ReasoningParser(thinking), "", ""
    edges = [0, *sorted(cuts), len(text)]
    for part in [*(parser.push(text[a:b]) for a, b in pairwise(edges)), parser.finish()]:
        reasoning, content = reasoning + part[0], content + part[1]
    assert parser.finish() == ("", "")
    return reasoning, content


@pytest.mark.parametrize(
    ("thinking", "text", "reasoning", "content"),
    [
        (OPTIONAL, "<think>\nHm.\n</think>\n\nYes.\n", "Hm.", "Yes.\n"),
        (OPTIONAL, "\n <think>a\n\nb</think>c", "a\n\nb", "c"),
        (OPTIONAL, "<think>\n\n</think>\n\nYes.", "", "Yes."),
        (OPTIONAL, "Yes <think>no</think>", "", "Yes <think>no</think>"),
        (OPTIONAL, "<thinking>", "", "<thinking>"),
        (OPTIONAL, " <thin", "", " <thin"),
        (OPTIONAL, " \n", "", " \n"),
        (OPTIONAL, "", "", ""),
        (OPTIONAL, "<think>cut o", "cut o", ""),
        (OPTIONAL, "<think>cut </thi", "cut </thi", ""),
        (OPTIONAL, "<think>a</think><think>b</think>c", "a", "<think>b</think>c"),
        (OPTIONAL, "<think>a < b </thin> c</think>", "a < b </thin> c", ""),
        (OPENED, "\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (OPENED, "<think>\nHm.</think>Yes.", "Hm.", "Yes."),
        (OPENED, "cut", "cut", ""),
        (OPENED, " <thi", "<thi", ""),
        (OPENED, "</think>Yes.", "", "Yes."),
        (NONE, "<think>a</think>b", "", "<think>a</think>b"),
        (NONE, "\n\nb ", "", "\n\nb "),
    ],
)
def test_what_is_thought_and_what_is_said(thinking: Thinking, text: str, reasoning: str, content: str) -> None:
    assert read(text, thinking) == (reasoning, content)
    assert read(text, thinking, range(1, len(text))) == (reasoning, content), "character by character"


FRAGMENTS = ["<think>", "</think>", "<thi", "</thi", "nk>", " ", "\n", "word", "<", ">", "é"]


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=9).map("".join),
    thinking=st.sampled_from(list(Thinking)),
    data=st.data(),
)
def test_cuts_change_nothing(text: str, thinking: Thinking, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text))))
    reasoning, content = read(text, thinking, cuts)
    assert (reasoning, content) == read(text, thinking)
    assert reasoning == reasoning.strip() and content in text and text.endswith(content)
    letters = iter(text)
    assert all(letter in letters for letter in reasoning + content), "nothing is added, and the order stays"


def test_thinking_comes_as_soon_as_it_is_certain() -> None:
    parser = ReasoningParser(OPTIONAL)
    assert not parser.is_thinking
    assert [parser.push(piece) for piece in ("<", "think>", "\n", "So", " ", "it", "</")] == [
        *[("", "")] * 3,
        ("So", ""),
        ("", ""),
        (" it", ""),
        ("", ""),
    ]
    assert parser.is_thinking
    assert [parser.push(piece) for piece in ("think>", "\n\n", "Yes", " ")] == [
        ("", ""),
        ("", ""),
        ("", "Yes"),
        ("", " "),
    ]
    assert not parser.is_thinking
    assert ReasoningParser(OPENED).is_thinking


def test_a_prompt_tells_whether_its_answer_begins_with_thinking() -> None:
    turn = "<|im_start|>assistant\n"
    assert thinking_after(turn) is OPTIONAL
    assert thinking_after(f"{turn}<think>\n") is OPENED
    assert thinking_after(f"{turn}<think>\n\n</think>\n\n") is NONE
    assert thinking_after(f"What is <think>?<|im_end|>\n{turn}") is OPTIONAL, "the user's words open nothing"
    assert thinking_within("") is thinking_within(" ") is OPTIONAL
    assert thinking_within("<think>\nSo") is OPENED
    assert thinking_within("<think>\nSo</think>\nYes") is thinking_within("Yes") is NONE
