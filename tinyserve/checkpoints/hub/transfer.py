"""How far a download is, told to a Progress: several files towards one total; and the bytes of one, put where they go.

It knows no addresses, and opens no connection.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Self

from tinyserve.progress import Progress

if TYPE_CHECKING:
    from httpx2 import Response

_INTERVAL = 0.1  # seconds between two reports: a file comes in thousands of pieces


class Transfer:
    """A context manager around a download, which tells its beginning, its end, and in between ten times a second."""

    def __init__(self, label: str, total: int, progress: Progress):
        self._stage, self._total, self._progress = f"download {label}", total, progress
        self._done: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._report(0)
        return self

    def at(self, file: str, done: int) -> None:
        """`done` bytes of `file` are here; going back is fine, when a server starts a file over."""
        self._done[file] = done
        if monotonic() - self._reported > _INTERVAL:
            self._report(min(sum(self._done.values()), self._total - 1))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._total:
            self._report(self._total)

    def _report(self, done: int) -> None:
        self._reported = monotonic()
        self._progress(self._stage, max(0, done), self._total)


def append(answer: Response, partial: Path, have: int, report: Callable[[int], None]) -> None:
    """Write a body behind the `have` bytes that were asked to be left out; a server that ignores that starts over.

    report: hears how many bytes there are.
    """
    have = have if answer.status_code == 206 else 0
    with partial.open("ab" if have else "wb") as out:
        for chunk in answer.iter_bytes():
            out.write(chunk)
            have += len(chunk)
            report(have)
