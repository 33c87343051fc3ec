"""config.json -> a ModelConfig: believe the checkpoint, refuse the unsupported, invent nothing.

Knows nothing of weights or the network; imports neither numpy nor numba.
"""

from collections.abc import Mapping
from typing import Any

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.fields import shown
from tinyserve.errors import ConfigError
from tinyserve.models import registry
from tinyserve.models.config.base import ATTENTION, MAMBA, ConfigFields, ModelConfig, RopeParameters
from tinyserve.models.config.generation import GenerationConfig
from tinyserve.models.dtypes import WEIGHT_DTYPES

__all__ = [
    "ATTENTION",
    "MAMBA",
    "PACKED",
    "PACKED_VERSION",
    "GenerationConfig",
    "ModelConfig",
    "RopeParameters",
    "parse_config",
    "preset_config",
]

PACKED_VERSION = 2  # of the layout that tensor/quant.py describes
PACKED = "tinyserve"  # the quant_method of checkpoints that `tinyserve quantize` writes


def parse_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Read a config.json in either dialect; raises ConfigError naming `source`, key and value."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: a config is one JSON object, but this is a {type(raw).__name__}.")
    fields = ConfigFields(raw, source)
    families = registry.by_model_type()
    model_type = fields.choice("model_type", tuple(families))
    _refuse_unsupported(fields)
    return families[model_type].config_class().parse(fields, model_type)


def preset_config(name: str) -> ModelConfig:
    """The config that a preset says it has; raises UnknownModelError."""
    preset = presets.get(name)
    return parse_config(preset.raw_config, preset.source)


def _refuse_unsupported(fields: ConfigFields) -> None:
    """Refuse what no architecture here can load: quantized checkpoints, encoders, classifiers, stretched positions."""
    for key in ("quantization_config", "compression_config"):
        quantization = fields.raw.get(key)
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        if quantization and method != PACKED:
            fields.refuse(
                f"{key!r} has the method {shown(method)}, which is not supported; take the model's float16, "
                "bfloat16 or float32 checkpoint (it is quantized here, with --dtype) or a GGUF file."
            )
        version = quantization.get("version") if isinstance(quantization, Mapping) else None
        if method == PACKED and version != PACKED_VERSION:
            fields.refuse(
                f"the weights are packed in layout {shown(version)}, and this version of tinyserve reads layout "
                f"{PACKED_VERSION}: write the checkpoint again from the original with `tinyserve quantize`."
            )
        if method == PACKED:
            fields.inside(key, fields.objects(key)).choice("dtype", tuple(WEIGHT_DTYPES))
    for key in ("add_cross_attention", "is_encoder_decoder"):
        if fields.boolean(key, default=False):
            fields.refuse(f"{key!r} is true, but only decoders without an encoder are supported.")
    fields.rope(max_position_embeddings=1)  # a type that is not built is refused although no head may be rotated
    for architecture in fields.names("architectures"):
        if "Classification" in architecture or "QuestionAnswering" in architecture:
            fields.refuse(
                f"'architectures' has {shown(architecture)}, which is not a language model (supported: ...ForCausalLM)."
            )
