"""GGUF files: metadata, and tensors, widened to float32 or as the blocks they are kept in.

Knows the file format; what a block means is told by the gguf package, and by tensor/gguf_blocks.py for the common
ones. The header is read here because that package spends seconds on a vocabulary's 100,000 strings, several times what
the rest of loading a small model takes.
"""

import math
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyserve.checkpoints.checkpoint import Array, Checkpoint, Index, LazyTensor, MappedFile
from tinyserve.checkpoints.fields import Fields, shown
from tinyserve.checkpoints.gguf_parts import parts_of
from tinyserve.errors import CheckpointError
from tinyserve.tensor import gguf_blocks

MAGIC = b"GGUF"
# Element types of GGUF's metadata: 0..7 and 10..12 are numbers, 8 a string, 9 an array (gguf.GGUFValueType).
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# What the gguf package dequantizes, and F64.
SUPPORTED = (
    "F32", "F16", "BF16", "F64", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
    "NVFP4",
)  # fmt: skip
# A header that is longer, or has longer lists, is none: a vocabulary of 260,000 tokens takes 20 MB and 1.3 million
# values, each of which is an object here.
_MAX_HEADER, _MAX_VALUES = 128 << 20, 1 << 23
_MAX_NAME, _MAX_DIMENSIONS, _MAX_SIZE = 512, 4, 1 << 48  # of a tensor; its size without zeros


@dataclass(frozen=True)
class GGUFFile:
    """One opened file: its metadata as plain Python values, its tensors by GGUF's own names."""

    path: Path
    metadata: dict[str, Any]
    tensors: Checkpoint


