"""The config.json that a GGUF file's metadata imply, in Hugging Face's keys.

Knows what all architectures have in common; the keys of each are told by its config.
"""

from pathlib import Path
from typing import Any

from tinyserve.checkpoints.fields import Fields, shown
from tinyserve.checkpoints.gguf import GGUFFile, open_gguf
from tinyserve.errors import ConfigError
from tinyserve.models import registry
from tinyserve.models.config.gguf import GGUFMetadata
from tinyserve.sampling_params import SamplingParams


def config_from_gguf(path: Path) -> dict[str, Any]:
    """The config a GGUF file implies, under Hugging Face's keys; raises ConfigError naming the missing key."""
    return hf_config(open_gguf(path))


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The same for an opened file."""
    metadata, families = file.metadata, registry.by_architecture()
    architecture = metadata.get("general.architecture")
    family = families.get(str(architecture))
    if family is None:
        raise ConfigError(
            f"{file.path}: general.architecture {shown(architecture)} is not supported; tinyserve reads GGUF files of "
            f"{', '.join(families)}."
        )
    keys = GGUFMetadata(
        str(file.path), str(architecture), metadata, file.tensors.tensors.keys(),
        largest=lambda name: _largest(file, name),
    )  # fmt: skip
    keys.require("attention.causal", True)
    keys.require("pooling_type", 0)
    raw = family.config_class().from_gguf(keys)
    raw["vocab_size"] = keys.key("vocab_size", None) or _vocab_size(file)
    fields = Fields(metadata, str(file.path))
    raw["bos_token_id"] = fields.token_id("tokenizer.ggml.bos_token_id")
    ends = [fields.token_id(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    raw["eos_token_id"] = sorted({end for end in ends if end is not None})
    raw["tie_word_embeddings"] = "output.weight" not in file.tensors
    return raw


def generation_config(file: GGUFFile) -> dict[str, Any]:
    """What the metadata says of sampling, under the keys of generation_config.json."""
    rows = [row for row in SamplingParams.rows.values() if row.gguf]
    found = {str(row.file): file.metadata.get(f"general.sampling.{row.gguf}") for row in rows}
    # Seven digits: 0.6 is kept as the float32 nearest to it.
    raw = {key: float(f"{n:.7g}") if isinstance(n, float) else n for key, n in found.items() if n is not None}
    return raw | {"do_sample": bool(raw.get("temperature"))}


def _largest(file: GGUFFile, name: str) -> float:
    values = file.tensors[name]
    if not values.size:
        raise ConfigError(f"{file.path}: tensor {name!r} has no numbers; convert the model again.")
    return float(values.max())


def _vocab_size(file: GGUFFile) -> int:
    vocabulary, embedding = file.metadata.get("tokenizer.ggml.tokens"), file.tensors.tensors.get("token_embd.weight")
    if isinstance(vocabulary, list):
        return len(vocabulary)
    if vocabulary is not None or embedding is None or not embedding.shape:
        raise ConfigError(
            f"{file.path}: tokenizer.ggml.tokens is {shown(vocabulary)}, not a vocabulary; convert the model again."
        )
    return embedding.shape[0]
