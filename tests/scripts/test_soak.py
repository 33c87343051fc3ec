"""The soak: a short one on a tiny model finds nothing, and what it is there to find would be found."""

import argparse
import asyncio
import copy
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from servers import Running, running

SCRIPTS = Path(__file__).parents[2] / "scripts"
KINDS = {
    "chat", "a seed", "penalties", "several answers", "thinking", "a budget of thought",
    "long answer", "json_schema", "regex", "choice", "tools",
    "required tool",
    "completion", "echo", "several prompts", "long prompt", "embeddings", "tokenize", "template",
    "left midway", "malformed", "half a request", "fills the cache",
}  # fmt: skip


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("soak")


@pytest.fixture
def checks(soak: Any) -> Any:
    return soak.checks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 256}
    return checkpoints.write_folder(tmp_path_factory.mktemp("soak"), raw)


@pytest.fixture
def server(folder: Path) -> Iterator[Running]:
    app = {"tool_format": "json"}
    with running({"tiny": folder}, app=app, dtype="float32", num_threads=1, max_num_seqs=4) as one:
        yield one


def drive(soak: Any, server: Running, pid: int | None = None) -> Any:
    """A report on a server within this process."""
    line = ["--url", server.url, "--minutes", "0.05", "--clients", "3", "--timeout", "60"]
    arguments: argparse.Namespace = soak.options().parse_args(line)
    report = soak.Report()
    asyncio.run(soak.soak(server.url, pid, arguments, report))
    return report


# --- a run for real ---------------------------------------------------------------------------------------------------


