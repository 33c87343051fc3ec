"""A replica without its cluster: the server's application, called in the process."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hold import hold
from servers import running

from tinyserve.engine_options import EngineOptions
from tinyserve.errors import EngineDeadError, TinyserveError
from tinyserve.fleet import replica as module
from tinyserve.fleet.messages import Began, Call, Ended, Identity, Item
from tinyserve.fleet.replica import Replica, ReplicaOptions
from tinyserve.llm import LLM

ENGINE: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 4}
CHAT = "/v1/chat/completions"
HEADERS = [(b"content-type", b"application/json")]


def call(body: Any, path: str = CHAT, answer: tuple[str, int] | None = ("f00", 7)) -> Call:
    return Call("POST", path, b"", HEADERS, json.dumps(body).encode(), answer)


def with_replica(
    folder: Path, test: Callable[[Replica, LLM], Awaitable[None]], beat: float = 5, source: str | None = None
) -> None:
    """Run a test in the event loop of a replica."""

    async def run() -> None:
        replica = Replica.__new__(Replica)
        options = ReplicaOptions(
            name="m", source=source or str(folder), engine=EngineOptions(**ENGINE), max_queue=4, max_body=10_000,
            cores=0, beat=beat, version="v",
        )  # fmt: skip
        await replica.load(options, "r1", "actor r1")
        engine = replica.state.pool.default.engine
        assert engine is not None
        try:
            await test(replica, engine.llm)
        finally:
            await replica.state.pool.close()

    asyncio.run(run())


async def items(answer: AsyncGenerator[Item, None]) -> list[Item]:
    async with aclosing(answer):
        return [item async for item in answer]


BODY = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12}


def test_an_answer_is_the_servers_under_the_name_that_was_chosen(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llama")
    with running({"m": folder}, **ENGINE) as server:
        whole = server.post(CHAT, BODY).json()
        streamed = server.post(CHAT, BODY | {"stream": True}).text
        refused = server.post(CHAT, BODY | {"temprature": 1})
        text = server.post("/v1/completions", {"prompt": "a", "temperature": 0, "max_tokens": 3}).json()

    async def test(replica: Replica, llm: LLM) -> None:
        identity, head, body, ended = await items(replica.answer(call(BODY)))
        assert identity == Identity("r1", "actor r1", llm.fingerprint())
        assert isinstance(head, Began) and head.status == 200
        assert isinstance(body, bytes)
        assert json.loads(body) == {**whole, "id": "chatcmpl-f00", "created": 7, "usage": json.loads(body)["usage"]}
        assert ended == Ended(whole["usage"]["prompt_tokens"], 12)
        _, head, *pieces, ended = await items(replica.answer(call(BODY | {"stream": True})))
        assert isinstance(head, Began) and (b"x-accel-buffering", b"no") in head.headers
        said = b"".join(piece for piece in pieces if isinstance(piece, bytes)).decode()
        anew = re.sub(r'"id":"[^"]*"', '"id":"chatcmpl-f00"', re.sub(r'"created":\d+', '"created":7', streamed))
        assert said == anew
        _, head, body, _ = await items(replica.answer(call(BODY | {"temprature": 1})))
        assert isinstance(head, Began) and head.status == 400 and body == refused.content
        _, _, body, _ = await items(
            replica.answer(call({"prompt": "a", "temperature": 0, "max_tokens": 3}, "/v1/completions"))
        )
        assert isinstance(body, bytes)
        told = json.loads(body)
        assert told["id"] == "cmpl-f00" and told["choices"] == text["choices"]
        _, _, body, _ = await items(replica.answer(call(BODY, answer=None)))
        assert isinstance(body, bytes)
        assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", json.loads(body)["id"])

    with_replica(folder, test)


def test_it_beats_while_it_has_nothing_to_say_and_ends_what_is_left(folder_of: Callable[[str], Path]) -> None:
    async def test(replica: Replica, llm: LLM) -> None:
        with hold(llm) as held:
            answer = replica.answer(call(BODY))
            assert isinstance(await anext(answer), Identity)
            assert [await anext(answer) for _ in range(3)] == [None, None, None]
            await asyncio.to_thread(held.started.wait, 30)
            await answer.aclose()
        while (stats := llm.stats()).num_running + stats.num_waiting:
            await asyncio.sleep(0.01)
        report = await replica.report()
        assert report.version == "v" and report.stats.output_tokens < 12

    with_replica(folder_of("llama"), test, beat=0.02)


def test_a_dead_engine_ends_the_process(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Exited(BaseException):
        pass

    def leave(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(module.os, "_exit", leave)
    monkeypatch.setattr(module.logging, "shutdown", lambda: None)

    async def test(replica: Replica, llm: LLM) -> None:
        await replica.check_health()
        llm.thread.dead_error = EngineDeadError("a mistake")
        with pytest.raises(Exited):
            await replica.check_health()
        with pytest.raises(Exited):
            await items(replica.answer(call(BODY)))
        llm.thread.dead_error = None

    with_replica(folder_of("llama"), test)


def test_an_engine_that_has_work_and_makes_no_step_is_unwell(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STUCK_SECONDS", 0.0)

    async def test(replica: Replica, llm: LLM) -> None:
        for _ in range(3):
            await replica.check_health()  # it has nothing to do
        with hold(llm) as held:
            answer = asyncio.create_task(items(replica.answer(call(BODY))))
            await asyncio.to_thread(held.started.wait, 30)
            await asyncio.sleep(0.01)
            with pytest.raises(EngineDeadError, match="no step"):
                for _ in range(2):
                    await replica.check_health()
                    await asyncio.sleep(0.01)
        await answer
        await replica.check_health()

    with_replica(folder_of("llama"), test)


def test_what_is_wrong_with_a_model_is_said_as_it_is_loaded(tmp_path: Path) -> None:
    async def test(replica: Replica, llm: LLM) -> None:
        raise AssertionError

    with pytest.raises(TinyserveError, match="has no config"):
        with_replica(tmp_path, test)
