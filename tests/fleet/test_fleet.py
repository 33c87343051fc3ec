"""A real fleet: two replicas of a tiny model on a cluster of their own, killed, stopped, poisoned, left, drained.

One fleet for all tests but those of its beginning; each waits until both replicas run again.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command_line import Children
from fleets import CHAT, COMPLETIONS, LONG, Fleet, Streams, answers_of_one_server, bodies, in_mid_answer, write_model
from processes import descendants, listeners, wait_until_gone
from servers import running

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")

# A request with this in it ends whichever process has it, as a bug in a kernel would.
SCRIPT = """
import asyncio, logging, os, sys
from contextlib import aclosing
from tinyserve.cli.serve import names
from tinyserve.engine_options import EngineOptions
from tinyserve.fleet.options import FleetOptions
from tinyserve.fleet.replica import Replica
from tinyserve.fleet.run import serve
from tinyserve.server.options import ServeOptions

class Poisonable(Replica):
    async def answer(self, call):
        async with aclosing(Replica.answer(self, call)) as items:
            async for item in items:
                yield item
                if b"poison" in call.body:
                    await asyncio.sleep(0.1)
                    os._exit(1)

logging.basicConfig(level=logging.INFO)
options = ServeOptions(
    models=names([sys.argv[1]]), port=0, engine=EngineOptions(max_num_seqs=16, num_threads=1, dtype="float32"),
    on_listen=lambda url: print(url, file=sys.stderr, flush=True), drain_timeout=60,
)
sys.exit(serve(options, FleetOptions(replicas=(2, 2), replica_timeout=4), Poisonable))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("fleet") / "model")


@pytest.fixture(scope="module")
def fleet(model: Path) -> Iterator[Fleet]:
    with Children() as start:
        one = Fleet(start(program=[sys.executable, "-c", SCRIPT, f"tiny={model}"]))
        yield one
        family = descendants(one.process.pid)
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGINT)
            one.process.wait(90)
        assert not wait_until_gone(family, 20)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[Any]]:
    return answers_of_one_server(model)


def test_answers_are_a_single_servers(fleet: Fleet, model: Path, expected: list[list[Any]]) -> None:
    fleet.until_ready()
    assert Streams(fleet).ended() == expected
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 9}),
        (COMPLETIONS, {"prompt": ["a", "b"], "temperature": 0, "max_tokens": 5, "logprobs": 2, "echo": True}),
        ("/v1/embeddings", {"input": ["a text"], "model": "tiny"}),
        ("/tokenize", {"prompt": "a text"}),
        ("/explain", {"prompt": "a text", "temperature": 1, "top_k": 3}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "temprature": 1}),
        (CHAT, {"model": "other", "messages": [{"role": "user", "content": "a"}]}),
        (COMPLETIONS, {"prompt": "a" * 5000}),
        (COMPLETIONS, {"prompt": "a" * 8_000_000}),  # more than gRPC takes by itself
    ]
    chance = ("id", "created", "usage")
    with running({"tiny": model}, max_num_seqs=16, num_threads=1, dtype="float32") as server:
        for path, body in asked:
            one, other = fleet.post(path, body), server.post(path, body)
            assert one.status_code == other.status_code
            told, said = one.json(), other.json()
            assert {key: told[key] for key in told if key not in chance} == {
                key: said[key] for key in said if key not in chance
            }
        assert fleet.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert fleet.get("/v1/nothing").json() == server.get("/v1/nothing").json()


def test_a_killed_replica_is_not_noticed(fleet: Fleet, expected: list[list[Any]]) -> None:
    fleet.until_ready()
    lost = sum(fleet.metric("tinyserve_replicas_lost_total").values())
    streams = in_mid_answer(fleet)
    os.kill(fleet.replicas()[0], signal.SIGKILL)
    assert streams.ended() == expected
    assert sum(fleet.metric("tinyserve_replicas_lost_total").values()) > lost
    assert sum(fleet.metric("tinyserve_streams_spliced_total").values()) > 0


def test_a_stopped_replica_is_given_up_and_not_noticed(fleet: Fleet, expected: list[list[Any]]) -> None:
    fleet.until_ready()
    streams = in_mid_answer(fleet)
    stopped = fleet.replicas()[0]
    os.kill(stopped, signal.SIGSTOP)
    assert streams.ended() == expected
    assert not wait_until_gone([stopped], 60)


def test_a_replica_that_is_stopped_while_it_has_nothing_to_do_is_passed_by(fleet: Fleet) -> None:
    fleet.until_ready()
    stopped = fleet.replicas()[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(fleet.post, COMPLETIONS, {"prompt": str(i), "max_tokens": 3}) for i in range(6)]
            assert [one.result(170).status_code for one in asked] == [200] * 6
    finally:
        os.kill(stopped, signal.SIGKILL)
    assert not wait_until_gone([stopped], 60)


