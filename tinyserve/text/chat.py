"""What a conversation becomes: the tokens of its prompt, how it is decoded, and how calls are read out of the answer.

One path for all who chat. Knows templates and tools; nothing of how tokens come to be, or of other requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any, NamedTuple

from tinyserve.errors import RequestError
from tinyserve.sampling_params import SamplingParams
from tinyserve.text.chat_template import ChatTemplate
from tinyserve.text.reasoning import CLOSES, OPENS, ReasoningParser, Thinking, thinking_after, thinking_within
from tinyserve.text.tokenizer import Tokenizer
from tinyserve.text.tool_parser import ToolCall, ToolCallDelta, ToolCallParser, joined_calls
from tinyserve.text.tools import FORMATS, checked_tools, format_named, tool_format, tool_grammar


@dataclass(frozen=True)
class ToolOptions:
    """Which tools there are, and which of them must be called, in OpenAI's form.

    tool_format: how this model writes calls, one of `tools.FORMATS`; None is what its chat template teaches.
    """

    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    tool_format: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.parallel_tool_calls, bool):
            raise RequestError(
                f"parallel_tool_calls is {self.parallel_tool_calls!r:.60}; it must be True or False.",
                param="parallel_tool_calls",
            )


@dataclass(frozen=True)
class AnswerFormat:
    """How thinking and calls stand in the answers to a prompt.

    thinking: whether an answer begins with it.
    tool_format: how calls are written; None: there are none to be read.
    tools: those that may be called, in OpenAI's form.
    shown_ids: the special tokens that all this is written with, and that its parsers must see.
    only_one: the answer is over behind its first call.
    is_named: which tool is called was not the model's to choose.
    """

    thinking: Thinking = Thinking.NONE
    tool_format: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    shown_ids: frozenset[int] = frozenset()
    only_one: bool = False
    is_named: bool = False


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation in tokens, and how its answers are read.

    continues: the answer goes on with the last message.
    """

    token_ids: list[int]
    answer_format: AnswerFormat = AnswerFormat()
    continues: bool = False


class ChatRequest(NamedTuple):
    """What `generate` takes: `llm.generate(*request)`, `engine.generate(*request)`."""

    prompt: ChatPrompt
    params: SamplingParams


class OutputParser:
    """Takes the text of one answer apart as it comes: `push` and `finish` return content, the rest is gathered here."""

    def __init__(self, format: AnswerFormat) -> None:
        self._format = format
        self._reasoning = ReasoningParser(format.thinking)
        self._calls = None
        if format.tool_format is not None:
            self._calls = ToolCallParser(format.tool_format, format.tools, format.only_one)
        self.reasoning = ""
        self.tool_call_deltas: list[ToolCallDelta] = []  # all of them, in their order

    def push(self, piece: str) -> str:
        """Take in a piece of the answer and return the content that is certain now."""
        return self._take(*self._reasoning.push(piece))

    def finish(self) -> str:
        """The answer has ended: the content that was still held back."""
        content = self._take(*self._reasoning.finish())
        return content + self._take_calls(*self._calls.finish()) if self._calls is not None else content

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is thought, as far as is known."""
        return self._reasoning.is_thinking

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls so far, the last of which may not be whole."""
        return joined_calls(self.tool_call_deltas)

    @property
    def num_whole_calls(self) -> int:
        """How many of the calls are over."""
        return self._calls.num_whole if self._calls is not None else 0

    @property
    def is_over(self) -> bool:
        """Whether the answer has all the calls that it may have."""
        return self._format.only_one and self.num_whole_calls > 0

    def finish_reason(self, reason: str | None) -> str | None:
        """ "tool_calls" where the model ended its answer with calls of its own choice, as OpenAI has it."""
        chose = bool(self.tool_call_deltas) and not self._format.is_named
        if self._calls is not None and self._calls.is_within_arguments:  # a stop string, say, has cut the call off
            chose = False
        return "tool_calls" if chose and reason == "stop" else reason

    def _take(self, reasoning: str, content: str) -> str:
        self.reasoning += reasoning
        return content if self._calls is None else self._take_calls(*self._calls.push(content))

    def _take_calls(self, content: str, deltas: list[ToolCallDelta]) -> str:
        self.tool_call_deltas += deltas
        return content


