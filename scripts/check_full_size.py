"""Compare float32 logits with transformers' at the real sizes of presets, whose tiny twins the tests compare.

    python scripts/check_full_size.py                 # every preset of the table below
    python scripts/check_full_size.py gpt2 falcon-7b

A checkpoint of the preset's own config.json, but for the number of layers, gets random weights, is saved by
transformers in bfloat16 shards, and is read by both programs, one after the other: the peak is one of them in float32
(falcon-40b: 13 GB with what is mapped, and 4 GB of disk). Exit code 1 if any difference is too large. Needs torch and
transformers.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import checkpoints  # noqa: E402
import chosen  # noqa: E402

from tinyserve import LLM  # noqa: E402
from tinyserve.checkpoints import presets  # noqa: E402
from tinyserve.models.config import parse_config  # noqa: E402
from tinyserve.models.config.costs import parameter_count  # noqa: E402

# How many layers of a preset are built; None is all of them. Layers are alike, so two show what many would.
LAYERS: dict[str, int | None] = {
    "gpt2": None,
    "falcon-7b": 2,
    "falcon-40b": 2,
    "falcon-rw-1b": 2,
    "llama-7b": 2,
    "llama-3.2-1b": 2,
    "mistral-7b": 2,
    "qwen2.5-0.5b": 4,
    "qwen3-0.6b": 4,
    "granite-350m": None,  # its attention layers are few and far between
    "granite-1b": 8,  # the sixth is the first with attention
}
TOKENS = 64
TOLERANCE = 1e-4  # of the largest logit, as in tests/models/test_models.py
SHARD = "200MB"


class Comparison(NamedTuple):
    """What both programs made of one checkpoint."""

    layers: int
    parameters: int
    shards: int
    largest: float  # logit
    difference: float  # the largest, as a share of the largest logit


def compare(raw: Mapping[str, Any], layers: int | None = None, tokens: int = TOKENS) -> Comparison:
    """Build the model of a config.json with so many layers, and compare the logits of one prefill."""
    raw = with_layers(raw, layers)
    config = parse_config(raw)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, config.vocab_size, tokens)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = save(raw, Path(scratch))
        expected = checkpoints.transformers_logits(folder, ids)
        shards = len(list(folder.glob("*.safetensors")))
        logits = LLM(folder, dtype="float32", max_model_len=2 * tokens, max_num_seqs=1).logits(ids)
    largest = float(np.abs(expected).max())
    difference = checkpoints.error(logits, expected)
    return Comparison(config.num_hidden_layers, parameter_count(config), shards, largest, difference)


def with_layers(raw: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """The same config.json with the first `layers` layers only."""
    raw = dict(raw)
    if layers is not None:
        raw[next(key for key in ("num_hidden_layers", "n_layer") if key in raw)] = layers
        for key in raw.keys() & {"layer_types", "layers_block_type"}:
            raw[key] = raw[key][:layers]
    return raw


def save(raw: Mapping[str, Any], folder: Path) -> Path:
    """Random weights by transformers' own rule, beside the config.json as it came; norms and biases are moved too."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(folder)  # reads what is only JSON's, such as infinity
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, max_shard_size=SHARD)
    (folder / "config.json").write_text(json.dumps(raw))  # which has been written anew
    checkpoints.write_tokenizer(folder)
    return folder


def main() -> None:
    names = chosen.names("Compare full-size float32 logits with transformers'.", "presets", LAYERS)
    results = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = compare(presets.get(name).raw_config, LAYERS[name])
    print_table(results)
    if any(not result.difference <= TOLERANCE for result in results.values()):
        raise SystemExit(1)


def print_table(results: Mapping[str, Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("preset", no_wrap=True)
    for title in ("layers", "parameters", "shards", "largest logit", "difference", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for name, (layers, parameters, shards, largest, difference) in results.items():
        verdict = "ok" if difference <= TOLERANCE else f"more than {TOLERANCE:g}"
        table.add_row(
            name, str(layers), f"{parameters / 1e6:,.0f} M", str(shards), f"{largest:.3g}", f"{difference:.1e}", verdict
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
