"""Slow work, told and shown: what every such function reports to, and what a person sees of it on stderr.

Knows terminals and notebooks; who reports, and of what, is for the callers.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from shutil import get_terminal_size
from time import perf_counter
from typing import Any, Self, TextIO

# Called with a stage, what of it is done, and all there is to do (0 where nobody knows). The stages of a model are
# "download NAME" (bytes), "compile KERNEL" (kernels so far, and about how many), "wait" and "wait download NAME" (0, 0:
# for another process), "load" (weights) and "prefill" (tokens).
Progress = Callable[[str, int, int], None]

_WIDEST = 100  # columns of a bar
_INTERVAL = 0.1  # seconds between two drawings
_NOTEBOOK_DELAY = 0.5  # seconds before a bar: what is in a cell's output stays in the notebook's file


def silent(stage: str, done: int, total: int) -> None:
    """The progress of whoever wants none."""


def renamed(progress: Progress, stage: str) -> Progress:
    """Report whatever is heard as one stage."""
    return lambda _, done, total: progress(stage, done, total)


@contextmanager
def default_progress(progress: Progress | None = None, model: str = "the model") -> Iterator[Progress]:
    """The `progress` given; else one that shows what is slow until the block ends, and is silent after it."""
    if progress is not None:
        yield progress
        return
    with LoadProgress(model, prompts=False) as shown:
        yield shown


class ProgressBar:
    """A bar for the stage that is heard of, gone when all is done or the block ends: a Progress, a context manager.

    Shown on a terminal and in a notebook, unless `shown` says otherwise.
    """

    def __init__(self, shown: bool | None = None):
        wanted = is_terminal(sys.stderr) or _in_notebook() if shown is None else shown
        self.is_shown = sys.stderr is not None and wanted
        self._stage = ""
        self._started, self._drawn = 0.0, 0.0  # the stage, and what is shown of it
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Draw it, with `note` in place of the numbers and the time that is left."""
        if not self.is_shown:
            return
        now = perf_counter()
        if stage != self._stage:
            self.clear()
            self._stage, self._started = stage, now
        if self._bar is None:
            if now - self._started < (_NOTEBOOK_DELAY if _in_notebook() else 0):
                return
            self._bar = _new_bar(total)
        elif done < total and now - self._drawn < _INTERVAL:
            return
        self._drawn = now
        self._bar.n = min(done, total)
        self._bar.bar_format = _bar_format(stage, note or self._numbers(done, total, now - self._started))
        self._bar.refresh()
        if done >= total:
            self.clear()

    def clear(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.n = self._bar.total  # or a notebook keeps it, in red
            self._bar.close()
            if is_terminal(sys.stderr) and self._bar.ncols:
                # tqdm removes what it believes to have written: less, if an interruption came as it wrote.
                print(f"\r{' ' * self._bar.ncols}\r", end="", file=sys.stderr, flush=True)  # noqa: T201
            self._bar = None
        self._stage = ""

    @staticmethod
    def _numbers(done: int, total: int, seconds: float) -> str:
        # By the mean: a step may take minutes, and the first must be enough for an estimate.
        left = f", {timedelta(seconds=round(seconds / done * (total - done)))} left" if done else ""
        return f"{done}/{total}{left}"


class LoadProgress:
    """What a person sees of a model's stages: a Progress, and a context manager around building the model.

    On a terminal a line that is overwritten, and a bar for a download; in a notebook bars; all are removed. Elsewhere
    what is rare is said in a line of its own. After the block it goes on showing how far long `prompts` are read.
    """

    def __init__(self, model: str, prompts: bool = True):
        self.model = model
        self._prompts = prompts
        self._started = perf_counter()
        self._ended: float | None = None
        self._terminal = is_terminal(sys.stderr)
        self._bar = ProgressBar()
        self._compiled = 0
        self._compiling_since: float | None = None
        self._compile_seconds = 0.0
        self._last_shown = 0.0
        self._shown = ""
        self._stage = ""  # the first report of a stage is shown, and then ten a second
        self._said: set[str] = set()
        self._downloading: tuple[str, float] | None = None  # what, and since when
        self._doing = "reading the prompt"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = perf_counter()
        self._time_compiling(False)
        self.clear()
        if not self._terminal and self._compiled:
            say(f"tinyserve: compiled {self._compiled} kernels in {self.compile_seconds:.0f} s")

    @property
    def seconds(self) -> float:
        """Seconds from when it was made to the end of its block, or to now, without those of compiling."""
        return (self._ended or perf_counter()) - self._started - self.compile_seconds

    @property
    def compile_seconds(self) -> float:
        """Seconds in which kernels were compiled, here or by another process that was waited for."""
        since = self._compiling_since
        return self._compile_seconds + (0.0 if since is None else perf_counter() - since)

    def _time_compiling(self, is_compiling: bool) -> None:
        """A kernel is told of when it begins: it has ended when something else is told of, or another kernel."""
        self._compile_seconds = self.compile_seconds
        self._compiling_since = perf_counter() if is_compiling else None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Hear of a stage; one that is none of a model's is shown by its name."""
        kind, _, detail = stage.partition(" ")
        self._time_compiling(kind == "compile" or stage == "wait")
        if kind == "download":
            self._download(detail, done, total)
        elif kind == "compile":
            self._compiled = done
            so_far = f"{done} of about {total}" if total else f"{done} so far"
            line = f"{so_far}, {detail.strip('_')} ({self.compile_seconds:.0f} s)"
            self._say("compiling kernels for this processor", f": {line}", " (the first time, up to a minute)")
        elif stage == "wait":
            self._say("another process is compiling the kernels: waiting for it")
        elif kind == "wait":
            self._say(f"waiting for another process to {detail}")
        elif stage == "load":
            self._share(stage, f"loading {self.model}", done, total)
        elif stage != "prefill":
            self.show(stage)
        elif self._prompts:
            self._share(stage, self._doing, done, total)

    def show(self, doing: str) -> None:
        """On a terminal, say what is done now; of long prompts it is told from now on how far they are read."""
        self._doing = doing
        self.wait(doing)

    def wait(self, what: str) -> None:
        """On a terminal, say what is waited for, until there is something else to say."""
        self._stage = ""
        if self._terminal:
            self._write(what)

    def clear(self) -> None:
        """Remove the line, or the bar."""
        self._bar.clear()
        if self._shown:
            self._write("")

    def _share(self, stage: str, doing: str, done: int, total: int) -> None:
        """A stage of which the end is known."""
        if not self._terminal:
            self._bar(doing, done, total)
        elif stage != self._stage or perf_counter() - self._last_shown > _INTERVAL or done == total:
            self._stage = stage
            self._write(f"{doing}: {100 * done // max(1, total)} %")

    def _download(self, name: str, done: int, total: int) -> None:
        if self._downloading is None or self._downloading[0] != name:
            self._downloading = name, perf_counter()
            self.clear()
            if not self._bar.is_shown:
                say(f"Downloading {name} ({size(total)})" if total else f"Downloading {name}")
        seconds = perf_counter() - self._downloading[1]
        if total and done >= total:
            self._downloading = None
            self._bar.clear()
            say(f"Downloaded {name} in {seconds:.0f} s")
        elif total:
            self._bar(name, done, total, f"{size(done)} of {size(total)}, {size(done / max(seconds, 1e-3))}/s")

    def _say(self, line: str, live: str = "", once: str = "") -> None:
        """A line that goes on with `live` where it is overwritten, and with `once` where it stays."""
        if self._terminal:
            self._write(line + live)
        elif line not in self._said:
            self._said.add(line)
            say(f"tinyserve: {line}{once}")

    def _write(self, line: str) -> None:
        self._bar.clear()
        line = line[: get_terminal_size().columns - 1]  # only the last row of a longer one would be overwritten
        self._last_shown, self._shown = perf_counter(), line
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)  # noqa: T201


