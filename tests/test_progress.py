"""What is shown of slow work: on a terminal, in a notebook and elsewhere, and what an interruption leaves of it."""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Terminal, last_line

from tinyserve import LLM, progress
from tinyserve.progress import LoadProgress, ProgressBar, default_progress, is_terminal, renamed, silent, size

STAGES = {
    "download owner/name": (1_000_000, 4_000_000),
    "compile _matmul": (3, 40),
    "compile _sum": (3, 0),
    "wait": (0, 0),
    "wait download owner/name": (0, 0),
    "load": (25, 100),
    "prefill": (512, 2048),
    "decode at depth 0, batch 1": (1, 3),
}
SHOWN = {
    "download owner/name": "1.0 MB of 4.0 MB, ",
    "compile _matmul": "compiling kernels for this processor: 3 of about 40, matmul (0 s)",
    "compile _sum": "compiling kernels for this processor: 3 so far, sum (0 s)",
    "wait": "another process is compiling the kernels: waiting for it",
    "wait download owner/name": "waiting for another process to download owner/name",
    "load": "loading gpt2: 25 %",
    "prefill": "reading the prompt: 25 %",
    "decode at depth 0, batch 1": "decode at depth 0, batch 1",
}
WORK = """
import sys, time
from tinyserve.progress import LoadProgress, ProgressBar, default_progress
try:
    with PROGRESS as progress:
        STEPS
        time.sleep(60)
except KeyboardInterrupt:
    print("stopped")
"""


def working(progress: str, *steps: tuple[str, int, int], columns: int = 80) -> Terminal:
    """A program that reports these steps, and then works on until it is interrupted."""
    calls = "; ".join(f"progress{step!r}; time.sleep(0.15)" for step in steps)
    code = WORK.replace("PROGRESS", progress).replace("STEPS", calls)
    return Terminal("-c", code, program=[sys.executable], columns=columns)


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_leaves_the_terminal_clean(stage: str) -> None:
    """Of every stage: it is seen, and when it is interrupted nothing of it stands before the program's next word."""
    with working("LoadProgress('gpt2')", (stage, 0, STAGES[stage][1]), (stage, *STAGES[stage])) as terminal:
        terminal.wait_for(SHOWN[stage])
        terminal.type("\x03")
        assert terminal.end() == 0
    gone = terminal.shown.replace("^C", "")
    if stage.startswith("download"):
        assert last_line("\r" + gone) == "stopped"  # a bar is overwritten with spaces
    else:
        assert gone.endswith("\rstopped\n")  # a line is erased


def test_a_line_fits_into_a_narrow_terminal() -> None:
    steps = [("compile _matmul", i, 0) for i in range(1, 4)]
    with working("LoadProgress('gpt2')", *steps, columns=30) as terminal:
        shown = [terminal.wait_for("compiling kernels for this pr") for _ in steps]
        terminal.type("\x03")
        assert terminal.end() == 0
    assert not any("\n" in one or "processor" in one for one in shown)
    assert terminal.shown.replace("^C", "") == "\rstopped\n"


def test_a_bar_that_is_interrupted_is_gone() -> None:
    with working("ProgressBar()", ("answers", 0, 4), ("answers", 3, 4)) as terminal:
        shown = terminal.wait_for("3/4, 0:00:0")
        assert "answers |" in shown
        terminal.type("\x03")
        assert terminal.end() == 0
    assert last_line("\r" + terminal.shown.replace("^C", "")) == "stopped"


class InterruptedTerminal(io.StringIO):
    """A terminal where Ctrl-C is pressed just as 3/4 was written."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        written = super().write(text)
        if "3/4" in text:
            raise KeyboardInterrupt
        return written


def test_a_bar_is_gone_if_the_interruption_came_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", InterruptedTerminal())
    with pytest.raises(KeyboardInterrupt), ProgressBar() as bar:
        bar("answers", 3, 4)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "3/4" in shown
    assert last_line(shown) == ""


def test_a_finished_download_leaves_a_line() -> None:
    with working("LoadProgress('m')", ("download m", 0, 8), ("download m", 8, 8)) as terminal:
        assert terminal.wait_for("\rDownloaded m in ")
        terminal.type("\x03")
        assert terminal.end() == 0


def test_elsewhere_what_is_rare_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with default_progress(None, "gpt2") as progress:
        for stage, (done, total) in STAGES.items():
            for part in (0, done, done, total):
                progress(stage, part, total)
    with default_progress() as progress:
        progress("load", 1, 1)
    said = capsys.readouterr()
    assert said.out == ""
    assert re.sub(r"\d+ s\b", "N s", said.err).splitlines() == [
        "Downloading owner/name (4.0 MB)",
        "Downloaded owner/name in N s",
        "tinyserve: compiling kernels for this processor (the first time, up to a minute)",
        "tinyserve: another process is compiling the kernels: waiting for it",
        "tinyserve: waiting for another process to download owner/name",
    ]


def test_compiling_and_loading_are_timed_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel's time goes on until something else is told of."""
    now = [100.0]
    monkeypatch.setattr("tinyserve.progress.perf_counter", lambda: now[0])
    steps = [
        ("load", 2),
        ("compile _a", 5),
        ("compile _b", 7),
        ("load", 1),
        ("wait", 20),
        ("load", 3),
        ("compile _c", 4),
    ]
    with LoadProgress("gpt2") as progress:
        for done, (stage, seconds) in enumerate(steps, 1):
            progress(stage, done, 100 * (stage == "load"))
            now[0] += seconds
    now[0] += 1000
    assert (progress.seconds, progress.compile_seconds) == (2 + 1 + 3, 5 + 7 + 20 + 4)
    assert capsys.readouterr().err.splitlines()[-1] == "tinyserve: compiled 7 kernels in 36 s"


