"""Forward passes against transformers', stored and live; and each model against itself, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from conftest import DTYPES
from oracles import Oracle

from tinyserve import LLM, SamplingParams
from tinyserve.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = list(checkpoints.CONFIGS)
TOLERANCE = 1e-4  # of the largest logit
# What 16 and 8 bits cost these models of random weights, whose softmaxes exaggerate every error.
LOOSE = {"bfloat16": 0.08, "int8": 0.12}


def golden_folder(folder: Path, golden: Any, config: dict[str, Any] | None = None) -> Path:
    tensors = {
        name: checkpoints.tensor(name, tuple(shape)) for name, shape in json.loads(str(golden["tensors"])).items()
    }
    return checkpoints.write_folder(folder, config or json.loads(str(golden["config"])), tensors)


@pytest.mark.parametrize("name", NAMES)
def test_golden_logits(name: str, tmp_path: Path) -> None:
    """What transformers computed when the goldens were made; torch is not needed."""
    golden = np.load(GOLDEN / f"{name}.npz")
    folder = golden_folder(tmp_path, golden)
    ids, positions, expected = golden["token_ids"].tolist(), golden["positions"], golden["logits"]
    assert checkpoints.error(LLM(folder, dtype="float32").logits(ids)[positions], expected) <= TOLERANCE
    for dtype, bound in LOOSE.items():
        assert checkpoints.error(LLM(folder, dtype=dtype).logits(ids)[positions], expected) <= bound, dtype


def test_goldens_are_what_the_configs_are() -> None:
    """A config changed without its golden would test nothing."""
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(NAMES)
    for name, raw in checkpoints.CONFIGS.items():
        stored = json.loads(str(np.load(GOLDEN / f"{name}.npz")["config"]))
        for key, value in raw.items():
            if key != "bare":
                assert stored[key] == value, (name, key)
        expected = np.load(GOLDEN / f"{name}.npz")["logits"]
        assert expected.std(axis=1).min() > 0.5, f"{name}'s logits are all alike"
    assert sum(path.stat().st_size for path in GOLDEN.glob("*.npz")) < 1_000_000


@pytest.mark.parametrize("name", ["llama-3", "llama-linear"])
def test_golden_logits_by_the_older_config_dialect(name: str, tmp_path: Path) -> None:
    """rope_theta beside rope_scaling, as checkpoints from before transformers 5 have them."""
    golden = np.load(GOLDEN / f"{name}.npz")
    config = json.loads(str(golden["config"]))
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope.pop("rope_type")}}
    logits = LLM(golden_folder(tmp_path, golden, config), dtype="float32").logits(golden["token_ids"].tolist())
    assert checkpoints.error(logits[golden["positions"]], golden["logits"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["granite-hybrid", "granite-hybrid-moe", "granite-hybrid-rope"])
@pytest.mark.parametrize("key", ["layer_types", "layers_block_type"])
def test_golden_logits_by_the_older_names_of_layers(name: str, key: str, tmp_path: Path) -> None:
    """What transformers 5 calls "linear_attention" and "full_attention", checkpoints call "mamba" and "attention"."""
    golden = np.load(GOLDEN / f"{name}.npz")
    config = json.loads(str(golden["config"]))
    older = {"linear_attention": "mamba", "full_attention": "attention"}
    config[key] = [older[kind] for kind in config.pop("layer_types")]
    logits = LLM(golden_folder(tmp_path, golden, config), dtype="float32").logits(golden["token_ids"].tolist())
    assert checkpoints.error(logits[golden["positions"]], golden["logits"]) <= TOLERANCE


def test_gpt2_ignores_the_masks_of_old_checkpoints(tmp_path: Path) -> None:
    golden = np.load(GOLDEN / "gpt2-bare.npz")
    config, tensors = json.loads(str(golden["config"])), json.loads(str(golden["tensors"]))
    weights = {name: checkpoints.tensor(name, tuple(shape)) for name, shape in tensors.items()}
    for i in range(config["n_layer"]):
        weights[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 128, 128), np.uint8))
        weights[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    folder = checkpoints.write_folder(tmp_path, config, weights)
    logits = LLM(folder, dtype="float32").logits(golden["token_ids"].tolist())
    assert checkpoints.error(logits[golden["positions"]], golden["logits"]) <= TOLERANCE


# --- live, where torch and transformers are installed -------------------------------------------------------------

SAVES = [(name, "float32", {}) for name in NAMES] + [
    ("llama", "bfloat16", {}),
    ("llama-biases", "float16", {}),
    ("gpt2", "bfloat16", {}),
    ("gpt2", "float16", {"max_shard_size": "200KB"}),
    ("llama-grouped", "float32", {"max_shard_size": "300KB"}),
    ("falcon-40b", "bfloat16", {"max_shard_size": "200KB"}),
    ("falcon-rw", "float16", {}),
    ("qwen2", "bfloat16", {}),
    ("qwen3", "bfloat16", {"max_shard_size": "300KB"}),
]


@pytest.mark.parametrize(("name", "saved", "options"), SAVES)
def test_live_logits(name: str, saved: str, options: dict[str, Any], tmp_path: Path, oracle: Oracle) -> None:
    """transformers saves a checkpoint, and computes what tinyserve computes from it."""
    oracle("torch")
    oracle("transformers")
    folder = checkpoints.save_with_transformers(tmp_path, checkpoints.CONFIGS[name], saved, **options)
    assert len(list(folder.glob("*.safetensors"))) == 1 or (folder / "model.safetensors.index.json").is_file()
    assert len(list(folder.glob("*.safetensors"))) > 1 or not options
    ids = checkpoints.token_ids(101, seed=1)
    expected = checkpoints.transformers_logits(folder, ids)
    assert checkpoints.error(LLM(folder, dtype="float32").logits(ids), expected) <= TOLERANCE
    if saved == "bfloat16":  # nothing is lost by keeping it as it is
        kept = LLM(folder, dtype="bfloat16", kv_cache_dtype="float32")
        assert checkpoints.error(kept.logits(ids), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "llama-3", "mistral", "falcon-7b", "falcon-40b", "falcon-rw", "granite", "granite-hybrid"),
        *("qwen2-window", "qwen3"),
    ],
)
def test_live_greedy_generation(name: str, tmp_path: Path, oracle: Oracle) -> None:
    """Thirty-two greedy tokens, past the window of the sliding one, are those of transformers' generate."""
    torch = oracle("torch")
    transformers = oracle("transformers")
    folder = checkpoints.save_with_transformers(tmp_path, checkpoints.CONFIGS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = checkpoints.token_ids(9, seed=2)
    prompt = torch.tensor([ids])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=32, pad_token_id=0,
        eos_token_id=None,
    )[0, len(ids) :].tolist()  # fmt: skip
    [output] = LLM(folder, dtype="float32").generate([ids], GREEDY)
    assert output.outputs[0].token_ids == expected


