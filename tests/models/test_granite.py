"""Granite's own: states that belong to sequences, experts that are one matrix, and what is refused."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest
from hold import hold
from oracles import Oracle

from tinyserve import LLM, SamplingParams
from tinyserve.checkpoints.checkpoint import LazyTensor, stacked
from tinyserve.errors import CheckpointError, UserError
from tinyserve.models.cache_plan import CacheNeeds, plan_cache
from tinyserve.models.config import parse_config
from tinyserve.models.config.costs import state_bytes_per_sequence
from tinyserve.models.kv_cache import KVCache
from tinyserve.models.matrix import IntegerMatrix
from tinyserve.tensor.quant import BLOCK, PAIR

HYBRIDS = ["granite-hybrid", "granite-hybrid-moe", "granite-hybrid-rope"]
CONFIGS = checkpoints.CONFIGS
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = [checkpoints.token_ids(count, seed=count) for count in (40, 3, 17)]


# --- states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_slot_that_is_used_again_starts_clean(name: str, folder_of: Callable[[str], Path]) -> None:
    """With one slot for all, each answer is that of a model that has seen nothing else."""
    llm = LLM(folder_of(name), dtype="float32", max_num_seqs=1)
    alone = [LLM(folder_of(name), dtype="float32").generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    for _ in range(2):
        for one, many in zip(alone, llm.generate(PROMPTS, GREEDY), strict=True):
            assert one.outputs[0].token_ids == many.outputs[0].token_ids


def test_a_cancelled_sequence_leaves_its_slot_behind(folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("granite-hybrid"), dtype="float32", max_num_seqs=1)
    [expected] = llm.generate([PROMPTS[0]], GREEDY)
    for _ in range(3):
        stream = llm.stream(PROMPTS[2], GREEDY)
        next(stream)
        stream.close()
    [again] = llm.generate([PROMPTS[0]], GREEDY)
    assert again.outputs[0].token_ids == expected.outputs[0].token_ids


def test_a_step_that_fails_halfway_leaves_no_state_behind(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was in the step has an answer; whoever comes later never goes on from a state that had moved."""
    llm = LLM(folder_of("granite-hybrid"), dtype="float32")
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=1)
    expected = LLM(folder_of("granite-hybrid"), dtype="float32").generate(PROMPTS, params)
    logits = llm.model.logits
    broken = threading.Event()

    def fail(hidden: np.ndarray) -> np.ndarray:
        if len(hidden) < 2:
            return logits(hidden)
        broken.set()
        raise RuntimeError("a kernel that does not work")

    with hold(llm, after=1) as held:
        streams = [llm.stream(PROMPTS[0], params)]
        assert held.started.wait(60)
        monkeypatch.setattr(llm.model, "logits", fail)
        streams.append(llm.stream(PROMPTS[1], params))
    for stream in streams:  # in one batch
        with pytest.raises(RuntimeError, match="does not work"):
            list(stream)
    assert broken.is_set()
    monkeypatch.setattr(llm.model, "logits", logits)
    for one, two in zip(expected, llm.generate(PROMPTS, params), strict=True):
        assert one.outputs[0].logprobs == two.outputs[0].logprobs
    assert llm.stats().num_running == 0


def test_logits_have_a_state_of_their_own(folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("granite-hybrid"), dtype="float32", max_num_seqs=2)
    states = llm.engine.runner.cache.layers[0].states
    llm.logits(PROMPTS[0])
    assert states[-1].any() and not states[:-1].any()
    np.testing.assert_array_equal(llm.logits(PROMPTS[0]), llm.logits(PROMPTS[0]))


def test_a_copied_slot_goes_on_as_its_source(folder_of: Callable[[str], Path]) -> None:
    cache = KVCache(parse_config(CONFIGS["granite-hybrid"]), num_blocks=1, block_size=16, num_slots=3)
    recurrent = [cache.layers[0], cache.layers[2]]
    for i, layer in enumerate(recurrent):
        layer.windows[1], layer.states[1] = i + 1, i + 3
    cache.copy_state(1, 2)
    for i, layer in enumerate(recurrent):
        assert (layer.windows[2] == i + 1).all() and (layer.states[2] == i + 3).all()
        assert not layer.windows[0].any() and not layer.states[0].any()
    cache.reset_state(1)
    for layer in recurrent:
        assert not layer.windows[1].any() and not layer.states[1].any()
        assert layer.windows[2].all() and layer.states[2].all()


