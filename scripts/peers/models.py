"""The compared models on disk: a checkpoint for every engine to convert, built once into the work folder.

Knows presets, transformers and tokenizers; what an engine makes of a checkpoint is told in that engine's file.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyserve.checkpoints import hub, presets
from tinyserve.models.config import parse_config

REAL = presets.DEFAULT  # the one model with weights of its own, shipped as a GGUF file; all others have random ones
SEED = 0


def raw_config(model: str) -> dict[str, Any]:
    """config.json of a preset, or of a checkpoint's folder."""
    if Path(model).is_dir():
        config: dict[str, Any] = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return config
    return presets.get(model).raw_config


def positions(model: str) -> int:
    """The longest sequence that a model can read."""
    return parse_config(raw_config(model)).max_position_embeddings


def vocab_size(model: str) -> int:
    return int(raw_config(model)["vocab_size"])


def weights(model: str) -> str:
    return "the folder's weights" if Path(model).is_dir() else "random weights of this shape"


def home(model: str, workdir: Path) -> Path:
    """Where what is built of a model is kept."""
    return workdir / Path(model).name


def shipped_gguf() -> Path:
    """The real model's file."""
    path = hub.resolve(REAL)
    if path.suffix != ".gguf":
        raise SystemExit(f"{REAL} is at {path}, which is no GGUF file: move it aside, or remove it by `tinyserve rm`.")
    return path


def built(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, built by `build(partial)` if it is not there yet; nothing half done ever has its name."""
    if not target.exists():
        partial = target.with_name(f"partial-{target.name}")
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        build(partial)
        partial.rename(target)
    return target


def checkpoint(model: str, workdir: Path) -> Path:
    """A folder of safetensors with config and tokenizer: the real weights widened to float32, or random bfloat16.

    A model that is such a folder is its own.
    """
    if Path(model).is_dir():
        return Path(model)
    build = _widen if model == REAL else _randomize
    return built(home(model, workdir) / "checkpoint", lambda folder: build(model, folder))


def _widen(model: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = shipped_gguf()
    options = {"gguf_file": file.name, "local_files_only": True}
    AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)


def _randomize(model: str, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = presets.get(model).raw_config
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    _write_tokenizer(folder, raw)


def _write_tokenizer(folder: Path, raw: dict[str, Any]) -> None:
    """A byte-level tokenizer with as many tokens as the model; beyond the bytes they have made-up names."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += ["th", "the"]
    names += [f"<|{i}|>" for i in range(len(names), raw["vocab_size"])]
    eos = raw["eos_token_id"]
    end = names[eos if isinstance(eos, int) else eos[0]]
    special = {"bos_token": names[raw["bos_token_id"]], "eos_token": end, "unk_token": end}
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special.values()])
    backend.save(str(folder / "tokenizer.json"))
    settings = special | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