# --- against itself -----------------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
PROMPTS = [checkpoints.token_ids(count, seed=count) for count in (1, 33, 5, 70, 16)]
FAMILIES = [
    "gpt2",
    "llama-3",
    "mistral",
    "qwen2",
    "qwen3-head-dim",
    "falcon-7b",
    "falcon-40b",
    "falcon-rw",
    "granite-hybrid",
    "granite-hybrid-moe",
]


class Recorder:
    """Keeps the logits that each request's tokens were sampled from."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[int, list[np.ndarray]] = {}
        runner: Any = llm.engine.runner
        sample = runner._sample

        def recording(places: list[Any], step: Any, masks: Any) -> Any:
            for place, row in zip(places, step.logits, strict=True):
                self.logits.setdefault(place.sequence.request_id, []).append(row.copy())
            return sample(places, step, masks)

        monkeypatch.setattr(runner, "_sample", recording)

    def of(self, output: Any) -> np.ndarray:
        return np.stack(self.logits[output.request_id])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_changes_nothing(
    name: str, dtype: str, llm_of: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding token by token gives the logits and tokens of recomputing the whole text for each."""
    llm = llm_of(name, dtype)
    recorder = Recorder(llm, monkeypatch)
    [output] = llm.generate([PROMPTS[2]], GREEDY)
    ids = list(PROMPTS[2])
    assert len(output.outputs[0].token_ids) == 32
    for token, logits in zip(output.outputs[0].token_ids, recorder.of(output), strict=True):
        recomputed = llm.logits(ids)[-1]
        np.testing.assert_array_equal(logits, recomputed)
        assert token == recomputed.argmax()
        ids.append(token)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_change_no_bit(name: str, dtype: str, folder_of: Callable[[str], Path]) -> None:
    """A prompt prefilled one token at a time, by sevens, or by 64s with one and two threads."""
    ids = checkpoints.token_ids(100, seed=3)
    ways = [
        LLM(folder_of(name), dtype=dtype, max_num_batched_tokens=chunk, num_threads=threads).logits(ids)
        for chunk, threads in ((512, 1), (1, 2), (1, 1), (7, 2), (64, 1), (64, 2), (512, 2))
    ]
    for other in ways[1:]:
        np.testing.assert_array_equal(ways[0], other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_batch_invariance_of_each_family(
    name: str, dtype: str, llm_of: Callable[..., LLM], folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of five unequal prompts gets the same logits alone, among the others, and in small scattered chunks."""
    llm = llm_of(name, dtype)
    recorder = Recorder(llm, monkeypatch)
    alone = [llm.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    batches = [(recorder, llm.generate(PROMPTS, GREEDY))]
    for threads in (1, 2):
        crowded = LLM(
            folder_of(name), dtype=dtype, max_num_seqs=3, max_num_batched_tokens=9, block_size=32, num_threads=threads
        )
        batches.append((Recorder(crowded, monkeypatch), crowded.generate(PROMPTS, GREEDY)))
    for other, batch in batches:
        for one, many in zip(alone, batch, strict=True):
            assert one.prompt_token_ids == many.prompt_token_ids
            assert one.outputs[0].token_ids == many.outputs[0].token_ids
            np.testing.assert_array_equal(recorder.of(one), other.of(many))


@pytest.mark.parametrize(("kept", "bound"), [("bfloat16", 0.05), ("int8", 0.15)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrow_cache_is_near_and_changes_no_bit(
    name: str, kept: str, bound: float, folder_of: Callable[[str], Path]
) -> None:
    """Fewer bits cost these untrained, sensitive models a little: the same in one chunk, in many, and one by one."""
    ids = checkpoints.token_ids(100, seed=6)
    exact = LLM(folder_of(name), dtype="float32")
    narrow = LLM(folder_of(name), dtype="float32", kv_cache_dtype=kept)
    assert narrow.engine.runner.cache.dtype == kept
    logits = narrow.logits(ids)
    assert 0 < checkpoints.error(logits, exact.logits(ids)) <= bound
    for chunk, threads in ((1, 2), (7, 1), (64, 2)):
        other = LLM(
            folder_of(name), dtype="float32", kv_cache_dtype=kept, max_num_batched_tokens=chunk, num_threads=threads
        )
        np.testing.assert_array_equal(other.logits(ids), logits)


def test_the_default_cache_is_as_exact_as_the_weights(folder_of: Callable[[str], Path]) -> None:
    assert LLM(folder_of("gpt2"), dtype="float32").kv_cache_dtype == "float32"
    assert LLM(folder_of("gpt2"), dtype="int8").kv_cache_dtype == "bfloat16"
    with pytest.raises(UserError, match="kv_cache_dtype 'fp8' does not exist"):
        LLM(folder_of("gpt2"), kv_cache_dtype="fp8")


def test_the_sliding_window_slides(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Three layers of a window of 5 see 13 tokens: the first of 14 makes no difference to the last, one later does."""
    llm = LLM(folder_of("mistral"), dtype="float32")
    ids = checkpoints.token_ids(14, seed=4)
    last = llm.logits(ids)[-1]
    far, near = [ids[0] ^ 1, *ids[1:]], [ids[0], ids[1] ^ 1, *ids[2:]]
    np.testing.assert_array_equal(llm.logits(far)[-1], last)
    assert np.abs(llm.logits(near)[-1] - last).max() > 0
