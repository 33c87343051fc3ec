"""Every dtype by its name: of weights with their activations, and of the KV cache; its width, and what "auto" is.

Names, numbers and words only. How a matrix is packed is told by matrix.py, how pages are laid out by kv_cache.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tinyserve.errors import UserError, did_you_mean
from tinyserve.progress import size

SCALE_BYTES: Final = 2  # a float16 for each group of inputs


@dataclass(frozen=True)
class WeightDtype:
    """How a weight matrix is kept, and what its activations are rounded to before they are multiplied with it."""

    name: str
    weight_bits: int
    activation_bits: int
    group_size: int = 0  # inputs that share a scale; 0 where weights are floats

    @property
    def is_integer(self) -> bool:
        """Whether weights are integers with scales."""
        return self.group_size > 0

    @property
    def at_least_8_bits(self) -> str:
        """The dtype for embeddings, heads and routers, which 4 bits would ruin first."""
        return self.name.replace("w4", "w8")


# Activations of 8 bits want the finer scale, and so do weights of 4.
WEIGHT_DTYPES: Final = {
    dtype.name: dtype
    for dtype in (
        WeightDtype("float32", 32, 32),
        WeightDtype("bfloat16", 16, 32),
        WeightDtype("w8a16", 8, 16, 64),
        WeightDtype("w8a8", 8, 8, 32),
        WeightDtype("w4a16", 4, 16, 32),
        WeightDtype("w4a8", 4, 8, 32),
    )
}
ALIASES: Final = {"int8": "w8a16", "auto": "w8a16", "int4": "w4a16", "fp32": "float32", "bf16": "bfloat16"}
# What people are shown and shells complete: an alias in the place of the name it stands for.
SHOWN: Final = ("auto", "float32", "bfloat16", "int8", "w8a8", "int4", "w4a8")
REPORTED: Final = ("float32", "bfloat16", "int8", "int4")  # what memory is told of by default
HELP: Final = "float32, bfloat16, int8 (w8a16; what auto means), w8a8, int4 (w4a16) or w4a8."
INTEGER_HELP: Final = "int8 (w8a16), w8a8, int4 (w4a16) or w4a8."


@dataclass(frozen=True)
class KVCacheDtype:
    """How keys and values are kept: bytes of a number, and of the scale that a head's numbers of a token share."""

    name: str
    itemsize: int
    scale_bytes: int = 0

    def head_bytes(self, width: int) -> int:
        """Bytes of `width` numbers of one head, with their scale."""
        return width * self.itemsize + self.scale_bytes


KV_CACHE_DTYPES: Final = {
    dtype.name: dtype for dtype in (KVCacheDtype("float32", 4), KVCacheDtype("bfloat16", 2), KVCacheDtype("int8", 1, 4))
}


def weight_dtype(name: str) -> WeightDtype:
    """The weight dtype of a name or an alias; raises UserError that lists the names."""
    dtype = WEIGHT_DTYPES.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if dtype is not None:
        return dtype
    raise UserError(
        f"dtype {name!r} is not built; there are {', '.join(WEIGHT_DTYPES)}, and int8 and auto for w8a16."
        f"{did_you_mean(str(name), (*WEIGHT_DTYPES, *ALIASES), 0.6)}"
    )


def resolve_dtype(name: str, packed: str | None = None) -> str:
    """A dtype's own name; raises UserError that lists the dtypes, or says what a `packed` checkpoint can be read as."""
    if packed and name == "auto":
        name = packed
    dtype = weight_dtype(name)
    if packed and not (dtype.is_integer and dtype.weight_bits == weight_dtype(packed).weight_bits):
        raise UserError(f"The weights are packed as {packed}, which do not run as {dtype.name}: quantize the original.")
    return dtype.name


def resolve_kv_cache_dtype(name: str, dtype: str) -> str:
    """What keys and values are kept in: "auto" is float32 for a float32 model, else bfloat16; raises UserError."""
    if name == "auto":
        return "float32" if dtype == "float32" else "bfloat16"
    if name not in KV_CACHE_DTYPES:
        raise UserError(f"kv_cache_dtype {name!r} does not exist; there are auto, {', '.join(KV_CACHE_DTYPES)}.")
    return name


def kept_weights(dtype: str, weights_by_bits: Mapping[int, int], nbytes: int) -> str:
    """What is kept in memory, in words that are the same everywhere: "int8 (w8a16): 8 bits a weight, 152.3 MB".

    `weights_by_bits` says how many weights of matrices have so many bits, for a dtype does not decide it alone: of a
    file that has fewer bits they are kept, and some matrices have more than the others.
    """
    kind = WEIGHT_DTYPES[dtype]
    name = next((f"{alias} ({dtype})" for alias, own in ALIASES.items() if own == dtype and alias in SHOWN), dtype)
    fewer = sorted(bits for bits in weights_by_bits if bits < kind.weight_bits)
    more = sorted(bits for bits in weights_by_bits if bits > kind.weight_bits)
    words = f"{kind.weight_bits} bits a weight"
    if fewer:
        where = (
            "this file's" if max(weights_by_bits, key=weights_by_bits.__getitem__) in fewer else "where this file has"
        )
        kept = " or ".join(map(str, fewer))
        words = f"at most {kind.weight_bits} bits; "
        words += f"{where} {kept} bits are kept" if where == "this file's" else f"{where} {kept} they are kept"
    elif more:
        words += f", {more[0]} in embeddings and heads"
    return f"{name}: {words}, {size(nbytes)}"