def say(line: str) -> None:
    """One line on stderr, where it does not mix with an answer; nothing where there is no stderr."""
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201


def is_shown(wanted: bool | None, total: int) -> bool | None:
    """What ProgressBar is told over so many things: as is wanted, and by default nothing over a single one."""
    return False if wanted is None and total <= 1 else wanted


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees what is written to a stream, where escape sequences then do what they say."""
    if stream is None or not stream.isatty():
        return False
    if sys.platform == "win32":
        from colorama import just_fix_windows_console

        just_fix_windows_console()
    return True


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def import_tqdm() -> Any:
    """tqdm for a terminal or a notebook, imported without its warning; call it before what imports tqdm by itself."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ipywidgets are missing: a bar of characters does
        from tqdm.auto import tqdm

    return tqdm


def _new_bar(total: int) -> Any:
    tqdm = import_tqdm()
    bar = type("Bar", (tqdm,), {"monitor_interval": 0})  # no thread that looks after it
    # A terminal that does not know its size has none for tqdm, which then draws nothing; a notebook's is in pixels.
    shape = {"ncols": None if _in_notebook() else min(_WIDEST, get_terminal_size().columns) - 1, "nrows": 20}
    # It draws itself before anybody holds it, who could remove it: nothing, then, or an interruption would leave it.
    return bar(total=total, file=sys.stderr, leave=False, bar_format=" ", **shape)


def _bar_format(stage: str, note: str) -> str:
    before, after = (text.replace("{", "{{").replace("}", "}}") for text in (stage, note))
    return f"{before} |{{bar}}| {after}"


def count(number: float) -> str:
    """Write a count as people do: 340.3 M, 1.46 B."""
    for unit, step in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= step:
            return f"{number / step:.{1 if unit != 'B' else 2}f} {unit}"
    return f"{number:g}"


def size(number: float, least: float = 1e3) -> str:
    """Write bytes in decimal units from `least` on: 8.2 kB, 22.6 MB, 1.36 GB."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= max(step, least):
            return f"{number / step:.{1 if unit != 'GB' else 2}f} {unit}"
    return f"{number:.0f} bytes"
