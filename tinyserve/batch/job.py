"""A job's folder: the journals of its workers, its parts, and what is made of them at the end.

Every file that counts is written beside its place and renamed into it. Knows no model and no requests.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyserve.batch.counts import Counts
from tinyserve.batch.disk import encoded, new_file, writing
from tinyserve.batch.journal import Journal, new_worker_name, read_journal
from tinyserve.batch.manifest import FINGERPRINT, MANIFEST, Manifest, compare, damaged, read_manifest, write_manifest
from tinyserve.batch.rows import COLUMNS, Outcome
from tinyserve.batch.shards import JSONL, KINDS, PARQUET, Input, Shard, as_rows
from tinyserve.errors import TinyserveError, UserError

SUCCESS, JOURNALS, TEMPORARY, LOCK = "_SUCCESS", "_journal", "_tmp", "_lock"
PARTS_SUFFIX = ".parts"  # of the folder beside an output that is one file


@dataclass(frozen=True)
class Job:
    """The folder of a job that writes `output`, a file or a folder. `merges`: parts have the input's fields, too."""

    output: Path
    input: Input
    merges: bool
    worker: str = field(default_factory=new_worker_name)

    @property
    def folder(self) -> Path:
        return folder_of(self.output)

    @property
    def kind(self) -> str:
        """What its parts are."""
        return KINDS.get(self.output.suffix, self.input.kind)

    def part(self, shard: Shard) -> Path:
        return self.folder / f"part-{shard.number:05d}.{self.kind}"

    def _counts_file(self, shard: Shard) -> Path:
        return self.folder / JOURNALS / f"{shard.number}.counts.json"

    # --- while it runs ------------------------------------------------------------------------------------------------

    def begin(self, manifest: Manifest) -> None:
        """Keep what it is, if it is begun now."""
        write_manifest(self.folder, self.folder / TEMPORARY, manifest)

    def done(self, shard: Shard) -> Counts | None:
        """The counts of a shard whose part is there; None for one that is still to be answered."""
        try:
            if self.part(shard).exists():
                return Counts(**json.loads(self._counts_file(shard).read_bytes()))
        except (OSError, ValueError, TypeError):  # lost: its rows are answered again
            pass
        return None

    def answered(self, shard: Shard) -> dict[int, Outcome]:
        """What any worker has written of a shard before: a line that was torn is as none."""
        found = dict[int, Outcome]()
        for path in sorted((self.folder / JOURNALS).glob(f"{shard.number}.*.jsonl")):
            with suppress(FileNotFoundError):  # another worker has finished it just now
                found |= read_journal(path)
        return {number: one for number, one in found.items() if 0 <= number - shard.first < shard.num_rows}

    def count(self, known: dict[int, Counts] | None = None) -> Counts:
        """What all workers have done by now; `known` keeps the counts of shards whose parts are there."""
        total, known = Counts(), {} if known is None else known
        begun = {
            int(path.name.partition(".")[0])
            for path in (self.folder / JOURNALS).glob("*.jsonl")
            if re.fullmatch(r"\d+\..+\.jsonl", path.name)
        }
        for shard in self.input.shards:
            counts = known.get(shard.number) or self.done(shard)
            if counts is not None:
                known[shard.number] = counts
                total.add(counts)
            elif shard.number in begun:
                for outcome in self.answered(shard).values():
                    total.add(Counts.of(outcome))
        return total

    def count_journals(self, shard: Shard, run: str) -> int:
        """How many workers of a run have begun a shard, which is not whole."""
        return len(list((self.folder / JOURNALS).glob(f"{shard.number}.{run}*.jsonl")))

    def open_journal(self, shard: Shard) -> Journal:
        """A new journal for this worker's rows of a shard."""
        path = self.folder / JOURNALS / f"{shard.number}.{self.worker}.jsonl"
        with writing(self.folder):
            return Journal(path, path.open("ab"))

    def finish(self, shard: Shard, outcomes: Mapping[int, Outcome]) -> None:
        """Write a shard's part of the outcome of each of its rows, and remove its journals.

        Raises UserError where the input has changed since it was read.
        """
        ordered = [outcomes[number] for number in range(shard.first, shard.first + shard.num_rows)]
        counts = Counts()
        for outcome in ordered:
            counts.add(Counts.of(outcome))
        if self.merges:
            self.input.check_unchanged()
        with writing(self.folder):
            with self._new_file(self._counts_file(shard)) as path:
                path.write_text(json.dumps(vars(counts)), encoding="utf-8")
            with self._new_file(self.part(shard)) as path:
                self._write_part(path, shard, ordered)
            for journal in (self.folder / JOURNALS).glob(f"{shard.number}.*.jsonl"):
                journal.unlink(missing_ok=True)

    def forget_journals_of_this_worker(self) -> None:
        """Remove what this worker has written beside parts: all of it has failed, which another try may not."""
        for journal in (self.folder / JOURNALS).glob(f"*.{self.worker}.jsonl"):
            journal.unlink(missing_ok=True)

    def outcomes(self) -> Iterator[Outcome]:
        """Of all rows that are answered, in their order, where parts have nothing of the input."""
        assert not self.merges and self.kind == JSONL
        for shard in self.input.shards:
            if self.done(shard) is not None:
                with self.part(shard).open("rb") as part:
                    for line in part:
                        fields = json.loads(line)
                        response = fields["response"]
                        yield Outcome(fields, response is None or response["status_code"] != 200)
            else:
                yield from (outcome for _, outcome in sorted(self.answered(shard).items()))

    def _write_part(self, path: Path, shard: Shard, outcomes: list[Outcome]) -> None:
        if self.kind == PARQUET:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = self.input.table(shard)
            for name, kind in COLUMNS.items():
                values = pa.array([outcome.fields[name] for outcome in outcomes], getattr(pa, kind)())
                table = table.append_column(name, values)
            pq.write_table(table, path)
            return
        own: Iterator[dict[str, Any]] = (row.fields for row in self.input.rows(shard))
        if self.merges and self.input.kind == PARQUET:
            own = iter(as_rows(self.input.table(shard)))
        with path.open("wb") as file:
            for outcome in outcomes:
                file.write(encoded({**next(own), **outcome.fields} if self.merges else outcome.fields))

    # --- its end ------------------------------------------------------------------------------------------------------

    def complete(self) -> Counts:
        """All parts are there: tell so, and make one file of them where the output is one. The whole job's counts."""
        total, sizes = Counts(), dict[str, int]()
        for shard in self.input.shards:
            counts = self.done(shard)
            if counts is None:
                raise TinyserveError(f"{self.part(shard)} is gone: run the same command again, which makes it anew.")
            total.add(counts)
            sizes[self.part(shard).name] = self.part(shard).stat().st_size
        with writing(self.folder):
            if self.output != self.folder:
                with self._new_file(self.output) as path:
                    self._join(path)
            with self._new_file(self.folder / SUCCESS) as path:
                parts = sizes if self.output == self.folder else {}
                path.write_text(json.dumps({"counts": vars(total), "parts": parts}, indent=1), encoding="utf-8")
            if self.output != self.folder:
                remove(self.folder)
            else:
                for name in (JOURNALS, TEMPORARY):
                    shutil.rmtree(self.folder / name)
                _remove_lock(self.folder)
        return total

    def read_counts(self) -> Counts:
        """Those of a job that is done. Raises UserError for parts that are not as they were."""
        path = self.folder / SUCCESS
        try:
            told = json.loads(path.read_bytes())
            counts, parts = Counts(**told["counts"]), dict(told["parts"])
        except (OSError, ValueError, TypeError, KeyError):
            raise damaged(path) from None
        for name, size in parts.items():
            part = self.folder / name
            if not part.exists() or part.stat().st_size != size:
                raise UserError(f"{part} is not as it was when the job ended: --restart answers all anew.")
        return counts

    def _join(self, path: Path) -> None:
        if self.kind == JSONL:
            with path.open("wb") as file:
                for shard in self.input.shards:
                    with self.part(shard).open("rb") as part:
                        shutil.copyfileobj(part, file, 1 << 20)
            return
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, pq.read_schema(self.part(self.input.shards[0]))) as writer:
            for shard in self.input.shards:
                writer.write_table(pq.read_table(self.part(shard)))

    @contextmanager
    def _new_file(self, place: Path) -> Iterator[Path]:
        with new_file(place, self.folder / TEMPORARY) as path:
            yield path