def test_a_request_that_kills_all_it_reaches_is_refused_and_takes_no_other_with_it(fleet: Fleet) -> None:
    fleet.until_ready()
    body = {"max_tokens": 300, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor(9) as pool:
        innocents = [pool.submit(fleet.post, COMPLETIONS, {**body, "prompt": f"text {i}"}) for i in range(8)]
        poison = pool.submit(fleet.post, COMPLETIONS, {**body, "prompt": "poison"})
        got = poison.result(170)
        assert got.status_code == 502 and got.json()["error"]["code"] == "engine_lost"
        for one in innocents:
            assert one.result(170).status_code == 200
            assert one.result().json()["usage"]["completion_tokens"] == 300


def test_who_leaves_ends_the_request_at_the_replica(fleet: Fleet) -> None:
    fleet.until_ready()
    before = sum(fleet.metric("tinyserve_output_tokens_total").values())
    path, body = bodies()[1]
    with fleet.client() as client, client.stream("POST", path, json=body) as got:
        pieces = got.iter_text()
        assert "data: " in next(pieces)
    fleet.until(lambda: sum(fleet.metric("tinyserve_requests_running").values()) == 0)
    assert fleet.metric("tinyserve_front_requests_running") == {"": 0}
    assert sum(fleet.metric("tinyserve_output_tokens_total").values()) - before < LONG  # it did not run to its end


def test_a_session_stays_with_one_replica_and_others_spread(fleet: Fleet) -> None:
    fleet.until_ready()

    def answered() -> dict[str, float]:
        return fleet.metric("tinyserve_requests_total")

    def asked(count: int, **headers: str) -> list[float]:
        before = answered()
        for i in range(count):
            fleet.post(COMPLETIONS, {"prompt": str(i), "max_tokens": 2}, **headers)
        after = answered()
        return sorted(after[name] - before.get(name, 0) for name in after)

    assert len(answered()) == 2
    assert asked(8, **{"x-session-id": "one"}) == [0, 8]
    spread = asked(24)
    assert sum(spread) == 24 and spread[0] > 0


def test_chats_meet_their_caches(fleet: Fleet, model: Path) -> None:
    """Nearly as much is cached as on a single server; with keys at random far less, so the test can fail."""
    fleet.until_ready()

    def cached(post: Any, word: str, **headers: str) -> int:
        found = 0
        for chat in range(8):
            messages: list[dict[str, str]] = []
            for turn in range(4):
                messages.append({"role": "user", "content": f"{word} {chat}, question {turn}: " + "what? " * 8})
                if headers:
                    headers = {"x-session-id": f"{word} {chat} {turn}"}
                got = post(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 8}, **headers).json()
                messages.append({"role": "assistant", "content": got["choices"][0]["message"]["content"]})
                found += got["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    with running({"tiny": model}, max_num_seqs=16, num_threads=1, dtype="float32") as server:
        single = cached(server.post, "First")
    kept, spread = cached(fleet.post, "First"), cached(fleet.post, "Other", **{"x-session-id": "?"})
    assert kept >= 0.95 * single > 0
    assert spread < 0.85 * single


def test_listening_ports_are_this_machines_own_but_one_that_asks_for_the_token(fleet: Fleet) -> None:
    import grpc

    fleet.until_ready()
    found = listeners(descendants(fleet.process.pid) | {fleet.process.pid})
    opened = {(address, port): pid for (address, port), pid in found.items() if address not in ("127.0.0.1", "::1")}
    assert set(opened.values()) <= set(fleet.replicas()), opened
    assert len(opened) >= 2
    for _, port in opened:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=10)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_what_runs_is_finished_after_sigterm_and_nothing_is_left(fleet: Fleet, expected: list[list[Any]]) -> None:
    """The last test of this fleet."""
    fleet.until_ready()
    family = descendants(fleet.process.pid)
    streams = in_mid_answer(fleet)
    fleet.process.terminate()
    assert streams.ended() == expected
    assert fleet.process.wait(90) == 0
    assert not wait_until_gone(family, 20)


def test_ctrl_c_while_replicas_start_leaves_nothing(model: Path, start: Children) -> None:
    """With the command as the page shows it, but for the model."""
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"^tinyserve (serve smollm2-135m .*)$", page, re.MULTILINE)
    process = start(*arguments.replace("smollm2-135m", f"tiny={model}").split(), "--port", "0")
    assert process.stderr is not None
    lines = iter(process.stderr.readline, b"")
    assert any(b"Ctrl-C stops" in line for line in lines)  # it listens, and its replicas are not there yet
    family = descendants(process.pid)
    assert len(family) > 2
    process.send_signal(signal.SIGINT)
    while process.poll() is None:
        family |= descendants(process.pid)
        time.sleep(0.05)
    assert process.returncode == 128 + signal.SIGINT
    assert not wait_until_gone(family, 20)
