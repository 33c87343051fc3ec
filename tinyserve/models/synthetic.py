"""Random weights of the right names and shapes: a model's speed and memory without its download.

Knows what a config implies, and of trained models only that norms are near one and matrices near zero.
"""

import math
import zlib
from functools import cache, partial

import numpy as np

from tinyserve.checkpoints.checkpoint import Array, Checkpoint, LazyTensor
from tinyserve.models.config import ModelConfig
from tinyserve.models.config.shapes import TensorShape
from tinyserve.models.dtypes import WEIGHT_DTYPES
from tinyserve.tensor.quant import ZERO_4, ZERO_8, IntegerWeights

# Numbers drawn once; a tensor starts at a place of its own and repeats them. A prime: no two rows begin alike.
_POOL = 1048573
_DEVIATION = 0.02  # of weights; with it activations stay of the size of a trained model's through all layers


def synthetic_checkpoint(config: ModelConfig) -> Checkpoint:
    """A checkpoint of random float32 tensors, the same for the same config."""
    tensors = {
        tensor.name: LazyTensor(
            tensor.shape, "synthetic weights", partial(_draw, tensor), packed=partial(packed_matrix, tensor.name)
        )
        for tensor in config.tensor_shapes()
    }
    return Checkpoint(tensors, "synthetic weights")


def packed_matrix(name: str, shape: tuple[int, int], dtype: str) -> IntegerWeights:
    """Random integers as a packed (N, K) matrix of this dtype, at the speed of memory: nothing is rounded."""
    bits, group = WEIGHT_DTYPES[dtype].weight_bits, WEIGHT_DTYPES[dtype].group_size
    packed = IntegerWeights.empty(shape, bits, group)
    pool, deviation = _integers(bits)
    packed.stream[:] = _repeat(pool, name, packed.stream.shape)
    packed.scales[:] = np.float16(_DEVIATION / deviation).view(np.int16)
    return packed


def _draw(tensor: TensorShape) -> Array:
    if tensor.name.endswith("weight") and (tensor.component == "norm" or tensor.name.endswith("norm.weight")):
        return np.ones(tensor.shape, np.float32)
    return _repeat(_normals(), tensor.name, tensor.shape)


def _repeat(pool: Array, name: str, shape: tuple[int, ...]) -> Array:
    pool = np.roll(pool, -(zlib.crc32(name.encode()) % _POOL))
    # np.resize would do it too, but keeps whole pools alive behind what it returns.
    numbers = np.empty(math.prod(shape), pool.dtype)
    for begin in range(0, numbers.size, _POOL):
        numbers[begin : begin + _POOL] = pool[: numbers.size - begin]
    return numbers.reshape(shape)


@cache
def _normals() -> Array:
    return np.random.default_rng(0).standard_normal(_POOL, dtype=np.float32) * np.float32(_DEVIATION)


@cache
def _integers(bits: int) -> tuple[Array, float]:
    """A pool of packed weights, and the deviation of what they stand for."""
    largest = 2 ** (bits - 1) - 1
    draw = np.random.default_rng(bits).standard_normal((2, _POOL), dtype=np.float32) * np.float32(largest / 3)
    whole = np.clip(np.rint(draw), -largest, largest).astype(np.int16)
    if bits == 8:
        return (whole[0] + ZERO_8).astype(np.uint8).view(np.int8), float(whole[0].std())
    low, high = whole + ZERO_4
    return (low | high << 4).astype(np.uint8), float(whole.std())
