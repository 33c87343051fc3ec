"""Granite 3 and 4 (IBM): a Llama with four multipliers, optionally with experts, optionally with Mamba2 layers.

transformers' `granite`, `granitemoe` and `granitemoehybrid`; Dao and Gu 2024, arXiv:2405.21060, for Mamba2; Shazeer et
al. 2017, arXiv:1701.06538, for the experts. Every product that ends in the residual stream is scaled by
`residual_multiplier` as it is added: the weights stay the file's, in whatever bits it keeps them.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from tinyserve.checkpoints.checkpoint import Array, Checkpoint, LazyTensor, stacked
from tinyserve.models.base import DecoderModel, Loader, gguf_names
from tinyserve.models.batch import Batch, Wanted
from tinyserve.models.config import MAMBA
from tinyserve.models.config.granite import GraniteConfig
from tinyserve.models.kv_cache import LayerState
from tinyserve.models.layers import MLP, Attention, Block, Experts, FeedForward, Linear, Normed, Rope
from tinyserve.models.llama import check_divisors, rope_frequencies, rotate_halves
from tinyserve.models.matrix import read_only
from tinyserve.tensor import mamba2, moe, rows


class Mamba:
    """Mamba2: a short convolution and a selective scan, whose memory of a sequence is of fixed size."""

    def __init__(
        self,
        in_proj: Linear,
        convolution: mamba2.Convolution,
        scan: mamba2.Scan,
        norm: Array,  # (inner,)
        eps: float,
        out_proj: Linear,
    ):
        self.in_proj, self.convolution, self.scan, self.out_proj = in_proj, convolution, scan, out_proj
        self.norm, self.eps = norm, np.float32(eps)

    def __call__(
        self, x: Array | Normed, batch: Batch, cache: LayerState, onto: Array, wanted: Wanted | None = None
    ) -> Array:
        """x (tokens, hidden) -> onto + the output (tokens, hidden); the sequences' windows and states move on."""
        projected = self.in_proj(x)  # (tokens, gate | x, B, C | dt)
        sequences = mamba2.Sequences(batch.starts, batch.state_indices)
        inner = self.norm.size
        xBC = mamba2.causal_conv1d(projected, inner, self.convolution, cache.windows, sequences)
        y = mamba2.selective_scan(xBC, projected, self.scan, cache.states, sequences)  # (tokens, inner)
        if wanted is not None:
            y, projected, onto = (rows.take_rows(one, wanted.rows) for one in (y, projected, onto))
        return self.out_proj(mamba2.gated_rms_norm(y, projected, self.norm, self.eps, self.scan.groups), onto)


class Mixture:
    """The experts that the router chooses for a token, by its weights, and the MLP that every token passes through."""

    def __init__(self, router: Linear, up: Experts, down: Experts, count: int, top_k: int, shared: FeedForward | None):
        self.router, self.up, self.down, self.shared = router, up, down, shared
        self.count, self.top_k = count, top_k

    def __call__(self, x: Normed, onto: Array) -> Array:
        """x (tokens, hidden) -> onto + the output (tokens, hidden)."""
        ids, weights = moe.route(self.router(x), self.top_k)
        row_of, offsets = moe.group_by_expert(ids, self.count)
        rows = moe.gather_rows(x.x, row_of)  # (tokens·k, hidden), expert by expert
        rows = self.down(self.up(Normed(rows, x.norm), offsets), offsets)
        if self.shared is not None:
            onto = self.shared(x, onto)
        return moe.combine(rows, row_of, weights, onto)


class Granite(DecoderModel):
    """Attention or Mamba2, then an MLP or experts, each behind an RMSNorm, each scaled as it is added."""

    def __init__(self, config: GraniteConfig, loader: Loader):
        eps = config.rms_norm_eps
        frequencies = rope_frequencies(config.rope, config.head_dim) if config.rope else None
        rope = Rope.none() if frequencies is None else Rope(frequencies, loader.max_model_len)
        blocks = []
        for i in loader.layers:
            layer, is_mamba = f"model.layers.{i}", config.layer_types[i] == MAMBA
            mixer = _mamba(config, loader, layer) if is_mamba else _attention(config, loader, layer, rope)
            mixer_norm = loader.rms_norm(f"{layer}.input_layernorm", eps)
            mlp_norm = loader.rms_norm(f"{layer}.post_attention_layernorm", eps)
            blocks.append(Block(mixer_norm, mixer, mlp_norm, _mlp(config, loader, layer)))
        super().__init__(config, loader, "model.embed_tokens", blocks, partial(loader.rms_norm, "model.norm", eps))
        if loader.is_last:
            self.head = self.head.scaled(1 / config.logits_scaling)
        self.embedding_multiplier = np.float32(config.embedding_multiplier)

    def embed(self, batch: Batch) -> Array:
        x = super().embed(batch)
        rows.scale_rows(x, self.embedding_multiplier)
        return x


def _attention(config: GraniteConfig, loader: Loader, layer: str, rope: Rope) -> Attention:
    return Attention(
        loader.linear(*(f"{layer}.self_attn.{part}_proj" for part in "qkv")),
        loader.linear(f"{layer}.self_attn.o_proj").scaled(config.residual_multiplier),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        scale=config.attention_multiplier,
        rope=rope,
    )


