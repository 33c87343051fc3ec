"""A job's input: every row once, in its order, however files, lines and row groups are cut."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve.batch.disk import encoded
from tinyserve.batch.shards import Input, find_files, read_input
from tinyserve.errors import UserError

pytestmark = pytest.mark.fast


def rows_of(given: Input) -> list[dict[str, Any]]:
    """The fields of all rows, through their shards."""
    rows = [row for shard in given.shards for row in given.rows(shard)]
    assert [row.number for row in rows] == list(range(given.num_rows))
    assert [row.error for row in rows] == [None] * len(rows)
    return [row.fields for row in rows]


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.lists(st.sampled_from(["", "x", "\u2028\x85 \r é", "long" * 50])), min_size=1, max_size=4),
    end=st.sampled_from(["\n", "\r\n", "\n\n \n"]),
    step=st.integers(1, 7),
    mark=st.booleans(),
    last=st.booleans(),
)
def test_every_line_is_a_row_once(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], end: str, step: int, mark: bool, last: bool
) -> None:
    folder, expected = tmp_path_factory.mktemp("in"), list[dict[str, Any]]()
    for i, texts in enumerate(files):
        rows = [{"prompt": text, "i": i, "j": j} for j, text in enumerate(texts)]
        expected += rows
        text = end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end * last
        (folder / f"{i}.jsonl").write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    if not expected:
        with pytest.raises(UserError, match="no row"):
            read_input([str(folder)])
        return
    read = read_input([str(folder)], rows_per_shard=step)
    assert rows_of(read) == expected
    assert [shard.num_rows for shard in read.shards[:-1]] == [step] * (len(read.shards) - 1)
    assert [shard.first for shard in read.shards] == list(range(0, len(expected), step))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    group=st.integers(1, 9),
    step=st.integers(1, 8),
)
def test_every_row_of_parquet_is_a_row_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group: int, step: int
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, first = tmp_path_factory.mktemp("in"), 0
    for i, size in enumerate(sizes):
        table = pa.table(
            {"prompt": [f"p{j}" for j in range(first, first + size)], "n": pa.array(range(size), pa.int32())}
        )
        pq.write_table(table, folder / f"{i}.parquet", row_group_size=group)
        first += size
    if first == 0:
        with pytest.raises(UserError, match="no row"):
            read_input([str(folder)])
        return
    read = read_input([str(folder / "*.parquet")], rows_per_shard=step)
    assert [fields["prompt"] for fields in rows_of(read)] == [f"p{j}" for j in range(first)]
    assert [read.table(shard).num_rows for shard in read.shards] == [shard.num_rows for shard in read.shards]


def test_a_thousand_rows_are_a_shard_and_more_where_there_are_very_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 2500)
    assert [shard.num_rows for shard in read_input([str(tmp_path)]).shards] == [1000, 1000, 500]
    monkeypatch.setattr("tinyserve.batch.shards.MOST_SHARDS", 2)
    read = read_input([str(tmp_path)])
    assert [shard.num_rows for shard in read.shards] == [2000, 500]
    assert len(rows_of(read)) == 2500


def test_files_have_the_digest_of_all_that_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    (before,) = read_input([str(path)]).files
    path.write_text('{"prompt": "a"}\n{"prompt": "B"}\n{"prompt": "c"}\n')  # as long, with the same ends
    (after,) = read_input([str(path)]).files
    assert before.size == after.size and before.digest != after.digest


def test_lines_that_are_no_objects_are_rows_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyserve.batch.shards.LONGEST_LINE", 400)
    lines = [
        '{"prompt": ',
        "[1]",
        "nul",
        '{"a": NaN}',
        json.dumps({"prompt": "x" * 900}),
        "[" * 150,
        '{"a": ' * 30 + "[" * 40 + "1" + "]" * 40 + "}" * 30,
        '{"prompt": "ok"}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    read = read_input([str(tmp_path)])
    rows = list(read.rows(read.shards[0]))
    assert [row.error is None for row in rows] == [False] * 7 + [True]
    assert rows[-1].fields == {"prompt": "ok"}
    assert all(row.error and len(row.error) < 300 for row in rows[:-1])


def test_a_line_of_blanks_without_end_is_no_row_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyserve.batch.shards.LONGEST_LINE", 100)
    lines = ['{"a": 1}', " " * 500 + '{"a": 2}', '{"a": 3}' + " " * 500 + "junk", '{"a": 4}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    read = read_input([str(tmp_path)])
    rows = list(read.rows(read.shards[0]))
    assert [row.fields for row in rows] == [{"a": 1}, {}, {}, {"a": 4}]
    assert all("more than" in (row.error or "") for row in rows[1:3])


def test_one_file_under_several_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    with suppress(OSError):  # on Windows a privilege
        (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert len(find_files(["a.jsonl", str(tmp_path / "a.jsonl"), "*.jsonl", "."])) == 1
    if hasattr(os, "mkfifo"):
        assert len(find_files(["a.jsonl", "b.jsonl"])) == 1
        os.mkfifo(tmp_path / "pipe.jsonl")
        with pytest.raises(UserError, match="no file that can be read twice"):
            find_files(["pipe.jsonl"])
    assert len(find_files(["."])) == 1


def test_columns_that_python_has_no_value_for(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "prompt": ["a", "b"],
            "zone": pa.array([0, 1], pa.timestamp("us", tz="Mars/Olympus")),
            "far": pa.array([0, 3_000_000], pa.date32()),
            "text": pa.array([b"ok", b"\xff"]).cast(pa.binary()).view(pa.string()),
            "map": pa.array([[("k", 1.5)], [("k", float("nan"))]], pa.map_(pa.string(), pa.float64())),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    read = read_input([str(tmp_path)])
    assert [row.fields for row in read.rows(read.shards[0], ["prompt"])] == [{"prompt": "a"}, {"prompt": "b"}]
    rows = [row.fields for row in read.rows(read.shards[0])]
    assert rows[1]["text"] == "\ufffd" and rows[0]["map"] == [("k", 1.5)] and str(rows[1]["far"]).startswith("10183-")
    for row in rows:
        json.loads(encoded(row))


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), tmp_path / "in.parquet")
    with pytest.raises(UserError, match="two columns 'a'"):
        read_input([str(tmp_path)])


def test_a_custom_id_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, ids: list[Any]) -> None:
        (tmp_path / name).write_text("".join(json.dumps({"custom_id": one, "body": {}}) + "\n" for one in ids))

    write("a.jsonl", ["a", "b", None, 3, 3])
    write("b.jsonl", ["c", "d", None])
    read_input([str(tmp_path)])
    monkeypatch.setattr("tinyserve.batch.shards._hash", lambda name: 7)  # all ids have one hash, and are not the same
    read_input([str(tmp_path)])
    monkeypatch.undo()
    (tmp_path / "b.jsonl").write_text('{"custom_id": "b"}\n')  # no line of OpenAI's: the column is its own
    read_input([str(tmp_path)])
    (tmp_path / "b.jsonl").write_text('{"custom_id": "c", "body": 0}\n{"custom\\u005fid": "b", "body": 0}\n')
    with pytest.raises(UserError, match=r"b\.jsonl: the custom_id 'b' is that of rows 2 and 7"):
        read_input([str(tmp_path)])


def test_files_are_found_and_refused(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.ndjson", "_job.jsonl", ".hidden.jsonl", "notes.txt"):
        (tmp_path / name).write_text("{}\n")
    assert [path.name for path in find_files([str(tmp_path)])] == ["a.ndjson", "b.jsonl"]
    assert [path.name for path in find_files([str(tmp_path / "b.jsonl"), str(tmp_path)])] == ["b.jsonl", "a.ndjson"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.parquet").write_text("no Parquet")
    for patterns, message in (
        (["nothing.jsonl"], "no file, no folder and no pattern"),
        ([tmp_path / "empty"], "without any"),
        ([tmp_path / "notes.txt"], "neither JSON lines"),
        ([tmp_path / "b.jsonl", tmp_path / "c.parquet"], "two kinds"),
    ):
        with pytest.raises(UserError, match=message):
            find_files([str(one) for one in patterns])
    with pytest.raises(UserError, match=r"c\.parquet cannot be read as Parquet"):
        read_input([str(tmp_path / "c.parquet")])
