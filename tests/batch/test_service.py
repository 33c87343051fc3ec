"""OpenAI's files and batches, by OpenAI's own client."""

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from command_line import Children, run
from servers import Running, running

from tinyserve.batch.service import BatchService
from tinyserve.errors import TinyserveError, UserError
from tinyserve.server.guards import Admission

OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 4}
CHAT = "/v1/chat/completions"


def lines(count: int, max_tokens: int = 6, **fields: Any) -> bytes:
    def body(i: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": f"{i}"}], "max_tokens": max_tokens, "temperature": 0, **fields}

    rows = [{"custom_id": f"r{i}", "method": "POST", "url": CHAT, "body": body(i)} for i in range(count)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def serve(tmp_path: Path, folder_of: Callable[[str], Path]) -> Callable[..., Any]:
    """Starts a server of a tiny model over the same folder of batches."""

    def start(**options: Any) -> Any:
        service = BatchService(tmp_path / "batches", 3)
        return running({"tiny": folder_of("llama")}, app={"extension": service}, **(OPTIONS | options))

    return start


def client_of(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ended(client: openai.OpenAI, name: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while (batch := client.batches.retrieve(name)).status not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def create(client: openai.OpenAI, content: bytes, endpoint: Any = CHAT) -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"night": "1"}
    )


def rows_in(client: openai.OpenAI, name: str | None) -> list[dict[str, Any]]:
    assert name is not None
    return [json.loads(line) for line in client.files.content(name).text.split("\n")[:-1]]


def test_a_batch_from_upload_to_answers(serve: Callable[..., Any]) -> None:
    content = lines(9) + b'{"custom_id": "bad", "url": "/v1/embeddings", "body": {"input": "a"}}\nno JSON\n'
    with serve() as server:
        client = client_of(server)
        batch = create(client, content)
        assert (batch.status, batch.object, batch.metadata) == ("validating", "batch", {"night": "1"})
        assert batch.endpoint == CHAT and batch.completion_window == "24h"
        batch = ended(client, batch.id)
        assert batch.status == "completed" and batch.completed_at >= batch.in_progress_at >= batch.created_at
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (11, 9, 2)
        answered, failed = rows_in(client, batch.output_file_id), rows_in(client, batch.error_file_id)
        assert [row["custom_id"] for row in answered] == [f"r{i}" for i in range(9)]
        for i, row in enumerate(answered):
            body = json.loads(lines(9).splitlines()[i])["body"]
            alone = server.post(CHAT, body).json()
            assert row["response"]["body"]["choices"] == alone["choices"] and row["error"] is None
        assert [row["custom_id"] for row in failed] == ["bad", None]
        assert "the batch's endpoint '/v1/chat/completions'" in failed[0]["error"]["message"]
        file = client.files.retrieve(batch.output_file_id)
        assert file.purpose == "batch_output" and file.filename == f"{batch.id}_output.jsonl"
        assert file.bytes == len(client.files.content(file.id).content)
        assert server.state.pool.default.num_open == 0


def test_lists_come_in_pages(serve: Callable[..., Any]) -> None:
    with serve() as server:
        client = client_of(server)
        batches = [create(client, lines(1)) for _ in range(5)]
        assert [one.id for one in client.batches.list(limit=2)] == [
            one.id for one in client.batches.list()
        ]  # the client reads on
        page = client.batches.list(limit=2)
        assert len(page.data) == 2 and page.has_more
        for batch in batches:
            assert ended(client, batch.id).status == "completed"
        files = list(client.files.list())
        assert sum(file.purpose == "batch" for file in files) == 5
        assert {file.purpose for file in client.files.list(purpose="batch_output")} == {"batch_output"}
        assert client.files.delete(files[-1].id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(files[-1].id)


def test_a_cancelled_batch_keeps_what_is_answered(serve: Callable[..., Any]) -> None:
    with serve() as server:
        client = client_of(server)
        batch = create(client, lines(400, max_tokens=60))
        waiting = create(client, lines(2))
        while client.batches.retrieve(batch.id).request_counts.completed == 0:
            time.sleep(0.02)
        assert client.batches.cancel(batch.id).status == "cancelling"
        assert client.batches.cancel(waiting.id).status == "cancelling"
        batch = ended(client, batch.id)
        assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
        answered = rows_in(client, batch.output_file_id)
        assert 0 < len(answered) < 400
        assert ended(client, waiting.id).output_file_id is None
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)
        assert server.state.pool.default.num_open == 0


def test_cancels_at_every_moment_end_every_batch(serve: Callable[..., Any]) -> None:
    """Also while the files are made; and the next batch is answered as ever."""
    with serve() as server:
        client = client_of(server)
        batches = [create(client, lines(3, max_tokens=2)) for _ in range(12)]
        deadline = time.monotonic() + 120
        while any(client.batches.retrieve(one.id).status not in ("completed", "cancelled") for one in batches):
            assert time.monotonic() < deadline
            for one in batches[::2]:
                with suppress(openai.ConflictError):
                    client.batches.cancel(one.id)
        for one in batches[1::2]:
            batch = client.batches.retrieve(one.id)
            assert batch.status == "completed" and len(rows_in(client, batch.output_file_id)) == 3
        for one in batches[::2]:
            batch = client.batches.retrieve(one.id)
            found = rows_in(client, batch.output_file_id) if batch.output_file_id else []
            assert batch.request_counts.completed == len(found)
        assert ended(client, create(client, lines(2)).id).status == "completed"


def test_odd_files_in_the_folder_hide_nothing(serve: Callable[..., Any], tmp_path: Path) -> None:
    with serve() as server:
        client = client_of(server)
        batch = ended(client, create(client, lines(1)).id)
        for name, text in (("x.json", "{}"), (f"batch_{'0' * 32}.json", "{}"), (f"batch_{'1' * 32}.json", "[")):
            (tmp_path / "batches" / "batches" / name).write_text(text)
        assert [one.id for one in client.batches.list()] == [batch.id]
        (tmp_path / "batches" / "files" / f"{batch.output_file_id}.jsonl").unlink()
        with pytest.raises(openai.NotFoundError, match="is gone"):
            client.files.content(batch.output_file_id)
        assert ended(client, create(client, lines(1)).id).status == "completed"


def test_a_server_that_ends_goes_on_when_it_is_started_again(serve: Callable[..., Any]) -> None:
    content = lines(150, max_tokens=40, temperature=3.0)
    with serve() as server:
        whole = ended(client_of(server), create(client_of(server), content).id)
        expected = [row["response"]["body"]["choices"] for row in rows_in(client_of(server), whole.output_file_id)]
        batch = create(client_of(server), content)
        while client_of(server).batches.retrieve(batch.id).request_counts.completed == 0:
            time.sleep(0.02)
    with serve() as server:
        client = client_of(server)
        assert ended(client, batch.id).status == "completed"
        found = rows_in(client, client.batches.retrieve(batch.id).output_file_id)
    assert [row["custom_id"] for row in found] == [f"r{i}" for i in range(150)]
    assert [row["response"]["body"]["choices"] for row in found] == expected


def test_people_come_first(serve: Callable[..., Any]) -> None:
    """A batch leaves places free, and what waits of it stands behind."""
    with serve(max_queue=2) as server:
        client = client_of(server)
        batch = create(client, lines(3000, max_tokens=60))
        while client.batches.retrieve(batch.id).request_counts.completed == 0:
            time.sleep(0.02)
        for _ in range(5):
            response = server.post(CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3})
            assert response.status_code == 200
        assert client.batches.retrieve(batch.id).status == "in_progress"
        client.batches.cancel(batch.id)
        ended(client, batch.id)


def test_a_file_that_is_none_fails_its_batch(serve: Callable[..., Any]) -> None:
    with serve() as server:
        client = client_of(server)
        empty, twice = create(client, b"\n\n"), create(client, lines(1) * 2)
        for batch, message in ((empty, "no row"), (twice, "custom_id 'r0'")):
            batch = ended(client, batch.id)
            assert batch.status == "failed" and message in batch.errors.data[0].message
            assert batch.output_file_id is None
        assert ended(client, create(client, lines(1)).id).status == "completed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input_file_id": "file-none", "endpoint": CHAT, "completion_window": "24h"}, "id"),
        ({"input_file_id": "../../etc/passwd", "endpoint": CHAT, "completion_window": "24h"}, "id"),
        ({"endpoint": CHAT}, "input_file_id"),
        ({"input_file_id": "file-1", "endpoint": "/v1/responses"}, "endpoint"),
        ({"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-1", "endpoint": CHAT, "windows": "1h"}, "windows"),
        ({"input_file_id": "file-1", "endpoint": CHAT, "metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_bad_batches_name_the_field(server: Running, body: dict[str, Any], param: str) -> None:
    response = server.post("/v1/batches", body)
    assert response.status_code in (400, 404) and response.json()["error"]["param"] == param


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder_of: Callable[[str], Path]) -> Iterator[Running]:
    service = BatchService(tmp_path_factory.mktemp("batches"), 3)
    with running({"tiny": folder_of("llama")}, app={"extension": service}, **OPTIONS) as one:
        yield one


def test_bad_uploads(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def upload(**form: Any) -> httpx.Response:
        with server.client() as client:
            return client.post("/v1/files", **form)

    content = {"file": ("in.jsonl", io.BytesIO(b"{}"))}
    for form, status, word in (
        ({"files": content, "data": {"purpose": "fine-tune"}}, 400, "purpose"),
        ({"files": {"file": ("a", io.BytesIO(b"{}"))}}, 400, "purpose"),
        ({"data": {"purpose": "batch", "file": "text"}}, 400, "file"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "form"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=a"}}, 400, "form"),
        ({"json": {}}, 400, "file"),
    ):
        response = upload(**form)
        assert response.status_code == status and word in response.json()["error"]["message"], response.text
    large = b"x" * 17_000_000  # more than other bodies may have
    response = upload(files={"file": ("big.jsonl", large)}, data={"purpose": "batch"})
    assert response.status_code == 200 and response.json()["bytes"] == len(large)
    for path in ("/v1/files/file-0", "/v1/files/file-0/content", "/v1/batches/batch_0", "/v1/files/..%2f..%2fetc"):
        assert server.get(path).status_code == 404
    for limit in ("0", "9" * 5000, "-1", "101"):
        assert server.get(f"/v1/batches?limit={limit}").status_code == 400
    assert "There is no file 'file-0'" in server.get("/v1/files/file-0").text
    assert server.post("/v1/batches/batch_0/cancel", {}).status_code == 404


def test_a_key_is_asked_for_and_the_batch_has_it(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    service = BatchService(tmp_path, 3, api_key="secret")
    admission = Admission(api_keys=["secret"])
    with running({"tiny": folder_of("llama")}, app={"extension": service}, admission=admission, **OPTIONS) as server:
        assert server.get("/v1/files").status_code == 401
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        batch = ended(client, create(client, lines(3)).id)
        assert batch.status == "completed" and batch.request_counts.completed == 3


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    with (
        BatchService(tmp_path / "new", 1).held(),
        pytest.raises(UserError, match="is another server's"),
        BatchService(tmp_path / "new", 1).held(),
    ):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(TinyserveError, match="cannot be written"), BatchService(tmp_path / "file", 1).held():
        pass


def test_serve_keeps_batches_where_it_is_told(
    tmp_path: Path, folder_of: Callable[[str], Path], start: Children
) -> None:
    flags = ("--dtype", "float32", "--threads", "1", "--port", "0", "--batch-dir", tmp_path / "batches")
    process = start("serve", folder_of("llama"), *flags)
    line = process.stderr.readline().decode()
    while "http://" not in line:
        line = process.stderr.readline().decode()
        assert line, "the server ended"
    client = openai.OpenAI(base_url=f"{line.split()[0]}/v1", api_key="none", max_retries=0)
    assert ended(client, create(client, lines(3)).id).request_counts.completed == 3
    second = run("serve", folder_of("llama"), *flags)
    assert second.code == 2 and "is another server's" in second.sentence
    process.terminate()
    assert process.wait(60) == 0
