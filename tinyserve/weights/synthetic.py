"""Random weights of the right names and shapes: a model's speed and memory without its download.

Knows what a config implies, and of trained models only that norms are near one and matrices near zero.
"""

import math
import zlib
from functools import partial

import numpy as np

from tinyserve.config import ModelConfig
from tinyserve.shapes import TensorShape, tensor_shapes
from tinyserve.weights.checkpoint import Array, Checkpoint, LazyTensor

_POOL = 1 << 20  # normal numbers drawn once; a tensor starts at a place of its own and repeats them


def synthetic_checkpoint(config: ModelConfig) -> Checkpoint:
    """A checkpoint of random float32 tensors, the same for the same config."""
    pool = np.random.default_rng(0).standard_normal(_POOL, dtype=np.float32) * np.float32(0.02)
    tensors = {
        tensor.name: LazyTensor(tensor.shape, "synthetic weights", partial(_draw, pool, tensor))
        for tensor in tensor_shapes(config)
    }
    return Checkpoint(tensors, "synthetic weights")


def _draw(pool: Array, tensor: TensorShape) -> Array:
    if tensor.component == "norm" and tensor.name.endswith("weight"):
        return np.ones(tensor.shape, np.float32)
    start = zlib.crc32(tensor.name.encode()) % _POOL
    return np.resize(np.roll(pool, -start), math.prod(tensor.shape)).reshape(tensor.shape)
