"""A job's folder: what it was begun with, the journals of its workers, its parts, and what comes of them at the end.

Every file that counts is written beside its place and renamed into it. Knows no model and no requests.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tinyserve.batch.rows import COLUMNS, Outcome
from tinyserve.batch.shards import JSONL, KINDS, PARQUET, Input, Shard
from tinyserve.errors import TinyserveError, UserError

MANIFEST, SUCCESS, JOURNALS, TEMPORARY, LOCK = "_job.json", "_SUCCESS", "_journal", "_tmp", "_lock"
FINGERPRINT = "_fingerprint"
PARTS_SUFFIX = ".parts"  # of the folder beside an output that is one file


@dataclass
class Counts:
    """What has come of some rows."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: "Counts") -> None:
        self.rows += other.rows
        self.failed += other.failed
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens

    @classmethod
    def of(cls, outcome: Outcome) -> "Counts":
        return cls(1, int(outcome.is_failure), outcome.prompt_tokens, outcome.output_tokens)


@dataclass
class BatchProgress:
    """How far a batch is: rows of `total`, of which `resumed` were answered before; tokens are of this run."""

    total: int
    rows: int = 0
    resumed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0

    def add(self, counts: Counts, is_old: bool) -> None:
        """Count rows in; `is_old` for those of an earlier run."""
        self.rows += counts.rows
        self.failed += counts.failed
        if not is_old:
            self.prompt_tokens += counts.prompt_tokens
            self.output_tokens += counts.output_tokens


OnProgress = Callable[[BatchProgress], None]


class Manifest(NamedTuple):
    """What a job is: a resumed one must be the same. `files` are the inputs, `settings` all that decides an answer."""

    files: list[dict[str, Any]]
    settings: dict[str, Any]


@dataclass
class Journal:
    """The finished rows of one shard, by one worker, a line each."""

    path: Path
    file: BinaryIO
    is_synced: bool = True

    def add(self, number: int, outcome: Outcome) -> None:
        """Write a row; it outlives this process at once, and the machine behind the next `sync`."""
        self.file.write(encoded([number, *outcome]))
        self.file.flush()
        self.is_synced = False

    def sync(self) -> None:
        if not self.is_synced and not self.file.closed:
            self.is_synced = True
            os.fsync(self.file.fileno())


