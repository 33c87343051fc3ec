"""The command line as a whole: help, versions, errors of one sentence, and the commands that only need a model."""

import errno
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import typer
from command_line import Children, Shell, Terminal, run

from tinyserve import __version__, cli, models
from tinyserve.checkpoints import hub, presets
from tinyserve.cli.ask import FAMILIES
from tinyserve.errors import ConfigError
from tinyserve.models import registry
from tinyserve.models.config import preset_config

COMMANDS = [
    "ask", "chat", "serve", "batch", "explain", "bench", "trace", "eval", "inspect-config", "compare", "pull", "list",
    "rm", "warmup", "quantize", "completion",
]  # fmt: skip
FolderOf = Callable[[str], Path]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPT-2 of one's own, to be damaged."""
    return checkpoints.write_folder(tmp_path / "model", checkpoints.CONFIGS["gpt2"])


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", [*COMMANDS, *(f"ask {family}" for family in FAMILIES)])
def test_every_help_has_an_example_that_parses(shell: Shell, command: str, flag: str) -> None:
    shown = shell(*command.split(), flag)
    assert shown.code == 0
    assert shown.err == ""
    examples = re.findall(rf"^    (tinyserve {command}\b.*|.* \| tinyserve {command}\b.*)$", shown.out, re.MULTILINE)
    assert examples, shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines() if "tinyserve" not in line)


def test_tinyserve_alone_shows_help_with_the_commands_in_order(shell: Shell) -> None:
    alone = shell()
    assert alone == shell("--help") == shell("-h")
    assert alone.code == 0
    listed = alone.out.partition("Commands:\n")[2].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)  # nothing is cut off
    assert 'tinyserve ask "What is the capital of France?"' in alone.out


def test_every_command_is_listed() -> None:
    command: Any = typer.main.get_command(cli.app)
    assert set(command.commands) == set(COMMANDS)


def test_help_names_every_family(shell: Shell) -> None:
    text = re.sub(r"\W", "", shell("--help").out).lower()
    assert all(family in text for family in FAMILIES)


def test_help_of_ask_shows_the_options_and_the_families(shell: Shell) -> None:
    text = shell("ask", "--help").out
    assert text.startswith("Usage: tinyserve ask [OPTIONS] [MODEL] [PROMPT]\n")
    assert "any-model" not in text
    for expected in ("--max-tokens", "--system", "--json", *FAMILIES):
        assert expected in text


@pytest.mark.parametrize("family", FAMILIES)
def test_help_names_the_variants(shell: Shell, family: str) -> None:
    variants, default = list(presets.variants(family)), FAMILIES[family].default
    assert default in variants
    text = " ".join(shell("ask", family, "--help").out.split())
    assert f"Variants for --model: {', '.join(variants)}." in text
    assert f"[default: {default}]" in text


def test_every_preset_is_a_variant_of_a_family() -> None:
    assert {presets.get(name).family for name in presets.names()} == set(FAMILIES)


def test_help_reads_no_preset_that_nobody_asks_about() -> None:
    code = "from tinyserve import cli; from tinyserve.checkpoints import presets; cli.run(['--help']); "
    code += "assert not presets.find.cache_info().currsize; cli.run(['ask', 'llama', '--help']); "
    code += "assert presets.find.cache_info().currsize"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(shell: Shell) -> None:
    assert shell("--version").out == f"tinyserve {__version__}\n"