def test_the_progress_given_is_the_one_that_hears(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[tuple[str, int, int]] = []

    def hear(stage: str, done: int, total: int) -> None:
        heard.append((stage, done, total))

    with default_progress(hear) as progress:
        assert progress is hear
    renamed(hear, "w8a16")("evaluate", 1, 2)
    silent("load", 1, 2)
    assert heard == [("w8a16", 1, 2)]
    assert capsys.readouterr() == ("", "")


def test_a_program_sees_its_model_being_loaded_and_nothing_of_its_prompts(folder_of: Callable[[str], Path]) -> None:
    code = f"""
from tinyserve import LLM, SamplingParams
llm = LLM({str(folder_of("llama"))!r}, dtype="float32", max_num_batched_tokens=8)
print("loaded")
llm.generate([[1] * 30], SamplingParams(max_tokens=1))
print("done")
"""
    with Terminal("-c", code, program=[sys.executable], columns=200) as terminal:
        assert "llama: 100 %" in terminal.wait_for("\rloaded\n")
        assert terminal.wait_for("done") == "done"
        assert terminal.end() == 0
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("loaded\ndone\n", "")


@pytest.mark.parametrize(
    ("system", "is_terminal_", "count"), [("win32", True, 1), ("win32", False, 0), ("linux", True, 0)]
)
def test_a_console_of_windows_is_told_to_obey_escape_sequences(
    monkeypatch: pytest.MonkeyPatch, system: str, is_terminal_: bool, count: int
) -> None:
    told: list[str] = []
    monkeypatch.setitem(
        sys.modules, "colorama", SimpleNamespace(just_fix_windows_console=lambda: told.append("console"))
    )
    monkeypatch.setattr(progress, "sys", SimpleNamespace(platform=system))
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal_)
    assert is_terminal(stream) is is_terminal_ and not is_terminal(None)
    assert len(told) == count


def test_a_notebook_has_bars_and_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error is no terminal there, and the kernel says so in its shell's config."""
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    assert not ProgressBar().is_shown
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert ProgressBar().is_shown and not ProgressBar(False).is_shown
    with LoadProgress("gpt2") as progress:
        progress("load", 0, 4)
        progress("load", 4, 4)
    assert stderr.getvalue() == "", "what is over at once leaves nothing in the notebook's file"
    monkeypatch.setattr("tinyserve.progress._NOTEBOOK_DELAY", 0.0)
    with LoadProgress("gpt2") as progress:
        progress("load", 0, 4)
        progress("load", 4, 4)
        progress("compile _matmul", 1, 0)
    assert "loading gpt2 |" in stderr.getvalue() and "4/4" in stderr.getvalue()
    assert "tinyserve: compiling kernels for this processor" in stderr.getvalue()
    assert "\x1b[2K" not in stderr.getvalue()


def test_a_program_without_standard_error(monkeypatch: pytest.MonkeyPatch, folder_of: Callable[[str], Path]) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as in a windowed program
    assert not ProgressBar(True).is_shown
    with LoadProgress("gpt2") as progress:
        for stage, (done, total) in STAGES.items():
            progress(stage, done, total)
    assert LLM(folder_of("llama"), dtype="float32").logits([1, 2]).shape[0] == 2


def test_names_with_braces_are_drawn_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    with ProgressBar(True) as bar:
        bar("reading {x}", 1, 2)
    assert "reading {x} |" in stderr.getvalue()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (8192, "8.2 kB"), (98_362_432, "98.4 MB"), (2e9, "2.00 GB")],
)
def test_bytes_for_people(number: float, text: str) -> None:
    assert size(number) == text


def test_bytes_that_are_all_told() -> None:
    assert (size(99_999, 1e5), size(100_000, 1e5)) == ("99999 bytes", "100.0 kB")
