"""Conversations with tools: shown, called, read back, in every way to chat; on models of random weights.

What such a model says is made sure of by a structure: an answer that may be one text only is that text.
"""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tokenizers
from checkpoints import VOCAB
from refusals import refused
from test_chat_template import SPECIAL
from test_tools import CALL, CONVERSATION, NAMED, NOW, TOOLS, WEATHER
from tool_templates import HERMES, LLAMA_3

from tinyserve import LLM, AsyncEngine, SamplingParams, StructuredOutputs
from tinyserve.text.chat import AnswerFormat, ChatFormat, OutputParser
from tinyserve.text.chat_template import ChatTemplate
from tinyserve.text.reasoning import Thinking
from tinyserve.text.request import CompletionOutput, StreamChunk
from tinyserve.text.tokenizer import Tokenizer
from tinyserve.text.tokenizer.detokenizer import StreamDetokenizer
from tinyserve.text.tool_parser import ToolCall, joined_calls
from tinyserve.text.tools import checked_tools

GRANITE_3 = (
    "{% if tools %}{{ tools | tojson }} Write <|tool_call|> and a list.\n{% endif %}"
    "{% for m in messages %}<|user|>{{ m.content }}\n{% endfor %}"
)
PLAIN = checkpoints.CHAT_TEMPLATE
QUESTION = [{"role": "user", "content": "Weather in Köln?"}]
ONE = '{"name": "get_weather", "arguments": {"place": "Köln"}}'
TWO = '{"name": "now", "arguments": {}}'
KOELN, NOW_CALL = ToolCall("get_weather", '{"place": "Köln"}'), ToolCall("now", "{}")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LLM]:
    """A tiny model with this chat template, and these special tokens behind its vocabulary."""
    root, loaded = tmp_path_factory.mktemp("chatty"), dict[Any, LLM]()

    def load(template: str | dict[str, str], *specials: str) -> LLM:
        key = (json.dumps(template), specials)
        if key not in loaded:
            raw = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 2048, "vocab_size": VOCAB + len(specials)}
            folder = checkpoints.write_folder(root / str(len(loaded)), raw)
            file = folder / "tokenizer_config.json"
            config = json.loads(file.read_text())
            config["chat_template"] = template
            if isinstance(template, dict):
                config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
            config["added_tokens_decoder"] = {
                VOCAB + i: {"content": text, "special": True, "normalized": False} for i, text in enumerate(specials)
            }
            file.write_text(json.dumps(config))
            loaded[key] = LLM(folder, dtype="float32", num_threads=1, max_num_seqs=4)
        return loaded[key]

    return load


def saying(text: str, max_tokens: int = 200, **options: Any) -> SamplingParams:
    """An answer that can be nothing but this; `<[7]>` in it is token 7."""
    parts = [part for part in text.replace("<[", "\0<[").replace("]>", "]>\0").split("\0") if part]
    grammar = "start: " + " ".join(part if part.startswith("<[") else json.dumps(part) for part in parts)
    structure = StructuredOutputs(grammar=grammar)
    return SamplingParams(temperature=0, max_tokens=max_tokens, structured_outputs=structure, **options)


def sampled(max_tokens: int = 300, **options: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 3, "max_tokens": max_tokens} | options)


def answer(llm: LLM, params: SamplingParams, messages: Any = QUESTION, **options: Any) -> CompletionOutput:
    """By `chat`; and `stream_chat` and an AsyncEngine say the same, in pieces."""
    [output] = llm.chat(messages, params, **options)
    [whole] = output.outputs

    async def collect() -> list[StreamChunk]:
        return [chunk async for chunk in AsyncEngine(llm).chat(messages, params, **options)]

    for chunks in (list(llm.stream_chat(messages, params, **options)), asyncio.run(collect())):
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [call for chunk in chunks for call in chunk.tool_calls] == whole.tool_calls
        assert joined_calls([delta for chunk in chunks for delta in chunk.tool_call_deltas]) == whole.tool_calls
        assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
        assert "".join(chunk.reasoning for chunk in chunks) == whole.reasoning
        assert sum(chunk.reasoning_tokens for chunk in chunks) == whole.reasoning_tokens
        assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == (whole.finish_reason, whole.stop_reason)
        assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    return whole


# --- what the model reads -----------------------------------------------------------------------------------------


