"""A job's input: files of JSON lines or Parquet, cut into numbered shards of rows.

Knows files, rows and ints; what a row asks for is read by rows.py.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob  # Path's takes no absolute pattern
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from tinyserve.errors import UserError
from tinyserve.progress import Progress, silent

if TYPE_CHECKING:
    from pyarrow import Table

JSONL, PARQUET = "jsonl", "parquet"
KINDS = {".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET}
ROWS = 1000  # in a shard
MOST_SHARDS = 20_000  # beyond, shards have more rows
LONGEST_LINE = 64 << 20  # bytes: four times the largest body that a server takes
MAX_DEPTH = 64  # of objects and lists in each other, as in a checkpoint's files
_TOO_LONG = b"\0"  # in the place of a line that is longer
_READ = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class InputFile:
    """One file as it was found: what a resumed job compares."""

    path: str
    size: int  # bytes
    digest: str  # of all that is in it
    num_rows: int


@dataclass(frozen=True)
class Shard:
    """Rows `first` to `first + num_rows` of the input; they begin at `start` of a file and may go on in the next ones.

    `start` is in bytes for JSON lines, in rows for Parquet.
    """

    number: int
    first: int
    num_rows: int
    file: int
    start: int


@dataclass(frozen=True)
class Row:
    """A row and its number in the input; `error` says why it has no fields."""

    number: int
    fields: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class Input:
    """All rows of a job, which are read shard by shard."""

    kind: str
    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]
    times: tuple[int, ...]  # when each file was last written, in ns: it must stay so

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    def rows(self, shard: Shard, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """A shard's rows, one at a time; of Parquet these columns."""
        if self.kind == PARQUET:
            numbered = enumerate(as_rows(self.table(shard, columns)), shard.first)
            yield from (Row(number, fields) for number, fields in numbered)
            return
        lines = (line for at in range(shard.file, len(self.files)) for line in self._lines(shard, at))
        for number, line in enumerate(islice(lines, shard.num_rows), shard.first):
            yield _row(number, line)

    def _lines(self, shard: Shard, at: int) -> Iterator[bytes]:
        with Path(self.files[at].path).open("rb") as file:
            file.seek(shard.start if at == shard.file else 0)
            yield from (line for _, line in _lines_of(file, file.tell()))

    def check_unchanged(self) -> None:
        """Raise UserError where a file is not as it was when it was read."""
        for file, time in zip(self.files, self.times, strict=True):
            try:
                found = Path(file.path).stat()
                is_same = (found.st_size, found.st_mtime_ns) == (file.size, time)
            except OSError:
                is_same = False
            if not is_same:
                raise UserError(
                    f"{file.path} has changed while its rows were answered: bring it back and run the same command "
                    "again, or say --restart to answer all anew."
                )

    def table(self, shard: Shard, columns: Sequence[str] | None = None) -> "Table":
        """A shard of Parquet as it lies in the files: these columns, or all, with their types.

        Raises UserError for a file that is damaged.
        """
        import pyarrow as pa

        try:
            return self._table(shard, columns)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.files[shard.file].path} cannot be read: {str(error).splitlines()[0]}") from None

    def _table(self, shard: Shard, columns: Sequence[str] | None) -> "Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts, missing, start = list[Any](), shard.num_rows, shard.start
        for file in self.files[shard.file :]:
            if missing == 0:
                break
            with pq.ParquetFile(file.path) as parquet:
                first = 0
                for group in range(parquet.num_row_groups):
                    rows = parquet.metadata.row_group(group).num_rows
                    if first + rows > start and missing:
                        part = parquet.read_row_group(group, columns).slice(max(0, start - first), missing)
                        parts.append(part)
                        missing -= part.num_rows
                    first += rows
            start = 0
        return pa.concat_tables(parts)


