"""Batches on a pool of workers: the bytes of one worker, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Children, run

from tinyserve.batch.on_ray import unseen
from tinyserve.batch.rows import RowOptions
from tinyserve.batch.run import BatchOptions
from tinyserve.batch.run import run as run_options
from tinyserve.batch.work import ModelOptions, WorkerOptions
from tinyserve.engine_options import EngineOptions
from tinyserve.errors import TinyserveError, UserError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")

ENGINE = EngineOptions(dtype="float32", num_threads=1, max_num_seqs=4, kv_cache_memory=50_000_000)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One for all tests of this file: a process that is connected stays so."""
    from tinyserve.cluster import connect

    with connect(cores=4):
        yield


@pytest.fixture
def options(tmp_path: Path, folder_of: Callable[[str], Path]) -> BatchOptions:
    """A drawn job of 240 rows in shards of 20."""
    lines = (json.dumps({"prompt": f"{i}", "i": i}) + "\n" for i in range(240))
    (tmp_path / "in.jsonl").write_text("".join(lines))
    model = str(folder_of("granite-hybrid"))
    return BatchOptions(
        inputs=[str(tmp_path / "in.jsonl")],
        output=str(tmp_path / "here.jsonl"),
        model=ModelOptions(name=model, source=model, engine=ENGINE),
        rows=RowOptions(body={"max_tokens": 12, "temperature": 3.0}, seed=3),
        rows_per_shard=20,
    )


def on_two(options: BatchOptions, name: str = "there.jsonl") -> BatchOptions:
    output = str(Path(options.output).with_name(name))
    return replace(options, output=output, workers=WorkerOptions(least=2, most=2))


def test_two_workers_write_the_bytes_of_one(cluster: None, options: BatchOptions) -> None:
    run_options(options, lambda progress: None)
    seen = list[int]()
    report = run_options(on_two(options), lambda progress: seen.append(progress.rows))
    assert Path(report.output).read_bytes() == Path(options.output).read_bytes()
    assert (report.rows, report.failed, report.resumed) == (240, 0, 0)
    assert seen[-1] == 240 and report.output_tokens > 1000


def _workers_of(folder: Path) -> set[int]:
    """The processes that have a journal."""
    names = [path.name.split(".")[1] for path in (folder / "_journal").glob("*.jsonl")]
    return {int(name.split("-")[-2][8:]) for name in names}


def test_a_worker_that_is_killed_costs_no_row(cluster: None, options: BatchOptions) -> None:
    run_options(options, lambda progress: None)
    there = on_two(options)
    folder = Path(f"{there.output}.parts")
    killed = list[int]()

    def kill() -> None:
        while not killed:
            for pid in _workers_of(folder) if (folder / "_journal").exists() else ():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
            threading.Event().wait(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    report = run_options(there, lambda progress: None)
    killer.join(1)
    assert len(killed) == 1
    assert Path(report.output).read_bytes() == Path(options.output).read_bytes()


def test_what_a_worker_raises_is_said_as_here(cluster: None, options: BatchOptions, tmp_path: Path) -> None:
    missing = replace(on_two(options), model=replace(options.model, source=str(tmp_path / "none")))
    with pytest.raises(UserError, match="There is no file or folder"):
        run_options(missing, lambda progress: None)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": "x" * 500}) + "\n" for _ in range(100)))
    with pytest.raises(UserError, match="The first 20 rows all failed"):
        run_options(on_two(options, "bad.jsonl"), lambda progress: None)


def test_a_shard_whose_workers_always_die_ends_it(cluster: None, options: BatchOptions) -> None:
    """Whoever has a journal is killed, until it is given up."""
    there = on_two(options)
    folder, ended, killed = Path(f"{there.output}.parts"), threading.Event(), set[int]()

    def kill() -> None:
        while not ended.wait(0.01):
            for pid in _workers_of(folder) - killed if (folder / "_journal").exists() else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.add(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(TinyserveError, match=r"were begun \d times, and each time the worker died"):
            run_options(there, lambda progress: None)
    finally:
        ended.set()
        killer.join()
    assert len(killed) >= 4


def test_more_workers_than_a_cluster_has_room_for(cluster: None, options: BatchOptions) -> None:
    many = replace(on_two(options), workers=WorkerOptions(least=5, most=5))
    with pytest.raises(UserError, match="5 workers of 1 threads do not fit: the nodes have 4 cores"):
        run_options(many, lambda progress: None)


def test_files_that_a_node_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    assert unseen({str(tmp_path / "a"): 3}) is None
    assert unseen({str(tmp_path / "a"): 4}) == str(tmp_path / "a")
    assert unseen({str(tmp_path / "a"): 3, str(tmp_path / "b"): 1}) == str(tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers is '0'"),
        (["--workers", "4:2"], "--workers is '4:2'"),
        (["--workers", "x"], "--workers is 'x'"),
        (["--no-ray-auth"], "--no-ray-auth is for a Ray cluster"),
        (["--address", "127.0.0.1:1"], "No Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    result = run("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", "m", *arguments)
    assert result.code == 2 and message in result.sentence


def test_a_killed_driver_is_resumed_and_leaves_no_process(
    tmp_path: Path, folder_of: Callable[[str], Path], start: Children
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(1000)))
    flags = ("--model", folder_of("llama"), "--dtype", "float32", "--threads", "1", "--temp", "3", "--max-tokens", "20")
    command = ("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", *flags, "--workers", "2", "--json")
    process = start(*command)
    journals = tmp_path / "out.jsonl.parts" / "_journal"
    while not (journals.exists() and sum(path.stat().st_size for path in journals.iterdir()) > 5000):
        assert process.poll() is None, process.stderr.read()
        threading.Event().wait(0.02)
    workers = _workers_of(journals.parent)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(600):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            break
        threading.Event().wait(0.1)
    else:
        raise AssertionError(subprocess.run(["ps", "ax"], capture_output=True, text=True, check=True).stdout)
    result = run(*command)
    assert result.code == 0, result.err
    report = json.loads(result.out.splitlines()[-1])
    assert report["rows"] == 1000 and report["resumed"] > 0
    alone = run("batch", tmp_path / "in.jsonl", tmp_path / "alone.jsonl", *flags)
    assert alone.code == 0, alone.err
    assert (tmp_path / "alone.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