def test_tools_are_shown_as_the_template_shows_them(chatty: Callable[..., LLM]) -> None:
    llm = chatty(HERMES)
    specials = llm.tokenizer.special_tokens
    for messages in (QUESTION, CONVERSATION):
        shown = ChatTemplate(HERMES, specials, "m").render(messages, tools=TOOLS)
        for choice in (None, "auto", "none", "required", NAMED):  # "none" shows them too, as in vLLM
            prompt, _ = llm.chat_request(messages, sampled(), tools=TOOLS, tool_choice=choice)
            assert prompt.token_ids == llm.tokenizer.encode_chat(shown)
    assert llm.chat_request(QUESTION).prompt.token_ids == llm.chat_prompt(QUESTION)
    assert llm.chat_request(QUESTION, tool_choice="none").prompt.answer_format == AnswerFormat(Thinking.OPTIONAL)


COLLISIONS = [
    "messages", "sampling_params", "tools", "tool_choice", "tool_format", "parallel_tool_calls", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message", "add_special_tokens", "temperature", "stop", "self",
]  # fmt: skip


@pytest.mark.parametrize("name", COLLISIONS)
def test_a_template_variable_that_is_said_elsewhere_is_refused(chatty: Callable[..., LLM], name: str) -> None:
    llm = chatty(PLAIN)
    for use in (llm.chat, llm.chat_request, llm.chat_prompt, llm.chat_text, llm.stream_chat):
        with refused(f"chat_template_kwargs.{name}", f"chat_template_kwargs.{name} is given"):
            use(QUESTION, chat_template_kwargs={name: 1})


def test_template_variables_may_have_any_other_name(chatty: Callable[..., LLM]) -> None:
    llm = chatty("{{ name }}{{ params }}{{ options }}{{ context }}{{ source }}{{ documents }}")
    names = dict.fromkeys(["name", "params", "options", "context", "source", "documents"], "x")
    assert llm.chat_text(QUESTION, chat_template_kwargs=names) == llm.chat_text(QUESTION, **names) == "xxxxxx"
    for wrong in ([1], "x", 3):
        with refused("chat_template_kwargs", "it must be an object"):
            llm.chat(QUESTION, chat_template_kwargs=wrong)
    with refused("chat_template", r"LLM(..., chat_template=...)"):
        llm.chat(QUESTION, chat_template=PLAIN)
    with refused("chat_template_kwargs.1"):
        llm.chat(QUESTION, chat_template_kwargs={1: 2})