def test_pages_are_for_attention_and_states_for_mamba() -> None:
    config = parse_config(CONFIGS["granite-hybrid"])
    cache = KVCache(config, num_blocks=4, block_size=16, num_slots=3)
    assert [hasattr(layer, "keys") for layer in cache.layers] == [False, True, False]
    states = sum(layer.windows.nbytes + layer.states.nbytes for layer in (cache.layers[0], cache.layers[2]))
    assert states == 3 * state_bytes_per_sequence(config)
    pages = cache.layers[1]
    assert pages.keys.nbytes + pages.values.nbytes == 4 * KVCache.block_nbytes(config, 16)
    plain = KVCache(parse_config(CONFIGS["granite"]), num_blocks=1, block_size=16, num_slots=100)
    plain.reset_state(99)  # nothing to forget
    assert all(hasattr(layer, "keys") for layer in plain.layers)


def test_memory_is_planned_for_states_first() -> None:
    config = parse_config(CONFIGS["granite-hybrid"])
    state, block = state_bytes_per_sequence(config), KVCache.block_nbytes(config, 16)
    needs = CacheNeeds(config, "float32", "float32", 16, max_num_seqs=4)
    plan = plan_cache(needs, kv_cache_memory=5 * state + 3 * block + 1)
    assert (plan.num_blocks, plan.block_size, plan.max_model_len) == (3, 16, 48)
    with pytest.raises(UserError, match=r"states of 4 sequences.*lower max_num_seqs"):
        plan_cache(needs, kv_cache_memory=5 * state - 1)
    with pytest.raises(UserError, match="too little for a cache of 2 tokens"):
        plan_cache(needs, kv_cache_memory=5 * state)
    mamba = parse_config(CONFIGS["granite-hybrid"] | {"layer_types": ["mamba"] * 3})
    only = plan_cache(replace(needs, config=mamba), kv_cache_memory=5 * state_bytes_per_sequence(mamba))
    assert (only.num_blocks, only.max_model_len) == (32, 128)


def test_a_model_of_mamba_layers_alone(tmp_path: Path, oracle: Oracle) -> None:
    torch = oracle("torch")
    transformers = oracle("transformers")
    raw = CONFIGS["granite-hybrid"] | {"layer_types": ["linear_attention"] * 3}
    folder = checkpoints.save_with_transformers(tmp_path, raw)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]]), use_cache=False).logits[0].numpy()
    llm = LLM(folder, dtype="float32")
    assert np.abs(llm.logits(PROMPTS[0]) - expected).max() <= 1e-4 * np.abs(expected).max()
    [output] = llm.generate([PROMPTS[0]], GREEDY)
    ids = PROMPTS[0] + output.outputs[0].token_ids
    assert llm.logits(ids)[39:-1].argmax(axis=1).tolist() == output.outputs[0].token_ids


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_experts_are_one_matrix(dtype: str, llm_of: Callable[..., LLM]) -> None:
    """Each has whole blocks of it, whatever its own width."""
    mixture = llm_of("granite-hybrid-moe", dtype).model.blocks[0].mlp
    for experts in (mixture.up, mixture.down):
        assert mixture.count == 5 and experts.width % BLOCK
        packed = experts.matrix.packed
        assert experts.matrix.shape[0] == len(getattr(packed, "stream", packed)) * PAIR
        assert experts.matrix.shape[0] % (5 * BLOCK) == 0


def test_the_router_keeps_8_bits(llm_of: Callable[..., LLM]) -> None:
    router = llm_of("granite-moe", "int4").model.blocks[0].mlp.router.matrix
    assert isinstance(router, IntegerMatrix) and router.packed.bits == 8


