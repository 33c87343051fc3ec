"""`inspect-config` and `compare`: the numbers, their forms, and the sentences for what cannot be read."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.cli.compare import compare
from tinyserve.cli.inspect_config import inspect_config, layer_map
from tinyserve.errors import CheckpointError, ConfigError, UnknownModelError, UserError
from tinyserve.models.config import costs, parse_config, preset_config
from tinyserve.models.config.description import architecture
from tinyserve.models.lookup import load_raw_config
from tinyserve.progress import count, size

pytestmark = pytest.mark.fast

app = typer.Typer()
app.command("inspect-config")(inspect_config)
app.command("compare")(compare)


def run(*arguments: str, columns: int = 80) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns), "TERM": "dumb"})


def raw_config(model: str) -> dict[str, Any]:
    return load_raw_config(ModelRef.parse(model))[0]


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
    weights = preset_config("granite-350m")
    read = costs.weight_bytes(weights, "int8") + 500 * 4096 + 2 * 22_622_208
    assert roofline["bytes_per_token"]["int8"] == read
    assert roofline["bytes_per_token"]["float32"] == 4 * 340_332_224 + 500 * 8192 + 2 * 22_622_208
    assert roofline["tokens_per_second"]["int8"] == round(1e10 / read, 2)
    assert roofline["bandwidth_gb_per_s"] == 10
    assert inspect("gpt2", "--context", "99999")["roofline"]["context"] == 1024


def test_a_window_bounds_what_a_token_reads(tmp_path: Path) -> None:
    """Mistral v0.1, whose window came before there was a null in its config."""
    raw = presets.get("mistral-7b").raw_config | {"sliding_window": 4096}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "all.json").write_text(json.dumps(raw | {"sliding_window": None}))
    window, everything = str(tmp_path / "config.json"), str(tmp_path / "all.json")
    read = {
        (model, context): inspect(model, "--context", context)["roofline"]["bytes_per_token"]["int8"]
        for model in (window, everything)
        for context in ("4096", "8192")
    }
    assert read[window, "8192"] == read[window, "4096"] == read[everything, "4096"]
    assert read[everything, "8192"] == read[everything, "4096"] + 4096 * 131_072
    assert inspect(window)["architecture"]["complexity"] == "O(n·4096)"
    assert "524.3 k, up to 4096" in run("compare", window, "--markdown").stdout


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


def test_slices_are_told_offline() -> None:
    whole, cut = inspect("llama-3.1-8b"), inspect("llama-3.1-8b", "--pipeline-parallel-size", "2")
    pipeline = cut.pop("pipeline")
    assert cut == whole and pipeline["network_bytes_per_token"] == 4 * 4096
    for dtype, slices in pipeline["slices"].items():
        assert [each["last_layer"] - each["first_layer"] + 1 for each in slices] == [16, 16]
        assert sum(each["weight_bytes"] for each in slices) == whole["weight_bytes"][dtype]
    shown = run("inspect-config", "granite-4.0-h-tiny", "--pipeline-parallel-size", "3").stdout
    assert "3 slices in int8" in shown and "12.3 kB cross the network for each token" in shown
    assert max(map(len, shown.splitlines())) <= 80
    refused = run("inspect-config", "granite-4.0-h-tiny", "--pipeline-parallel-size", "41")
    assert isinstance(refused.exception, UserError) and "has 40 layers" in str(refused.exception)


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
        raw_config("gtp2")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        raw_config(str(tmp_path))
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        raw_config(str(tmp_path))
    broken.write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        raw_config(str(broken))
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not JSON"):
        raw_config(str(broken))
    broken.write_text(json.dumps({"model_type": "gemma"}))
    result = run("inspect-config", str(broken))
    assert isinstance(result.exception, ConfigError)
    assert str(broken) in str(result.exception)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", ("MHA 12/12 heads of 64", "learned", "LayerNorm", "GELU (tanh)", "sequential", "O(n²)")),
        (
            "falcon-7b",
            ("MQA 71/1 heads of 64", "RoPE θ=10000", "LayerNorm", "GELU (erf)", "parallel, 1 norm", "O(n²)"),
        ),
        (
            "falcon-40b",
            ("GQA 128/8 heads of 64", "RoPE θ=10000", "LayerNorm", "GELU (erf)", "parallel, 2 norms", "O(n²)"),
        ),
        ("falcon-rw-1b", ("MHA 32/32 heads of 64", "ALiBi", "LayerNorm", "GELU (erf)", "sequential", "O(n²)")),
        (
            "llama-3.2-1b",
            ("GQA 32/8 heads of 64", "RoPE θ=500000, llama3 ×32", "RMSNorm", "SwiGLU", "sequential", "O(n²)"),
        ),
        (
            "granite-4.0-h-tiny",
            (
                "GQA 12/4 heads of 128 in 4 layers, Mamba2 in 36",
                "none (NoPE)",
                "RMSNorm",
                "SwiGLU",
                "sequential, 6 of 64 experts",
                "O(n²) in 4 layers, O(n) in 36",
            ),
        ),
    ],
)
def test_architectures_in_words(name: str, words: tuple[str, ...]) -> None:
    assert tuple(architecture(preset_config(name)).values()) == words


def test_what_is_granites_own_is_shown() -> None:
    hybrid, mixture, experts = (inspect(f"granite-{name}")["sizes"] for name in ("350m", "4.0-h-tiny", "3.0-1b-a400m"))
    assert hybrid == {
        "hidden / MLP": "768 / 2048",
        "Mamba2": "48 heads of 32, state 128, convolution 4, 1 group",
        "multipliers": "embedding 12, attention 0.015625, residual 0.246, logits 1/3",
    }
    assert mixture["hidden / MLP"] == "1536 / 512 in each of 64 experts, 1024 shared"
    assert experts["hidden / MLP"] == "1024 / 512 in each of 32 experts"
    assert "Mamba2" not in experts
    shown = run("inspect-config", "granite-350m").stdout
    assert all(words in shown for words in hybrid.values())


def test_a_model_of_mamba_layers_alone() -> None:
    raw = presets.get("granite-350m").raw_config
    words = architecture(parse_config(raw | {"layer_types": ["mamba"] * 32}))
    assert (words["attention"], words["complexity"]) == ("none: Mamba2 in every layer", "O(n)")
    words = architecture(parse_config(raw | {"layer_types": ["mamba"] * 31 + ["attention"]}))
    assert (words["attention"], words["complexity"]) == (
        "GQA 12/4 heads of 64 in 1 layer, Mamba2 in 31",
        "O(n²) in 1 layer, O(n) in 31",
    )


# The table of the project's aim, computed by hand: a token's keys and values are 2 · layers · key heads · head_dim
# numbers of 2 bytes; a Mamba2 layer of the hybrid keeps 48·32·128 + 3·1792 numbers of 4 bytes.
TABLE = {
    "attention": ("MHA 12/12 heads of 64", "MQA 71/1 heads of 64", "GQA 32/8 heads of 128",
                  "GQA 12/4 heads of 64 in 4 layers, Mamba2 in 28"),
    "position": ("learned", "RoPE θ=10000", "RoPE θ=500000, llama3 ×8", "none (NoPE)"),
    "norm": ("LayerNorm", "LayerNorm", "RMSNorm", "RMSNorm"),
    "activation": ("GELU (tanh)", "GELU (erf)", "SwiGLU", "SwiGLU"),
    "block": ("sequential", "parallel, 1 norm", "sequential", "sequential"),
    "KV, 1k tokens": ("36.9 MB", "8.2 MB", "131.1 MB", "4.1 MB + 22.6 MB state"),
    "KV, full": ("37.7 MB", "16.8 MB", "17.18 GB", "134.2 MB + 22.6 MB state"),
    "complexity": ("O(n²)", "O(n²)", "O(n²)", "O(n²) in 4 layers, O(n) in 28"),
    "context": ("1024 tokens", "2048 tokens", "131072 tokens", "32768 tokens"),
    "parameters": ("124.4 M", "6.92 B", "8.03 B", "340.3 M"),
}  # fmt: skip


def test_the_architecture_table() -> None:
    lines = run("compare", "gpt2", "falcon-7b", "llama-3.1-8b", "granite-350m", "--markdown").stdout.splitlines()
    table = {cells[0]: tuple(cells[1:]) for line in lines if (cells := line.strip("| ").split(" | "))}
    assert {name: table[name] for name in TABLE} == TABLE


FOUR, ALL = ("gpt2", "falcon-7b", "llama-3.1-8b", "granite-350m"), tuple(presets.names())


@pytest.mark.parametrize(
    ("columns", "models", "side_by_side"),
    [
        *((columns, FOUR, side_by_side) for columns, side_by_side in ((40, 1), (80, 4), (120, 4), (200, 4))),
        *((columns, ALL, side_by_side) for columns, side_by_side in ((40, 1), (80, 3), (120, 6), (200, 8))),
    ],
)
def test_no_word_of_the_table_is_broken_at_any_width(columns: int, models: tuple[str, ...], side_by_side: int) -> None:
    shown = run("compare", *models, columns=columns).stdout
    assert max(map(len, shown.splitlines())) <= columns
    for row in json.loads(run("compare", *models, "--json").stdout)["models"]:
        cells = {row["model"], row["model_type"], *(row[name] for name in architecture(preset_config("gpt2")))}
        assert {word for cell in cells for word in cell.split()} <= set(shown.split()), row["model"]
    assert 1 <= shown.count("architecture ") <= math.ceil(len(models) / side_by_side), "as few tables as will do"


def test_compare_has_three_forms() -> None:
    models = ("gpt2", "falcon-7b", "llama-7b", "granite-350m")
    rows = json.loads(run("compare", *models, "--json").stdout)["models"]
    assert [row["model"] for row in rows] == list(models)
    assert [row["attention_kind"] for row in rows] == ["MHA", "MQA", "MHA", "GQA"]
    assert rows[2]["kv_bytes_per_1000_tokens"]["float32"] == 1000 * 2 * 32 * 32 * 128 * 4
    assert rows[2]["kv_bytes_full_context"]["bfloat16"] == 4096 * 2 * 32 * 32 * 128 * 2
    assert [bool(row["state_bytes_per_sequence"]) for row in rows] == [False, False, False, True]

    table = run("compare", *models, "--markdown").stdout.splitlines()
    assert table[:2] == ["| | gpt2 | falcon-7b | llama-7b | granite-350m |", "|---|---|---|---|---|"]
    *table, empty, note = table
    assert all(line.count("|") == 6 for line in table)
    assert empty == "" and "bfloat16" in note

    shown = run("compare", *models)
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for expected in (*models, "MQA", "learned", "22.6 MB", "6.92 B"):
        assert expected in shown.stdout
    with pytest.raises(UserError, match="choose one"):
        compare(["gpt2"], json_=True, markdown=True)


def test_compare_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    file = tmp_path / "compare.png"
    shown = run("compare", "gpt2", "granite-350m", "mistral-7b", "granite-3.0-1b-a400m", "--plot", str(file))
    assert shown.exit_code == 0 and "MHA" in shown.stdout
    with Image.open(file) as image:
        assert image.width > 2 * image.height > 800
        assert len(image.convert("P", palette=Image.Palette.ADAPTIVE).getcolors() or []) > 20
    for wrong, words in ((tmp_path / "x.svg", "ends with .png"), (tmp_path / "no" / "x.png", "does not exist")):
        with pytest.raises(UserError, match=words):
            compare(["gpt2"], plot=wrong)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tinyserve\[plot\]'"):
        compare(["gpt2"], plot=file)


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
