"""Fleets on a cluster that is there already, changed while they run; and as many replicas as requests ask for."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Children
from fleets import Fleet
from processes import descendants, wait_until_gone

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
HOST = """
import time
from tinyserve.cluster import connect
with connect(cores=4) as session:
    print(session.address, flush=True)
    time.sleep(600)
"""
# Serve takes half a minute to begin another replica, and ten to end one.
SCALED = """
import sys
from tinyserve.fleet import run
from tinyserve.cli import main
options = run.deployment_options
def hasty(*arguments):
    told = options(*arguments)
    told["autoscaling_config"] |= {
        "upscale_delay_s": 1, "downscale_delay_s": 3, "metrics_interval_s": 0.5, "look_back_period_s": 2,
    }
    return told
run.deployment_options = hasty
main()
"""
BODY = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "temperature": 0}


class Load:
    """Requests, one after the other in each of some threads, until it is ended."""

    def __init__(self, fleet: Fleet, threads: int, **fields: Any):
        self.statuses: list[int] = []
        self.texts: set[str] = set()
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(fleet, {**BODY, **fields})) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, fleet: Fleet, body: dict[str, Any]) -> None:
        while not self._end.is_set():
            got = fleet.post("/v1/completions", body)
            self.statuses.append(got.status_code)
            if body.get("stream"):
                self.texts.add(str(got.text.count("data: ")) + got.text[-14:])
            else:
                self.texts.add(got.json()["choices"][0]["text"] if got.status_code == 200 else got.text)

    def end(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(180)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[int, str]]:
    """A process with a cluster, and its address."""
    with Children() as start:
        process = start(program=[sys.executable, "-c", HOST], **TOKEN)
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().decode().strip()
        family = descendants(process.pid)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            assert not wait_until_gone(family, 20)


def test_a_fleet_is_joined_changed_under_load_and_taken_down(
    cluster: tuple[int, str], folder_of: Callable[[str], Path], start: Children
) -> None:
    host, address = cluster
    model = folder_of("llama")

    def front(*arguments: str) -> Fleet:
        common = ("--address", address, "--port", "0", "--threads", "1", "--dtype", "float32")
        return Fleet(start("serve", f"tiny={model}", *common, *arguments, **TOKEN), host)

    first = front("--replicas", "2").until_ready()
    before = set(first.replicas())
    joined = front("--join")
    joined.until(lambda: joined.get("/ready").status_code == 200)
    said, heard = (one.post("/v1/completions", BODY).json()["choices"] for one in (first, joined))
    assert said == heard
    same = front("--replicas", "2").until_ready()
    assert set(same.replicas()) == before

    load, streams = Load(first, 3), Load(joined, 3, stream=True)
    changed = front("--replicas", "2", "--max-num-seqs", "5")
    changed.until(lambda: len(changed.replicas()) == 2 and not before & set(changed.replicas()))
    time.sleep(1)
    load.end()
    streams.end()
    assert len(load.statuses) + len(streams.statuses) >= 60
    assert {*load.statuses, *streams.statuses} == {200}
    assert len(load.texts) == len(streams.texts) == 1
    assert next(iter(streams.texts)).endswith("data: [DONE]\n\n")

    for one in (joined, same, first):  # of which none has started what runs now
        one.process.terminate()
        assert one.process.wait(60) == 0
    assert len(changed.replicas()) == 2 and changed.post("/v1/completions", BODY).status_code == 200
    last = set(changed.replicas())
    changed.process.terminate()
    assert changed.process.wait(60) == 0
    assert not wait_until_gone(last, 30)


def test_a_fleet_that_is_left_is_found_again(
    cluster: tuple[int, str], folder_of: Callable[[str], Path], start: Children
) -> None:
    host, address = cluster
    common = ("--address", address, "--port", "0", "--threads", "1", "--replicas", "1")
    command = ("serve", f"left={folder_of('llama')}", *common)
    one = Fleet(start(*command, "--leave", **TOKEN), host).until_ready(1)
    replicas = one.replicas()
    one.process.terminate()
    assert one.process.wait(60) == 0
    again = Fleet(start(*command, **TOKEN), host).until_ready(1)
    assert again.replicas() == replicas
    assert again.post("/v1/completions", BODY).status_code == 200
    again.process.kill()  # and goes on without its front
    again.process.wait()
    once_more = Fleet(start(*command, "--join", **TOKEN), host).until_ready(1)
    assert once_more.replicas() == replicas


def test_a_model_that_cannot_be_loaded_there_is_told_and_not_left_behind(
    cluster: tuple[int, str], folder_of: Callable[[str], Path], tmp_path: Path, start: Children
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder_of("llama").iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    common = ("--address", cluster[1], "--port", "0", "--threads", "1", "--replicas", "1")
    for command in (common, (*common, "--join")):  # for none is left to join
        process = start("serve", f"broken={broken}", *command, **TOKEN)
        _, told = process.communicate(timeout=120)
        last = told.decode().splitlines()[-1]
        assert process.returncode == (2 if "--join" in command else 1)
        assert ("No fleet of the name" if "--join" in command else "broken could not be loaded: ") in last, told


def test_what_is_not_there_cannot_be_joined(
    cluster: tuple[int, str], folder_of: Callable[[str], Path], start: Children
) -> None:
    common = ("--address", cluster[1], "--port", "0", "--join")
    process = start("serve", f"nobody={folder_of('llama')}", *common, **TOKEN)
    _, told = process.communicate(timeout=90)
    assert process.returncode == 2
    assert "No fleet of the name" in told.decode().splitlines()[-1], told


@pytest.fixture(scope="module")
def beheaded(cluster: tuple[int, str], folder_of: Callable[[str], Path]) -> Iterator[Fleet]:
    """A fleet whose cluster has just lost its head."""
    host, address = cluster
    common = ("--address", address, "--port", "0", "--threads", "1", "--replicas", "1", "--drain-timeout", "1")
    with Children() as start:
        one = Fleet(start("serve", f"orphan={folder_of('llama')}", *common, **TOKEN), host)
        one.until(lambda: one.get("/ready").status_code == 200)
        os.kill(host, signal.SIGKILL)
        yield one


def test_replicas_come_and_go_with_the_load(beheaded: Fleet, folder_of: Callable[[str], Path], start: Children) -> None:
    """On another cluster, while the one without a head is given up."""
    arguments = ("serve", f"tiny={folder_of('llama')}", "--replicas", "1:2", "--threads", "1", "--port", "0")
    process = start(*arguments, "--max-num-seqs", "2", program=[sys.executable, "-c", SCALED])
    fleet = Fleet(process).until_ready(1)
    family = descendants(process.pid)
    load = Load(fleet, 6, stream=True)
    fleet.until(lambda: len(fleet.replicas()) == 2 and fleet.metric("tinyserve_replicas_running") == {"": 2})
    family |= descendants(process.pid)
    load.end()
    assert set(load.statuses) == {200} and len(load.texts) == 1
    fleet.until(lambda: len(fleet.replicas()) == 1 and fleet.metric("tinyserve_replicas_running") == {"": 1})
    assert fleet.post("/v1/completions", BODY).status_code == 200
    process.terminate()
    assert process.wait(60) == 0
    assert not wait_until_gone(family, 20)


def test_a_cluster_whose_head_is_gone_ends_the_command(beheaded: Fleet) -> None:
    """Whatever Ray does meanwhile, a supervisor hears of it."""
    assert beheaded.process.wait(150) == 1
    assert "does not answer" in "".join(beheaded.log)
