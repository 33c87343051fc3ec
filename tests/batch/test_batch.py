"""Batches as a whole: what they answer, and that nothing is lost or doubled, however they end."""

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command_line import Children, run
from servers import running

from tinyserve import LLM, SamplingParams
from tinyserve.batch import BatchReport, run_batch
from tinyserve.batch.rows import CHAT, COMPLETIONS, EMBEDDINGS
from tinyserve.errors import TinyserveError, UserError

OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 4}
FLAGS = ("--dtype", "float32", "--threads", "1", "--max-num-seqs", "4")
DRAWN = SamplingParams(max_tokens=9, temperature=3.0, top_p=0.9)


@pytest.fixture
def tiny(folder_of: Callable[[str], Path]) -> str:
    """A hybrid with a chat template."""
    return str(folder_of("granite-hybrid"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def questions(count: int) -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "prompt": f"{'ab' * (i % 7)} {i}?", "weight": i / 3} for i in range(count)]


def test_rows_are_answered_as_the_model_does(tmp_path: Path, tiny: str) -> None:
    rows = questions(23)
    given = write(tmp_path / "in.jsonl", rows)
    report = run_batch(given, tmp_path / "out.jsonl", tiny, DRAWN, seed=5, system="s", **OPTIONS)
    answered = read(tmp_path / "out.jsonl")
    assert [{name: row[name] for name in ("id", "prompt", "weight")} for row in answered] == rows
    llm = LLM(tiny, **OPTIONS)
    for number, row in enumerate(answered):
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": row["prompt"]}]
        params = SamplingParams(max_tokens=9, temperature=3.0, top_p=0.9, seed=_seed(5, number))
        (output,) = llm.chat(messages, params)
        assert (row["answer"], row["finish_reason"]) == (output.outputs[0].text, output.outputs[0].finish_reason)
        assert row["prompt_tokens"] == len(output.prompt_token_ids) and row["error"] is None
    assert len({row["answer"] for row in answered}) > 15
    tokens = sum(row["output_tokens"] for row in answered)
    assert report == BatchReport(
        tmp_path / "out.jsonl", 23, 0, sum(row["prompt_tokens"] for row in answered), tokens, 0, report.seconds
    )
    run_batch(given, tmp_path / "other.jsonl", tiny, DRAWN, seed=6, system="s", **OPTIONS)
    assert read(tmp_path / "other.jsonl") != answered


def _seed(job: int, number: int) -> int:
    from tinyserve.batch.rows import RowOptions, rows_of
    from tinyserve.batch.shards import Row

    row = Row(number, {"prompt": "a"})
    return int(rows_of(row, RowOptions(seed=job), "in").request(row).body["seed"])


def test_openais_lines_are_answered_as_the_server_does(tmp_path: Path, tiny: str) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "temperature": 0}),
        (CHAT, {"messages": [{"role": "user", "content": "b"}], "max_tokens": 5, "seed": 3, "n": 2, "logprobs": True}),
        (CHAT, {"messages": [{"role": "user", "content": "c"}], "max_tokens": 5, "model": "tiny", "temperature": 0}),
        (COMPLETIONS, {"prompt": ["ab", "cd"], "max_tokens": 4, "temperature": 0, "echo": True}),
        (EMBEDDINGS, {"input": ["ab", "cd"]}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 400}]}),  # too long
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "model": "gpt-4"}),
        (CHAT, {"messages": [], "temprature": 1}),
    ]
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": path, "body": body} for i, (path, body) in enumerate(bodies)
    ]
    given = write(tmp_path / "in.jsonl", lines)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("no JSON\n")
    result = run("batch", given, tmp_path / "out.jsonl", "--model", f"tiny={tiny}", *FLAGS, "--json")
    assert result.code == 1, result.err
    report = json.loads(result.out.splitlines()[-1])
    assert (report["rows"], report["failed"]) == (9, 4)
    answered = read(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in answered] == [*(line["custom_id"] for line in lines), None]
    assert answered[-1]["response"] is None and "no JSON" in answered[-1]["error"]["message"]
    with running({"tiny": tiny}, **OPTIONS) as server:
        for (path, body), row in zip(bodies, answered, strict=False):
            response = server.post(path, body)
            assert row["error"] is None
            assert row["response"]["status_code"] == response.status_code
            assert _without_chance(row["response"]["body"]) == _without_chance(response.json())