class ChatFormat:
    """How one model chats: its tokenizer and its templates."""

    def __init__(self, name: str, tokenizer: Tokenizer, template: ChatTemplate, most_tokens: int | None = None) -> None:
        """`name` says in errors whose they are; a conversation that is longer than `most_tokens` can be is refused."""
        self._name, self._tokenizer, self._template, self._most_tokens = name, tokenizer, template, most_tokens

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        """A checkpoint with several templates has one for tools, under the name that transformers looks for."""
        source = self._tokenizer.chat_templates.get("tool_use")
        if source is None or source == self._template.source:
            return self._template
        return ChatTemplate(source, self._tokenizer.special_tokens, self._name)

    def new_call_id(self, random: Random | None = None) -> str:
        """An id for a call in an answer, such as the template takes when the call is sent back."""
        return self._tool_template.new_call_id(random)

    def text(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """A conversation as the template writes it; raises RequestError as templates do."""
        template = self._template if variables.get("tools") is None else self._tool_template
        return template.render(messages, **variables)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        add_special_tokens: bool = False,
    ) -> list[int]:
        """The tokens of a conversation, with no second BOS; raises RequestError as templates do.

        With `add_special_tokens` a BOS that the template does not write is added, if the model's texts have one.
        """
        return self._encode(self.text(messages, variables), add_special_tokens)

    def request(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        options: ToolOptions,
        variables: Mapping[str, Any],
        add_special_tokens: bool = False,
    ) -> ChatRequest:
        """A conversation with tools or without. Raises RequestError for tools that cannot be shown, or forced."""
        if options.tools is None:
            if options.tool_choice not in (None, "none"):
                raise RequestError(
                    f"tool_choice is {options.tool_choice!r:.80}, and there are no tools to choose from.",
                    param="tool_choice",
                )
            return ChatRequest(self._prompt(messages, variables, add_special_tokens, AnswerFormat()), params)
        tools = checked_tools(options.tools)
        if options.tool_choice == "none":  # a template may show them all the same, and need not
            return ChatRequest(
                self._prompt(messages, {**variables, "tools": tools}, add_special_tokens, AnswerFormat()), params
            )
        format = self._tool_format(options.tool_format)
        grammar = tool_grammar(
            tools,
            options.tool_choice,
            format,
            parallel_tool_calls=options.parallel_tool_calls,
            special_ids=self._tokenizer.specials,
        )
        if grammar is not None:
            if params.structured_outputs is not None:
                raise RequestError(
                    f"tool_choice is {options.tool_choice!r:.80} beside structured_outputs: an answer cannot be a call "
                    "and have another structure. Leave out one of the two.",
                    param="tool_choice",
                )
            params = replace(params, structured_outputs=grammar)
        answers = AnswerFormat(
            tool_format=format,
            tools=tuple(tools),
            shown_ids=self._shown_ids(format_named(format).tags),
            only_one=not options.parallel_tool_calls,
            is_named=isinstance(options.tool_choice, Mapping),
        )
        return ChatRequest(self._prompt(messages, {**variables, "tools": tools}, add_special_tokens, answers), params)

    def _prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        add_special_tokens: bool,
        answers: AnswerFormat,
    ) -> ChatPrompt:
        text = self.text(messages, variables)
        continues = bool(variables.get("continue_final_message"))
        thinking = thinking_after(text)
        if continues:
            content = messages[-1].get("content")
            thinking = thinking_within(content if isinstance(content, str) else "")
        shown_ids = answers.shown_ids | self._shown_ids((OPENS, CLOSES))
        answers = replace(answers, thinking=thinking, shown_ids=shown_ids)
        return ChatPrompt(self._encode(text, add_special_tokens), answers, continues)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if not isinstance(add_special_tokens, bool):
            raise RequestError(
                f"add_special_tokens is {add_special_tokens!r:.60}; it must be True or False.",
                param="add_special_tokens",
            )
        return self._tokenizer.encode_prompt(text, add_special_tokens, self._most_tokens)

    def _tool_format(self, given: str | None) -> str:
        format = given if given is not None else tool_format(self._tool_template.source)
        if format is None:
            raise RequestError(
                f"The chat template of {self._name} does not show tools to the model. Leave out tools; or describe "
                "them in a message, and say by tool_format (serve --tool-format) how calls are written: "
                f"{', '.join(FORMATS)}.",
                param="tools",
            )
        format_named(format)
        return format

    def _shown_ids(self, tags: Sequence[str]) -> frozenset[int]:
        return frozenset(token for text, token in self._tokenizer.specials.items() if text in tags)
