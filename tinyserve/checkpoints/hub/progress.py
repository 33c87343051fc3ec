"""What a download shows on stderr: a bar on a terminal, else a line before and after. It knows no network."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def human(size: int) -> str:
    """Bytes as people read them: 98362432 -> "98 MB"."""
    if size < 1000:
        return f"{size} bytes"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def say(line: str, *, show: bool = True) -> None:
    """One line on stderr, where it does not mix with an answer."""
    if show:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Bar:
    """The progress of several files towards one total of bytes."""

    def __init__(self, label: str, total: int, *, show: bool = True) -> None:
        self.label, self.total, self.show = label, total, show
        self._done: dict[str, int] = {}
        self._bar: Progress | None = None

    def __enter__(self) -> "Bar":
        self._started = time.monotonic()
        if self.show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress("{task.description}", *columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.label, total=self.total)
            self._bar.start()
        else:
            say(f"Downloading {self.label} ({human(self.total)})", show=self.show)
        return self

    def at(self, file: str, done: int) -> None:
        """`done` bytes of `file` are here; going back is fine, when a server starts a file over."""
        self._done[file] = done
        if self._bar is not None:
            self._bar.update(self._task, completed=min(sum(self._done.values()), self.total))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            say(f"Downloaded {self.label} in {time.monotonic() - self._started:.0f} s", show=self.show)
