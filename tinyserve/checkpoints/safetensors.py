"""Safetensors files, one or many with an index, memory-mapped: a tensor costs memory only while it is converted.

Knows the file format and its float dtypes; the library checks each file, NumPy reads it (bfloat16 and float8, which
NumPy lacks, are widened here).
"""

import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from tinyserve.checkpoints.checkpoint import Array, Checkpoint, Index, LazyTensor, MappedFile
from tinyserve.checkpoints.shard_index import INDEX, WHOLE, read_index
from tinyserve.errors import CheckpointError

_MAX_HEADER = 32 << 20  # bytes: of the largest shards about, not a tenth of it


def open_safetensors(folder: Path) -> Checkpoint:
    """Map every tensor of a folder's safetensors files; raises CheckpointError naming the file and the tensor."""
    if (folder / WHOLE).is_file():
        return Checkpoint(_open_file(folder / WHOLE), str(folder))
    if (folder / INDEX).is_file():
        return Checkpoint(_indexed(folder), str(folder))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no *.safetensors file: tinyserve reads safetensors and GGUF, not pickled weights."
        )
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        found = _open_file(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{file} has tensor {twice[0]!r}, and so has {tensors[twice[0]].file}: without {INDEX} nothing says "
                "which one is the model's; leave the files of one model in the folder."
            )
        tensors |= found
    return Checkpoint(tensors, str(folder))


def _indexed(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of all shards, each from the one that the index names."""
    wanted = read_index(folder / INDEX)
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(wanted.values())):
        found = _open_file(folder / shard)
        tensors |= {name: tensor for name, tensor in found.items() if wanted.get(name) == shard}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise CheckpointError(
            f"{folder / wanted[missing[0]]} lacks tensor {missing[0]!r}, which {INDEX} promises there: "
            f"download the shards again."
        )
    return tensors


def _open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, by name."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again.")
    with path.open("rb") as stream:
        if (header := int.from_bytes(stream.read(8), "little")) > _MAX_HEADER and path.stat().st_size > _MAX_HEADER:
            raise CheckpointError(
                f"{path} is not a safetensors file: its header would be {header} bytes long; download it again."
            )
    try:
        with safe_open(path, framework="numpy"):  # checks the header, every offset, and the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error!s:.200}): it is truncated or corrupt, download it "
            "again."
        ) from None
    file = MappedFile(path)
    data = file.bytes
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    return {
        name: _tensor(path, file, start, name, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"])
        for name, entry in header.items()
    }


def _tensor(
    path: Path, file: MappedFile, start: int, name: str, dtype: str, shape: tuple[int, ...], offsets: list[int]
) -> LazyTensor:
    first, end = (start + offset for offset in offsets)
    data = file.bytes[first:end]
    take = stored = None
    read: Callable[[], Array]
    if dtype in _CONVERT:
        kept_as, convert = _CONVERT[dtype]
        values = data.view(kept_as).reshape(shape)
        read = partial(convert, values)
        if len(shape) >= 2:
            take = partial(_take, values.reshape(math.prod(shape[:-1]), shape[-1]), convert)
    else:
        read = partial(_refuse, path, name, dtype)
    if dtype in _STORED:
        stored = partial(_stored, data, shape, _STORED[dtype])
    forget = partial(file.forget, first, end)
    return LazyTensor(shape, str(path), read, stored=stored, name=name, take=take, forget=forget)


def _take(matrix: Array, convert: Callable[[Array], Array], index: Index, transposed: bool) -> Array:
    return convert(matrix[:, index].T if transposed else matrix[index])


def _refuse(path: Path, name: str, dtype: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: tensor {name!r} has dtype {dtype}; tinyserve reads {', '.join(_CONVERT)} "
        f"(a quantized checkpoint needs its unquantized original)."
    )


_STORED = {"I8": np.int8, "U8": np.uint8, "I16": np.int16}


def _stored(data: Array, shape: tuple[int, ...], kept_as: type) -> Array:
    return np.asarray(data).view(kept_as).reshape(shape)


def _widen_bfloat16(data: Array) -> Array:
    wide = data.astype(np.uint32)
    wide <<= 16  # in place: one tensor in memory, not two
    return wide.view(np.float32)


@np.errstate(over="ignore")  # what float32 cannot hold is an infinity in it
def _narrow_float64(data: Array) -> Array:
    return data.astype(np.float32)


@cache
def _float8_values(exponent_bits: int) -> Array:
    """What each of the 256 bytes means: OCP 8-bit floats, E4M3 (finite, "fn") and E5M2."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    byte = np.arange(256)
    exponent = (byte >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (byte & (2**mantissa_bits - 1)) / 2**mantissa_bits
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if exponent_bits == 5:
        value = np.where(exponent == 31, np.where(fraction == 0, np.inf, np.nan), value)
    else:
        value = np.where((byte & 0x7F) == 0x7F, np.nan, value)
    return np.where(byte & 0x80, -value, value).astype(np.float32)


# How a dtype is kept, and how it becomes float32.
_CONVERT: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "F32": ("<f4", np.asarray),
    "F16": ("<f2", lambda data: data.astype(np.float32)),
    "BF16": ("<u2", _widen_bfloat16),
    "F64": ("<f8", _narrow_float64),
    "F8_E4M3": ("u1", lambda data: _float8_values(4)[data]),
    "F8_E5M2": ("u1", lambda data: _float8_values(5)[data]),
}
