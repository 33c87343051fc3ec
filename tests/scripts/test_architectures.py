"""docs/architectures.md is current, and its figures show the blocks that the checkpoints have."""

import importlib
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tinyserve.checkpoints import presets
from tinyserve.models.config import costs, preset_config

SCRIPTS = Path(__file__).parents[2] / "scripts"
TEXT = (SCRIPTS.parent / "docs" / "architectures.md").read_text(encoding="utf-8")
FIGURES = re.findall(r"<!-- (second half of a )?block of (\S+), layer (\d+) -->\n```text\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def make_architectures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("make_architectures")


def test_the_page_is_current(make_architectures: Any) -> None:
    assert make_architectures.page(TEXT) == TEXT, "run python scripts/make_architectures.py"
    assert (
        len(make_architectures.GENERATED.findall(TEXT)) == TEXT.count("<!-- tinyserve ") == TEXT.count("<!-- end -->")
    )


def test_a_number_that_is_not_the_commands_is_stale(make_architectures: Any) -> None:
    assert "| 36.9 MB |" in TEXT
    assert make_architectures.page(TEXT.replace("| 36.9 MB |", "| 37.9 MB |")) == TEXT


def test_check_writes_nothing(make_architectures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = [sys.executable, str(SCRIPTS / "make_architectures.py"), "--check"]
    assert subprocess.run(script, check=False).returncode == 0
    stale = tmp_path / "architectures.md"
    stale.write_text("<!-- tinyserve inspect-config gpt2 : Layers -->\n<!-- end -->\n")
    monkeypatch.setattr(make_architectures, "PAGE", stale)
    monkeypatch.setattr(sys, "argv", script[1:])
    assert make_architectures.main() == 1
    assert "AAAA" not in stale.read_text()
    monkeypatch.setattr(sys, "argv", script[1:2])
    assert make_architectures.main() == 0
    assert "AAAAAAAAAA AA" in stale.read_text()


def test_a_command_that_fails_or_lacks_the_paragraph_is_told(make_architectures: Any) -> None:
    with pytest.raises(SystemExit, match=r"compare gtp2: There is no model 'gtp2'"):
        make_architectures.generated("compare gtp2", None)
    with pytest.raises(SystemExit, match="0 paragraphs begin with 'Lawyers'"):
        make_architectures.generated("inspect-config gpt2", "Lawyers")


def test_what_was_downloaded_does_not_change_the_page(
    make_architectures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = presets.get("gpt2")
    folder = tmp_path / f"models--{gpt2.repo.replace('/', '--')}" / "snapshots" / gpt2.revision
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "AAAAAAAAAA AA" in make_architectures.generated("inspect-config gpt2", "Layers")


@pytest.mark.parametrize(("half", "name", "layer", "figure"), FIGURES, ids=[figure[1] for figure in FIGURES])
def test_a_figure_has_the_weights_of_its_block(half: str, name: str, layer: str, figure: str) -> None:
    """Every weight of the layer is drawn, and nothing is drawn that the checkpoint lacks."""
    tensors = [t.name for t in preset_config(name).tensor_shapes() if t.layer == int(layer)]
    if half:
        tensors = [t for t in tensors if ".input_layernorm." not in t and ".mamba." not in t]
    weights = {re.sub(r"\.(weight|bias)$", "", t).rpartition(".")[2] for t in tensors}
    drawn = set(re.findall(r"\w+", figure))
    assert weights <= drawn
    assert {word for word in drawn if "_" in word} <= weights


@pytest.mark.parametrize("figure", [figure[3] for figure in FIGURES], ids=[figure[1] for figure in FIGURES])
def test_the_lines_of_a_figure_meet(figure: str) -> None:
    lines = figure.splitlines()
    for upper, lower in pairwise(lines):
        for column in range(max(len(upper), len(lower))):
            above, below = (line[column : column + 1] or " " for line in (upper, lower))
            assert above not in "┬┐" or below in "│├└┘┤┴+×", f"{column}:\n{upper}\n{lower}"
            assert below not in "└┘┴" or above in "│├┬┐┤+×", f"{column}:\n{upper}\n{lower}"


def test_every_family_has_its_figures() -> None:
    drawn = {preset_config(name).model_type for _, name, _, _ in FIGURES}
    assert drawn >= {"gpt2", "falcon", "llama", "qwen3", "granitemoehybrid"}
    for section in ("GPT-2", "Falcon", "Llama and Mistral", "Qwen", "Granite"):
        body = TEXT.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        for part in (
            "tinyserve/models/",
            "tinyserve/models/config/",
            "<!-- block of",
            "**How its cache grows.**",
            "compare",
        ):
            assert part in body, (section, part)


def test_no_figure_is_too_wide_for_a_screen() -> None:
    blocks = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 100


def test_what_the_text_says_of_sizes_is_so() -> None:
    """The few numbers that stand in sentences and not in tables."""
    llama, hybrid, dense = (preset_config(n) for n in ("llama-3.1-8b", "granite-350m", "granite-4.0-350m"))
    context = costs.matmul_flops_per_token(llama) / costs.attention_flops_per_position(llama)
    assert f"a context of {round(context, -2):,.0f}." in TEXT.replace("\n", " ")
    state, kv = costs.state_bytes_per_sequence(hybrid), costs.kv_bytes_per_token(hybrid, "bfloat16")
    tokens = state / (costs.kv_bytes_per_token(dense, "bfloat16") - kv)
    assert f"past it after {tokens:.0f} tokens" in TEXT.replace("\n", " ")
    full = hybrid.max_position_embeddings
    assert 5.5 < full * costs.kv_bytes_per_token(dense, "bfloat16") / (full * kv + state) < 6.5  # "a sixth"
    qwen2, qwen3 = (costs.kv_bytes_per_token(preset_config(name)) for name in ("qwen2.5-0.5b", "qwen3-0.6b"))
    assert 9 * qwen2 < qwen3 < 9.5 * qwen2
    falcon, gpt2 = preset_config("falcon-7b"), preset_config("gpt2")
    assert 4 * costs.kv_bytes_per_token(falcon) < costs.kv_bytes_per_token(gpt2)
    assert int(costs.parameter_count(falcon) / costs.parameter_count(gpt2)) == 55
