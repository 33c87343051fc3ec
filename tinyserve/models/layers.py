"""The parts that architectures are made of: callables that hold weights and nothing else.

Knows kernels and shapes; which parts make a Llama and under which names they are stored is told by models/llama.py.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tinyserve.models.batch import Batch, Wanted
from tinyserve.models.matrix import Matrix, no_bias
from tinyserve.tensor import attention, kv_cache, matmul, rope
from tinyserve.tensor import norm as norms
from tinyserve.tensor.norm import NO_NORM, Norm
from tinyserve.tensor.rows import take_rows

Array = np.ndarray

_NO_ALIBI = np.empty((0, 0), np.float32)
_NO_ALIBI.flags.writeable = False


@dataclass(frozen=True, slots=True)
class Normed:
    """A norm that is not applied yet: the matrix product that reads `x` normalises each row in the same pass."""

    x: Array
    norm: Norm


class Linear:
    """onto + activation(scale · (x · Wᵀ + b)), where x may be behind a norm: one kernel.

    `width` is the number of output columns: the rows of W, or half of them for SwiGLU, which makes one of two.
    """

    def __init__(
        self,
        matrix: Matrix,
        bias: Array,
        activation: int = matmul.PLAIN,
        width: int | None = None,
        scale: float = 1.0,
    ):
        self.matrix, self.width = matrix, width or matrix.shape[0]
        self.after = matmul.Epilogue(bias, np.float32(scale), activation)

    def scaled(self, scale: float) -> "Linear":
        """The same layer, times a constant: applied to what comes out, so that the weights stay the file's."""
        return Linear(self.matrix, self.after.bias, self.after.activation, self.width, scale)

    def __call__(self, x: Array | Normed, onto: Array | None = None) -> Array:
        """x (tokens, inputs), onto (tokens, width) or nothing -> (tokens, width)."""
        x, norm = (x.x, x.norm) if isinstance(x, Normed) else (x, NO_NORM)
        return self.matrix.product(x, norm, self.after, matmul.NOTHING if onto is None else onto, self.width)


class Experts:
    """activation(scale · (x · Wᵀ)) with a W for each expert, one above the other in one matrix: one kernel for all."""

    def __init__(self, matrix: Matrix, activation: int, width: int, scale: float = 1.0):
        self.matrix, self.width = matrix, width
        self.after = matmul.Epilogue(no_bias(), np.float32(scale), activation)

    def scaled(self, scale: float) -> "Experts":
        """The same experts, times a constant."""
        return Experts(self.matrix, self.after.activation, self.width, scale)

    def __call__(self, x: Array | Normed, offsets: Array) -> Array:
        """x (rows, inputs), of which offsets[e] .. offsets[e + 1] are expert e's -> (rows, width)."""
        x, norm = (x.x, x.norm) if isinstance(x, Normed) else (x, NO_NORM)
        return self.matrix.grouped_product(x, norm, offsets, self.after, self.width)


class Embedding:
    """A row for each token; as a head, the product of a hidden state with every row."""

    def __init__(self, matrix: Matrix):
        self.matrix = matrix
        self.head = Linear(matrix, no_bias())  # (rows, hidden) -> logits (rows, vocab)

    def __call__(self, token_ids: Array) -> Array:
        """token_ids (tokens,) -> (tokens, hidden)."""
        return self.matrix.rows(token_ids)


class RMSNorm:
    """x / rms(x) · weight."""

    def __init__(self, weight: Array, eps: float):
        self.norm = Norm(norms.RMS, weight, no_bias(), np.float32(eps))

    def __call__(self, x: Array) -> Normed:
        return Normed(x, self.norm)


class LayerNorm:
    """(x - mean) / deviation · weight + bias."""

    def __init__(self, weight: Array, bias: Array, eps: float):
        self.norm = Norm(norms.LAYER, weight, bias, np.float32(eps))

    def __call__(self, x: Array) -> Normed:
        return Normed(x, self.norm)


class Rope:
    """Rotary positions for heads of one size; the table has a row for each position."""

    def __init__(self, frequencies: Array, positions: int):
        self.table = rope.rope_table(frequencies, positions)
        self.table.cosines.flags.writeable = self.table.sines.flags.writeable = False

    @classmethod
    def none(cls) -> "Rope":
        """No rotation: empty tables."""
        return cls(np.empty(0, np.float32), 0)


