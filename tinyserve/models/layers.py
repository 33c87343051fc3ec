"""The parts that architectures are made of: callables that hold weights and nothing else.

Knows kernels and shapes; which parts make a Llama and under which names they are stored is told by models/llama.py.
"""

import numpy as np

from tinyserve.models.batch import Batch
from tinyserve.models.cache import LayerCache
from tinyserve.quantize import Matrix
from tinyserve.tensor import attention, norm, rope

Array = np.ndarray


class Linear:
    """y = x · Wᵀ + b."""

    def __init__(self, matrix: Matrix, bias: Array):
        self.matrix, self.bias = matrix, bias

    def __call__(self, x: Array) -> Array:
        """x (tokens, inputs) -> (tokens, outputs)."""
        return self.matrix.matmul(x, self.bias)


class Embedding:
    """A row for each token; as a head, the product of a hidden state with every row."""

    def __init__(self, matrix: Matrix, no_bias: Array):
        self.matrix, self.no_bias = matrix, no_bias

    def __call__(self, token_ids: Array) -> Array:
        """token_ids (tokens,) -> (tokens, hidden)."""
        return self.matrix.rows(token_ids)

    def head(self, x: Array) -> Array:
        """x (rows, hidden) -> logits (rows, vocab)."""
        return self.matrix.matmul(x, self.no_bias)


class RMSNorm:
    """x / rms(x) · weight."""

    def __init__(self, weight: Array, eps: float):
        self.weight, self.eps = weight, np.float32(eps)

    def __call__(self, x: Array) -> Array:
        return norm.rms_norm(x, self.weight, self.eps)


class LayerNorm:
    """(x - mean) / deviation · weight + bias."""

    def __init__(self, weight: Array, bias: Array, eps: float):
        self.weight, self.bias, self.eps = weight, bias, np.float32(eps)

    def __call__(self, x: Array) -> Array:
        return norm.layer_norm(x, self.weight, self.bias, self.eps)


class Rope:
    """Rotary positions for heads of one size; the table has a row for each position."""

    def __init__(self, frequencies: Array, positions: int):
        self.cosines, self.sines = rope.rope_table(frequencies, positions)
        self.cosines.flags.writeable = self.sines.flags.writeable = False

    def __call__(self, x: Array, positions: Array, heads: int, head_dim: int) -> None:
        """Rotate the first `heads` heads of each row of x, in place."""
        rope.apply_rope(x, self.cosines, self.sines, positions, heads, head_dim)


class Attention:
    """Causal self-attention: one product makes queries, keys and values, one mixes the heads' answers.

    `kv_heads` tells the kind: as many as `heads` is multi-head, fewer is grouped-query, one is multi-query.
    """

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        rope: Rope | None = None,
        window: int = 0,
    ):
        self.qkv, self.out, self.rope = qkv, out, rope
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.window = np.float32(scale), window

    def __call__(self, x: Array, batch: Batch, cache: LayerCache) -> Array:
        """x (tokens, hidden) -> (tokens, hidden); each token sees its own sequence up to itself."""
        keys, values = cache
        qkv = self.qkv(x)  # (tokens, (heads + 2·kv_heads)·head_dim)
        if self.rope is not None:
            self.rope(qkv, batch.positions, self.heads + self.kv_heads, self.head_dim)
        attention.store_kv(qkv, self.heads, self.kv_heads, self.head_dim, batch.slots, keys, values)
        mixed = attention.attention(
            qkv, self.heads, keys, values, batch.block_tables, batch.sequence_of, batch.positions,
            self.scale, self.window,
        )  # (tokens, heads·head_dim)  # fmt: skip
        return self.out(mixed)
