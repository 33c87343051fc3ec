"""What is thought is free and bounded, and what must be said begins behind it, whatever the tokens are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from checkpoints import CHAT_TEMPLATE, CONFIGS, write_folder, write_tokenizer
from refusals import refused
from test_chat import QUESTION, TOOLS, answer, chatty, sampled, saying  # noqa: F401  # chatty is a fixture
from test_grammar import allowed, compiler_of  # noqa: F401  # compiler_of is a fixture
from tool_templates import HERMES

from tinyserve import LLM, SamplingParams, StructuredOutputs
from tinyserve.text.grammar import GrammarCompiler
from tinyserve.text.reasoning import Thinking
from tinyserve.text.reasoning_matcher import ReasoningMatcher, ThinkingTokens
from tinyserve.text.tokenizer import Tokenizer

OPENED = CHAT_TEMPLATE + "{% if enable_thinking is not false %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
TAGS = ("<think>", "</think>")


def tokens_of(compiler: GrammarCompiler) -> ThinkingTokens:
    return ThinkingTokens(compiler._tokenizer, compiler.vocab_size, compiler.end_tokens)


def spelled(tokens: ThinkingTokens, ids: list[int]) -> bytes:
    return b"".join(map(tokens.bytes_of, ids))


def walk(matcher: ReasoningMatcher, rng: Any, most: int = 400) -> list[int]:
    """Tokens at random among those that are allowed, which are those that it takes; now and then those of </think>."""
    ids: list[int] = []
    following: list[int] = []
    for _ in range(most):
        here = allowed(matcher)
        assert here, "a mask that allows nothing"
        for token in rng.integers(0, matcher.vocab_size, 3).tolist():
            assert matcher.copy().advance(token) == (token in here)
        if not following and rng.random() < 0.2:
            following = list(matcher._tokens.closing)
        wanted = following.pop(0) if following else -1
        token = wanted if wanted in here else int(rng.choice(here))
        assert matcher.advance(token)
        if token in matcher.end_tokens:
            return ids
        ids.append(token)
    raise AssertionError(f"no end within {most} tokens")


@pytest.mark.parametrize("kind", ["bytes", "smollm2", "sentencepiece", "gpt-2"])
def test_what_must_be_said_begins_behind_the_thinking(kind: str, compiler_of: Callable[..., Any]) -> None:  # noqa: F811
    compiler = compiler_of(kind)
    grammar, tokens = compiler.compile(StructuredOutputs(choice=["yes", "no"])), tokens_of(compiler)
    thoughts = set()
    for seed in range(12):
        matcher = ReasoningMatcher(tokens, Thinking.OPENED, grammar.matcher())
        text = spelled(tokens, walk(matcher, np.random.default_rng(seed)))
        thought, closed, said = text.partition(b"</think>")
        assert closed and said.strip() in (b"yes", b"no")
        thoughts.add(thought)
    assert len(thoughts) > 6, "what is thought is free"


@pytest.mark.parametrize("kind", ["bytes", "smollm2", "sentencepiece", "gpt-2"])
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_closes_the_thinking(kind: str, budget: int, compiler_of: Callable[..., Any]) -> None:  # noqa: F811
    compiler = compiler_of(kind)
    tokens = tokens_of(compiler)
    plain = compiler._tokenizer.encode("a", add_special_tokens=False)[-1]
    matcher = ReasoningMatcher(tokens, Thinking.OPENED, max_tokens=budget)
    for _ in range(budget):
        assert not matcher.forced_tokens() and matcher.advance(plain)
    assert matcher.forced_tokens() == tokens.closing
    assert matcher.count_valid([*tokens.closing, plain, plain]) == len(tokens.closing) + 2
    for token in tokens.closing:
        assert allowed(matcher) == [token] and not matcher.advance(plain)
        assert matcher.advance(token)
    assert len(allowed(matcher)) == matcher.vocab_size + -matcher.vocab_size % 32, "the answer is free"
    assert matcher.advance(plain) and matcher.forced_tokens() == []


def test_thinking_that_begins_with_the_answer(compiler_of: Callable[..., Any]) -> None:  # noqa: F811
    """Without a grammar it may be spelled in any way; with one, only by a token of its own, which may be left out."""
    compiler = compiler_of("bytes")
    tokens = tokens_of(compiler)
    encode = compiler._tokenizer.encode
    for before in ("", "\n"):
        matcher = ReasoningMatcher(tokens, Thinking.OPTIONAL, max_tokens=2)
        for token in encode(before + "<think>"):
            assert not matcher.forced_tokens() and matcher.advance(token)
        assert [matcher.advance(token) for token in encode("ab<")] == [True, True, True], "the budget's < closes"
        assert not matcher.advance(encode("a")[0]) and matcher.forced_tokens() == encode("/think>")
    matcher = ReasoningMatcher(tokens, Thinking.OPTIONAL, max_tokens=0)
    assert all(matcher.advance(token) for token in encode("<thing> is not <think>, and no end"))
    grammar = compiler.compile(StructuredOutputs(choice=["<think>!"]))
    matcher = ReasoningMatcher(tokens, Thinking.OPTIONAL, grammar.matcher())
    assert [token for token in encode("<think>!") if not matcher.advance(token)] == [], "no token: all is the answer's"
    assert ReasoningMatcher(tokens, Thinking.NONE, grammar.matcher(), 0).forced_tokens() == encode("<think>!")


def test_a_tag_that_is_a_token_of_its_own(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.add_special_tokens(list(TAGS))
    backend.save(str(file))
    tokenizer = Tokenizer.from_folder(tmp_path)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    opens, closes = (tokenizer.encode(tag)[0] for tag in TAGS)
    tokens, grammar = tokens_of(compiler), compiler.compile(StructuredOutputs(regex="[ab]+"))
    assert (tokens.opening, tokens.closing) == (opens, [closes])
    a, b, blank = (tokenizer.encode(text)[0] for text in "ab\n")
    matcher = ReasoningMatcher(tokens, Thinking.OPTIONAL, grammar.matcher())
    assert allowed(matcher) == sorted([a, b, opens])
    assert matcher.copy().advance(a) and not matcher.advance(blank)
    skipping = matcher.copy()
    assert skipping.advance(b) and opens not in allowed(skipping), "who has begun to answer does not think"
    assert matcher.advance(opens)
    inside = set(allowed(matcher))
    assert {a, blank, closes, opens} <= inside and not inside & matcher.end_tokens, "thinking is no answer"
    assert matcher.advance(blank) and matcher.advance(closes)
    assert {a, b, blank} <= set(allowed(matcher)) and tokenizer.encode("c")[0] not in allowed(matcher)
    twin = matcher.copy()
    assert twin.advance(blank) and not twin.advance(blank), "one token of white space may be before the answer"
    assert matcher.advance(a) and not matcher.advance(blank)
    draft = np.zeros((5, (tokenizer.vocab_size + 31) // 32), np.uint32)
    fresh = ReasoningMatcher(tokens, Thinking.OPENED, grammar.matcher())
    assert fresh.fill_draft([b, closes, a, opens], draft) == 3 and fresh.count_valid([b, closes, a, opens]) == 3
    assert draft[3].any() and not draft[4].any()


# --- in whole answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("specials", [(), TAGS])
def test_an_answer_with_thinking(chatty: Callable[..., LLM], specials: tuple[str, ...]) -> None:  # noqa: F811
    llm = chatty(OPENED, *specials)
    closing = len(llm.tokenizer.encode("</think>", add_special_tokens=False))
    got = answer(llm, saying("\n\nYes. ", thinking_token_budget=5))
    assert (got.text, got.finish_reason) == ("Yes. ", "stop")
    assert got.reasoning and got.reasoning_tokens == 5 + closing
    assert got.reasoning.startswith(llm.tokenizer.decode(got.token_ids[:5]).strip()[:3])
    free = answer(llm, sampled(30, thinking_token_budget=3))
    assert free.token_ids[3 : 3 + closing] == llm.tokenizer.encode("</think>", add_special_tokens=False)
    none = answer(llm, saying("Yes."), chat_template_kwargs={"enable_thinking": False})
    assert (none.text, none.reasoning, none.reasoning_tokens) == ("Yes.", "", 0)
    cut = answer(llm, sampled(4, banned_token_ids=llm.tokenizer.encode("<>", add_special_tokens=False)))
    assert (cut.text, cut.finish_reason, cut.reasoning_tokens) == ("", "length", 4)


def test_an_answer_that_begins_with_thinking(chatty: Callable[..., LLM]) -> None:  # noqa: F811
    llm = chatty(CHAT_TEMPLATE)
    got = answer(llm, saying("<think>\nLet me see.\n</think>\n\nYes."))
    assert (got.text, got.reasoning) == ("Yes.", "Let me see.")
    assert got.reasoning_tokens < len(got.token_ids)
    [completion] = llm.generate("<think>Why</think>", saying("<think>a</think>b"))
    assert (completion.outputs[0].text, completion.outputs[0].reasoning) == ("<think>a</think>b", "")
    calls = answer(llm, saying('<think><tool_call>no</think>[{"name": "now", "arguments": {}}]'), tools=TOOLS,
                   tool_format="hermes")  # fmt: skip
    assert (calls.reasoning, calls.tool_calls) == ("<tool_call>no", [])


@pytest.mark.parametrize("format", ["hermes", "qwen3-coder", "mistral-v11"])
def test_a_forced_call_is_behind_the_thinking(chatty: Callable[..., LLM], format: str) -> None:  # noqa: F811
    llm = chatty(HERMES.replace('BEGIN + "assistant" + MIDDLE }}', "BEGIN + \"assistant\" + MIDDLE + '<think>' }}"))
    got = answer(llm, sampled(thinking_token_budget=4), tools=TOOLS, tool_choice="required",
                 parallel_tool_calls=False, tool_format=format)  # fmt: skip
    assert got.reasoning and got.text == "" and got.finish_reason == "tool_calls"
    assert [call.name in ("now", "get_weather") for call in got.tool_calls] == [True]


def test_a_message_is_continued_where_its_thinking_was(chatty: Callable[..., LLM]) -> None:  # noqa: F811
    llm = chatty(CHAT_TEMPLATE)
    begun = {"role": "assistant", "content": "<think>First"}
    options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    got = answer(llm, saying(" no.", thinking_token_budget=2), [*QUESTION, begun], **options)
    assert got.reasoning and got.text == "no."
    got = answer(llm, saying("<think>a</think>"), [*QUESTION, {**begun, "content": "So"}], **options)
    assert (got.text, got.reasoning) == ("<think>a</think>", "")


def test_a_budget_holds_for_a_text_too(chatty: Callable[..., LLM]) -> None:  # noqa: F811
    llm = chatty(CHAT_TEMPLATE)
    params = SamplingParams(temperature=0, max_tokens=20, thinking_token_budget=2)
    closing = llm.tokenizer.encode("</think>", add_special_tokens=False)
    for prompt in ("Why? <think>\n", llm.tokenizer.encode("Why? <think>\n")):
        [output] = llm.generate(prompt, params)
        assert output.outputs[0].token_ids[2 : 2 + len(closing)] == closing
    with refused("thinking_token_budget", "thinking_token_budget is -1; it must be a whole number of at least 0."):
        SamplingParams(thinking_token_budget=-1)


def test_thinking_is_the_same_with_draft_tokens_and_in_company(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CONFIGS["llama"] | {"max_position_embeddings": 1024})
    conversations = [[{"role": "user", "content": f"{word} <think>"}] for word in ("One", "Two", "Three")]
    params = saying("Yes, yes, yes, yes, yes, yes.", thinking_token_budget=30)
    template = OPENED.replace("<think>\n{% else %}", "<think>\nab ab ab ab {% else %}")
    seen = []
    for options in ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}):
        with LLM(folder, dtype="float32", chat_template=template, num_threads=1, **options) as llm:  # type: ignore[arg-type]
            alone = [llm.chat(one, params)[0].outputs[0] for one in conversations]
            together = [output.outputs[0] for output in llm.chat(conversations, params)]
            assert [one.token_ids for one in alone] == [one.token_ids for one in together]
            seen.append([(one.reasoning, one.text, one.token_ids) for one in alone])
    assert seen[0] == seen[1] and all(text == "Yes, yes, yes, yes, yes, yes." for _, text, _ in seen[0])