def folder_of(output: Path) -> Path:
    """The folder of the job that writes this output: itself, or beside a single file."""
    return output if output.suffix not in KINDS else output.with_name(output.name + PARTS_SUFFIX)


@contextmanager
def opened(output: Path, manifest: Manifest, *, restart: bool) -> Iterator[bool]:
    """Hold a job's folder against all other drivers; whether there is anything left to do.

    Raises UserError for an output that is somebody else's, a job that was begun otherwise unless it is to `restart`,
    and one that another process is at.
    """
    from filelock import FileLock, Timeout

    folder = folder_of(output)
    _refuse_foreign(output, folder, restart)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_dev != output.absolute().parent.stat().st_dev and folder != output:
        raise UserError(f"{folder} is on another disk than {output}, so that it cannot be renamed: remove the link.")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process is writing {output}: wait for it, or name another output.") from None
    except OSError as error:
        raise TinyserveError(f"{folder} cannot be written: {error.strerror or error}.") from None
    try:
        if not (folder / LOCK).exists():  # a driver that has just ended has removed it
            raise UserError(f"Another process has just written {output}: look whether anything is left to do.")
        is_done = (folder / SUCCESS).exists() and not restart
        begun = None if restart else read_manifest(folder)
        if begun is not None:
            compare(output, begun, manifest)
        if not is_done:
            with writing(folder):
                for name in (JOURNALS, TEMPORARY):
                    (folder / name).mkdir(exist_ok=True)
                for left in (folder / TEMPORARY).iterdir():
                    left.unlink()
        yield not is_done
        if is_done and output != folder:  # it ended between writing its output and removing this folder
            remove(folder)
    finally:
        lock.release()
        if not (folder / MANIFEST).exists() and not (folder / SUCCESS).exists():
            remove(folder)  # nothing was begun


