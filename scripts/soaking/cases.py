"""The requests of a soak: those whose answers are known from being made alone, and those that only disturb.

Knows OpenAI's interface; what must hold of the answers is `checks`'.
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from soaking import checks

CHAT, TEXT, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
STORY = (
    "In the morning the ships lay still in the harbour, and the men who had come down from the hills stood on the quay "
    "and counted them. Nobody spoke. A boy asked how far it was to the islands. "
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "sunny": {"type": "boolean"}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "sunny", "days"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather of a city.", "parameters": SCHEMA},
}
Outcome = tuple[int | str, str | None]  # the status, and what was wrong


@dataclass
class Case:
    """A request and, once it was made alone, the essence of its answer."""

    kind: str
    path: str
    body: dict[str, Any]
    expected: Any = None


@dataclass
class Action:
    """Something that a client does."""

    kind: str
    run: Callable[[httpx.AsyncClient, random.Random], Awaitable[Outcome]]


async def made_for(client: httpx.AsyncClient) -> list[Case]:
    """The cases, as long as the first model's context allows."""
    (card, *_) = (await client.get("/v1/models")).json()["data"]
    room = card["max_model_len"]
    ids = (await client.post("/tokenize", json={"prompt": STORY * 40})).json()["tokens"]
    short, long = max(8, room // 64), room // 4
    questions = ("What is the capital of France?", "Name a colour.", "Count to ten.", "Who are you?")
    cases = [_chat("chat", question, short) for question in questions]
    cases += [
        _chat("a seed", questions[0], short, temperature=1.0, seed=7, top_p=0.9),
        _chat("penalties", questions[2], short, repetition_penalty=1.2, logit_bias={"5": 1.0}, min_tokens=4),
        _chat("several answers", questions[1], short, temperature=1.0, seed=3, n=3),
        _thinking("thinking", questions[0], short),
        _thinking("a budget of thought", questions[3], 2 * short, thinking_token_budget=4, min_tokens=8),
        _chat("long answer", "Think step by step: why is the sky blue?", long, ignore_eos=True),
        _chat("json_schema", questions[0], 100, response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
        _chat("regex", questions[1], short, structured_outputs={"regex": "[a-f]{3,8}"}),
        _chat("choice", questions[1], short, structured_outputs={"choice": ["red", "green", "blue"]}),
        _chat("tools", questions[0], short, tools=[TOOL]),
        _chat("required tool", questions[0], 100, tools=[TOOL], tool_choice="required", parallel_tool_calls=False),
        _text("completion", STORY[:60], short),
        _text("echo", STORY[:20], short, echo=True),
        _text("several prompts", [STORY[:20], STORY[:30], STORY[:25]], short),
        _text("long prompt", ids[: room - room // 8 - 1], max(2, room // 64)),
        _text("long prompt", ids[7 : room - room // 4], max(2, room // 64)),
        Case("embeddings", EMBEDDINGS, {"input": [STORY[:40], STORY[:30]], "encoding_format": "base64"}),
        Case("tokenize", "/tokenize", {"prompt": STORY}),
        Case("template", "/apply-template", {"messages": _messages(questions[0])}),
    ]  # fmt: skip
    return cases


def for_pools(number: int) -> list[Case]:
    """Requests that other threads and processes work on; each number has a grammar of its own."""
    structure = {"regex": f"a{{1,{number + 1}}}"}
    return [
        Case("template", "/apply-template", {"messages": _messages("Who are you?")}),
        _chat("regex", "Who are you?", 1, structured_outputs=structure),
    ]


def actions(cases: list[Case], chance: random.Random) -> list[Action]:
    """What a client does in one round: each case, streams as well, some of them left; and what is no request at all."""
    deck = []
    for case in cases:
        deck.append(Action(case.kind, whole(case)))
        if case.path in (CHAT, TEXT):
            if not case.body.get("echo"):  # with log-probabilities it comes whole
                deck.append(Action(case.kind, streamed(case)))
            deck.append(Action("left midway", leaves(case)))
    deck += [Action("malformed", malformed(*bad)) for bad in MALFORMED]
    deck += [Action("half a request", half(chance.choice(cases))) for _ in range(3)]
    deck += [Action("fills the cache", fills) for _ in range(3)]
    return deck


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _chat(kind: str, question: str, limit: int, **options: Any) -> Case:
    body = {"messages": _messages(question), "max_tokens": limit, "temperature": 0, "logprobs": True}
    return Case(kind, CHAT, body | {"top_logprobs": 2} | options)


def _thinking(kind: str, question: str, limit: int, **options: Any) -> Case:
    """An answer that begins within thought, whatever the template is."""
    messages = [*_messages(question), {"role": "assistant", "content": "<think>\nThe user"}]
    more = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    return _chat(kind, question, limit, **more, **options)


def _text(kind: str, prompt: Any, limit: int, **options: Any) -> Case:
    return Case(kind, TEXT, {"prompt": prompt, "max_tokens": limit, "temperature": 0, "logprobs": 1} | options)


# --- what clients do --------------------------------------------------------------------------------------------------


def whole(case: Case) -> Callable[[httpx.AsyncClient, random.Random], Awaitable[Outcome]]:
    """The request as it is; the answer must be the one given alone."""

    async def run(client: httpx.AsyncClient, chance: random.Random) -> Outcome:
        response = await client.post(case.path, json=case.body)
        if response.status_code != 200:
            return response.status_code, f"status {response.status_code}, {response.text[:200]}"
        return 200, checks.difference(case.expected, checks.essence(response.json()))

    return run


def streamed(case: Case) -> Callable[[httpx.AsyncClient, random.Random], Awaitable[Outcome]]:
    """The same as a stream, read to its end."""

    async def run(client: httpx.AsyncClient, chance: random.Random) -> Outcome:
        body = case.body | {"stream": True, "stream_options": {"include_usage": True}}
        events: list[dict[str, Any]] = []
        done = False
        async with client.stream("POST", case.path, json=body) as response:
            if response.status_code != 200:
                return response.status_code, f"status {response.status_code}, {(await response.aread())[:200]!r}"
            async for line in response.aiter_lines():
                done = line == "data: [DONE]"
                if line.startswith("data: {"):
                    events.append(json.loads(line[6:]))
                if done:
                    break
        if not done:
            return 200, f"the stream ended without [DONE], behind {len(events)} events"
        return 200, checks.difference(case.expected, checks.assembled(events))

    return run


def leaves(case: Case) -> Callable[[httpx.AsyncClient, random.Random], Awaitable[Outcome]]:
    """A stream whose client closes the connection after some events, or before there are any."""

    async def run(client: httpx.AsyncClient, chance: random.Random) -> Outcome:
        events = chance.randrange(0, 6)
        async with client.stream("POST", case.path, json=case.body | {"stream": True, "echo": None}) as response:
            if response.status_code != 200:
                return response.status_code, f"status {response.status_code}, {(await response.aread())[:200]!r}"
            lines = response.aiter_lines()
            async for line in lines:
                if (events := events - line.startswith("data:")) <= 0:
                    break
        return "left", None

    return run


# A path, a body, a content type, and the statuses that it may have.
MALFORMED: tuple[tuple[str, bytes, str, tuple[int, ...]], ...] = (
    (CHAT, b'{"messages": [', "application/json", (400,)),
    (CHAT, b"[1, 2, 3]", "application/json", (400,)),
    (CHAT, b"", "application/json", (400,)),
    (CHAT, b'{"messages": "Hello"}', "application/json", (400,)),
    (CHAT, b'{"messages": [{"role": "user", "content": 1}]}', "application/json", (400,)),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}', "application/json", (400,)),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}', "application/json", (400,)),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "n": 100000}', "application/json", (400,)),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "structured_outputs": {"regex": "("}}',
     "application/json", (400,)),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}', "application/json", (400,)),
    (TEXT, b'{"prompt": [99999999]}', "application/json", (400,)),
    (TEXT, b'{"prompt": {"a": 1}}', "application/json", (400,)),
    (TEXT, b'{"prompt": "' + b"a b " * 60_000 + b'"}', "application/json", (400, 413)),
    (TEXT, b'{"prompt": "\xff\xfe"}', "application/json", (400,)),
    (TEXT, b'{"prompt": "a", "stream": true, "temprature": 1}', "application/json", (400,)),
    (EMBEDDINGS, b'{"input": []}', "application/json", (400,)),
    ("/tokenize", b'{"prompt": 1}', "application/json", (400,)),
    ("/detokenize", b'{"tokens": [-5]}', "application/json", (400,)),
    (CHAT, b"messages=hello", "application/x-www-form-urlencoded", (415,)),
    ("/v1/nothing", b"{}", "application/json", (404,)),
)  # fmt: skip


def malformed(
    path: str, body: bytes, kind: str, statuses: tuple[int, ...]
) -> Callable[[httpx.AsyncClient, random.Random], Awaitable[Outcome]]:
    """A request that must be refused, in OpenAI's form."""

    async def run(client: httpx.AsyncClient, chance: random.Random) -> Outcome:
        response = await client.post(path, content=body, headers={"Content-Type": kind})
        where = f"{path} {body[:80]!r}"
        if response.status_code not in statuses:
            return response.status_code, f"status {response.status_code} for {where}: {response.text[:200]}"
        message = response.json()["error"]["message"]
        return response.status_code, None if message else f"an error without a sentence for {where}"

    return run


def half(case: Case) -> Callable[[httpx.AsyncClient, random.Random], Awaitable[Outcome]]:
    """The first bytes of a request, and a connection that is closed behind them."""

    async def run(client: httpx.AsyncClient, chance: random.Random) -> Outcome:
        body = json.dumps(case.body).encode()
        head = f"POST {case.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        try:
            writer.write(data[: chance.randrange(1, len(data) - 1)])
            await writer.drain()
            await asyncio.sleep(chance.random() / 10)
        finally:
            writer.close()
        return "left", None

    return run


async def fills(client: httpx.AsyncClient, chance: random.Random) -> Outcome:
    """A prompt that nobody has sent, which takes the room of what was kept for others."""
    prompt = [chance.randrange(3, 250) for _ in range(chance.randrange(8, 96))]
    body = {"prompt": prompt, "max_tokens": chance.randrange(1, 16), "n": chance.randrange(1, 3)}
    response = await client.post(TEXT, json=body)
    wrong = response.status_code != 200
    return response.status_code, f"status {response.status_code}, {response.text[:200]}" if wrong else None