# --- command lines that cannot be parsed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("frob", r"No such command 'frob'; see tinyserve --help\."),
        ("--frob", r"No such option: --frob.*; see tinyserve --help\."),
        ("ask gpt2 --frob hi", r"No such option: --frob.*; see tinyserve ask gpt2 --help\."),
        ("ask some-model --frob hi", r"No such option: --frob.*; see tinyserve ask --help\."),
        ("ask gpt2 hi --max-tokens ten", r"Invalid value for '--max-tokens'.*; see tinyserve ask gpt2 --help\."),
        ("ask gpt2 hi there", r"unexpected extra argument.*there.*; see tinyserve ask gpt2 --help\."),
        ("inspect-config", r"Missing argument.*; see tinyserve inspect-config --help\."),
        ("bench gpt2 --decode 1", r"Invalid value for '--decode'.*2.*; see tinyserve bench --help\."),
    ],
)
def test_a_wrong_command_line_is_one_sentence(shell: Shell, line: str, says: str) -> None:
    result = shell(*line.split())
    assert result.code == 2
    assert re.search(says, result.sentence, re.IGNORECASE), result.sentence


# --- models that cannot be loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ask", "chat", "bench", "trace", "inspect-config", "compare", "pull", "warmup"])
def test_an_unknown_model(shell: Shell, command: str) -> None:
    result = shell(command, "smolm2-135m", *(["hi"] if command == "ask" else []))
    assert result.code == 2
    assert "'smolm2-135m'" in result.sentence
    assert "Did you mean smollm2-135m" in result.sentence
    assert all(name in result.sentence for name in presets.names())


def test_a_family_that_is_not_built_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    described = [family._replace(model=None) for family in registry.FAMILIES]
    monkeypatch.setattr(registry, "FAMILIES", described)
    with pytest.raises(ConfigError, match="'falcon' cannot run yet: its family is not built"):
        models.check_supported(preset_config("falcon-7b"))


def test_folders_that_hold_no_model(shell: Shell, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in shell("ask", tmp_path / "empty", "hi").sentence
    assert f"{tmp_path / 'nothing'}" in shell("ask", tmp_path / "nothing", "hi").sentence
    assert "check the path" in shell("ask", "./nothing.gguf", "hi").sentence
    sentence = shell("ask", folder / "model.safetensors", "hi").sentence
    assert f"give its folder, {folder}" in sentence
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors file" in shell("ask", folder, "hi").sentence


def test_an_architecture_that_nobody_built(shell: Shell, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(checkpoints.CONFIGS["gpt2"] | {"model_type": "qwen9"}))
    for command in ("ask", "inspect-config", "bench"):
        result = shell(command, folder, *(["hi"] if command == "ask" else []))
        assert result.code == 2
        assert "'qwen9'" in result.sentence
        assert "gpt2" in result.sentence  # what there is instead


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "config.json"),
        ("[]", "config.json"),
        ('{"model_type": "gpt2"}', "'n_embd'"),
        (json.dumps(checkpoints.CONFIGS["gpt2"] | {"n_head": 7}), "7 attention heads"),
    ],
)
def test_a_config_that_is_none(shell: Shell, folder: Path, config: str, says: str) -> None:
    (folder / "config.json").write_text(config)
    result = shell("ask", folder, "hi")
    assert result.code == 2
    assert says in result.sentence