def test_the_last_message_goes_on(chatty: Callable[..., LLM]) -> None:
    template = PLAIN.replace("{% endfor %}", "<|eos|>{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}")
    llm = chatty(template)
    messages = [*QUESTION, {"role": "assistant", "content": "It is "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    text = llm.chat_text(messages, **options)
    assert text == f"<|bos|><|user|>{QUESTION[0]['content']}\n<|eos|><|user|>It is "
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    assert llm.chat_prompt(messages, **options) == llm.chat_request(messages, **options).prompt.token_ids == ids
    [output] = llm.chat(messages, sampled(4), **options)
    assert output.prompt_token_ids == ids
    with refused("continue_final_message", "both true"):
        llm.chat(messages, continue_final_message=True)


def test_bos_is_added_to_a_template_that_does_not_write_it(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = checkpoints.write_folder(tmp_path, checkpoints.CONFIGS["llama"])
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", checkpoints.BOS)])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    for source, counts in ((PLAIN, (1, 1)), ("{{ messages[0].content }}", (0, 1))):
        chats = ChatFormat("m", tokenizer, ChatTemplate(source, SPECIAL | {"bos_token": "<|bos|>"}, "m"))
        for add, count in zip((False, True), counts, strict=True):
            assert chats.prompt(QUESTION, {}, add_special_tokens=add).count(checkpoints.BOS) == count
    with refused("add_special_tokens"):
        chats.prompt(QUESTION, {}, add_special_tokens=1)  # type: ignore[arg-type]


def test_a_model_with_a_broken_template_continues_text(chatty: Callable[..., LLM]) -> None:
    llm = chatty("{% for m in messages %}{% audio m %}{% endfor %}")
    assert llm.generate("Once", sampled(3))[0].outputs[0].token_ids
    for use in (llm.chat, llm.chat_prompt, llm.stream_chat):
        with refused("messages", "Encountered unknown tag 'audio'"):
            use(QUESTION)


def test_a_template_for_tools_is_taken_where_there_is_one(chatty: Callable[..., LLM]) -> None:
    llm = chatty({"default": PLAIN, "tool_use": HERMES})
    assert llm.chat_prompt(QUESTION) == chatty(PLAIN).chat_prompt(QUESTION)
    expected = llm.tokenizer.encode_chat(ChatTemplate(HERMES, SPECIAL, "m").render(QUESTION, tools=TOOLS))
    assert llm.chat_request(QUESTION, tools=TOOLS).prompt.token_ids == expected
    assert llm.chat_prompt(QUESTION, tools=TOOLS) == expected
    assert llm.chat_request(QUESTION, tools=TOOLS).prompt.answer_format == AnswerFormat(
        Thinking.OPTIONAL, "hermes", tuple(checked_tools(TOOLS))
    )


# --- what comes of the answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "said", "text", "calls"),
    [
        (HERMES, "Hello.", "Hello.", []),
        (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [KOELN]),
        (
            HERMES,
            f"Let me see.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{TWO}</tool_call>",
            "Let me see.",
            [KOELN, NOW_CALL],
        ),
        (HERMES, "<tool_call>\nlater", "<tool_call>\nlater", []),
        (LLAMA_3, ONE.replace("arguments", "parameters"), "", [KOELN]),
        (LLAMA_3, f"It is {TWO}", f"It is {TWO}", []),
    ],
)
def test_calls_are_read_out_of_answers(
    chatty: Callable[..., LLM], template: str, said: str, text: str, calls: list[ToolCall]
) -> None:
    got = answer(chatty(template), saying(said), tools=TOOLS)
    assert (got.text, got.tool_calls, got.finish_reason) == (text, calls, "tool_calls" if calls else "stop")
    assert chatty(template).tokenizer.decode(got.token_ids) == said


def test_nothing_is_read_where_no_tool_may_be_called(chatty: Callable[..., LLM]) -> None:
    said = f"<tool_call>{ONE}</tool_call>"
    for options in ({"tools": TOOLS, "tool_choice": "none"}, {}):
        got = answer(chatty(HERMES), saying(said), **options)
        assert (got.text, got.tool_calls, got.finish_reason) == (said, [], "stop")


def test_calls_come_as_soon_as_they_are_whole(chatty: Callable[..., LLM]) -> None:
    said = f"Well. <tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call>"
    chunks = list(chatty(HERMES).stream_chat(QUESTION, saying(said), tools=TOOLS))
    came = {
        call.name: sum(len(c.token_ids) for c in chunks[: i + 1]) for i, c in enumerate(chunks) for call in c.tool_calls
    }
    count = chatty(HERMES).tokenizer.encode
    assert came == {
        "get_weather": len(count(said[: said.index(ONE)] + ONE)),
        "now": len(count(said[: said.index(TWO)] + TWO)),
    }


def test_one_call_at_a_time_ends_the_answer(chatty: Callable[..., LLM]) -> None:
    said = f"Well. <tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call>"
    got = answer(chatty(HERMES), saying(said), tools=TOOLS, parallel_tool_calls=False)
    assert (got.text, got.tool_calls, got.finish_reason, got.stop_reason) == ("Well.", [KOELN], "tool_calls", None)
    assert chatty(HERMES).tokenizer.decode(got.token_ids).endswith(ONE)
    in_a_list = answer(chatty(HERMES), saying(f"<tool_call>[{ONE}, {TWO}]</tool_call> and"), tools=TOOLS,
                       parallel_tool_calls=False)  # fmt: skip
    assert (in_a_list.text, in_a_list.tool_calls) == ("", [KOELN])


def test_an_answer_that_is_cut(chatty: Callable[..., LLM]) -> None:
    """A call is one once its arguments have begun; but the answer has not come to its end."""
    llm, said = chatty(HERMES), f"<tool_call>{ONE}</tool_call>"
    got = answer(llm, saying(said, 20), tools=TOOLS)
    assert (got.text, got.tool_calls, got.finish_reason) == (llm.tokenizer.decode(got.token_ids), [], "length")
    length = len(llm.tokenizer.encode(said)) - 5
    got = answer(llm, saying(said, length), tools=TOOLS)
    assert (got.tool_calls, got.finish_reason) == ([KOELN], "length")
    got = answer(llm, saying(said, stop="</tool_call>"), tools=TOOLS)
    assert (got.text, got.tool_calls, got.finish_reason, got.stop_reason) == ("", [KOELN], "tool_calls", "</tool_call>")
    got = answer(llm, saying(f"So {said}", stop="place"), tools=TOOLS)
    begun = [ToolCall("get_weather", '{"')]
    assert (got.text, got.tool_calls, got.finish_reason, got.stop_reason) == ("So", begun, "stop", "place")
    got = answer(llm, saying(f"So {said}", stop="weather"), tools=TOOLS)
    assert (got.text, got.tool_calls) == ('So <tool_call>{"name": "get_', [])


@pytest.mark.parametrize("is_byte_level", [True, False])
def test_the_formats_special_tokens_are_read_and_no_others(
    chatty: Callable[..., LLM], is_byte_level: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = chatty(GRANITE_3, "<|tool_call|>", "<|other|>")
    if not is_byte_level:
        monkeypatch.setattr(
            llm.tokenizer,
            "detokenizer",
            lambda skip, *, continuation, shown: StreamDetokenizer(
                llm.tokenizer._backend, llm.tokenizer.special_ids - shown if skip else frozenset()
            ),
        )
    said = f"So<[{VOCAB + 1}]>. <[{VOCAB}]>[{ONE}, {TWO}]"
    got = answer(llm, saying(said), tools=TOOLS)
    assert VOCAB in got.token_ids and VOCAB + 1 in got.token_ids
    assert (got.text, got.tool_calls, got.finish_reason) == ("So.", [KOELN, NOW_CALL], "tool_calls")
    plain = answer(llm, saying(said), tools=TOOLS, tool_choice="none")
    assert plain.text == f"So. [{ONE}, {TWO}]"
    every = answer(llm, saying(said, skip_special_tokens=False), tools=TOOLS)
    assert (every.text, every.tool_calls) == ("So<|other|>.", [KOELN, NOW_CALL])


def test_each_of_several_answers_has_calls_of_its_own(chatty: Callable[..., LLM]) -> None:
    llm = chatty(HERMES)
    [output] = llm.chat(QUESTION, sampled(n=3), tools=TOOLS, tool_choice="required")
    assert len({str(one.tool_calls) for one in output.outputs}) == 3
    conversations = [QUESTION, [{"role": "user", "content": "Now?"}]]
    outputs = llm.chat(conversations, [saying(f"<tool_call>{TWO}</tool_call>"), saying("No.")], tools=TOOLS)
    assert [o.outputs[0].tool_calls for o in outputs] == [[NOW_CALL], []]
    assert [o.outputs[0].text for o in outputs] == ["", "No."]


# --- forced calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "specials"), [(HERMES, []), (LLAMA_3, []), (GRANITE_3, ["<|tool_call|>"]), (GRANITE_3, [])]
)
def test_a_forced_answer_is_a_call(chatty: Callable[..., LLM], template: str, specials: list[str]) -> None:
    llm = chatty(template, *specials)
    got = answer(llm, sampled(), tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert got.text == "" and len(got.tool_calls) == 1 and got.finish_reason == "tool_calls"
    named = answer(llm, sampled(), tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}})
    assert (named.text, named.tool_calls, named.finish_reason) == ("", [NOW_CALL], "stop")
    for one in llm.chat(QUESTION, sampled(n=4, temperature=0.5), tools=TOOLS, tool_choice=NAMED)[0].outputs:
        assert one.finish_reason == "length" or json.loads(one.tool_calls[0].arguments)["place"]
        assert one.finish_reason == "length" or not one.text


def test_a_model_that_shows_no_tools(chatty: Callable[..., LLM]) -> None:
    llm = chatty(PLAIN)
    for choice in (None, "auto", "required"):
        with refused("tools", "does not show tools to the model. Leave out tools; or describe them"):
            llm.chat(QUESTION, sampled(), tools=TOOLS, tool_choice=choice)
    none = llm.chat(QUESTION, sampled(), tools=TOOLS, tool_choice="none")[0].outputs[0]
    assert none == llm.chat(QUESTION, sampled())[0].outputs[0], "what may not be called need not be shown"
    got = answer(llm, sampled(), tools=[NOW], tool_choice="required", parallel_tool_calls=False, tool_format="json")
    assert got.tool_calls == [NOW_CALL]
    got = answer(llm, saying(f"<tool_call>{ONE}</tool_call>"), tools=[WEATHER], tool_format="hermes")
    assert got.tool_calls == [KOELN]


@pytest.mark.parametrize(
    ("options", "param", "sentence"),
    [
        ({"tools": []}, "tools", "tools is []; it must be a list of at least one tool"),
        ({"tools": [NOW, NOW]}, "tools[1].function.name", "as is that of tools[0]"),
        (
            {"tool_choice": "required"},
            "tool_choice",
            "tool_choice is 'required', and there are no tools to choose from.",
        ),
        ({"tool_choice": "auto"}, "tool_choice", "is 'auto', and there are no tools to choose from."),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "is 'always'; it must be"),
        ({"tools": [NOW], "tool_choice": NAMED}, "tool_choice.function.name", "is 'get_weather'; the tools are now."),
        ({"tools": TOOLS, "tool_format": "xml"}, "tool_format", "There is no tool format 'xml'; there are llama-3,"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls", "is 1; it must be True or False."),
        ({"max_tokens": 3}, "max_tokens", "is a sampling parameter: give it as SamplingParams(max_tokens=...)."),
        (
            {"tools": TOOLS, "tool_choice": "required", "sampling_params": saying("x")},
            "tool_choice",
            "tool_choice is 'required' beside structured_outputs",
        ),
        (
            {"tools": TOOLS, "tool_choice": NAMED, "sampling_params": SamplingParams(ignore_eos=True)},
            "ignore_eos",
            "ignore_eos is True beside structured_outputs",
        ),
    ],
)
def test_what_is_refused(chatty: Callable[..., LLM], options: dict[str, Any], param: str, sentence: str) -> None:
    llm = chatty(HERMES)
    for chat in (llm.chat, llm.stream_chat, llm.chat_request):
        with refused(param, sentence):
            chat(QUESTION, **options)

    async def ask() -> None:
        async for _ in AsyncEngine(llm).chat(QUESTION, **options):
            raise AssertionError

    with refused(param, sentence):
        asyncio.run(ask())


def test_a_template_may_refuse_what_was_called(chatty: Callable[..., LLM]) -> None:
    twice = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}]
    with refused("messages", "only supports single tool-calls"):
        chatty(LLAMA_3).chat(twice, sampled(), tools=TOOLS)


