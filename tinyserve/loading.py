"""A model's files, opened: config, tokenizer, chat template, end tokens, and weights not read yet.

Knows what lies in a folder or a GGUF file and what only looks like it; computes nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from tinyserve.checkpoints import hub
from tinyserve.checkpoints.checkpoint import Checkpoint
from tinyserve.checkpoints.json_file import read_json
from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.errors import CheckpointError, UserError
from tinyserve.models import check_supported
from tinyserve.models.config import GenerationConfig, ModelConfig, parse_config, preset_config
from tinyserve.models.lookup import load_raw_config
from tinyserve.progress import Progress
from tinyserve.text.chat_template import ChatTemplate
from tinyserve.text.tokenizer import Tokenizer

LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True)
class ModelFiles:
    """What was found under a model's name. No tokenizer: the weights are synthetic, and speak token ids only."""

    name: str
    path: Path | None
    config: ModelConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    generation: GenerationConfig
    end_tokens: Mapping[int, list[str]]  # the ids that end an answer, and where each is said to
    raw_config: dict[str, Any]

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end an answer, whoever says so."""
        return frozenset(self.end_tokens)

    @property
    def packed_dtype(self) -> str | None:
        """The dtype that `tinyserve quantize` packed the weights in; None for an ordinary checkpoint."""
        return (self.raw_config.get("quantization_config") or {}).get("dtype")


def open_model(model: str | PathLike[str], load_format: str = "auto", progress: Progress | None = None) -> ModelFiles:
    """Find a model, downloading it if need be, and open its files; raises the errors of hub, config and checkpoint.

    `load_format="dummy"` makes synthetic weights from the config alone: no download. `progress` is that of
    `hub.resolve`.
    """
    if load_format not in LOAD_FORMATS:
        raise UserError(f"load_format {load_format!r} does not exist; there are {' and '.join(LOAD_FORMATS)}.")
    ref = ModelRef.parse(model)
    if ref.preset is not None:
        check_supported(preset_config(ref.preset.name))  # before gigabytes are downloaded for nothing
    if load_format == "dummy":
        return _synthetic(ref)
    path = hub.resolve(ref, progress=progress)
    return _from_gguf(ref.name, path) if path.is_file() else _from_folder(ref.name, path)


def _synthetic(ref: ModelRef) -> ModelFiles:
    from tinyserve.models.synthetic import synthetic_checkpoint

    raw, source = load_raw_config(ref)
    config = parse_config(raw, source)
    check_supported(config)
    ends = {token: ["config.json"] for token in config.eos_token_ids}
    generation = GenerationConfig(source="generation_config.json")
    return ModelFiles(ref.name, None, config, synthetic_checkpoint(config), None, None, generation, ends, raw)


def _from_folder(name: str, folder: Path) -> ModelFiles:
    from tinyserve.checkpoints.safetensors import open_safetensors

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not the folder of a Hugging Face checkpoint.")
    raw = read_json(folder / "config.json")
    config = parse_config(raw, str(folder / "config.json"))
    check_supported(config)
    file = folder / "generation_config.json"
    generation = GenerationConfig.parse(read_json(file) if file.is_file() else {}, str(file))
    tokenizer = Tokenizer.from_folder(folder)
    checkpoint = open_safetensors(folder)
    if config.tie_word_embeddings and any(key.startswith("lm_head.") for key in checkpoint):
        # Tied is many a config's default, and a head in the file may be another matrix: transformers reads it too.
        config = replace(config, tie_word_embeddings=False)
    return _assemble(name, folder, config, checkpoint, tokenizer, generation, raw)


def _from_gguf(name: str, path: Path) -> ModelFiles:
    from tinyserve.checkpoints.gguf import open_gguf
    from tinyserve.models.gguf_config import generation_config, hf_config

    file = open_gguf(path)
    raw = hf_config(file)
    config = parse_config(raw, str(path))
    check_supported(config)
    tokenizer = Tokenizer.from_gguf(file.metadata, str(path))
    generation = GenerationConfig.parse(generation_config(file), str(path))
    return _assemble(name, path, config, file.tensors, tokenizer, generation, raw)


def _assemble(
    name: str,
    path: Path,
    config: ModelConfig,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    generation: GenerationConfig,
    raw: dict[str, Any],
) -> ModelFiles:
    source = tokenizer.chat_template
    template = ChatTemplate(source, tokenizer.special_tokens, name) if source else None
    said: dict[str, Iterable[int]] = {
        "config.json": config.eos_token_ids,
        "generation_config.json": generation.eos_token_ids,
        # What the tokenizer knows by itself: it has read the two configs as well.
        "tokenizer": tokenizer.eos_token_ids.difference(config.eos_token_ids, generation.eos_token_ids),
    }
    if path.is_file():  # a GGUF file, whose metadata is all of these
        said = {"metadata": set().union(*said.values())}
    said["chat template"] = tokenizer.end_tokens() - tokenizer.eos_token_ids
    ends: dict[int, list[str]] = {}
    for origin, tokens in said.items():
        for token in sorted(tokens):
            ends.setdefault(token, []).append(origin)
    return ModelFiles(name, path, config, checkpoint, tokenizer, template, generation, ends, raw)
