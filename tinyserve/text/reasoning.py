"""What a model thinks before it answers, told from its answer: text between <think> and </think>.

Knows text, as it comes in pieces; not tokens, nor what an answer must look like (reasoning_matcher.py).
"""

from enum import Enum
from typing import Literal

from tinyserve.text.tokenizer.stops import longest_beginning

OPENS, CLOSES = "<think>", "</think>"

_Place = Literal["start", "inside", "behind", "content"]


class Thinking(Enum):
    """What a prompt leaves open: whether its answer begins within the thinking."""

    NONE = "none"  # it is over, or there is none
    OPTIONAL = "optional"  # the model may begin its answer with <think>
    OPENED = "opened"  # the prompt ends with <think>


def thinking_after(prompt: str) -> Thinking:
    """What a prompt that ends so leaves open."""
    end = prompt.rstrip()
    if end.endswith(CLOSES):
        return Thinking.NONE
    return Thinking.OPENED if end.endswith(OPENS) else Thinking.OPTIONAL


def thinking_within(message: str) -> Thinking:
    """What the beginning of an answer leaves open, for the model to go on with it."""
    if message.rfind(OPENS) > message.rfind(CLOSES):
        return Thinking.OPENED
    return Thinking.NONE if message.strip() else Thinking.OPTIONAL


class ReasoningParser:
    """Takes the thinking off the beginning of one answer, wherever its text is cut.

    White space around the thinking, and before the content behind it, belongs to neither.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._place: _Place = "content" if thinking is Thinking.NONE else "start"
        self._held = ""
        self._is_begun = False

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is thought, as far as is known."""
        return self._place == "inside" or (self._place == "start" and self._thinking is Thinking.OPENED)

    def push(self, piece: str) -> tuple[str, str]:
        """Take in a piece of the answer; returns the thinking and the content that are certain now."""
        return self._read(piece, final=False)

    def finish(self) -> tuple[str, str]:
        """The answer is over: nothing is held back any more."""
        return self._read("", final=True)

    def _read(self, piece: str, final: bool) -> tuple[str, str]:
        self._held += piece
        if self._place == "start":
            self._begin(final)
        reasoning = self._inside(final) if self._place == "inside" else ""
        if self._place == "behind":
            self._held = self._held.lstrip()
            self._place = "content" if self._held else "behind"
        if self._place != "content":
            return reasoning, ""
        content, self._held = self._held, ""
        return reasoning, content

    def _begin(self, final: bool) -> None:
        text = self._held.lstrip()
        if text.startswith(OPENS):
            self._held, self._place = text[len(OPENS) :], "inside"
        elif final or not OPENS.startswith(text):
            self._place = "inside" if self._thinking is Thinking.OPENED else "content"

    def _inside(self, final: bool) -> str:
        text = self._held if self._is_begun else self._held.lstrip()
        end = text.find(CLOSES)
        if end >= 0:
            reasoning, self._held, self._place = text[:end].rstrip(), text[end + len(CLOSES) :], "behind"
        else:
            certain = text if final else text[: len(text) - longest_beginning(text, CLOSES)]
            reasoning = certain.rstrip()
            self._held = "" if final else text[len(reasoning) :]
        self._is_begun |= bool(reasoning)
        return reasoning
