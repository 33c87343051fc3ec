"""Structured outputs through all layers: in batches, with several answers, preempted, streamed, and refused."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import jsonschema
import pytest
from command_line import Shell
from conftest import cache_bytes
from refusals import refused
from schemas import CASES

from tinyserve import LLM, AsyncEngine, SamplingParams, StructuredOutputs


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def asked(max_tokens: int = 60, temperature: float = 1.0, **spec: Any) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens, seed=1, structured_outputs=StructuredOutputs(**spec)
    )


SPECS = [
    ({"regex": "[a-f]{3}-[0-9]{2,4}"}, re.compile("[a-f]{3}-[0-9]{2,4}").fullmatch),
    ({"choice": ["yes", "no", "perhaps"]}, {"yes", "no", "perhaps"}.__contains__),
    ({"grammar": 'start: "(" start ")" | "x"'}, lambda text: text.count("(") == text.count(")") and "x" in text),
]


@pytest.mark.parametrize("name", ["llama", "granite-hybrid"])
def test_answers_of_a_batch_keep_to_their_own_structure(name: str, llm_of: Callable[..., LLM]) -> None:
    """Beside others that have none, several answers a prompt, sampled: a random model would never do so by itself."""
    llm = llm_of(name)
    prompts = [checkpoints.token_ids(5 + i, seed=i) for i in range(len(SPECS))]
    structured = [asked(**spec) for spec, _ in SPECS[:2]] + [asked(200, 0.5, **SPECS[2][0])]
    free = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = llm.generate(prompts[0], free)[0].outputs[0].token_ids
    alone = [llm.generate([prompt], one)[0].outputs[0] for prompt, one in zip(prompts, structured, strict=True)]
    for (_, holds), answer in zip(SPECS, alone, strict=True):
        assert answer.finish_reason == "length" or holds(answer.text), answer
    assert [answer.finish_reason for answer in alone[:2]] == ["stop", "stop"]
    together = llm.generate([*prompts, prompts[0]], [*structured, free])
    assert [output.outputs[0].token_ids for output in together] == [a.token_ids for a in alone] + [expected]
    several = SamplingParams(n=5, seed=3, max_tokens=60, structured_outputs=StructuredOutputs(**SPECS[0][0]))
    texts = [answer.text for answer in llm.generate([prompts[0]], several)[0].outputs]
    assert all(map(SPECS[0][1], texts)) and len(set(texts)) > 1


def test_preemption_and_streams(folder_of: Callable[[str], Path], llm_of: Callable[..., LLM]) -> None:
    prompts = [checkpoints.token_ids(20, seed=i) for i in range(6)]
    one = asked(60, regex="[a-z]{40}")
    expected = [output.outputs[0].text for output in llm_of("llama").generate(prompts, one)]
    assert all(re.fullmatch("[a-z]{40}", text) for text in expected)
    small = LLM(folder_of("llama"), dtype="float32", max_num_seqs=6, num_threads=1, max_model_len=96,
                kv_cache_memory=cache_bytes(llm_of("llama"), 10, 0))  # fmt: skip
    outputs = small.generate(prompts, one)
    assert [output.outputs[0].text for output in outputs] == expected
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert "".join(map(str, small.stream(prompts[0], one))) == expected[0]

    async def main() -> None:
        engine = AsyncEngine(small)
        text = ""
        async for chunk in engine.generate(prompts[1], one):
            text += chunk.text
        assert text == expected[1]

    asyncio.run(main())


@pytest.mark.parametrize(
    "spec",
    [
        {"regex": "(unclosed"},
        {"json": {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}},
        {"json": {"not": {"type": "string"}}},
        {"grammar": "start: undefined_rule"},
    ],
)
def test_a_bad_grammar_is_refused_before_anything_is_computed(spec: dict[str, Any], llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("llama")
    steps = llm.stats().steps
    with refused("structured_outputs", f"{next(iter(spec))} is refused"):
        llm.generate([[1, 2], [3]], [SamplingParams(), asked(**spec)])
    assert llm.stats().steps == steps


def test_what_does_not_go_together(folder_of: Callable[[str], Path]) -> None:
    for other in ({"ignore_eos": True}, {"min_tokens": 3}):
        with refused(next(iter(other)), "beside structured_outputs"):
            SamplingParams(structured_outputs=StructuredOutputs(choice=["a"]), **other)
    with refused("structured_outputs", "must be a StructuredOutputs"):
        SamplingParams(structured_outputs={"choice": ["a"]})  # type: ignore[arg-type]
    dummy = LLM(folder_of("llama"), load_format="dummy", dtype="float32")
    with refused("structured_outputs", "no tokenizer"):
        dummy.generate([[1]], asked(choice=["a"]))


def test_a_dead_end_fails_that_request_alone(llm_of: Callable[..., LLM]) -> None:
    """A banned token leaves the grammar nothing, or the grammar is more than can be followed: the request says so, and
    its neighbour goes on.
    """
    llm = llm_of("llama")
    params = SamplingParams(
        max_tokens=5, banned_token_ids=list(range(256)), structured_outputs=StructuredOutputs(regex="[0-9]{4}")
    )
    with refused("structured_outputs", "No token is left"):
        llm.generate([[1, 2]], params)
    with refused("structured_outputs", "The structured output cannot go on: Parser Error: Current row has"):
        llm.generate([[1, 2]], asked(choice=["yes", "no"] * 1000))
    with refused(None, "No token is left"):
        llm.generate([[1, 2]], SamplingParams(allowed_token_ids=[checkpoints.EOS], min_tokens=2))
    free = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    assert len(llm.generate([[1, 2]], free)[0].outputs[0].token_ids) == 5


def test_on_the_command_line(smollm2: Path, tmp_path: Path, shell: Shell) -> None:
    """A schema in a file or as it is, an expression; and what is wrong with either."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    (tmp_path / "city.json").write_text(json.dumps(schema))
    question = ["ask", smollm2, "What is the capital of France?", "-q"]
    for given in (tmp_path / "city.json", json.dumps(schema)):
        result = shell(*question, "--json-schema", given)
        assert result.code == 0, result.err
        assert json.loads(result.out) == {"city": "Paris"}
    assert shell(*question, "--regex", "[A-Z]{5}").out.strip().isupper()
    for wrong, words in (
        (["--json-schema", tmp_path / "none.json"], "none.json: this file cannot be read"),
        (["--json-schema", "{"], "json is no JSON"),
        (["--regex", "("], "regex is refused"),
        (["--regex", "a", "--json-schema", "{}"], "json and regex are given"),
    ):
        result = shell(*question, *wrong)
        assert result.code == 2 and words in result.err and not result.out


def test_all_answers_of_the_real_model_fit_their_schemas(smollm2: Path) -> None:
    """Ten schemas in one batch with a conversation that has none."""
    llm = LLM(smollm2, max_model_len=1024, max_num_seqs=11)
    conversations = [[{"role": "user", "content": case.prompt}] for case in CASES.values()]
    conversations.append([{"role": "user", "content": "What is the capital of France?"}])
    params = [
        SamplingParams(temperature=0, max_tokens=400, structured_outputs=StructuredOutputs(json=case.schema))
        for case in CASES.values()
    ]
    outputs = llm.chat(conversations, [*params, SamplingParams(temperature=0, max_tokens=12)])
    assert len(CASES) == 10
    for case, output in zip(CASES.values(), outputs[:-1], strict=True):
        answer = output.outputs[0]
        assert answer.finish_reason == "stop", answer.text
        jsonschema.validate(json.loads(answer.text), case.schema)
    assert "Paris" in outputs[-1].outputs[0].text