@dataclass
class Job:
    """The folder of a job that writes `output`, a file or a folder. `merges`: parts have the input's fields, too."""

    output: Path
    input: Input
    merges: bool
    worker: str = field(default_factory=lambda: new_worker_name())

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

    def is_done(self, shard: Shard) -> bool:
        return self.part(shard).exists()

    def counts(self, shard: Shard) -> Counts:
        """Of a shard whose part is there."""
        return Counts(**json.loads(self._counts_file(shard).read_bytes()))

    def answered(self, shard: Shard) -> dict[int, Outcome]:
        """What any worker has written of a shard before: a line that was torn is as none."""
        found = dict[int, Outcome]()
        for path in sorted((self.folder / JOURNALS).glob(f"{shard.number}.*.jsonl")):
            found |= read_journal(path)
        return {number: one for number, one in found.items() if 0 <= number - shard.first < shard.num_rows}

    def count(self, known: dict[int, Counts] | None = None) -> Counts:
        """What all workers have done by now; `known` keeps the counts of shards whose parts are there."""
        total, known = Counts(), {} if known is None else known
        journals: dict[int, dict[int, Outcome]] = {}
        for shard in self.input.shards:
            if shard.number not in known and self.is_done(shard):
                known[shard.number] = self.counts(shard)
        for path in (self.folder / JOURNALS).glob("*.jsonl"):
            number = int(path.name.partition(".")[0])
            if number not in known:
                with suppress(FileNotFoundError):  # its shard was finished just now
                    journals.setdefault(number, {}).update(read_journal(path))
        for counts in known.values():
            total.add(counts)
        for outcomes in journals.values():
            for outcome in outcomes.values():
                total.add(Counts.of(outcome))
        return total

    def count_journals(self, shard: Shard, run: str) -> int:
        """How many workers of a run have begun a shard, which is not whole."""
        return len(list((self.folder / JOURNALS).glob(f"{shard.number}.{run}*.jsonl")))

    def outcomes(self) -> Iterator[Outcome]:
        """Of all rows that are answered, in their order, where parts have nothing of the input."""
        assert not self.merges and self.kind == JSONL
        for shard in self.input.shards:
            if self.is_done(shard):
                with self.part(shard).open("rb") as part:
                    for line in part:
                        fields = json.loads(line)
                        response = fields["response"]
                        yield Outcome(fields, response is None or response["status_code"] != 200)
            else:
                yield from (outcome for _, outcome in sorted(self.answered(shard).items()))

    def open_journal(self, shard: Shard) -> Journal:
        """A new journal for this worker's rows of a shard."""
        path = self.folder / JOURNALS / f"{shard.number}.{self.worker}.jsonl"
        with writing(self.folder):
            return Journal(path, path.open("ab"))

    def finish(self, shard: Shard, outcomes: Mapping[int, Outcome]) -> None:
        """Write a shard's part of the outcome of each of its rows, and remove its journals."""
        ordered = [outcomes[number] for number in range(shard.first, shard.first + shard.num_rows)]
        counts = Counts()
        for outcome in ordered:
            counts.add(Counts.of(outcome))
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
        rows = self.input.rows(shard) if self.merges else None
        with path.open("wb") as file:
            for outcome in outcomes:
                fields = {**next(rows).fields, **outcome.fields} if rows is not None else outcome.fields
                file.write(encoded(fields))

    # --- its end ------------------------------------------------------------------------------------------------------

    def read_counts(self) -> Counts:
        """Those of a job that is done."""
        return Counts(**json.loads((self.folder / SUCCESS).read_bytes()))

    def complete(self) -> Counts:
        """All parts are there: tell so, and make one file of them where the output is one. The whole job's counts."""
        total = Counts()
        for shard in self.input.shards:
            total.add(self.counts(shard))
        with writing(self.folder):
            if self.output != self.folder:
                with self._new_file(self.output) as path:
                    self._join(path)
            with self._new_file(self.folder / SUCCESS) as path:
                path.write_text(json.dumps(vars(total)), encoding="utf-8")
            if self.output != self.folder:
                shutil.rmtree(self.folder)
            else:
                for name in (JOURNALS, TEMPORARY):
                    shutil.rmtree(self.folder / name)
                (self.folder / LOCK).unlink(missing_ok=True)
        return total

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
        """A file to write, which is safe on the disk, and then in its place, where the block ends without an error."""
        path = self.folder / TEMPORARY / f"{place.name}.{self.worker}"
        yield path
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        path.replace(place)
        _sync_folder(place.parent)


def new_worker_name(run: str = "") -> str:
    """A name for a worker's journals that no other has, on any machine; `run` is a beginning that several share."""
    return f"{run}{os.getpid()}-{uuid.uuid4().hex[:8]}"


def folder_of(output: Path) -> Path:
    """The folder of the job that writes this output: itself, or beside a single file."""
    return output if output.suffix not in KINDS else output.with_name(output.name + PARTS_SUFFIX)


def read_journal(path: Path) -> dict[int, Outcome]:
    """The rows of a journal. What was torn is left out, wherever it is: its row is computed again."""
    found = dict[int, Outcome]()
    for line in path.read_bytes().split(b"\n")[:-1]:  # behind the last line feed is what was not written whole
        try:
            number, fields, is_failure, prompt_tokens, output_tokens = json.loads(line)
        except (ValueError, TypeError):
            continue
        if isinstance(number, int) and isinstance(fields, dict):
            found[number] = Outcome(fields, is_failure, prompt_tokens, output_tokens)
    return found


@contextmanager
def opened(output: Path, manifest: Manifest, *, restart: bool) -> Iterator[bool]:
    """Hold a job's folder, made or resumed, against all other drivers; whether there is anything left to do.

    Raises UserError for an output that is somebody else's, a job that was begun otherwise, and one that another process
    is at.
    """
    from filelock import FileLock, Timeout

    folder = folder_of(output)
    _refuse_foreign(output, folder, restart)
    with writing(output.parent if output != folder else folder):
        folder.mkdir(parents=True, exist_ok=True)
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
        if restart:
            _clear(output, folder)
        begun = _read_manifest(folder)
        if begun is not None:
            _compare(output, begun, manifest)
        is_done = (folder / SUCCESS).exists()
        if not is_done:
            with writing(folder):
                for name in (JOURNALS, TEMPORARY):
                    (folder / name).mkdir(exist_ok=True)
                for left in (folder / TEMPORARY).iterdir():
                    left.unlink()
            if begun is None:
                _write_manifest(folder, manifest)
        yield not is_done
        if is_done and output != folder:  # it ended between writing its output and removing this folder
            shutil.rmtree(folder)
    finally:
        lock.release()