def _mamba(config: GraniteConfig, loader: Loader, layer: str) -> Mamba:
    name = f"{layer}.mamba"
    weight = loader.array(f"{name}.conv1d.weight")  # (channels, 1, d_conv)
    bias = loader.array(f"{name}.conv1d.bias") if config.mamba_conv_bias else np.zeros(len(weight), np.float32)
    dt_min, dt_max = config.time_step_limit
    scan = mamba2.Scan(
        read_only(-np.exp(loader.array(f"{name}.A_log"))),
        loader.array(f"{name}.D"),
        loader.array(f"{name}.dt_bias"),
        np.float32(dt_min),
        np.float32(dt_max),
        config.mamba_n_groups,
    )
    return Mamba(
        loader.linear(f"{name}.in_proj"),
        mamba2.Convolution(read_only(np.ascontiguousarray(weight[:, 0].T)), read_only(bias)),
        scan,
        loader.array(f"{name}.norm.weight"),
        config.rms_norm_eps,
        loader.linear(f"{name}.out_proj").scaled(config.residual_multiplier),
    )


def _mlp(config: GraniteConfig, loader: Loader, layer: str) -> FeedForward:
    shared: FeedForward | None = None
    if config.has_plain_mlp:
        up = loader.gated(f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
        shared = MLP(up, loader.linear(f"{layer}.mlp.down_proj").scaled(config.residual_multiplier))
    elif config.shared_intermediate_size:
        up = loader.gated(f"{layer}.shared_mlp.input_linear")
        shared = MLP(up, loader.linear(f"{layer}.shared_mlp.output_linear").scaled(config.residual_multiplier))
    if not config.num_local_experts:
        assert shared is not None
        return shared
    name = f"{layer}.block_sparse_moe"
    return Mixture(
        loader.head(f"{name}.router.layer"),
        loader.gated_experts(f"{name}.input_linear"),
        loader.experts(f"{name}.output_linear").scaled(config.residual_multiplier),
        config.num_local_experts,
        config.num_experts_per_tok,
        shared,
    )


_GGUF_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_down_exps": "block_sparse_moe.output_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d": "mamba.conv1d",
    "ssm_norm": "mamba.norm",
    "ssm_out": "mamba.out_proj",
}
_GGUF_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_GGUF_SHARED_MLP = {"ffn_down": "shared_mlp.output_linear"}
# What llama.cpp's converter takes apart: gates, and what they let through.
_GGUF_STACKED = {
    "ffn_gate": ("ffn_up", "shared_mlp.input_linear"),
    "ffn_gate_shexp": ("ffn_up_shexp", "shared_mlp.input_linear"),
    "ffn_gate_exps": ("ffn_up_exps", "block_sparse_moe.input_linear"),
}


def sanitize(checkpoint: Checkpoint, config: GraniteConfig) -> Checkpoint:
    """The checkpoint under Hugging Face's names, with what llama.cpp's converter takes apart and turns put back."""
    if "token_embd.weight" not in checkpoint:
        return checkpoint
    plain = config.has_plain_mlp
    parts = _GGUF_PARTS | (_GGUF_MLP if plain else _GGUF_SHARED_MLP)
    renamed = gguf_names(parts)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors: dict[str, LazyTensor] = {}
    upper_halves: set[str] = set()
    for name, tensor in checkpoint.tensors.items():
        match name.split("."):
            case ["rope_freqs", "weight"] if config.rope is not None:
                check_divisors(tensor, config.rope, config.head_dim)
            case ["blk", layer, "ssm_a"]:
                tensors[f"model.layers.{layer}.mamba.A_log"] = _column(tensor, _log_of_minus)
            case ["blk", layer, "ssm_d"]:
                tensors[f"model.layers.{layer}.mamba.D"] = _column(tensor, np.ravel)
            case ["blk", layer, "ssm_dt", "bias"]:
                tensors[f"model.layers.{layer}.mamba.dt_bias"] = tensor
            case ["blk", layer, part, kind] if part in parts:
                if part in heads:  # permuted with or without rotary positions
                    tensor = tensor.reordered(partial(rotate_halves, heads=heads[part]))
                elif part == "ssm_conv1d" and kind == "weight":
                    tensor = tensor.map(lambda weight: weight[:, None], (*tensor.shape[:1], 1, *tensor.shape[1:]))
                elif part == "ssm_norm":  # (groups, size)
                    tensor = tensor.map(np.ravel, (math.prod(tensor.shape),))
                tensors[renamed(name)] = tensor
            case ["blk", layer, part, "weight"] if not plain and part in _GGUF_STACKED:
                up, whole = _GGUF_STACKED[part]
                if other := checkpoint.tensors.get(f"blk.{layer}.{up}.weight"):
                    tensors[f"model.layers.{layer}.{whole}.weight"] = stacked([tensor, other])
                    upper_halves.add(f"blk.{layer}.{up}.weight")
            case _:
                tensors[renamed(name)] = tensor
    return Checkpoint({name: tensors[name] for name in tensors if name not in upper_halves}, checkpoint.source)


def _column(tensor: LazyTensor, change: Callable[[Array], Array]) -> LazyTensor:
    """A vector that llama.cpp keeps as (n, 1); of any other shape it is refused as it is."""
    return tensor.map(change, tensor.shape[:1]) if tensor.shape[1:] in ((), (1,)) else tensor


def _log_of_minus(a: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):  # the loader refuses what is no number, by name
        return np.log(-a.ravel())