class QKNorm:
    """An RMSNorm of each query head and one of each key head, before they are rotated."""

    def __init__(self, q_norm: RMSNorm, k_norm: RMSNorm):
        self.q_norm, self.k_norm = q_norm.norm, k_norm.norm

    def __call__(self, qkv: Array, heads: kv_cache.Heads) -> None:
        """qkv (tokens, (heads + 2·kv_heads)·head_dim): its queries and keys are normalised in place."""
        eps = self.q_norm.eps
        norms.rms_norm_heads(qkv, heads.heads, heads.kv_heads, self.q_norm.weight, self.k_norm.weight, eps)


class MLP:
    """down(up(x)), where `up` ends in an activation: a GELU, or SwiGLU's silu(gate(x)) · up(x)."""

    def __init__(self, up: Linear, down: Linear):
        self.up, self.down = up, down

    def __call__(self, x: Array | Normed, onto: Array) -> Array:
        """x (tokens, hidden) -> onto + the output (tokens, hidden)."""
        return self.down(self.up(x), onto)


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
        alibi: Array | None = None,
        qk_norm: QKNorm | None = None,
    ):
        self.qkv, self.out, self.rope = qkv, out, rope or Rope.none()
        self.heads = kv_cache.Heads(heads, kv_heads, head_dim)
        self.scoring = attention.Scoring(np.float32(scale), window, _NO_ALIBI if alibi is None else alibi)
        self.qk_norm = qk_norm

    def __call__(
        self, x: Array | Normed, batch: Batch, cache: kv_cache.Pages, onto: Array, wanted: Wanted | None = None
    ) -> Array:
        """x (tokens, hidden) -> onto + the output (tokens, hidden); each token sees its own sequence up to itself."""
        tokens = kv_cache.Tokens(batch.positions, batch.slot_mapping, batch.sequence_of, batch.block_tables)
        qkv = self.qkv(x)  # (tokens, (heads + 2·kv_heads)·head_dim)
        if self.qk_norm is not None:
            self.qk_norm(qkv, self.heads)
        kv_cache.rotate_and_store(qkv, self.heads, self.rope.table, tokens, cache)
        if wanted is not None:
            qkv, onto = take_rows(qkv, wanted.rows), take_rows(onto, wanted.rows)
            tokens = tokens._replace(positions=wanted.positions, sequence_of=wanted.sequence_of)
        mixed = attention.attention(qkv, self.heads, self.scoring, tokens, cache)  # (tokens, heads·head_dim)
        return self.out(mixed, onto)


class Mixer(Protocol):
    """Where tokens look at earlier ones: attention, or a Mamba; `cache` is the layer's, of the mixer's kind.

    All tokens go into the cache; those that are wanted come out.
    """

    def __call__(self, x: Normed, batch: Batch, cache: Any, onto: Array, wanted: Wanted | None = None) -> Array: ...


class FeedForward(Protocol):
    """What thinks about each token alone: an MLP, or a mixture of them."""

    def __call__(self, x: Normed, onto: Array) -> Array: ...


class Block:
    """A mixer and an MLP, each behind its norm, each added to the residual stream."""

    def __init__(self, mixer_norm: RMSNorm | LayerNorm, mixer: Mixer, mlp_norm: RMSNorm | LayerNorm, mlp: FeedForward):
        self.mixer_norm, self.mixer, self.mlp_norm, self.mlp = mixer_norm, mixer, mlp_norm, mlp

    def __call__(self, x: Array, batch: Batch, cache: Any, wanted: Wanted | None = None) -> Array:
        """x (tokens, hidden) -> (tokens, hidden), or those of the wanted tokens."""
        x = self.mixer(self.mixer_norm(x), batch, cache, x, wanted)
        return self.mlp(self.mlp_norm(x), onto=x)


class ParallelBlock(Block):
    """The same side by side: both read x, each behind its norm or both behind one, and both are added to it."""

    def __call__(self, x: Array, batch: Batch, cache: Any, wanted: Wanted | None = None) -> Array:
        """x (tokens, hidden) -> (tokens, hidden), or those of the wanted tokens."""
        mixed = self.mixer(self.mixer_norm(x), batch, cache, x, wanted)
        x = x if wanted is None else take_rows(x, wanted.rows)
        return self.mlp(self.mlp_norm(x), onto=mixed)