def test_a_short_soak_finds_nothing(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "soak.py"), str(folder), "--minutes", "0.25", "--dtype", "float32"]
    command += ["--max-model-len", "256", "--tool-format", "json", "--max-num-seqs", "4", "--seed", "5"]
    # Its memory is that of a process which has only begun.
    command += ["--tolerance", "0.5", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["violations"] == report["left_out"] == [] and report["seed"] == 5
    assert report["requests"].keys() == report["longest"].keys() == KINDS
    assert not [status for status in report["statuses"] if status not in ("200", "400", "404", "413", "415", "left")]
    assert sum(report["requests"].values()) == sum(report["statuses"].values())
    _, before, after = report["idle"]
    assert before["blocks"] == after["blocks"] == 0 and after["descriptors"] <= before["descriptors"]
    assert len(report["memory"]) >= 10
    assert " min: " in done.stdout and "VIOLATION" not in done.stdout


# --- what it would find -----------------------------------------------------------------------------------------------


def test_a_changed_answer_is_reported(soak: Any, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyserve.server import answers, chat

    asked = 0

    def wrong(*arguments: Any) -> Any:
        """The log-probabilities, of which the last bit is another one from the fiftieth request on."""
        nonlocal asked
        asked += 1
        row = answers.chat_logprobs(*arguments)
        if asked > 50 and row["content"]:
            row["content"][0]["logprob"] += 1e-12
        return row

    monkeypatch.setattr(chat, "chat_logprobs", wrong)
    report = drive(soak, server)
    assert any("choices[0].logprobs.content[0].logprob is " in one and "alone" in one for one in report.violations)
    assert not any("status" in one for one in report.violations)


def test_a_block_that_is_held_is_reported(soak: Any, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyserve.server import metrics

    help_, count = metrics._GAUGES["tinyserve_cache_blocks_used"]
    monkeypatch.setitem(metrics._GAUGES, "tinyserve_cache_blocks_used", (help_, lambda stats: count(stats) + 2))
    report = soak.Report()
    idle = asyncio.run(soak.idle(server.url, None, report, settle=0.5))
    assert idle.blocks == 2 and report.violations == ["2 blocks of the cache are held, and nobody asks."]


def test_an_error_of_the_servers_is_reported(soak: Any, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyserve.server import embeddings

    answered = 0

    def broken(*arguments: Any) -> Any:
        nonlocal answered
        answered += 1
        if answered > 2:  # the two texts of the request that is made alone
            raise ZeroDivisionError
        return ""

    monkeypatch.setattr(embeddings, "_encoded", broken)
    report = drive(soak, server)
    assert report.statuses["500"] == report.requests["embeddings"] > 0
    assert any(one.startswith("embeddings (client ") and "status 500" in one for one in report.violations)


def test_a_hang_is_reported(soak: Any) -> None:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        case = soak.cases.Case("chat", soak.cases.CHAT, {"messages": []})
        arguments = soak.options().parse_args(["--url", url, "--clients", "1", "--timeout", "0.2"])
        report = soak.Report()
        asyncio.run(soak.drive(url, [case], 0.5, 0, arguments, report))
    assert report.statuses["hang"] >= 1
    assert any("no end within 0.2 s" in one for one in report.violations)


def test_more_descriptors_threads_or_processes_are_reported(checks: Any) -> None:
    before = checks.snapshot("", os.getpid())
    assert checks.lost(before, before) == []
    with Path(__file__).open() as file, subprocess.Popen(["sleep", "60"]) as child:
        after = checks.snapshot("", os.getpid())
        child.kill()
    assert file.closed and [one.split()[0] for one in checks.lost(before, after)] == ["descriptors", "processes"]
    assert checks.lost(before, checks.Snapshot(threads=before.threads + 1, descriptors=1, processes=1)) == [
        f"threads are {before.threads + 1}, and were {before.threads} behind the warm-up."
    ]
    assert len(checks.lost(before, checks.Snapshot())) == 3  # the process is gone


def test_memory_that_grows_is_reported_and_one_peak_is_not(checks: Any) -> None:
    flat = [(60.0 * i, 100_000_000 + i % 3) for i in range(50)]
    assert checks.unsteady(flat, 0.05) == []
    peak = [(at, 2 * size if at == 1800 else size) for at, size in flat]
    assert checks.unsteady(peak, 0.05) == []
    growing = [(at, size + int(at) * 3000) for at, size in flat]
    (sentence,) = checks.unsteady(growing, 0.05)
    assert sentence.startswith("Resident memory is ") and sentence.endswith(" %.")
    shrinking = [(at, size - int(at) * 3000) for at, size in flat]
    assert len(checks.unsteady(shrinking, 0.05)) == 1
    assert checks.resident(os.getpid()) > 1 << 20 and checks.resident(2**22 + 1) is None


def test_memory_that_grows_at_rest_is_reported(checks: Any) -> None:
    flat = [(600.0 * i, 100_000_000 + 2_000_000 * (i % 3)) for i in range(6)]
    assert checks.grown_at_rest(flat, 0.05) == [] == checks.grown_at_rest([], 0.05)
    growing = [(at, size + int(at) * 3000) for at, size in flat]
    first, *others = checks.grown_at_rest(growing, 0.05)
    assert first.startswith("Resident memory at rest is 107.6 MB after 20.0 minutes, and was 100.0 MB behind the ")
    assert first.endswith("warm-up: +7.6 %.") and len(others) == 3
    shrinking = [(at, size - int(at) * 3500) for at, size in flat]
    assert len(checks.grown_at_rest(shrinking, 0.05)) == 3
    assert checks.resident(os.getpid()) > 1 << 20 and checks.resident(2**22 + 1) is None


def test_the_first_difference_is_named(checks: Any) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "stop_reason": None, "logprobs": None}
    whole = {"id": "1", "object": "chat.completion", "created": 5, "model": "m", "choices": [choice]}
    again = copy.deepcopy(whole) | {"id": "2", "created": 6}
    again["choices"][0]["message"] |= {"content": "", "tool_calls": [call | {"id": "b"}]}
    assert checks.difference(checks.essence(whole), checks.essence(again)) is None
    for change, where in (
        ({"content": "x"}, "choices[0].message.content"),
        ({"tool_calls": []}, "choices[0].message.tool_calls"),
        ({"tool_calls": [{**call, "function": {"name": "f", "arguments": "[]"}}]}, ".function.arguments"),
    ):
        other = copy.deepcopy(whole)
        other["choices"][0]["message"] |= change
        assert where in checks.difference(checks.essence(whole), checks.essence(other))
    assert "choices" in checks.difference(checks.essence(whole), {**checks.essence(whole), "choices": []})


def test_a_stream_that_lacks_a_piece_differs(soak: Any, server: Running) -> None:
    case = soak.cases._chat("chat", "Hello", 8)
    expected = soak.checks.essence(server.post(case.path, case.body).json())
    text = server.post(case.path, case.body | {"stream": True, "stream_options": {"include_usage": True}}).text
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert soak.checks.difference(expected, soak.checks.assembled(events)) is None
    for left_out in (2, len(events) - 2, len(events) - 1):
        rest = events[:left_out] + events[left_out + 1 :]
        assert soak.checks.difference(expected, soak.checks.assembled(rest)) is not None


def test_a_model_or_an_address_must_be_given(soak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ([], ["smollm2-135m", "--url", "http://127.0.0.1:1"]):
        monkeypatch.setattr("sys.argv", ["soak.py", *line])
        with pytest.raises(SystemExit) as ended:
            soak.main()
        assert ended.value.code == 2
