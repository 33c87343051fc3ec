"""Taps: one forward pass over a prompt of which everything is kept that a layer takes in, makes, and looks at.

The model's own kernels compute what goes through the layers. What they never have as an array, a head's attention
weights and how much of its state a Mamba keeps, is computed once more in NumPy.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from tinyserve.models.base import DecoderModel
from tinyserve.models.batch import Batch, BatchShape, Wanted
from tinyserve.models.granite import Mamba
from tinyserve.models.kv_cache import KVCache
from tinyserve.models.layers import Attention, FeedForward, Mixer, Normed
from tinyserve.tensor import reference
from tinyserve.tensor.mamba2 import Scan
from tinyserve.tensor.reference_mamba2 import softplus

Array = np.ndarray

BLOCK_SIZE = 16
T = TypeVar("T")


class Run(Protocol):
    """Calls a function, and returns what it returns."""

    def __call__(self, function: Callable[[], T], /) -> T: ...


@dataclass(eq=False)
class LayerTap:
    """What one layer did with a prompt: an attention layer has `attention`, a Mamba2 layer the last three."""

    mixer: Array
    """(tokens, hidden) float32: what attention or Mamba2 added to the residual stream."""
    mlp: Array
    """(tokens, hidden) float32: what the MLP, or the mixture of experts, added."""
    attention: Array | None = None
    """(heads, tokens, tokens) float32: row t is what token t takes from each token; it sums to 1."""
    dt: Array | None = None
    """(tokens, heads) float64: the step of a Mamba2 head, by which a token is written to its state."""
    decay: Array | None = None
    """(tokens, heads) float64: e^(dt·A), the share of its state that a head keeps at a token."""
    state: Array | None = None
    """(heads, d_state, d_head) float32: a Mamba2 layer's state behind the last token."""


@dataclass(eq=False)
class Taps:
    """A forward pass: the residual stream before, between and behind the layers, and what each layer did."""

    stream: Array  # (layers + 1, tokens, hidden) float32
    layers: list[LayerTap]


@dataclass(frozen=True)
class _Place:
    """The only sequence of a cache of its own."""

    block_table: list[int]
    state_slot: int = 0
    num_computed: int = 0


def tap(model: DecoderModel, token_ids: Sequence[int], kv_cache_dtype: str, run: Run) -> Taps:
    """Compute a prompt from its first token on, in a cache of its own; raises UserError where there is no memory for
    it.

    `run` calls a function that needs the kernels: once for each layer, so that nobody waits for longer.
    """
    place = _Place(list(range(-(-len(token_ids) // BLOCK_SIZE))))
    cache = KVCache(model.config, len(place.block_table), BLOCK_SIZE, kv_cache_dtype)
    work = [(token_ids, place)]
    batch = Batch.empty(BatchShape.of(work, len(token_ids)))
    batch.fill(work, range(len(token_ids)), BLOCK_SIZE)
    stream, layers = [run(partial(model.embed, batch))], list[LayerTap]()
    for block, layer_cache in zip(model.blocks, cache.layers, strict=True):
        tapped, mixer, mlp = copy.copy(block), _TappedMixer(block.mixer), _TappedMLP(block.mlp)
        tapped.mixer, tapped.mlp = mixer, mlp
        stream.append(run(partial(tapped, stream[-1].copy(), batch, layer_cache)))
        layer = LayerTap(mixer.added, mlp.added)
        if isinstance(block.mixer, Attention):
            layer.attention = attention_weights(block.mixer, mixer.projected)
        elif isinstance(block.mixer, Mamba):
            layer.dt, layer.decay = steps(block.mixer.scan, mixer.projected)
            layer.state = layer_cache.states[0].copy()
        layers.append(layer)
    return Taps(np.stack(stream), layers)


class _TappedMixer:
    projected: Array  # what its first product makes: queries, keys and values, or a Mamba's inputs
    added: Array

    def __init__(self, mixer: Mixer):
        self._mixer = mixer

    def __call__(self, x: Normed, batch: Batch, cache: Any, onto: Array, wanted: Wanted | None = None) -> Array:
        match self._mixer:
            case Attention() as attention:
                self.projected = attention.qkv(x)
                if attention.qk_norm is not None:
                    attention.qk_norm(self.projected, attention.heads)
            case Mamba() as mamba:
                self.projected = mamba.in_proj(x)
        before = onto.copy()
        after = self._mixer(x, batch, cache, onto, wanted)
        self.added = after - before
        return after


class _TappedMLP:
    added: Array

    def __init__(self, mlp: FeedForward):
        self._mlp = mlp

    def __call__(self, x: Normed, onto: Array) -> Array:
        before = onto.copy()
        after = self._mlp(x, onto)
        self.added = after - before
        return after


def attention_weights(attention: Attention, qkv: Array) -> Array:
    """softmax(scale · q·kᵀ) of each head over a whole prompt, (heads, tokens, tokens) float32.

    qkv (tokens, (heads + 2·kv_heads)·head_dim) float32, which is rotated in place.
    """
    (heads, kv_heads, head_dim), (scale, window, alibi) = attention.heads, attention.scoring
    positions = np.arange(len(qkv))
    if attention.rope.table.cosines.size:
        reference.apply_rope(qkv, *attention.rope.table, positions, heads + kv_heads, head_dim)
    parts = qkv.reshape(len(qkv), heads + 2 * kv_heads, head_dim).astype(np.float64).transpose(1, 0, 2)
    distance = positions[:, None] - positions
    unseen = (distance < 0) | (distance >= window if window > 0 else False)
    weights = np.empty((heads, len(qkv), len(qkv)), np.float32)
    for head in range(heads):
        scores = parts[head] @ parts[heads + head * kv_heads // heads].T
        if alibi.size:
            scores += alibi[head, : len(positions)]
        scores = np.where(unseen, -np.inf, scores * scale)
        share = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights[head] = share / share.sum(axis=1, keepdims=True)
    return weights


def steps(scan: Scan, projected: Array) -> tuple[Array, Array]:
    """dt and e^(dt·A) of each head at each token, two of (tokens, heads) float64; projected (tokens, .. | dt)."""
    dt = softplus(projected[:, -len(scan.A) :].astype(np.float64) + scan.dt_bias)
    dt = np.clip(dt, scan.dt_min, scan.dt_max)
    return dt, np.exp(dt * scan.A)