def test_multipliers_leave_the_weights_alone(llm_of: Callable[..., LLM], tmp_path: Path) -> None:
    """A tied embedding is looked up times one number and is the head times another: its bits are the file's."""
    model = llm_of("granite-hybrid", "float32").model
    expected = checkpoints.tensor("model.embed_tokens.weight", (checkpoints.VOCAB, 120))
    np.testing.assert_array_equal(model.embedding(np.arange(checkpoints.VOCAB)), expected)
    assert model.head.matrix is model.embedding.matrix
    assert model.head.after.scale == np.float32(1 / 3)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mamba.A_log",
        "model.layers.2.mamba.dt_bias",
        "model.layers.0.mamba.conv1d.weight",
        "model.layers.0.mamba.conv1d.bias",
        "model.layers.2.mamba.norm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.shared_mlp.input_linear.weight",
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(name: str, tmp_path: Path) -> None:
    tensors = checkpoints.tensors_of(CONFIGS["granite-hybrid"])
    cut = np.ascontiguousarray(tensors[name][:-1])
    with pytest.raises(CheckpointError, match=f"'{name}' has shape"):
        LLM(checkpoints.write_folder(tmp_path / "cut", CONFIGS["granite-hybrid"], tensors | {name: cut}))
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"has no tensor '{name}'"):
        LLM(checkpoints.write_folder(tmp_path / "less", CONFIGS["granite-hybrid"], tensors))


@pytest.mark.parametrize("changed", [{"layer_types": ["mamba", "rwkv", "mamba"]}, {"position_embedding_type": "alibi"}])
def test_what_is_not_built_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoints.write_folder(
        tmp_path, CONFIGS["granite-hybrid"] | changed, checkpoints.tensors_of(CONFIGS["granite-hybrid"])
    )
    (key,) = changed
    with pytest.raises(UserError, match=f"{key}.*not supported"):
        LLM(folder)


# --- GGUF ---------------------------------------------------------------------------------------------------------


