"""A model's weights packed once and for all: written as the kernels read them, so that loading is mapping a file.

Knows which files make a checkpoint; what packing means is told by quantize.py, and how it is read by models/base.py.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyserve.errors import UserError
from tinyserve.loading import open_model
from tinyserve.models import build_model
from tinyserve.models.base import STREAM
from tinyserve.models.config import PACKED, PACKED_VERSION
from tinyserve.models.dtypes import weight_dtype
from tinyserve.models.matrix import IntegerMatrix
from tinyserve.progress import Progress

if TYPE_CHECKING:
    import numpy as np

SHARD = 1 << 30  # bytes after which another file begins, so that no more than that is copied at a time
# What a checkpoint's folder has beside config.json and weights.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "additional_chat_templates/*.jinja")


def write(model: str, out: Path, dtype: str, progress: Progress | None = None) -> tuple[int, int]:
    """Pack a model in this dtype into the folder `out`, which must not exist; returns (bytes of weights, files).

    Raises UserError for a dtype of floats, an `out` that is there, or a model that is packed already; OSError, and
    leaves nothing behind, when writing fails.
    """
    kind = weight_dtype(dtype)
    dtype = kind.name
    if not kind.is_integer:
        raise UserError(f"dtype {dtype} is not quantized: take int8, w8a8, int4 or w4a8.")
    if out.exists():
        raise UserError(f"{out} exists already: give another folder, or delete it first.")
    files = open_model(model, progress=progress)
    if files.packed_dtype:
        raise UserError(f"{model} is packed already, as {files.packed_dtype}: quantize the original.")
    built: dict[str, Any] = {}
    build_model(files.config, files.checkpoint, dtype, files.config.max_position_embeddings, progress, built)
    _clear_away(out)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        nbytes, count = _write_weights(partial, built)
        if files.path is not None and files.path.is_dir():
            _copy_companions(files.path, partial)
        elif files.tokenizer is not None:
            files.tokenizer.save(partial)
            generation = files.generation.as_json() | {"eos_token_id": sorted(files.eos_token_ids)}
            (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        quantization = {"quant_method": PACKED, "version": PACKED_VERSION, "dtype": dtype}
        config = files.raw_config | {"quantization_config": quantization}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for weights in partial.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
            shutil.copymode(partial / "config.json", weights)
        try:
            partial.rename(out)
        except OSError:
            if out.exists():  # another process was faster, and wrote all of it
                raise UserError(f"{out} was written by another process meanwhile: give another folder.") from None
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return nbytes, count


def _clear_away(out: Path) -> None:
    """Delete what processes that were killed have left beside `out`."""
    for old in out.parent.glob(f"{glob.escape(out.name)}.*.partial"):
        pid = old.name.removesuffix(".partial").rpartition(".")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(old, ignore_errors=True)


def _tensors(built: dict[str, Any]) -> "Iterator[tuple[str, np.ndarray]]":
    for name, value in built.items():
        if isinstance(value, IntegerMatrix):
            yield f"{name}.{STREAM}", value.packed.stream
        else:
            yield name, value


def _write_weights(folder: Path, built: dict[str, Any]) -> tuple[int, int]:
    from safetensors.numpy import save_file

    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in _tensors(built):
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = array
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    total = sum(array.nbytes for shard in shards for array in shard.values())
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total, len(shards)


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.name != "config.json" and not file.name.endswith(".safetensors.index.json"):
                target = folder / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
