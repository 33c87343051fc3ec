"""`inspect-config` and `compare`: the numbers, their forms, and the sentences for what cannot be read."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from tinyserve import presets, shapes
from tinyserve.cli._model_config import architecture, count, load_raw_config, size
from tinyserve.cli.compare import compare
from tinyserve.cli.inspect_config import inspect_config, layer_map
from tinyserve.errors import ConfigError, UnknownModelError, UserError

app = typer.Typer()
app.command("inspect-config")(inspect_config)
app.command("compare")(compare)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "TERM": "dumb"})


def inspect(*arguments: str) -> Any:
    result = run("inspect-config", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_hybrid_in_numbers() -> None:
    report = inspect("granite-350m")
    assert report["repo"] == "ibm-granite/granite-4.0-h-350m"
    assert report["parameters"] == 340_332_224
    assert sum(report["parameters_by_component"].values()) == report["parameters"]
    assert report["layer_types"].count("mamba") == 28
    assert report["attention_kind"] == "GQA"
    assert report["kv_bytes_per_token"] == {"float32": 8192, "bfloat16": 4096, "int8": 4 * 2 * 4 * (64 + 4)}
    assert report["kv_bytes_full_context"]["float32"] == 8192 * 32768
    assert report["state_bytes_per_sequence"] == 22_622_208
    assert report["weight_bytes"]["float32"] == 4 * 340_332_224


def test_the_roofline_counts_weights_cache_and_state() -> None:
    report = inspect("granite-350m", "--bandwidth", "10", "--context", "500")
    roofline = report["roofline"]
    read = shapes.weight_bytes(presets.get("granite-350m").config, "int8") + 500 * 8192 + 2 * 22_622_208
    assert roofline["bytes_per_token"]["int8"] == read
    assert roofline["tokens_per_second"]["int8"] == round(1e10 / read, 2)
    assert roofline["bandwidth_gb_per_s"] == 10
    assert inspect("gpt2", "--context", "99999")["roofline"]["context"] == 1024


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_fits_eighty_columns(name: str) -> None:
    result = run("inspect-config", name)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    report = inspect(name)
    for expected in (name, count(report["parameters"]), size(report["weight_bytes"]["int8"]), "int4"):
        assert expected in result.stdout
    for key in presets.get(name).unverified:
        assert key in result.stdout.split("Unverified:")[1]


def test_the_layer_map_shows_the_hybrid_at_a_glance() -> None:
    assert layer_map(["mamba"] * 10 + ["attention"] + ["mamba"] * 2) == ["   0  MMMMMMMMMM AMM"]
    assert layer_map(["attention"] * 41) == ["   0  " + " ".join(["A" * 10] * 4), "  40  A"]
    shown = run("inspect-config", "granite-350m").stdout
    assert "MMMMMMMMMM AMMAMMMAMM MMMMMMMAMM MM" in shown
    assert "A attention ×4, M Mamba2 ×28" in shown


def test_folders_and_files_are_models_too(tmp_path: Path) -> None:
    raw = presets.get("smollm2-135m").raw_config
    (tmp_path / "config.json").write_text(json.dumps(raw))
    folder, file = inspect(str(tmp_path)), inspect(str(tmp_path / "config.json"))
    preset = inspect("smollm2-135m")
    assert folder["source"] == file["source"] == str(tmp_path / "config.json")
    assert folder["repo"] is None
    for key in ("parameters", "weight_bytes", "architecture", "layer_types"):
        assert folder[key] == file[key] == preset[key]
    shown = run("inspect-config", str(tmp_path))
    assert shown.exit_code == 0
    assert "134.5 M" in shown.stdout


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="Did you mean gpt2"):
        load_raw_config("gtp2")
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_raw_config(str(tmp_path))
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_raw_config(str(tmp_path))
    broken.write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        load_raw_config(str(broken))
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_raw_config(str(broken))
    broken.write_text(json.dumps({"model_type": "qwen2"}))
    result = run("inspect-config", str(broken))
    assert isinstance(result.exception, ConfigError)
    assert str(broken) in str(result.exception)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", ("MHA 12/12 heads of 64", "learned", "LayerNorm", "GELU (tanh)", "sequential")),
        (
            "falcon-7b",
            ("MQA 71/1 heads of 64", "RoPE θ=10000", "LayerNorm", "GELU (erf)", "parallel, 1 norm"),
        ),
        (
            "falcon-40b",
            ("GQA 128/8 heads of 64", "RoPE θ=10000", "LayerNorm", "GELU (erf)", "parallel, 2 norms"),
        ),
        ("falcon-rw-1b", ("MHA 32/32 heads of 64", "ALiBi", "LayerNorm", "GELU (erf)", "sequential")),
        (
            "llama-3.2-1b",
            ("GQA 32/8 heads of 64", "RoPE θ=500000, llama3 ×32", "RMSNorm", "SwiGLU", "sequential"),
        ),
        (
            "granite-4.0-h-tiny",
            (
                "GQA 12/4 heads of 128 in 4 of 40 layers, Mamba2 in the others",
                "none",
                "RMSNorm",
                "SwiGLU",
                "sequential, 6 of 64 experts",
            ),
        ),
    ],
)
def test_architectures_in_words(name: str, words: tuple[str, ...]) -> None:
    assert tuple(architecture(presets.get(name).config).values()) == words


def test_compare_has_three_forms() -> None:
    models = ("gpt2", "falcon-7b", "llama-7b", "granite-350m")
    rows = json.loads(run("compare", *models, "--json").stdout)["models"]
    assert [row["model"] for row in rows] == list(models)
    assert [row["attention_kind"] for row in rows] == ["MHA", "MQA", "MHA", "GQA"]
    assert rows[2]["kv_bytes_per_1000_tokens"] == 1000 * 2 * 32 * 32 * 128 * 4
    assert [bool(row["state_bytes_per_sequence"]) for row in rows] == [False, False, False, True]

    table = run("compare", *models, "--markdown").stdout.splitlines()
    assert table[:2] == ["| | gpt2 | falcon-7b | llama-7b | granite-350m |", "|---|---|---|---|---|"]
    assert all(line.count("|") == 6 for line in table)

    shown = run("compare", *models)
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for expected in (*models, "MQA", "learned", "22.6 MB", "6.92 B"):
        assert expected in shown.stdout
    with pytest.raises(UserError, match="choose one"):
        compare(["gpt2"], json_=True, markdown=True)


@pytest.mark.parametrize("command", ["inspect-config", "compare"])
def test_help_has_examples(command: str) -> None:
    text = run(command, "--help").stdout
    assert "Examples" in text
    assert f"tinyserve {command}" in text


@pytest.mark.parametrize(
    ("number", "words"), [(12, "12"), (49_920, "49.9 k"), (340_332_224, "340.3 M"), (7e9, "7.00 B")]
)
def test_counts_in_words(number: int, words: str) -> None:
    assert count(number) == words


def test_the_command_imports_nothing_heavy_and_is_quick() -> None:
    """A whole process takes about 0.2 s; the limit leaves room for a busy machine."""
    script = (
        "import sys; from tinyserve.cli.inspect_config import inspect_config;"
        "inspect_config('granite-350m', 40.0, 1024, True);"
        "assert not {'numpy', 'numba', 'rich.console', 'tokenizers', 'huggingface_hub'} & set(sys.modules)"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    "name", ["gpt2", "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e", "owner/name"]
)
def test_what_was_downloaded_wins_over_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A snapshot in the Hub's cache, by the preset's name, by repository and revision, and by its branch."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    preset = presets.get("gpt2")
    repo, commit = ("owner/name", "0" * 40) if name == "owner/name" else (preset.repo, preset.revision)
    folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for file in ("model.safetensors", "tokenizer.json"):
        (snapshot / file).write_text("{}")
    (snapshot / "config.json").write_text(json.dumps(preset.raw_config | {"n_layer": 5}))
    report = inspect(name)
    assert report["num_hidden_layers"] == 5
    assert report["source"] == str(snapshot / "config.json")