def _refuse_foreign(output: Path, folder: Path, restart: bool) -> None:
    if output != folder:
        if output.is_dir():
            raise UserError(f"{output} is a folder, and its name that of a file: name another output.")
        if output.exists() and not folder.exists() and not restart:
            raise UserError(f"{output} exists: name another output, or say --restart to answer all anew.")
    elif folder.exists():
        if not folder.is_dir():
            raise UserError(f"{output} is a file, and neither .jsonl nor .parquet: name another output.")
        if any(folder.iterdir()) and not (folder / MANIFEST).exists() and not (folder / LOCK).exists():
            raise UserError(f"{output} is a folder with other files in it: name an empty or a new one.")


def _clear(output: Path, folder: Path) -> None:
    """Remove what the job has written, and nothing else."""
    for name in (JOURNALS, TEMPORARY):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (*folder.glob("part-*"), folder / SUCCESS, folder / MANIFEST, folder / FINGERPRINT):
        path.unlink(missing_ok=True)
    if output != folder:
        output.unlink(missing_ok=True)


def _read_manifest(folder: Path) -> Manifest | None:
    path = folder / MANIFEST
    try:
        return Manifest(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged, so that the job cannot go on: --restart begins it anew.") from None


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    path = folder / TEMPORARY / MANIFEST
    with writing(folder):
        with path.open("w", encoding="utf-8") as file:
            json.dump(manifest._asdict(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        path.replace(folder / MANIFEST)
        _sync_folder(folder)


def record_fingerprint(folder: Path, fingerprint: str, *, any_bits: bool) -> None:
    """Keep what bits a worker computes, if it is the first; raises UserError for others, unless they are allowed."""
    place = folder / FINGERPRINT
    with writing(folder):
        with (
            suppress(FileExistsError),
            place.open("x", encoding="utf-8") as file,
        ):  # of several workers one is the first
            file.write(fingerprint)
        known = place.read_text(encoding="utf-8")
        if not known:  # whoever made it has not written it yet, or never will
            place.write_text(fingerprint, encoding="utf-8")
            known = fingerprint
    if known != fingerprint and not any_bits:
        raise UserError(
            f"{folder} was begun by a machine or with weights whose answers may have other bits than here (fingerprint "
            f"{known}, here {fingerprint}): --any-bits goes on all the same, --restart begins anew."
        )


def _compare(output: Path, begun: Manifest, wanted: Manifest) -> None:
    """Raises UserError that names the first difference."""
    way_out = "give the same again, or --restart to answer all anew."
    before, now = ([file["path"] for file in one.files] for one in (begun, wanted))
    if before != now:
        raise UserError(f"{output} was begun with {_few(before)} as input, not {_few(now)}: {way_out}")
    for old, new in zip(begun.files, wanted.files, strict=True):
        if old != new:
            sizes = f"{old['size']} bytes then, {new['size']} now" if old["size"] != new["size"] else "as many bytes"
            raise UserError(
                f"{old['path']} has changed since {output} was begun ({sizes}): bring it back, or say --restart to "
                "answer all anew."
            )
    for name in {**begun.settings, **wanted.settings}:
        old_value, new_value = begun.settings.get(name), wanted.settings.get(name)
        if old_value != new_value:
            raise UserError(
                f"{output} was begun with {name} {json.dumps(old_value)}, and this is {json.dumps(new_value)}: "
                f"{way_out}"
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def encoded(value: Any) -> bytes:
    """A line of JSON. What only Parquet has is written as a text, such as a date, or as null, where it is no number."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), default=str)
    # Half a surrogate pair, which JSON can spell, is no UTF-8; and some readers end lines at these characters, too.
    if any(end in text for end in "\u0085\u2028\u2029") or not _is_unicode(text):
        text = json.dumps(_finite(value), separators=(",", ":"), default=str)
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive the machine, where the system knows how."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say in a sentence where something cannot be written, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        raise TinyserveError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}. What is answered is kept: make "
            "room, and run the same command again."
        ) from None