def as_rows(table: "Table") -> list[dict[str, Any]]:
    """The rows of a table. A value that Python has no type for is a text, one that is no UTF-8 has marks in it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def values(column: Any) -> list[Any]:
        try:
            return list(column.to_pylist())
        except UnicodeDecodeError:
            raw = column.cast(pa.binary()).to_pylist()
            return [None if one is None else one.decode(errors="replace") for one in raw]
        except (pa.ArrowException, ValueError, OverflowError, LookupError):  # a year or a time zone that Python lacks
            if pa.types.is_timestamp(column.type):
                column = column.cast(pa.timestamp(column.type.unit))
            try:
                return list(pc.cast(column, pa.string()).to_pylist())
            except pa.ArrowException as error:
                what = f"A column of type {column.type}"
                raise UserError(f"{what} cannot be read: {str(error).splitlines()[0].rstrip('.')}.") from None

    columns = [values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files behind paths, folders and patterns, each once, in order.

    Raises UserError where there is none, where they are of two kinds, and for a kind that is not read.
    """
    found = dict[Path, Path]()  # under whatever names
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = sorted(
                one for one in path.iterdir() if one.suffix in KINDS and one.name[0] not in "._" and one.is_file()
            )
            if not inside:
                raise UserError(f"{path} is a folder without any .jsonl or .parquet file: name the files.")
        elif path.exists():
            if not path.is_file():  # to open a pipe is to wait for somebody to write
                raise UserError(f"{path} is no file that can be read twice: write it to one first.")
            inside = [path]
        else:
            inside = sorted(Path(one) for one in glob(pattern, recursive=True))  # noqa: PTH207
            if not inside:
                raise UserError(f"{pattern} is no file, no folder and no pattern that any file matches.")
        found |= {one.resolve(): one for one in inside if one.resolve() not in found}
    files = list(found.values())
    for file in files:
        if file.suffix not in KINDS:
            raise UserError(
                f"{file} is neither JSON lines (.jsonl, .ndjson) nor Parquet (.parquet): rename or convert it."
            )
        if KINDS[file.suffix] != KINDS[files[0].suffix]:
            raise UserError(f"{files[0]} and {file} are of two kinds: a job reads JSON lines or Parquet.")
    return files


def read_input(patterns: Sequence[str], progress: Progress = silent, rows_per_shard: int | None = None) -> Input:
    """Look through all files once: where each shard begins, and that no `custom_id` comes twice.

    Raises UserError for files that cannot be read, have no rows, or have an id twice.
    """
    files = find_files(patterns)
    kind = KINDS[files[0].suffix]
    if kind == PARQUET:
        require_parquet(f"{files[0]} is Parquet, which")
    try:
        return _read_parquet(files, rows_per_shard) if kind == PARQUET else _read_jsonl(files, progress, rows_per_shard)
    except OSError as error:
        raise UserError(f"{error.filename or files[0]} cannot be read: {error.strerror or error}.") from None