def _without_chance(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in ("id", "created")}


@pytest.mark.parametrize("name", ["out.parquet", "folder", "out.jsonl"])
def test_parquet_keeps_its_columns_and_types(tmp_path: Path, tiny: str, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chats = [[{"role": "user", "content": f"{i}"}] for i in range(7)]
    when = pa.array(range(7), pa.date32())
    table = pa.table({"chat": chats, "when": when, "small": pa.array(range(7), pa.int8())})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=3)
    given, out = tmp_path / "in.parquet", tmp_path / name
    run_batch(given, out, tiny, SamplingParams(max_tokens=5, temperature=0), messages_column="chat", **OPTIONS)
    write(tmp_path / "same.jsonl", [{"prompt": f"{i}"} for i in range(7)])
    run_batch(
        tmp_path / "same.jsonl", tmp_path / "as.jsonl", tiny, SamplingParams(max_tokens=5, temperature=0), **OPTIONS
    )
    expected = [row["answer"] for row in read(tmp_path / "as.jsonl")]
    if name == "out.jsonl":
        assert [row["answer"] for row in read(out)] == expected
        assert read(out)[3]["when"] == "1970-01-04"
        return
    answered = pq.read_table(out if out.is_file() else out / "part-00000.parquet")
    assert answered.select(["chat", "when", "small"]).equals(table)
    assert answered["answer"].to_pylist() == expected
    assert answered.schema.field("prompt_tokens").type == pa.int64() and answered["error"].null_count == 7