class _Cursor:
    """A position in the header. Reading past the end of the file raises CheckpointError."""

    def __init__(self, path: Path, data: Array):
        self.path, self.data, self.at = path, data.data[:_MAX_HEADER], 0
        self.values = 0  # of all lists so far

    def need(self, count: int) -> None:
        if count < 0 or self.at + count > len(self.data):
            if len(self.data) == _MAX_HEADER:
                what = f"{self.path}: its header goes on past byte {_MAX_HEADER}, which no model's does: it is corrupt"
            else:
                what = f"{self.path} ends at byte {len(self.data)} inside its header: it is truncated or corrupt"
            raise CheckpointError(f"{what}, download it again.")

    def number(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.need(length)
        value = bytes(self.data[self.at : self.at + length])
        self.at += length
        return value.decode("utf-8", errors="replace")

    def rank(self, tensor: str) -> int:
        """How many dimensions a tensor has."""
        if len(tensor) > _MAX_NAME:
            raise CheckpointError(
                f"{self.path}: a tensor's name has {len(tensor)} characters, {tensor!r:.80}; the file is corrupt."
            )
        rank: int = self.number("I")
        if rank > _MAX_DIMENSIONS:
            raise CheckpointError(
                f"{self.path}: tensor {tensor!r} has {rank} dimensions, more than GGUF allows; the file is corrupt."
            )
        return rank

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise CheckpointError(
                f"{self.path}: metadata of type {kind} at byte {self.at} is not GGUF; the file is corrupt."
            )
        element, count = self.number("I"), self.number("Q")
        self.need(count)  # before asking struct for a size that no memory holds
        self.values += count
        if self.values > _MAX_VALUES:
            raise CheckpointError(
                f"{self.path}: the lists of its metadata hold more than {_MAX_VALUES} values, which no model's do: the "
                f"file is corrupt."
            )
        if element in _NUMBERS:
            form = f"<{count}{_NUMBERS[element]}"
            self.need(struct.calcsize(form))
            values = list(struct.unpack_from(form, self.data, self.at))
            self.at += struct.calcsize(form)
            return values
        if element != _STRING:  # of arrays, neither ggml has any
            raise CheckpointError(
                f"{self.path}: an array of type {element} at byte {self.at} is not GGUF; the file is corrupt."
            )
        return self._strings(count)

    def _strings(self, count: int) -> list[str]:
        """The hot loop of opening a file: a vocabulary and its merges."""
        data, at, unpack, values = self.data, self.at, struct.Struct("<Q").unpack_from, []
        try:
            for _ in range(count):
                (length,) = unpack(data, at)
                end = at + 8 + length
                values.append(str(data[at + 8 : end], "utf-8", "replace"))
                at = end
        except (struct.error, OverflowError):  # past the end, or past any index
            at = len(data) + 1
        self.at = min(at, len(data))
        self.need(at - self.at)
        return values


def open_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file, and of all parts if it is one of several, and map their tensors.

    Raises CheckpointError naming the file, and the byte, the key or the tensor. Metadata are the first part's.
    """
    file = _open_part(path)
    split = Fields(file.metadata, str(path), CheckpointError)
    count = split.integer("split.count", default=1, minimum=0, maximum=99_999)  # as many as a name can number
    if count < 2:
        return file
    names = parts_of(path.name)
    if len(names) != count:
        split.refuse(
            f"'split.count' is {count}, so that this is one part of several, and its name does not say which: parts "
            f"are found by their names, NAME-00001-of-{count:05}.gguf and so on."
        )
    parts = [file if name == path.name else _open_part(path.with_name(name)) for name in names]
    tensors: dict[str, LazyTensor] = {}
    for i, part in enumerate(parts):
        fields = Fields(part.metadata, str(part.path), CheckpointError)
        for key, expected in (("split.no", i), ("split.count", count)):
            if (found := fields.integer(key, minimum=0)) != expected:
                fields.refuse(f"{key!r} is {found}, but by its name it is {expected}: it is a part of another model.")
        if twice := sorted(tensors.keys() & part.tensors.tensors.keys()):
            fields.refuse(f"tensor {twice[0]!r} is in {tensors[twice[0]].file} too: they are parts of two models.")
        tensors |= part.tensors.tensors
    total = split.integer("split.tensors.count", default=len(tensors), minimum=0)
    if total != len(tensors):
        split.refuse(
            f"'split.tensors.count' is {total}, but the {count} parts have {len(tensors)} tensors: download them again."
        )
    return GGUFFile(parts[0].path, parts[0].metadata, Checkpoint(tensors, str(parts[0].path)))


def _open_part(path: Path) -> GGUFFile:
    if not path.is_file():
        parts = parts_of(path.name)
        which = f", which is part {parts.index(path.name) + 1} of {len(parts)}: put it beside the others"
        raise CheckpointError(f"{path} does not exist{which if len(parts) > 1 else ''}.")
    if path.stat().st_size < 24:
        raise CheckpointError(
            f"{path} is {path.stat().st_size} bytes long, too short for a GGUF file: download it again."
        )
    mapped = MappedFile(path)
    data = mapped.bytes
    cursor = _Cursor(path, data)
    if bytes(data[:4]) != MAGIC:
        raise CheckpointError(f"{path} does not start with 'GGUF': it is not a GGUF file, or a download was cut off.")
    cursor.at = 4
    version = cursor.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF version {version}; tinyserve reads versions 2 and 3, little-endian.")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    entries = []
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(cursor.number("Q") for _ in range(cursor.rank(name)))[::-1]
        entries.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise CheckpointError(
            f"{path}: general.alignment is {shown(alignment)}, which aligns nothing; the file is corrupt."
        )
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, LazyTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise CheckpointError(f"{path} has two tensors {name!r:.80}: the file is corrupt.")
        tensors[name] = _tensor(path, mapped, start + offset, name, shape, kind)
    return GGUFFile(path, metadata, Checkpoint(tensors, str(path)))


def _tensor(path: Path, file: MappedFile, at: int, name: str, shape: tuple[int, ...], kind: int) -> LazyTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    data = file.bytes
    known = {int(quant) for quant in GGMLQuantizationType}
    quantization = GGMLQuantizationType(kind) if kind in known else None
    if quantization is None or quantization.name not in SUPPORTED:
        found = quantization.name if quantization else f"type {kind}"
        raise CheckpointError(f"{path}: tensor {name!r} is stored as {found}; tinyserve reads {', '.join(SUPPORTED)}.")
    if math.prod(max(1, size) for size in shape) > _MAX_SIZE:  # which arrays are not made for, even where one is zero
        raise CheckpointError(
            f"{path}: tensor {name!r} has the shape {list(shape)}, which no tensor has: it is corrupt."
        )
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    if columns % block:
        raise CheckpointError(
            f"{path}: tensor {name!r} has rows of {columns}, no multiple of {quantization.name}'s {block}."
        )
    size = rows * columns // block * block_bytes
    if at + size > len(data):
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {at + size}, the file at byte {len(data)}; "
            f"download it again."
        )
    raw = data[at : at + size].reshape(rows, columns // block * block_bytes)
    blocks = take = None
    if len(shape) >= 2:
        take = partial(_take, raw, quantization, columns)
        if quantization.name in gguf_blocks.FAST:
            blocks = partial(gguf_blocks.Blocks, quantization.name, raw, (rows, columns))
    read, forget = partial(_dequantize, raw, quantization, shape), partial(file.forget, at, at + size)
    return LazyTensor(shape, str(path), read, blocks, name=name, take=take, forget=forget)


def _take(raw: Array, quantization: Any, columns: int, index: Index, transposed: bool) -> Array:
    if transposed:  # which blocks do not know
        return _dequantize(raw, quantization, (len(raw), columns)).T[index]
    rows = raw[index]
    return _dequantize(rows, quantization, (len(rows), columns))


def _dequantize(raw: Array, quantization: Any, shape: tuple[int, ...]) -> Array:
    if quantization.name in gguf_blocks.FAST:
        from gguf.constants import GGML_QUANT_SIZES

        blocks = raw.reshape(-1, GGML_QUANT_SIZES[quantization][1])
        return gguf_blocks.dequantize(blocks, quantization.name).reshape(shape)
    match quantization.name:
        case "F32":
            return np.asarray(raw).view(np.float32).reshape(shape)
        case "F64":
            return np.asarray(raw).view(np.float64).astype(np.float32).reshape(shape)
        case "F16":
            return np.asarray(raw).view(np.float16).astype(np.float32).reshape(shape)
        case _ if not raw.size:
            return np.zeros(shape, np.float32)
        case _:
            from gguf.quants import dequantize

            return np.asarray(dequantize(raw, quantization), np.float32).reshape(shape)
