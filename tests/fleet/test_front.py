"""The front over HTTP, with replicas that do as a script says: guards, the queue, health, metrics, who leaves."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from tinyserve.engine import EngineStats
from tinyserve.errors import TinyserveError
from tinyserve.fleet import front as module
from tinyserve.fleet.attempts import Attempts, LostError
from tinyserve.fleet.front import Front, Gate, create_front
from tinyserve.fleet.handle import Condition
from tinyserve.fleet.messages import Began, Call, Ended, Identity, Item, Report
from tinyserve.server.errors import ApiError
from tinyserve.server.guards import Admission

WHO = Identity("r1", "actor r1", "bits")
HEAD = Began(200, [(b"content-type", b"application/json")])
SSE = Began(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
CHAT = "/v1/chat/completions"
UP = Condition(running=1, is_up=True)
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


class FakeApplication:
    """Replicas in this process: each call is answered by `answer`."""

    def __init__(self) -> None:
        self.now = UP
        self.error: Exception | None = None
        self.calls: list[Call] = []
        self.keys: list[str | None] = []
        self.open = 0
        self.started, self.release, self.closed = threading.Event(), threading.Event(), threading.Event()
        self.answer: Callable[[Call], AsyncGenerator[Item, None]] = self.echo

    async def attach(self) -> None: ...

    async def condition(self) -> Condition:
        if self.error is not None:
            raise self.error
        return self.now

    async def reports(self) -> list[Report]:
        return [Report(WHO, EngineStats(1, 2, 30, 20, steps=4, step_seconds=0.5, requests=7), "v")]

    def give_up(self, replica: Identity) -> None: ...

    async def call(self, call: Call, key: str | None) -> AsyncGenerator[Item, None]:
        self.calls.append(call)
        self.keys.append(key)
        self.open += 1
        try:
            async for item in self.answer(call):
                yield item
        finally:
            self.open -= 1
            self.closed.set()

    async def echo(self, call: Call) -> AsyncGenerator[Item, None]:
        """What was asked."""
        yield WHO
        yield HEAD
        yield json.dumps([call.method, call.path, call.query.decode(), call.body.decode()]).encode()
        yield Ended(1, 2)

    async def hold(self, call: Call) -> AsyncGenerator[Item, None]:
        """A stream that waits in its middle."""
        yield WHO
        yield SSE
        yield b"data: 1\n\n"
        self.started.set()
        while not self.release.is_set():
            await asyncio.sleep(0.01)
            yield None
        yield b"data: 2\n\n"
        yield Ended(1, 2)


class Running:
    def __init__(self, url: str, front: Front, application: FakeApplication, failures: list[Exception]):
        self.url, self.front, self.application, self.failures = url, front, application, failures

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def get(self, path: str, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, headers=headers)

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)


@contextmanager
def running(
    places: int = 2,
    max_queue: int = 1,
    wanted: int = 1,
    admission: Admission | None = None,
    condition: Condition = UP,
    access_log: bool = False,
) -> Iterator[Running]:
    application, failures = FakeApplication(), list[Exception]()
    application.now = condition
    gate = Gate(max_queue)
    taken_down = threading.Event()

    async def deploy() -> None: ...

    async def take_down() -> None:
        taken_down.set()

    front = Front("m", application, Attempts(application, 2, 5), gate, places, wanted)  # type: ignore[arg-type]
    app = create_front(front, admission or Admission(), deploy, take_down, failures.append, access_log=access_log)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    one = Running(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", front, application, failures)
    one.until(lambda: front.condition == condition)
    try:
        yield one
    finally:
        application.release.set()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and taken_down.is_set() is not front.is_lost


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)


def test_a_request_goes_on_as_it_came_but_for_what_is_the_fronts_own() -> None:
    with running() as one:
        got = one.post(CHAT + "?a=b", HELLO, authorization="Bearer secret", cookie="c", **{"x-request-id": "7"})
        assert got.status_code == 200 and got.headers["content-type"] == "application/json"
        method, path, query, body = got.json()
        assert (method, path, query) == ("POST", CHAT, "a=b") and json.loads(body) == HELLO
        names = {name for name, _ in one.application.calls[0].headers}
        assert {b"x-request-id", b"content-type"} <= names
        assert not {b"authorization", b"cookie", b"host", b"content-length"} & names
        assert one.get("/v1/models").json()[:2] == ["GET", "/v1/models"]
        assert one.get("/v1/models/a/b").json()[1] == "/v1/models/a/b"
        assert one.post("/tokenize", {"prompt": "a"}).json()[1] == "/tokenize"
        assert one.application.keys[0] is not None and one.application.keys[1:] == [None, None, None]


def test_the_guards_are_the_servers() -> None:
    admission = Admission(api_keys=["k"], hosts=["127.0.0.1"], max_body=50)
    with running(admission=admission) as one:
        assert one.post(CHAT, HELLO).status_code == 401
        assert one.post(CHAT, HELLO, authorization="Bearer k", host="evil.example").status_code == 403
        assert one.post(CHAT, HELLO | {"a": "b" * 50}, authorization="Bearer k").status_code == 413
        assert one.get("/v1/nothing", authorization="Bearer k").status_code == 404
        assert one.get(CHAT, authorization="Bearer k").status_code == 405
        assert not one.application.calls
        assert "<html" in one.get("/").text and one.get("/health").json() == {"status": "ok"}
        assert one.post("/tokenize", {"prompt": "a"}, authorization="Bearer k").status_code == 200


def test_beyond_the_places_requests_wait_their_turn_and_beyond_the_queue_are_refused() -> None:
    with running(places=1, max_queue=1) as one, ThreadPoolExecutor(2) as pool:
        one.application.answer = one.application.hold
        first = pool.submit(one.post, CHAT, HELLO)
        assert one.application.started.wait(30)
        second = pool.submit(one.post, CHAT, HELLO)
        one.until(lambda: one.front.gate.num_waiting == 1)
        refused = one.post(CHAT, HELLO)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert len(one.application.calls) == 1
        one.application.release.set()
        assert first.result().text == second.result().text == "data: 1\n\ndata: 2\n\n"
        assert one.front.gate.taken == 0


def test_who_leaves_gives_back_the_place_and_ends_the_request_there() -> None:
    with running(places=1) as one:
        one.application.answer = one.application.hold
        with one.client() as client, client.stream("POST", CHAT, json=HELLO) as got:
            pieces = got.iter_bytes()  # whose end would close the connection
            assert next(pieces) == b"data: 1\n\n"
            assert one.application.open == 1
        assert one.application.closed.wait(30)
        one.until(lambda: one.front.gate.taken == 0 and one.application.open == 0)


def test_who_leaves_while_waiting_leaves_no_hole_in_the_queue() -> None:
    with running(places=1, max_queue=2) as one, ThreadPoolExecutor(2) as pool:
        one.application.answer = one.application.hold
        first = pool.submit(one.post, CHAT, HELLO)
        assert one.application.started.wait(30)
        with httpx.Client(base_url=one.url, timeout=0.3, trust_env=False) as hasty, pytest.raises(httpx.ReadTimeout):
            hasty.post(CHAT, json=HELLO)
        one.until(lambda: one.front.gate.num_waiting == 0)
        one.application.release.set()
        assert first.result().status_code == 200
        assert one.post(CHAT, HELLO).status_code == 200
        assert len(one.application.calls) == 2


def test_health_is_one_replica_and_readiness_all() -> None:
    with running(wanted=2) as one:
        assert one.get("/health").status_code == 200
        not_yet = one.get("/ready")
        assert not_yet.status_code == 503 and "1 of 2 replicas" in not_yet.text
        one.application.now = Condition(running=2, is_up=True)
        one.until(lambda: one.get("/ready").status_code == 200)
        one.application.now = Condition(running=0, is_up=True)
        one.until(lambda: one.get("/health").status_code == 503)
        assert not one.failures


def test_metrics_have_each_replica_by_its_label_and_what_befell_requests() -> None:
    with running() as one:
        one.post(CHAT, HELLO)
        text = one.get("/metrics").text
        assert 'tinyserve_requests_running{model="m",replica="r1"} 1.0' in text
        assert 'tinyserve_replica{fingerprint="bits",model="m",replica="r1"} 1.0' in text
        assert 'tinyserve_requests_total{model="m",replica="r1"} 7.0' in text
        assert f'tinyserve_http_responses_total{{path="{CHAT}",status="200"}} 1.0' in text
        assert "tinyserve_replicas_running 1.0" in text and "tinyserve_streams_spliced_total 0.0" in text


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_sentence() -> None:
    with running(condition=Condition(failure="x.safetensors is truncated.")) as one:
        one.until(lambda: bool(one.failures))
        assert str(one.failures[0]) == "m could not be loaded: x.safetensors is truncated."


def test_once_it_has_been_up_a_failure_is_serves_to_mend() -> None:
    with running() as one:
        one.application.now = Condition(running=0, failure="a node is gone")
        one.until(lambda: one.get("/health").status_code == 503)
        one.application.now = Condition(running=1, is_up=True)
        one.until(lambda: one.get("/health").status_code == 200)
        assert not one.failures


def test_a_cluster_that_is_gone_ends_it() -> None:
    with running() as one:
        one.application.error = TinyserveError("The Ray cluster does not answer (RpcError).")
        one.until(lambda: bool(one.failures))
        got = one.get("/health")
        assert got.status_code == 503 and "does not answer" in got.text and "Restart" in got.text


def test_a_drained_front_without_replicas_sends_away_who_waits() -> None:
    with running(places=1) as one, ThreadPoolExecutor(1) as pool:
        one.application.now = Condition(running=0)
        one.until(lambda: one.front.gate.places == 0)
        waiting = pool.submit(one.post, CHAT, HELLO)
        one.until(lambda: one.front.gate.num_waiting == 1)
        one.front.is_draining = True
        assert waiting.result().status_code == 503
        assert one.get("/health").json()["error"]["code"] == "shutting_down"


def test_lost_replicas_show_as_nothing_or_as_an_error() -> None:
    with running() as one:

        async def dies(call: Call) -> AsyncGenerator[Item, None]:
            yield WHO
            if len(one.application.calls) % 3:
                raise LostError("gone")
            async for item in one.application.echo(call):
                yield item

        one.application.answer = dies
        assert one.post(CHAT, HELLO).status_code == 200
        assert len(one.application.calls) == 3

        async def always(call: Call) -> AsyncGenerator[Item, None]:
            yield WHO
            raise LostError("gone")

        one.application.answer = always
        got = one.post(CHAT, HELLO)
        assert got.status_code == 502 and got.json()["error"]["code"] == "engine_lost"


def test_a_stream_that_waits_for_another_replica_is_kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_ALIVE", 0.05)
    with running() as one, ThreadPoolExecutor(1) as pool:
        one.application.answer = one.application.hold
        got = pool.submit(one.post, CHAT, HELLO)
        assert one.application.started.wait(30)
        time.sleep(0.3)
        one.application.release.set()
        assert ": waiting\n\n" in got.result().text
        assert got.result().text.replace(": waiting\n\n", "") == "data: 1\n\ndata: 2\n\n"


def test_the_access_log_has_the_tokens_that_a_replica_tells(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tinyserve.server.access"), running(access_log=True) as one:
        one.post(CHAT, HELLO)
        one.until(lambda: f"POST {CHAT} 200" in caplog.text)
    assert "1+2 tokens" in caplog.text


def test_the_gate_counts_right_whoever_comes_and_goes() -> None:
    async def run() -> None:
        gate = Gate(10)
        gate.set_places(1)
        order: list[int] = []

        async def visit(number: int) -> None:
            async with gate.place():
                order.append(number)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(visit(i)) for i in range(6)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        tasks[4].cancel()
        gate.set_places(0)
        gate.set_places(2)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 1, 3, 5] and gate.taken == 0 and gate.num_waiting == 0
        gate.set_places(0)
        waiting = asyncio.create_task(visit(9))
        await asyncio.sleep(0)
        gate.set_places(1)  # its turn comes
        waiting.cancel()  # in the moment that it leaves
        await asyncio.gather(waiting, return_exceptions=True)
        assert gate.taken == 0
        async with gate.place():
            pass

    asyncio.run(run())


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.05)

    async def run() -> None:
        gate = Gate(1)
        with pytest.raises(ApiError) as refused:
            async with gate.place():
                raise AssertionError
        assert refused.value.status == 503 and gate.num_waiting == 0

    asyncio.run(run())