ROWS = 900  # half a second and more behind the last kill
CHILD = """
import sys
from tinyserve.batch import run as module
from tinyserve.batch.rows import RowOptions
from tinyserve.batch.run import BatchOptions, run
from tinyserve.batch.work import ModelOptions
from tinyserve.engine_options import EngineOptions

given, output, model = sys.argv[1:]
module._TICK_SECONDS = 0.01
engine = EngineOptions(dtype="float32", num_threads=1, max_num_seqs=4)
report = run(
    BatchOptions(
        inputs=[given], output=output, rows_per_shard=25, model=ModelOptions(name=model, source=model, engine=engine),
        rows=RowOptions(body={"max_tokens": 12, "temperature": 3.0}, messages_column="m"),
    ),
    lambda progress: print(progress.rows, flush=True),
)
print("done", report.rows, report.resumed, flush=True)
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    tmp_path: Path, tiny: str, start: Children, kind: str
) -> None:
    rows = [{"m": [{"role": "user", "content": f"{i} é\u2028"}], "i": i} for i in range(ROWS)]
    given = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        write(given, rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), given, row_group_size=40)

    def begin(output: str) -> Any:
        return start(given, tmp_path / output, tiny, program=(sys.executable, "-c", CHILD))

    def finish(process: Any) -> tuple[int, int]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
        _, rows, resumed = out.decode().splitlines()[-1].split()
        return int(rows), int(resumed)

    assert finish(begin(f"whole.{kind}")) == (ROWS, 0)
    chance, folder = random.Random(kind), tmp_path / f"out.{kind}.parts"
    kept = 0
    for _ in range(3):
        process = begin(f"out.{kind}")
        goal = kept + chance.randint(1, ROWS // 6)
        while int(process.stdout.readline() or b"0") < goal:
            assert process.poll() is None, process.stderr.read()
        process.kill()
        process.wait()
        assert not (tmp_path / f"out.{kind}").exists()
        kept = _answered_in(folder)
        assert kept >= goal  # what was told is kept
    assert finish(begin(f"out.{kind}")) == (ROWS, kept)
    assert (tmp_path / f"out.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    assert not folder.exists()


def _answered_in(folder: Path) -> int:
    """The rows in parts and journals; none is in two of them."""
    counts = [json.loads(path.read_text()) for path in (folder / "_journal").glob("*.counts.json")]
    parts = {path.name.split("-")[1].split(".")[0].lstrip("0") or "0" for path in folder.glob("part-*")}
    done = sum(one["rows"] for one in counts[: len(parts)])
    open_ = set()
    for path in (folder / "_journal").glob("*.jsonl"):
        if path.name.split(".")[0] not in parts:
            lines = path.read_bytes().split(b"\n")[:-1]
            open_ |= {json.loads(line)[0] for line in lines}
    return done + len(open_)


def test_ctrl_c_keeps_what_is_answered(tmp_path: Path, tiny: str, start: Children) -> None:
    given = write(tmp_path / "in.jsonl", questions(400))
    flags = ("--model", tiny, *FLAGS)
    process = start("batch", given, tmp_path / "out", *flags, "--max-tokens", "60", "--json")
    journals = tmp_path / "out" / "_journal"
    while not (journals.exists() and sum(path.stat().st_size for path in journals.iterdir())):
        assert process.poll() is None, process.stderr.read()
        threading.Event().wait(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err, err
    result = run("batch", given, tmp_path / "out", *flags, "--max-tokens", "60", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out.splitlines()[-1])
    assert report["rows"] == 400 and 0 < report["resumed"] < 400
    again = run("batch", given, tmp_path / "out", *flags, "--max-tokens", "60")
    assert again.code == 0 and "400 rows answered, 400 of them before" in again.err
    other = run("batch", given, tmp_path / "out", *flags, "--max-tokens", "61")
    assert other.sentence.startswith(f"{tmp_path / 'out'} was begun with max_tokens 60, and this is 61")


def test_a_full_disk_stops_it_and_loses_nothing(tmp_path: Path, tiny: str, start: Children) -> None:
    given = write(tmp_path / "in.jsonl", questions(60))
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); " \
        "sys.argv[0] = 'tinyserve'; runpy.run_module('tinyserve', run_name='__main__')"  # fmt: skip
    command = ("batch", given, tmp_path / "out.jsonl", "--model", tiny, *FLAGS, "--max-tokens", "8")
    process = start(*command, program=(sys.executable, "-c", limited))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and b"cannot be written: File too large. What is answered is kept" in err, err
    assert run(*command).code == 0
    result = run("batch", given, tmp_path / "whole.jsonl", *command[3:])
    assert result.code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_rows_that_fail_are_rows_unless_all_do(tmp_path: Path, tiny: str) -> None:
    rows = questions(30)
    for i in (0, 3, 29):
        rows[i]["prompt"] = "x" * 500
    rows[7]["prompt"] = None
    report = run_batch(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", tiny, DRAWN, **OPTIONS)
    answered = read(tmp_path / "out.jsonl")
    assert [i for i, row in enumerate(answered) if row["error"]] == [0, 3, 7, 29] and report.failed == 4
    assert "context" in answered[0]["error"] or "tokens" in answered[0]["error"]
    assert answered[7]["error"] == "The column 'prompt' is empty." and answered[7]["answer"] is None
    few = write(tmp_path / "few.jsonl", [{"prompt": "x" * 500}] * 3)
    assert run_batch(few, tmp_path / "few-out.jsonl", tiny, DRAWN, **OPTIONS).failed == 3
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "x" * 500}] * 25)
    with pytest.raises(UserError, match=r"The first 20 rows all failed, and none is kept\. The first one: "):
        run_batch(bad, tmp_path / "bad-out.jsonl", tiny, DRAWN, **OPTIONS)
    assert list((tmp_path / "bad-out.jsonl.parts" / "_journal").iterdir()) == []
    given = write(tmp_path / "bad.jsonl", [{"prompt": "x" * 500}] * 10 + [{"prompt": "ok"}] + [{"prompt": None}] * 40)
    assert run_batch(given, tmp_path / "good-out.jsonl", tiny, DRAWN, **OPTIONS).failed == 50


def test_a_server_answers_and_its_429s_are_obeyed(tmp_path: Path, tiny: str) -> None:
    given = write(tmp_path / "in.jsonl", questions(20))
    run_batch(given, tmp_path / "here.jsonl", tiny, DRAWN, **OPTIONS)
    with running({"tiny": tiny}, max_queue=1, **(OPTIONS | {"max_num_seqs": 2})) as server:
        run_batch(given, tmp_path / "there.jsonl", None, DRAWN, server=server.url, max_concurrency=12)
        assert server.metric("tinyserve_requests_refused_total") or "429" in server.get("/metrics").text
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()


class OddServer:
    """A server whose n-th answer `answer(n, body)` says: a status and bytes, or None to close the connection."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], tuple[int, bytes] | None]):
        odd, self.asked, lock = self, 0, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send(200, b'{"data": [{"id": "m"}]}')

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    odd.asked += 1
                    number = odd.asked
                answered = answer(number, body)
                if answered is None:
                    self.close_connection = True
                else:
                    self.send(*answered)

            def send(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "OddServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


WHOLE = json.dumps({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}).encode()


def test_a_server_that_is_gone_stops_it_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyserve.batch.work.SERVER_PATIENCE", 0.4)
    hot = json.dumps({"error": {"message": "Too hot.", "code": "heat"}}).encode()
    given = write(tmp_path / "in.jsonl", questions(5))
    with (
        OddServer(lambda number, body: (200, WHOLE) if number <= 2 else (503, hot)) as server,
        pytest.raises(TinyserveError, match=r"answers no more: Too hot \(heat\)\. What is answered is kept"),
    ):
        run_batch(given, tmp_path / "out.jsonl", server=server.url, max_concurrency=1)
    with pytest.raises(TinyserveError, match="Nothing answers at"):
        run_batch(given, tmp_path / "out.jsonl", server=server.url)
    journals = (tmp_path / "out.jsonl.parts" / "_journal").glob("*.jsonl")
    assert sum(len(path.read_text().splitlines()) for path in journals) == 2


@pytest.mark.parametrize(
    "odd",
    [
        None,
        (200, b"<html>"),
        (200, b""),
        (200, b"[]"),
        (200, b"\xff"),
        (200, b'{"choices": []}'),
        (200, b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
        (404, b"<html>"),
        (500, b"{}"),
    ],
)
def test_what_a_server_does_to_one_row_is_that_rows_error(tmp_path: Path, odd: tuple[int, bytes] | None) -> None:
    def answer(number: int, body: dict[str, Any]) -> tuple[int, bytes] | None:
        return odd if "3?" in body["messages"][0]["content"] else (200, WHOLE)

    with OddServer(answer) as server:
        report = run_batch(write(tmp_path / "in.jsonl", questions(8)), tmp_path / "out.jsonl", server=server.url)
    answered = read(tmp_path / "out.jsonl")
    assert report.failed == 1 and [i for i, row in enumerate(answered) if row["error"]] == [3]
    assert len(answered[3]["error"]) > 15


def test_only_rows_that_were_asked_first_can_stop_it(tmp_path: Path) -> None:
    """Rows that nobody need be asked about fail at once, whatever becomes of those before them."""
    release = threading.Event()

    def answer(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        assert release.wait(60)
        return 200, WHOLE

    rows = questions(12) + [{"id": i, "prompt": None} for i in range(40)] + questions(5)
    given = write(tmp_path / "in.jsonl", rows)
    with OddServer(answer) as server:
        report = run_batch(
            given, tmp_path / "out.jsonl", server=server.url, on_progress=lambda now: now.failed >= 20 and release.set()
        )
    assert (report.rows, report.failed) == (57, 40)


def test_an_engine_that_dies_ends_it(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, **_: Any) -> Any:
        raise KeyboardInterrupt("a bit fell over")  # an Exception would end the requests, and not the engine

    monkeypatch.setattr("tinyserve.engine.Engine.step", broken)
    with pytest.raises(TinyserveError, match="a bit fell over"):
        run_batch(write(tmp_path / "in.jsonl", questions(5)), tmp_path / "out.jsonl", tiny, DRAWN, **OPTIONS)
    monkeypatch.undo()
    report = run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tiny, DRAWN, **OPTIONS)
    assert report.rows == 5 and report.resumed == report.failed <= 4


def test_a_step_that_fails_is_an_error_of_its_rows(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyserve.model_runner import ModelRunner

    execute, steps = ModelRunner.execute, 0

    def broken(self: Any, scheduled: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("a bit fell over")
        return execute(self, scheduled)

    monkeypatch.setattr(ModelRunner, "execute", broken)
    report = run_batch(write(tmp_path / "in.jsonl", questions(15)), tmp_path / "out.jsonl", tiny, DRAWN, **OPTIONS)
    failed = [row for row in read(tmp_path / "out.jsonl") if row["error"]]
    assert 0 < len(failed) == report.failed <= 4
    assert failed[0]["error"] == "internal error (RuntimeError: a bit fell over)"


def test_it_runs_within_an_event_loop_as_in_a_notebook(tmp_path: Path, tiny: str) -> None:
    given = write(tmp_path / "in.jsonl", questions(3))

    async def cell() -> BatchReport:
        return run_batch(given, tmp_path / "out.jsonl", tiny, DRAWN, **OPTIONS)

    assert asyncio.run(cell()).rows == 3


def test_weights_that_changed_are_refused(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    given, out = write(tmp_path / "in.jsonl", questions(4)), tmp_path / "out.jsonl"
    model = tmp_path / "model"
    model.symlink_to(folder_of("llama"))
    bad = [{"prompt": "x" * 500}] * 25
    write(given, bad)
    with pytest.raises(UserError, match="all failed"):  # begun, and not ended
        run_batch(given, out, model, DRAWN, **OPTIONS)
    model.unlink()
    model.symlink_to(folder_of("gpt2"))
    with pytest.raises(UserError, match="--any-bits goes on all the same"):
        run_batch(given, out, model, DRAWN, **OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.jsonl"], "Missing argument"),
        (["in.jsonl", "out.jsonl"], "No model is named"),
        (["in.jsonl", "out.jsonl", "--model", "m", "--api-key", "k"], "--api-key is for a server"),
        (["in.jsonl", "out.jsonl", "--server", "http://x", "--dtype", "int8"], "--dtype is the server's to decide"),
        (["in.jsonl", "out.jsonl", "--server", "http://x", "--tool-format", "json"], "--tool-format is the server's"),
        (["none.jsonl", "out.jsonl", "--model", "m"], "none.jsonl is no file"),
        (["in.jsonl", "in.jsonl", "--model", "m"], "which is read"),
        (["in.jsonl", ".", "--model", "m"], "which is read"),
        (["in.jsonl", "out.csv", "--model", "m"], "neither .jsonl nor .parquet"),
        (["in.jsonl", f"{'o' * 246}.jsonl", "--model", "m"], "258 bytes, and file systems take 255"),
        (["in.jsonl", f"{'ö' * 130}", "--model", "m"], "260 bytes"),
        (["in.jsonl", "out.parquet", "--model", "m"], "whose rows have no types"),
        (["in.jsonl", "out.jsonl", "--model", "m", "--prompt-column", "q"], "no column 'q'"),
        (["in.jsonl", "out.jsonl", "--model", "m", "--max-concurrency", "0"], "--max-concurrency is 0"),
        (["in.jsonl", "out.jsonl", "--model", "m", "--temp", "-1"], "temperature is -1"),
        (["in.jsonl", "out.jsonl", "--model", "no/such/model"], "no/such/model"),
    ],
)
def test_the_users_mistakes_end_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    write(tmp_path / "in.jsonl", questions(2))
    monkeypatch.chdir(tmp_path)
    result = run("batch", *arguments)
    assert result.code == 2 and message in result.sentence
    assert not (tmp_path / "out.jsonl").exists()


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'tinyserve\[parquet\]'"):
        run_batch(tmp_path / "in.parquet", tmp_path / "out", "m")


def test_parameters_that_a_row_has_no_place_for_are_refused(tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", questions(2))
    for params, name in ((SamplingParams(n=2), "n"), (SamplingParams(logprobs=3), "logprobs")):
        with pytest.raises(UserError, match=f"^{name} is"):
            run_batch(given, tmp_path / "out.jsonl", "m", params)
    with pytest.raises(UserError, match="Neither a model nor a server"):
        run_batch(given, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="dtype is the server's"):
        run_batch(given, tmp_path / "out.jsonl", server="http://x", dtype="int8")
    assert os.listdir(tmp_path) == ["in.jsonl"]  # noqa: PTH208


def test_a_changed_template_is_refused(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder_of("llama"), model)
    given = write(tmp_path / "in.jsonl", [{"prompt": "x" * 500}] * 25)
    with pytest.raises(UserError, match="all failed"):  # begun, and not ended
        run_batch(given, tmp_path / "out.jsonl", model, DRAWN, **OPTIONS)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "Say: " + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="--any-bits goes on all the same"):
        run_batch(given, tmp_path / "out.jsonl", model, DRAWN, **OPTIONS)


def test_a_mistaken_model_leaves_nothing_and_costs_nothing(tmp_path: Path, tiny: str) -> None:
    given = write(tmp_path / "in.jsonl", questions(3))
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="There is no"):
        run_batch(given, out, tmp_path / "typo", DRAWN, **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
    run_batch(given, out, tiny, DRAWN, **OPTIONS)
    answers = out.read_bytes()
    with pytest.raises(UserError, match="There is no"):
        run_batch(given, out, tmp_path / "typo", DRAWN, restart=True, **OPTIONS)
    assert out.read_bytes() == answers
    run_batch(given, out, tiny, SamplingParams(max_tokens=2, temperature=0), restart=True, **OPTIONS)
    assert out.read_bytes() != answers


def test_the_file_behind_a_link_is_written(tmp_path: Path, tiny: str) -> None:
    given = write(tmp_path / "in.jsonl", questions(2))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    run_batch(given, tmp_path / "link.jsonl", tiny, DRAWN, **OPTIONS)
    assert (tmp_path / "link.jsonl").is_symlink() and len(read(tmp_path / "real.jsonl")) == 2


def test_the_first_row_decides_nothing_alone(tmp_path: Path, tiny: str) -> None:
    given = write(tmp_path / "in.jsonl", [{"note": "no prompt"}, {"prompt": "a"}, {"prompt": "b"}])
    report = run_batch(given, tmp_path / "out.jsonl", tiny, DRAWN, **OPTIONS)
    assert (report.rows, report.failed) == (3, 1) and read(tmp_path / "out.jsonl")[0]["note"] == "no prompt"


def test_an_interrupted_notebook_cell_ends_at_once(tmp_path: Path) -> None:
    """KeyboardInterrupt while the work is done in a thread of its own."""
    never = threading.Event()
    code = """
import asyncio, sys
from tinyserve.batch import run_batch

async def cell():
    run_batch(sys.argv[1], sys.argv[2], server=sys.argv[3], on_progress=lambda now: print(now.rows, flush=True))

asyncio.new_event_loop().run_until_complete(cell())  # asyncio.run would take the signal for itself
"""
    given = write(tmp_path / "in.jsonl", questions(3))
    with OddServer(lambda number, body: (200, WHOLE) if never.wait(60) else None) as server, Children() as start:
        process = start(given, tmp_path / "out.jsonl", server.url, program=(sys.executable, "-c", code))
        assert process.stdout.readline() == b"0\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        never.set()
    assert process.returncode != 0 and b"KeyboardInterrupt" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": None}, "inputs is None"),
        ({"inputs": []}, r"inputs is \[\]"),
        ({"inputs": [3]}, r"inputs is \[3\]"),
        ({"output": None}, "output is None"),
        ({"output": ""}, "output is ''"),
        ({"sampling_params": {"max_tokens": 3}}, "must be a SamplingParams"),
        ({"max_concurrency": -1}, "max_concurrency is -1"),
        ({"max_concurrency": "3"}, "max_concurrency is '3'"),
        ({"workers": 0}, "workers is 0"),
        ({"workers": (4, 2)}, r"workers is \(4, 2\)"),
        ({"chat_template": "x" * 5000 + ".jinja"}, "."),
    ],
)
def test_odd_arguments_are_sentences(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given = write(tmp_path / "in.jsonl", questions(2))
    arguments = {"inputs": given, "output": tmp_path / "out.jsonl", "model": tmp_path / "none", **options}
    with pytest.raises(UserError, match=message):
        run_batch(**arguments)
