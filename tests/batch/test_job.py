"""A job's folder: journals torn anywhere, jobs that differ, and outputs that are somebody else's."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinyserve.batch import disk
from tinyserve.batch.counts import Counts
from tinyserve.batch.disk import encoded
from tinyserve.batch.job import Job, clear, folder_of, remove
from tinyserve.batch.job import opened as opened_job
from tinyserve.batch.journal import read_journal
from tinyserve.batch.manifest import Manifest, record_fingerprint, write_manifest
from tinyserve.batch.rows import Outcome
from tinyserve.batch.shards import Input, read_input
from tinyserve.errors import TinyserveError, UserError

pytestmark = pytest.mark.fast

OUTCOMES = {i: Outcome({"answer": f"é\u2028{i}"}, False, 3, i) for i in range(5)}


@pytest.fixture
def given(tmp_path: Path) -> Input:
    """Five rows in shards of two."""
    (tmp_path / "in.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(5)))
    return read_input([str(tmp_path / "in.jsonl")], rows_per_shard=2)


@contextmanager
def opened(output: Path, wanted: Manifest, *, restart: bool) -> Iterator[bool]:
    """A job that is opened and, where it is not done, begun, as by a worker whose model is there."""
    with opened_job(output, wanted, restart=restart) as is_open:
        if restart:
            clear(folder_of(output))
            for name in ("_journal", "_tmp"):
                (folder_of(output) / name).mkdir()
        if is_open:
            write_manifest(folder_of(output), folder_of(output) / "_tmp", wanted)
        yield is_open


def manifest(given: Input, **settings: Any) -> Manifest:
    return Manifest([asdict(file) for file in given.files], {"dtype": "auto", **settings})


@pytest.mark.parametrize("name", ["out.jsonl", "out"])
def test_parts_become_the_output(tmp_path: Path, given: Input, name: str) -> None:
    output = tmp_path / name
    with opened(output, manifest(given), restart=False) as is_open:
        assert is_open
        job = Job(output, given, merges=True)
        for shard in given.shards:
            assert job.done(shard) is None
            job.finish(shard, OUTCOMES)
            counts = job.done(shard)
            assert counts is not None and counts.rows == shard.num_rows
        assert job.complete() == Counts(5, 0, 15, 10)
    files = [output] if output.is_file() else sorted(output.glob("part-*"))
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").split("\n")[:-1]]
    assert rows == [{"prompt": str(i), "answer": f"é\u2028{i}"} for i in range(5)]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["in.jsonl", name]
    if output.is_dir():
        assert {path.name for path in output.iterdir()} >= {"_SUCCESS", "_job.json"}
        assert not any((output / inner).exists() for inner in ("_journal", "_tmp", "_lock"))
        with opened(output, manifest(given), restart=False) as is_open:
            assert not is_open and Job(output, given, merges=True).read_counts().rows == 5


def test_a_journal_torn_at_any_byte_has_the_rows_before(tmp_path: Path, given: Input) -> None:
    output = tmp_path / "out"
    with opened(output, manifest(given), restart=False):
        job = Job(output, given, merges=True)
        journal = job.open_journal(given.shards[0])
        ends = [0]
        for i in (0, 1):
            journal.add(i, OUTCOMES[i])
            ends.append(journal.file.tell())
        journal.file.close()
        whole = journal.path.read_bytes()
        assert len(whole) == ends[-1]
        for cut in range(len(whole) + 1):
            journal.path.write_bytes(whole[:cut])
            expected = {i: OUTCOMES[i] for i in (0, 1) if ends[i + 1] <= cut}
            assert read_journal(journal.path) == expected
            assert job.answered(given.shards[0]) == expected
        for at in range(len(whole)):  # a byte that the disk has lost: another value at most, never an error
            journal.path.write_bytes(whole[:at] + b"\0" + whole[at + 1 :])
            assert set(read_journal(journal.path)) <= {0, 1}
        # Rows of other shards, and those that two workers have answered.
        journal.path.write_bytes(whole + encoded([4, *OUTCOMES[4]]))
        other = Job(output, given, merges=True, worker="other").open_journal(given.shards[0])
        other.add(1, OUTCOMES[1])
        other.file.close()
        assert job.answered(given.shards[0]) == {0: OUTCOMES[0], 1: OUTCOMES[1]}


def test_a_finished_shard_leaves_no_journals(tmp_path: Path, given: Input) -> None:
    output = tmp_path / "out"
    with opened(output, manifest(given), restart=False):
        job = Job(output, given, merges=True)
        for shard in given.shards[:2]:
            job.open_journal(shard).file.close()
        job.finish(given.shards[0], OUTCOMES)
        names = sorted(path.name for path in (output / "_journal").iterdir())
        assert names == ["0.counts.json", f"1.{job.worker}.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, 'was begun with dtype "auto", and this is "int8"'),
        ({"temperature": 0.5}, "was begun with temperature null, and this is 0.5"),
        ({"input": '{"prompt": "x"}\n'}, r"in\.jsonl has changed since .* \(75 bytes then, 16 now\)"),
        ({"input": '{"prompt": "7"}\n' * 5}, r"in\.jsonl has changed since .* \(as many bytes\)"),
        ({"name": "other.jsonl"}, r"was begun with .*in\.jsonl as input, not .*other\.jsonl"),
    ],
)
def test_a_job_that_differs_is_refused_by_name(
    tmp_path: Path, given: Input, change: dict[str, str], message: str
) -> None:
    output = tmp_path / "out"
    if change.get("input", "").count("\n") == 5:
        change = {"input": "".join(f'{{"prompt": "{i}"}}\n' for i in (0, 1, 3, 3, 4))}
    else:
        message = message.replace("75", str(given.files[0].size))
    with opened(output, manifest(given), restart=False):
        Job(output, given, merges=True).finish(given.shards[0], OUTCOMES)
    path = tmp_path / change.pop("name", "in.jsonl")
    path.write_text(change.pop("input", (tmp_path / "in.jsonl").read_text()), newline="\n")
    now = manifest(read_input([str(path)], rows_per_shard=2), **change)
    with pytest.raises(UserError, match=message), opened(output, now, restart=False):
        pass
    assert (output / "part-00000.jsonl").exists()
    with opened(output, now, restart=True) as is_open:
        assert is_open and not (output / "part-00000.jsonl").exists()
    with opened(output, now, restart=False):
        pass


def test_other_bits_are_refused_unless_allowed(tmp_path: Path, given: Input) -> None:
    output = tmp_path / "out"
    with opened(output, manifest(given), restart=False):
        record_fingerprint(output, "aa", any_bits=False)
    with opened(output, manifest(given), restart=False):
        record_fingerprint(output, "aa", any_bits=False)
        with pytest.raises(UserError, match="fingerprint aa, here bb"):
            record_fingerprint(output, "bb", any_bits=False)
        record_fingerprint(output, "bb", any_bits=True)


def test_two_drivers_at_one_output(tmp_path: Path, given: Input) -> None:
    with (
        opened(tmp_path / "out", manifest(given), restart=False),
        pytest.raises(UserError, match="Another process is writing"),
        opened(tmp_path / "out", manifest(given), restart=True),
    ):
        pass


def test_outputs_of_others_are_left_alone(tmp_path: Path, given: Input) -> None:
    (tmp_path / "out.jsonl").write_text("precious\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("precious")
    (tmp_path / "dir.jsonl").mkdir()
    (tmp_path / "file").write_text("precious")
    for name, message in (
        ("out.jsonl", "exists: name another"),
        ("folder", "other files in it"),
        ("dir.jsonl", "is a folder"),
        ("file", "is a file"),
    ):
        with pytest.raises(UserError, match=message), opened(tmp_path / name, manifest(given), restart=False):
            pass
    with pytest.raises(UserError), opened(tmp_path / "folder", manifest(given), restart=True):
        pass
    assert (tmp_path / "folder" / "thesis.txt").exists()
    with opened(tmp_path / "out.jsonl", manifest(given), restart=True):
        assert (tmp_path / "out.jsonl").read_text() == "precious\n"  # until there is another in its place
    (tmp_path / "new.jsonl.parts").mkdir()
    (tmp_path / "new.jsonl.parts" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="other files"), opened(tmp_path / "new.jsonl", manifest(given), restart=True):
        pass


def test_a_damaged_manifest_is_said(tmp_path: Path, given: Input) -> None:
    with opened(tmp_path / "out", manifest(given), restart=False):
        pass
    (tmp_path / "out" / "_job.json").write_text('{"files": [')
    with (
        pytest.raises(UserError, match=r"_job\.json is damaged"),
        opened(tmp_path / "out", manifest(given), restart=False),
    ):
        pass


def test_what_cannot_be_written_is_said_and_kept(tmp_path: Path, given: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with opened(output, manifest(given), restart=False):
        job = Job(output, given, merges=True)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tinyserve.batch.disk.os.fsync", full)
        with pytest.raises(TinyserveError, match=r"No space left on device\. What is answered is kept"):
            job.finish(given.shards[0], OUTCOMES)
        monkeypatch.undo()
        assert job.done(given.shards[0]) is None
    with opened(output, manifest(given), restart=False):
        assert list((output / "_tmp").iterdir()) == []
        job.finish(given.shards[0], OUTCOMES)


@pytest.mark.parametrize(("readings", "system"), [(2, "win32"), (9, "win32"), (1, "linux")])
def test_what_somebody_reads_is_replaced_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: int, system: str
) -> None:
    """On Windows, where a virus scanner is enough; not for ever, and elsewhere a refusal is one."""
    place, tries, rename = tmp_path / "place", list[Path](), Path.replace
    place.write_bytes(b"before")

    def refused(self: Path, target: Path) -> Path:
        tries.append(target)
        if len(tries) <= readings:
            raise PermissionError(13, "Access is denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    monkeypatch.setattr(disk, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(disk, "sys", SimpleNamespace(platform=system))
    fails = pytest.raises(PermissionError) if readings > len(disk.PAUSES) or system == "linux" else nullcontext()
    with fails, disk.new_file(place, tmp_path) as path:
        path.write_bytes(b"after")
    assert place.read_bytes() == (b"after" if (readings, system) == (2, "win32") else b"before")
    assert len(tries) == {2: 3, 9: 4, 1: 1}[readings]


def test_a_job_that_ended_before_its_folder_was_removed_is_done(tmp_path: Path, given: Input) -> None:
    output = tmp_path / "out.jsonl"
    with opened(output, manifest(given), restart=False):
        pass
    (folder_of(output) / "_SUCCESS").write_text(json.dumps({"counts": vars(Counts(5, 0, 15, 10)), "parts": {}}))
    output.write_text("whole\n")
    with opened(output, manifest(given), restart=False) as is_open:
        assert not is_open and Job(output, given, merges=True).read_counts() == Counts(5, 0, 15, 10)
    assert output.read_text() == "whole\n" and not folder_of(output).exists()


def test_lines_are_json_and_lines_to_everybody() -> None:
    from datetime import date

    value = {"a": "\u2028\x85é", "b": float("nan"), "c": [float("inf"), 1.5], "d": date(2026, 1, 2), "e": "\ud800"}
    line = encoded(value)
    assert line.endswith(b"\n") and len(line.decode().splitlines()) == 1
    assert json.loads(line) == {"a": "\u2028\x85é", "b": None, "c": [None, 1.5], "d": "2026-01-02", "e": "\ud800"}
    assert encoded({"a": "é"}) == '{"a":"é"}\n'.encode()


def test_a_job_killed_at_any_moment_of_its_removal_is_done(
    tmp_path: Path, given: Input, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each unlink, rename and rmdir in turn is the last thing that the process does."""
    output = tmp_path / "out.jsonl"

    class Killed(BaseException):
        pass

    for moment in range(60):
        for path in tmp_path.glob("out*"):
            remove(path) if path.is_dir() else path.unlink()
        left = moment

        def step(call: Any) -> Any:
            def stepped(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return call(*arguments, **options)

            return stepped

        ended = False
        try:
            with opened_job(output, manifest(given), restart=False):
                job = Job(output, given, merges=True)
                job.begin(manifest(given))
                for shard in given.shards:
                    job.finish(shard, OUTCOMES)
                with monkeypatch.context() as patch:
                    for name in ("unlink", "rename", "replace", "rmdir"):
                        patch.setattr(Path, name, step(getattr(Path, name)))
                    patch.setattr("os.unlink", step(os.unlink))
                    patch.setattr("os.rmdir", step(os.rmdir))
                    try:
                        job.complete()
                        ended = True
                    finally:
                        left = 10**9  # what a process that was killed would not do any more is harmless
        except Killed:
            pass
        existed = output.exists()
        if ended:
            break
        if existed and not folder_of(output).exists():
            continue
        with opened_job(output, manifest(given), restart=False) as is_open:
            if is_open:
                counts = Job(output, given, merges=True).complete()
            else:
                counts = Job(output, given, merges=True).read_counts()
            assert counts == Counts(5, 0, 15, 10), moment
        assert len(output.read_text().split("\n")) == 6
    assert ended and moment > 8


def test_lost_counts_and_parts_are_answered_again_and_a_finished_folder_says_what_is_gone(
    tmp_path: Path, given: Input
) -> None:
    output = tmp_path / "out"
    with opened(output, manifest(given), restart=False):
        job = Job(output, given, merges=True)
        for shard in given.shards:
            job.finish(shard, OUTCOMES)
        for damage in ("", "{}x", '{"rows": 1, "odd": 2}', "[]"):
            (output / "_journal" / "0.counts.json").write_text(damage)
            assert job.done(given.shards[0]) is None
        job.finish(given.shards[0], OUTCOMES)
        (output / "part-00001.jsonl").unlink()
        assert job.done(given.shards[1]) is None
        with pytest.raises(TinyserveError, match=r"part-00001\.jsonl is gone: run the same command again"):
            job.complete()
        job.finish(given.shards[1], OUTCOMES)
        for name in (".nfs01.jsonl", "x.jsonl", "x.y.jsonl"):
            (output / "_journal" / name).write_text("[]\n")
        assert job.count() == Counts(5, 0, 15, 10)
        job.complete()
    (output / "part-00001.jsonl").write_text("")
    with (
        opened(output, manifest(given), restart=False),
        pytest.raises(UserError, match="is not as it was when the job"),
    ):
        Job(output, given, merges=True).read_counts()
    (output / "_SUCCESS").write_text("")
    with opened(output, manifest(given), restart=False), pytest.raises(UserError, match="_SUCCESS is damaged"):
        Job(output, given, merges=True).read_counts()


@pytest.mark.parametrize("change", ["shorter", "other", "gone"])
def test_input_that_changes_on_the_way_is_said(tmp_path: Path, given: Input, change: str) -> None:
    output, path = tmp_path / "out", tmp_path / "in.jsonl"
    with opened(output, manifest(given), restart=False):
        job = Job(output, given, merges=True)
        if change == "gone":
            path.unlink()
        else:
            path.write_text(path.read_text()[:20] if change == "shorter" else path.read_text().replace("0", "9"))
        with pytest.raises(UserError, match=r"in\.jsonl has changed while its rows were answered"):
            job.finish(given.shards[0], OUTCOMES)
        assert job.done(given.shards[0]) is None


def test_what_was_never_begun_leaves_nothing(tmp_path: Path, given: Input) -> None:
    for name in ("out", "out.jsonl"):
        with opened_job(tmp_path / name, manifest(given), restart=False):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_settings_are_compared_as_json_has_them(tmp_path: Path, given: Input) -> None:
    with opened(tmp_path / "out", manifest(given, logit_bias={5: 1.0}, seed=float("nan")), restart=False):
        pass
    with opened(tmp_path / "out", manifest(given, logit_bias={5: 1.0}, seed=float("nan")), restart=False) as is_open:
        assert is_open


@pytest.mark.parametrize("text", ['{"files": [5], "settings": {}}', '{"files": [], "settings": 3}', "[]", "[" * 9999])
def test_odd_manifests_are_damage(tmp_path: Path, given: Input, text: str) -> None:
    with opened(tmp_path / "out", manifest(given), restart=False):
        pass
    (tmp_path / "out" / "_job.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"), opened(tmp_path / "out", manifest(given), restart=False):
        pass