def require_parquet(what: str) -> None:
    """Raise UserError where pyarrow is missing; `what` is the sentence's subject."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f"{what} needs the extra parquet: pip install 'tinyserve[parquet]'.") from None


def _read_jsonl(files: Sequence[Path], progress: Progress, rows_per_shard: int | None) -> Input:
    total, read = sum(file.stat().st_size for file in files), 0
    times = tuple(file.stat().st_mtime_ns for file in files)
    starts, found, ids = list[tuple[int, int]](), list[InputFile](), _Ids(files)
    step = rows_per_shard or ROWS
    row = 0
    for at, path in enumerate(files):
        digest, first = hashlib.blake2b(digest_size=16), row
        with path.open("rb") as file:
            for start, line in _lines_of(file, 0, digest):
                if row % step == 0:
                    starts.append((at, start))
                    progress("read the input", read + start, total)
                if b"custom_id" in line or b"\\u" in line:
                    ids.add(row, line)
                row += 1
            size = file.tell()
        read += size
        found.append(InputFile(str(path), size, digest.hexdigest(), row - first))
    progress("read the input", total, total)
    _check_rows(files, row)
    ids.check()
    merged = 1 if rows_per_shard else _times(row)  # several of the small shards are one
    numbered = enumerate(starts[::merged])
    step *= merged
    shards = (Shard(k, k * step, min(step, row - k * step), *place) for k, place in numbered)
    return Input(JSONL, tuple(found), tuple(shards), times)


def _read_parquet(files: Sequence[Path], rows_per_shard: int | None) -> Input:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found, schema, times = list[InputFile](), None, tuple(file.stat().st_mtime_ns for file in files)
    for path in files:
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while piece := file.read(_READ):
                digest.update(piece)
            size = file.tell()
        try:
            with pq.ParquetFile(path) as parquet:
                own, rows = parquet.schema_arrow.remove_metadata(), parquet.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0].rstrip('.')}.") from None
        if twice := next((name for name in own.names if own.names.count(name) > 1), None):
            raise UserError(f"{path} has two columns {twice!r}: rename one of them.")
        if rows and schema is not None and own != schema:
            raise UserError(f"{path} has other columns than files before it: answer them in jobs of their own.")
        schema = own if rows else schema  # columns without a row may have no type
        found.append(InputFile(str(path), size, digest.hexdigest(), rows))
    total = sum(file.num_rows for file in found)
    _check_rows(files, total)
    step = rows_per_shard or ROWS * _times(total)
    shards, at, before = list[Shard](), 0, 0
    for number, first in enumerate(range(0, total, step)):
        while first >= before + found[at].num_rows:
            before += found[at].num_rows
            at += 1
        shards.append(Shard(number, first, min(step, total - first), at, first - before))
    return Input(PARQUET, tuple(found), tuple(shards), times)


def _times(rows: int) -> int:
    """How many times ROWS a shard has, so that there are not too many."""
    return max(1, -(-rows // (ROWS * MOST_SHARDS)))


def _check_rows(files: Sequence[Path], rows: int) -> None:
    if rows == 0:
        raise UserError(f"{files[0]}{' and the other files have' if len(files) > 1 else ' has'} no row to answer.")


def _lines_of(file: BinaryIO, start: int, digest: "hashlib.blake2b | None" = None) -> Iterator[tuple[int, bytes]]:
    """Where each line that is not blank begins, and the line; a line ends with a line feed, and nothing else.

    `digest` takes all bytes. In the place of a line that is longer than LONGEST_LINE comes _TOO_LONG.
    """
    while line := file.readline(LONGEST_LINE):
        end = start + len(line)
        if digest is not None:
            digest.update(line)
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            line = _TOO_LONG
            while rest := file.readline(LONGEST_LINE):
                end += len(rest)
                if digest is not None:
                    digest.update(rest)
                if rest.endswith(b"\n"):
                    break
        if start == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield start, line
        start = end


def _row(number: int, line: bytes) -> Row:
    if line == _TOO_LONG:
        return Row(number, {}, f"The line has more than {LONGEST_LINE >> 20} MB.")
    try:
        fields = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"The line is no JSON: {error}.")
    if not isinstance(fields, dict):
        return Row(number, {}, f"The line is {line.decode(errors='replace').strip()!r:.60}; it must be a JSON object.")
    if is_deeper(fields, MAX_DEPTH):
        return Row(number, {}, f"The line has objects and lists in each other, more than {MAX_DEPTH} deep.")
    return Row(number, fields)


def is_deeper(value: Any, depth: int) -> bool:
    """Whether more objects and lists are in each other: what reads or writes them later calls itself for each."""
    level = [value]
    for _ in range(depth + 1):
        level = [one for parent in level for one in (parent.values() if isinstance(parent, dict) else parent)
                 if isinstance(one, dict | list)]  # fmt: skip
        if not level:
            return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"it has {name}, which JSON does not")


class _Ids:
    """The custom_ids of a job, eight bytes each; whether one comes twice."""

    def __init__(self, files: Sequence[Path]):
        self._files = files
        self._rows, self._hashes = array("q"), array("Q")

    def add(self, row: int, line: bytes) -> None:
        fields = _row(row, line).fields
        name = fields.get("custom_id")
        if isinstance(name, str) and "body" in fields:  # of OpenAI's lines: others have columns of their own
            self._rows.append(row)
            self._hashes.append(_hash(name))

    def check(self) -> None:
        """Raises UserError for an id that two rows have."""
        hashes = np.frombuffer(self._hashes, np.uint64) if self._hashes else np.empty(0, np.uint64)
        ordered = np.sort(hashes)
        twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if not twice:
            return
        rows = np.frombuffer(self._rows, np.int64)[np.isin(hashes, list(twice))].tolist()
        wanted, seen = set(rows), dict[str, int]()
        row = 0
        for path in self._files:  # again: two ids may have one hash
            with path.open("rb") as file:
                for _, line in _lines_of(file, 0):
                    if row in wanted:
                        name = _row(row, line).fields["custom_id"]
                        if name in seen:
                            raise UserError(
                                f"{path}: the custom_id {name!r:.80} is that of rows {seen[name] + 1} and {row + 1}: "
                                "give each its own, for answers are told apart by it."
                            )
                        seen[name] = row
                    row += 1


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