def test_stacked_matrices() -> None:
    a, b = np.arange(24.0).reshape(2, 3, 4), np.arange(24.0, 48.0).reshape(2, 3, 4)
    whole = stacked([LazyTensor(part.shape, "x.gguf", lambda part=part: part) for part in (a, b)])
    assert whole.shape == (2, 6, 4) and whole.blocks is None
    np.testing.assert_array_equal(whole.read(), np.concatenate([a, b], axis=1))
    for other in (np.zeros((2, 3, 5)), np.zeros((2, 2, 4)), np.zeros((3, 3, 4)), np.zeros((3, 4))):
        with pytest.raises(CheckpointError, match=r"x\.gguf: tensors .* are parts of one"):
            stacked([LazyTensor(part.shape, "x.gguf", lambda: a) for part in (a, other)])


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0])
def test_blocks_of_experts_are_kept_to_the_bit(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    """int8 reads a quantized file's own integers, in gates, in experts and in hybrids' projections alike."""
    raw = CONFIGS["granite-hybrid-moe"] | {
        "hidden_size": 160, "num_attention_heads": 5, "intermediate_size": 96, "shared_intermediate_size": 64,
        "mamba_n_heads": 10, "mamba_d_head": 32,
    }  # fmt: skip
    tensors = checkpoints.gguf_tensors(raw)
    matrices = [name for name, array in tensors.items() if array.ndim >= 2 and array.shape[-1] % 32 == 0]
    assert sum("exps" in name for name in matrices) == 9
    packed = tensors | {name: gguf.quants.quantize(tensors[name], kind) for name in matrices}
    widened = tensors | {name: gguf.quants.dequantize(packed[name], kind) for name in matrices}
    metadata, ids = checkpoints.gguf_metadata(raw), checkpoints.token_ids(40)
    quantized = checkpoints.write_gguf(
        tmp_path / "quantized.gguf", "granitehybrid", metadata, packed, dict.fromkeys(matrices, kind)
    )
    plain = checkpoints.write_gguf(tmp_path / "plain.gguf", "granitehybrid", metadata, widened)
    exact = LLM(plain, dtype="float32")
    np.testing.assert_array_equal(LLM(quantized, dtype="float32").logits(ids), exact.logits(ids))
    llm = LLM(quantized, dtype="int8", kv_cache_dtype="float32")
    for layer in range(3):
        ours, theirs = (
            [mlp.up, mlp.down, mlp.shared.up, mlp.shared.down]
            for mlp in (model.blocks[layer].mlp for model in (llm.model, exact.model))
        )
        for one, other in zip(ours, theirs, strict=True):
            rows = np.arange(one.matrix.shape[0])
            np.testing.assert_array_equal(one.matrix.rows(rows), other.matrix.rows(rows))
    expected = exact.logits(ids)
    assert np.abs(llm.logits(ids) - expected).max() <= 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    "changed",
    [
        {"layer_types": ["full_attention"] * 3, "position_embedding_type": "rope"},
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["full_attention"] * 3, "position_embedding_type": "rope", "num_local_experts": 5}
        | {"num_experts_per_tok": 2, "intermediate_size": 77},
    ],
)
def test_a_hybrid_without_mamba_layers(changed: dict[str, Any], tmp_path: Path) -> None:
    """llama.cpp's converter calls it granite or granitemoe; only the metadata tell what it was."""
    raw = CONFIGS["granite-hybrid"] | changed
    file = LLM(checkpoints.write_model_gguf(tmp_path / "model.gguf", raw), dtype="float32")
    folder = LLM(checkpoints.write_folder(tmp_path / "folder", raw), dtype="float32")
    np.testing.assert_array_equal(file.logits(PROMPTS[0]), folder.logits(PROMPTS[0]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count_kv", [5, 5]),
        ("attention.head_count_kv", ["a", "b", "c"]),
        ("attention.head_count_kv", [0, 5, 5]),
        ("attention.head_count_kv", [0, 0, 0]),
        ("attention.head_count_kv", []),
        ("attention.scale", None),
        ("attention.scale", "small"),
        ("residual_scale", 0.0),
        ("logit_scale", [3.0]),
        ("expert_count", "many"),
        ("expert_count", 5),
        ("block_count", "many"),
        ("block_count", 2),
        ("ssm.inner_size", None),
        ("ssm.inner_size", 250),
        ("ssm.inner_size", "wide"),
        ("ssm.time_step_rank", 0),
        ("ssm.state_size", 17),
        ("ssm.group_count", 3),
        ("ssm.conv_kernel", 1),
    ],
)
def test_wrong_metadata(key: str, value: Any, tmp_path: Path) -> None:
    raw = CONFIGS["granite-hybrid"]
    metadata = checkpoints.gguf_metadata(raw) | {f"granitehybrid.{key}": value}
    if value is None:
        del metadata[f"granitehybrid.{key}"]
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "granitehybrid", metadata, checkpoints.gguf_tensors(raw))
    with pytest.raises(UserError, match=r"x\.gguf"):
        LLM(path, dtype="float32")


@pytest.mark.parametrize("name", ["blk.0.ssm_a", "blk.1.ffn_up.weight", "blk.2.ssm_dt.bias"])
def test_a_gguf_that_lacks_a_tensor(name: str, tmp_path: Path) -> None:
    raw = CONFIGS["granite-hybrid"]
    tensors = checkpoints.gguf_tensors(raw)
    del tensors[name]
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "granitehybrid", checkpoints.gguf_metadata(raw), tensors)
    with pytest.raises(CheckpointError, match=r"x\.gguf has no tensor"):
        LLM(path)


def test_a_positive_a_is_damage(tmp_path: Path) -> None:
    """ssm_a is -exp(A_log): no number has this logarithm."""
    raw = CONFIGS["granite-hybrid"]
    tensors = checkpoints.gguf_tensors(raw)
    tensors["blk.0.ssm_a"][3] = 0.5
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "granitehybrid", checkpoints.gguf_metadata(raw), tensors)
    with pytest.raises(CheckpointError, match=r"x\.gguf.*A_log.*nan"):
        LLM(path)