# --- its parts ----------------------------------------------------------------------------------------------------


def test_output_parser_alone() -> None:
    parser = OutputParser(AnswerFormat(tool_format="hermes"))
    assert [parser.push(piece) for piece in ("a <to", "ol_call>", ONE, "</tool_c")] == ["a", "", "", ""]
    assert parser.tool_calls == [KOELN] and not parser.is_over
    assert parser.finish() == "</tool_c"
    assert [parser.finish_reason(reason) for reason in ("stop", "length", "abort", None)] == [
        "tool_calls", "length", "abort", None,
    ]  # fmt: skip
    assert OutputParser(AnswerFormat(tool_format="hermes")).finish_reason("stop") == "stop"


def test_a_chat_format_needs_no_model(smollm2: Path) -> None:
    from tinyserve.loading import open_model

    files = open_model(str(smollm2))
    assert files.tokenizer is not None and files.chat_template is not None
    chats = ChatFormat("m", files.tokenizer, files.chat_template)
    assert files.tokenizer.decode(chats.prompt(QUESTION, {}), skip_special_tokens=False).count("Köln") == 1


def test_the_default_model_is_made_to_call(smollm2: Path) -> None:
    """It was not trained to, but reads English and JSON."""
    llm = LLM(str(smollm2), max_model_len=1024)
    system = {
        "role": "system",
        "content": "Answer with a call of get_weather, which takes a place and a unit, such as "
        '{"name": "get_weather", "arguments": {"place": "Rome", "unit": "celsius"}}',
    }
    question = {"role": "user", "content": "What is the weather like in Paris, in celsius?"}
    got = answer(
        llm,
        SamplingParams(temperature=0, max_tokens=60),
        [system, question],
        tools=TOOLS,
        tool_choice=NAMED,
        tool_format="json",
    )
    [call] = got.tool_calls
    assert call.name == "get_weather" and json.loads(call.arguments)["place"] == "Paris"
    assert got.text == "" and got.finish_reason == "stop"