def _refuse_foreign(output: Path, folder: Path, restart: bool) -> None:
    is_ours = any((folder / name).exists() for name in (MANIFEST, SUCCESS, JOURNALS))
    if output != folder:
        if output.is_dir():
            raise UserError(f"{output} is a folder, and its name that of a file: name another output.")
        if output.exists() and not is_ours and not restart:
            raise UserError(f"{output} exists: name another output, or say --restart to answer all anew.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and neither .jsonl nor .parquet: name another output.")
    if folder.exists() and not is_ours and any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(f"{folder} is a folder with other files in it: name another output.")


def clear(folder: Path) -> None:
    """Remove what an earlier job has written into its folder, and nothing else; at the end what says that it is one."""
    for path in folder.glob("part-*"):
        path.unlink(missing_ok=True)
    for name in (JOURNALS, TEMPORARY):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (FINGERPRINT, MANIFEST, SUCCESS):
        (folder / name).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """The same, and the folder, unless others have put something into it."""
    clear(folder)
    _remove_lock(folder)
    with suppress(OSError):
        folder.rmdir()


def _remove_lock(folder: Path) -> None:
    with suppress(PermissionError):  # on Windows, of a file that is open: who holds the lock removes it as it lets go
        (folder / LOCK).unlink(missing_ok=True)
