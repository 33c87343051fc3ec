"""A request that outlives its replicas, against a script of what they say."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyserve.fleet import attempts as module
from tinyserve.fleet.attempts import Attempts, LostError
from tinyserve.fleet.keys import Asked
from tinyserve.fleet.messages import Began, Call, Ended, Identity, Item
from tinyserve.server.errors import ApiError

pytestmark = pytest.mark.fast

CALL = Call("POST", "/v1/chat/completions", b"", [], b"{}")
STREAM = Asked("key", True, b"{}", ("id", 1))
WHOLE = Asked("key", False, b"{}", ("id", 1))
SSE = Began(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
JSON_HEAD = Began(200, [(b"content-type", b"application/json")])
LOST, SILENCE = LostError("gone"), object()
END = Ended(3, 4)


def who(name: str = "a", bits: str = "same") -> Identity:
    return Identity(name, f"actor {name}", bits)


def event(number: int) -> bytes:
    return b"data: %d\n\n" % number


class Script:
    """Replicas that say what is written, a list for each call; the last list is for all that follow."""

    def __init__(self, *calls: Sequence[Any]):
        self.calls = list(calls)
        self.keys: list[str | None] = []
        self.given_up: list[Identity] = []
        self.open = 0

    async def call(self, call: Call, key: str | None) -> AsyncGenerator[Item, None]:
        self.keys.append(key)
        steps = self.calls.pop(0) if len(self.calls) > 1 else self.calls[0]
        self.open += 1
        try:
            for step in steps:
                if isinstance(step, Exception):
                    raise step
                if step is SILENCE:
                    await asyncio.sleep(3600)
                await asyncio.sleep(0)
                yield step
        finally:
            self.open -= 1

    def give_up(self, replica: Identity) -> None:
        self.given_up.append(replica)


def ask(script: Script, asked: Asked = STREAM, retries: int = 2, timeout: float = 0.05) -> list[Any]:
    """All that comes of a request, or the error in place of the last."""

    async def run() -> list[Any]:
        got: list[Any] = []
        try:
            async for item in Attempts(script, retries, timeout).ask(CALL, asked):
                got += [item]
        except ApiError as error:
            got.append(error)
        return got

    got = asyncio.run(run())
    assert not script.open
    return got


def body(got: list[Any]) -> bytes:
    return b"".join(item for item in got if isinstance(item, bytes))


@given(st.integers(0, 6), st.lists(st.integers(0, 6), max_size=2))
def test_a_stream_arrives_once_wherever_its_replicas_die(count: int, deaths: list[int]) -> None:
    events = [event(i) for i in range(count)]
    dying = [[who(str(i)), SSE, *events[:death], LOST] for i, death in enumerate(deaths)]
    got = ask(Script(*dying, [who("z"), SSE, None, *events, END]))
    assert got[0] == SSE and got[-1] == END and body(got) == b"".join(events)
    assert sum(isinstance(item, Began) for item in got) == 1


def test_an_answer_that_is_no_stream_comes_whole_or_from_another() -> None:
    script = Script([who(), None, JSON_HEAD, b'{"a":', LOST], [who(), JSON_HEAD, b'{"a":', b"1}", END])
    assert ask(script, WHOLE) == [JSON_HEAD, b'{"a":1}', END]


@pytest.mark.parametrize("asked", [STREAM, WHOLE])
def test_the_third_replica_that_dies_is_the_last(asked: Asked) -> None:
    script = Script([who(), LOST])
    *_, error = ask(script, asked)
    assert error.status == 502 and error.code == "engine_lost" and "3 engines" in error.message
    assert len(script.keys) == 3
    assert len(set(script.keys)) == 3  # a silent one must not get it again


def test_after_the_beginning_an_error_is_the_last_event() -> None:
    got = ask(Script([who(), SSE, event(0), LOST]))
    assert got[0] == SSE and got[1] == event(0) and isinstance(got[-1], Ended)
    assert json.loads(got[-2].removeprefix(b"data: "))["error"]["code"] == "engine_lost"


@pytest.mark.parametrize(
    "second",
    [
        [who(), SSE, event(7), END],
        [who(), SSE, END],
        [who(), Began(400, []), b"{}", END],
        [who("b", "other bits"), SSE, event(0), END],
    ],
    ids=["other events", "fewer events", "an error", "other bits"],
)
def test_what_cannot_be_joined_ends_with_an_error(second: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0)
    got = ask(Script([who(), SSE, event(0), LOST], second))
    assert got[:2] == [SSE, event(0)]
    assert json.loads(got[2].removeprefix(b"data: "))["error"]["code"] == "engine_lost"
    assert len(got) == 4 and isinstance(got[3], Ended)


def test_a_stream_of_several_answers_is_not_spliced() -> None:
    several = Asked("key", False, b"{}", ("id", 1))
    got = ask(Script([who(), SSE, event(0), LOST], [who(), SSE, event(0), END]), several)
    assert b"several answers" in got[-2]
    assert body(ask(Script([who(), LOST], [who(), SSE, event(0), END]), several)) == event(0)


def test_another_replica_with_the_same_bits_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0)
    others = [[who("b", "other"), SSE, event(9), END]] * 3
    script = Script([who(), SSE, event(0), LOST], *others, [who("c"), SSE, event(0), event(1), END])
    assert body(ask(script)) == event(0) + event(1)
    assert len(set(script.keys)) == 5


def test_before_the_beginning_any_bits_will_do() -> None:
    script = Script([who(), LOST], [who("b", "other"), SSE, event(5), END])
    assert body(ask(script)) == event(5)


def test_a_silent_replica_is_given_up_and_beats_are_no_silence() -> None:
    script = Script([who("mute"), SSE, event(0), SILENCE], [who("b"), None, SSE, None, event(0), event(1), END])
    assert body(ask(script)) == event(0) + event(1)
    assert [one.name for one in script.given_up] == ["mute"]


def test_who_does_not_even_take_it_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0)
    script = Script([SILENCE], [LOST], [who(), SSE, event(0), END])
    assert body(ask(script)) == event(0)
    assert len(set(script.keys)) == 3 and not script.given_up
    monkeypatch.setattr(module, "PLACE_SECONDS", 0)
    (error,) = ask(Script([LOST]))
    assert error.status == 503 and error.code == "no_replica"


def test_a_refusal_is_passed_on() -> None:
    (error,) = ask(Script([ApiError(503, "Not now.", code="no_replica")]))
    assert error.message == "Not now."
    refused = [who(), Began(400, [(b"content-type", b"application/json")]), b'{"error":{}}', END]
    assert ask(Script(refused))[1:] == [b'{"error":{}}', END]


def test_who_leaves_ends_the_request_at_the_replica() -> None:
    script = Script([who(), SSE, event(0), SILENCE])

    async def run() -> None:
        items = Attempts(script, 2, 60).ask(CALL, STREAM)
        assert await anext(items) == SSE and await anext(items) == event(0)
        assert script.open == 1
        await items.aclose()
        assert script.open == 0
        task: asyncio.Task[Any] = asyncio.ensure_future(anext(Attempts(script, 2, 60).ask(CALL, STREAM)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert script.open == 0

    asyncio.run(run())


def test_those_who_have_seen_two_die_are_asked_one_at_a_time() -> None:
    """A request that kills whoever has it takes no innocent with it for good."""
    poison = Asked("poison", False, b"poison", None)
    replicas: list[set[bytes]] = [set()]  # of each those that it was asked by; the last one lives

    class Shared(Script):
        """One replica for all: with the poison on it, everybody's answer is lost, and another takes its place."""

        async def call(self, call: Call, key: str | None) -> AsyncGenerator[Item, None]:
            yield who()
            mine = replicas[-1]
            mine.add(call.body)
            for _ in range(5):
                await asyncio.sleep(0.001)
                if b"poison" in mine:
                    if mine is replicas[-1]:
                        replicas.append(set())
                    raise LOST
            yield JSON_HEAD
            yield call.body
            yield END

    attempts = Attempts(Shared([]), 2, 5)

    async def one(asked: Asked) -> Any:
        try:
            return [item async for item in attempts.ask(CALL._replace(body=asked.body), asked)]
        except ApiError as error:
            return error

    async def run() -> list[Any]:
        innocents = [Asked(str(i), False, b"%d" % i, None) for i in range(8)]
        return await asyncio.gather(*(one(asked) for asked in [*innocents, poison]))

    *answers, error = asyncio.run(run())
    assert [got[1] for got in answers] == [b"%d" % i for i in range(8)]
    assert isinstance(error, ApiError) and error.status == 502
    assert attempts.counts.failed == 1
    assert len(replicas) == 4 and sum(map(len, replicas[:3])) > 9, "none was there with it"


def test_counts_tell_what_has_befallen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def counts(script: Script, asked: Asked) -> tuple[int, ...]:
        attempts = Attempts(script, 2, 5)
        async for _ in attempts.ask(CALL, asked):
            pass
        told = attempts.counts
        return told.lost, told.retried, told.spliced, told.failed

    run: Callable[..., tuple[int, ...]] = lambda *calls: asyncio.run(counts(Script(*calls), STREAM))  # noqa: E731
    end = [who(), SSE, event(0), END]
    assert run(end) == (0, 0, 0, 0)
    assert run([who(), LOST], end) == (1, 1, 0, 0)
    assert run([who(), LOST], [who(), SSE, event(0), LOST], end) == (2, 1, 1, 0)
    assert run([who(), SSE, LOST], end) == (1, 0, 1, 0)