def test_a_missing_tensor(shell: Shell, tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"]
    tensors = checkpoints.tensors_of(raw)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    folder = checkpoints.write_folder(tmp_path / "model", raw, tensors)
    result = shell("ask", folder, "hi")
    assert result.code == 2
    assert "'model.layers.1.mlp.up_proj.weight'" in result.sentence
    assert str(folder) in result.sentence


def test_a_misshapen_tensor(shell: Shell, tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"]
    tensors = checkpoints.tensors_of(raw)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1]
    result = shell("ask", checkpoints.write_folder(tmp_path / "model", raw, tensors), "hi")
    assert result.code == 2
    for expected in ("model.safetensors", name, "[156, 120]", "[157, 120]"):
        assert expected in result.sentence


@pytest.mark.parametrize("damage", ["header", "length", "truncated", "empty"])
def test_a_corrupt_safetensors_file(shell: Shell, folder: Path, damage: str) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    damaged = {
        "header": data[:8] + b"\xff" * 64 + data[72:],
        "length": (1 << 60).to_bytes(8, "little") + data[8:],
        "truncated": data[:-1000],
        "empty": b"",
    }
    file.write_bytes(damaged[damage])
    result = shell("ask", folder, "hi")
    assert result.code == 2
    assert str(file) in result.sentence


@pytest.mark.parametrize("kept", [0, 3, 20, 2000, -100])
def test_a_truncated_gguf(shell: Shell, tmp_path: Path, kept: int) -> None:
    file = checkpoints.write_model_gguf(tmp_path / "model.gguf", checkpoints.CONFIGS["llama"])
    file.write_bytes(file.read_bytes()[:kept])
    for command in ("ask", "bench"):
        result = shell(command, file, *(["hi"] if command == "ask" else []))
        assert result.code == 2
        assert str(file) in result.sentence


def test_a_missing_tokenizer(shell: Shell, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    result = shell("ask", folder, "hi")
    assert result.code == 2
    assert str(folder) in result.sentence
    assert "tokenizer.json" in result.sentence


def test_what_is_no_fault_of_the_users_ends_with_one(shell: Shell, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = shell("ask", "gpt2-medium", "hi")
    assert result.code == 1
    assert "HF_HUB_OFFLINE" in result.sentence
    assert "tinyserve pull gpt2-medium" in result.sentence


@pytest.mark.parametrize(
    "lost",
    [
        "class A:\n    def __del__(self): press()\nA()",
        "import ctypes\nctypes.CFUNCTYPE(None)(press)()",
        "import weakref\nclass A: pass\na = A()\nb = weakref.ref(a, press)\ndel a",
    ],
    ids=["in a finalizer", "in a callback of C", "in a callback of a weak reference"],
)
def test_a_ctrl_c_that_python_loses_comes_again(lost: str) -> None:
    code = f"""
import signal, sys, time
from tinyserve import cli
sys.unraisablehook = cli.deliver_again
def press(*_):
    signal.raise_signal(signal.SIGINT)
try:
    exec({lost!r})
    time.sleep(30)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_what_a_ctrl_c_was_made_into_is_no_bug(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy.core.multiarray failed to import")  # noqa: B904  # as C does

    monkeypatch.setattr(hub, "resolve", broken)
    result = shell("pull", "gpt2")
    assert (result.code, result.err) == (130, "")


def test_a_bug_is_a_sentence_too_unless_debugging(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(hub, "resolve", broken)
    result = shell("pull", "gpt2")
    assert result.code == 1
    assert "internal error (RuntimeError: no such luck)" in result.err
    assert result.err.count("\n") == 1
    monkeypatch.setenv("TINYSERVE_DEBUG", "1")
    with pytest.raises(RuntimeError, match="no such luck"):
        shell("pull", "gpt2")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_too_little_memory_is_a_sentence(error: Exception, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be mapped says it as an OSError, and names no file."""

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "resolve", full)
    result = shell("pull", "gpt2")
    assert result.code == 1
    assert result.sentence == "there is not enough memory: take a smaller model, or --dtype int4."


def test_an_error_that_names_no_file_blames_none(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(hub, "resolve", refused)
    result = shell("pull", "gpt2")
    assert (result.code, result.sentence) == (1, "the system refuses: Too many open files.")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_a_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "tinyserve", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (
        done.returncode == 1 and done.stderr.endswith(": No space left on device.\n") and done.stderr.count("\n") == 1
    )


# --- the other commands ---------------------------------------------------------------------------------------------


def test_warmup(shell: Shell, folder_of: FolderOf) -> None:
    result = shell("warmup", folder_of("gpt2"), "--dtype", "float32")
    assert result.code == 0
    assert re.fullmatch(r".*gpt2 is ready in float32 on \d+ threads \(\d+\.\d s\)\.\n", result.out)


def test_pull_list_and_rm_of_a_local_cache(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("TINYSERVE_CACHE", str(tmp_path / "own"))
    assert "No model is downloaded yet" in shell("list").out
    preset = presets.get("gpt2")
    snapshot = tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots" / preset.revision
    checkpoints.write_folder(snapshot, checkpoints.CONFIGS["gpt2"])
    assert shell("pull", "gpt2").out == f"{snapshot}\n"
    heading, row, *zoo = shell("list").out.splitlines()
    assert [line.split()[0].startswith(("tiny-", "tinier-")) for line in zoo] == [True] * 5
    assert heading.split() == ["name", "size", "where"]
    assert row.startswith("gpt2  ") and row.endswith(str(snapshot))
    assert re.search(r"^gpt2 +yes +openai-community/gpt2$", shell("list", "--presets").out, re.MULTILINE)
    assert "add --yes" in shell("rm", "gpt2").sentence
    missing = shell("rm", "gpt2-large")
    assert (missing.code, "did you mean gpt2?" in missing.sentence) == (2, True)
    removed = shell("rm", "gpt2", "--yes")
    assert (removed.code, removed.out) == (0, "")
    assert removed.err.startswith("Removed gpt2: ")
    assert not snapshot.exists()
    assert "tinyserve list" in shell("rm", "gpt2", "--yes").sentence


def test_rm_asks_on_a_terminal(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--owner--name/snapshots" / ("0" * 40)
    checkpoints.write_folder(snapshot, checkpoints.CONFIGS["gpt2"])
    for typed, code, gone in (("n\n", 0, False), ("\x03", 130, False), ("y\n", 0, True)):
        with Terminal("rm", f"owner/name@{'0' * 40}", HF_HOME=str(tmp_path)) as terminal:
            terminal.wait_for("Delete owner/name")
            terminal.wait_for("from this disk? [y/N]:")
            terminal.wait_until_it_sleeps()
            terminal.type(typed)
            assert terminal.end() == code
            assert "Traceback" not in terminal.shown
            assert snapshot.exists() is not gone


def test_the_first_run_says_that_it_compiles(folder_of: FolderOf, tmp_path: Path) -> None:
    """A fresh cache of kernels, so this is slow; the second run is silent."""
    command = ("ask", folder_of("gpt2"), "hi", "--dtype", "float32", "--max-tokens", "3", "--quiet")
    first = run(*command, TINYSERVE_CACHE=str(tmp_path))
    assert first.code == 0
    start, end = first.err.splitlines()
    assert start == "tinyserve: compiling kernels for this processor (the first time, up to a minute)"
    assert re.fullmatch(r"tinyserve: compiled \d+ kernels in \d+ s", end)
    assert any(tmp_path.rglob("*.kernel"))
    second = run(*command, TINYSERVE_CACHE=str(tmp_path))
    assert (second.code, second.out, second.err) == (0, first.out, "")
    drawn = run(*command, "--temp", "1", "--repetition-penalty", "1.1", TINYSERVE_CACHE=str(tmp_path))
    assert (drawn.code, drawn.err) == (0, ""), "whoever draws has all kernels, too"


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from tinyserve import cli; cli.run([]); cli.run(['ask', '-h']); print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    loaded = set(shown.splitlines()[-1].split())
    assert "tinyserve.cli.ask" in loaded
    assert not loaded & {"numpy", "numba", "tokenizers", "huggingface_hub", "jinja2", "gguf", "safetensors"}


def test_children_of_tests_hear_signals_that_this_process_ignores(
    start: Children,
) -> None:
    """As one that a script has started in the background does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = start("-c", "import signal; print(flush=True); signal.pause()", program=[sys.executable])
        assert child.stdout is not None and child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == -signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


def test_children_of_tests_end_with_them() -> None:
    with pytest.raises(RuntimeError), Children() as start:
        child = start("-c", "import signal; signal.pause()", program=[sys.executable])
        raise RuntimeError
    assert child.returncode == -signal.SIGKILL
