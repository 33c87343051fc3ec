"""The memory that loading takes: tensors are read a few rows at a time, which changes no bit, and given back."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest

from tinyserve.checkpoints.checkpoint import Checkpoint
from tinyserve.checkpoints.gguf import open_gguf
from tinyserve.checkpoints.safetensors import open_safetensors
from tinyserve.errors import CheckpointError
from tinyserve.models import base, build_model
from tinyserve.models.config import parse_config
from tinyserve.models.config.shapes import TensorShape

CONFIGS = checkpoints.CONFIGS
RAW = CONFIGS["llama"]
# TinyLlama's matrices, eight layers of them: 484 million numbers. GPT-2's lie the other way round.
LLAMA = RAW | {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
    "num_key_value_heads": 4, "num_hidden_layers": 8,
}  # fmt: skip
GPT2 = CONFIGS["gpt2"] | {"vocab_size": 50257, "n_embd": 1600, "n_head": 25, "n_layer": 13}
SHARD = 100e6
MEASURE = """
import sys
from pathlib import Path
from tinyserve import LLM

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

small, large, dtype = sys.argv[1:]
options = dict(dtype=dtype, max_num_seqs=1, max_model_len=16, num_threads=1)
LLM(small, **options).logits([1])  # imports and kernels
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
llm = LLM(large, **options)
print(status("VmHWM") - before, status("VmRSS") - before, llm.model.nbytes)
"""


def write_shards(folder: Path, raw: dict[str, Any]) -> Path:
    """A sharded checkpoint in bfloat16, written by hand: a library would hold it in memory."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    checkpoints.write_tokenizer(folder)
    bits = np.random.default_rng(0).integers(0, 1 << 16, 1 << 20, np.uint16)
    pool = bits & 0x807F | 0x3C00  # 2**-7 to 2**-6, of either sign
    shards: list[list[TensorShape]] = [[]]
    for tensor in parse_config(raw).tensor_shapes():
        if shards[-1] and sum(2 * other.size for other in shards[-1]) + 2 * tensor.size > SHARD:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    for number, shard in enumerate(shards):
        name, at, header = f"model-{number:05}.safetensors", 0, {}
        for tensor in shard:
            end = at + 2 * tensor.size
            header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [at, end]}
            weight_map[tensor.name], at = name, end
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in shard:
                file.write(np.resize(pool, tensor.size).data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def measured(large: Path, dtype: str, scratch: Path) -> tuple[int, int, int]:
    """Loading a model in a process of its own: the peak of its memory, what is left of it, and its weights."""
    small = checkpoints.write_folder(scratch / "small", RAW)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, str(small), str(large), dtype]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    peak, after, weights = map(int, run.stdout.split())
    return peak, after, weights


PARTS = ["gpt2", "falcon-40b", "falcon-rw", "llama-biases", "granite-moe", "granite-hybrid-moe", "granite-hybrid"]


def opened(name: str, is_gguf: bool, folder: Path) -> Checkpoint:
    if is_gguf:
        return open_gguf(checkpoints.write_model_gguf(folder / "model.gguf", CONFIGS[name])).tensors
    return open_safetensors(checkpoints.write_folder(folder, CONFIGS[name]))


def packed_arrays(name: str, checkpoint: Checkpoint, dtype: str) -> dict[str, np.ndarray]:
    built: dict[str, Any] = {}
    build_model(parse_config(CONFIGS[name]), checkpoint, dtype, 32, built=built)
    arrays = {}
    for key, value in built.items():
        whole = value if isinstance(value, np.ndarray) else value.packed
        arrays[key] = whole if isinstance(whole, np.ndarray) else whole.stream
    return arrays


@pytest.mark.parametrize("is_gguf", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "w8a16", "w4a8"])
@pytest.mark.parametrize("name", PARTS)
def test_packing_in_parts_changes_no_bit(
    name: str, dtype: str, is_gguf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows at a time, where all at once would do; GGUF's blocks are in test_blocks_are_packed_in_parts."""
    if is_gguf and name == "falcon-rw":
        name = "falcon-7b"  # llama.cpp has no ALiBi for it
    checkpoint = opened(name, is_gguf, tmp_path)
    whole = packed_arrays(name, checkpoint, dtype)
    monkeypatch.setattr(base, "_AT_ONCE", 1)
    parts = packed_arrays(name, checkpoint, dtype)
    assert whole.keys() == parts.keys()
    for key, array in whole.items():
        np.testing.assert_array_equal(array, parts[key], err_msg=key)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_are_packed_in_parts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = CONFIGS["granite-hybrid-moe"] | {
        "hidden_size": 160, "intermediate_size": 96, "shared_intermediate_size": 64, "mamba_d_head": 32,
    }  # fmt: skip
    monkeypatch.setitem(CONFIGS, "blocks", raw)
    quantization, tensors = gguf.GGMLQuantizationType[kind], checkpoints.gguf_tensors(raw)
    matrices = [name for name, array in tensors.items() if array.ndim >= 2 and array.shape[-1] % 32 == 0]
    packed = tensors | {name: gguf.quants.quantize(tensors[name], quantization) for name in matrices}
    path = checkpoints.write_gguf(
        tmp_path / "x.gguf",
        "granitehybrid",
        checkpoints.gguf_metadata(raw),
        packed,
        dict.fromkeys(matrices, quantization),
    )
    whole = packed_arrays("blocks", open_gguf(path).tensors, "w8a16")
    monkeypatch.setattr(base, "_AT_ONCE", 1)
    parts = packed_arrays("blocks", open_gguf(path).tensors, "w8a16")
    for key, array in whole.items():
        np.testing.assert_array_equal(array, parts[key], err_msg=key)


@pytest.mark.parametrize("is_gguf", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "falcon-40b", "llama-grouped", "granite-hybrid-moe"])
def test_rows_taken_alone_are_those_of_the_whole(name: str, is_gguf: bool, tmp_path: Path) -> None:
    """Whatever a model's file makes of its tensors: turned, reordered, one above the other."""
    module: Any = import_module(f"tinyserve.models.{name.split('-')[0]}")
    checkpoint = module.sanitize(opened(name, is_gguf, tmp_path), parse_config(CONFIGS[name]))
    by_rows = {key: tensor for key, tensor in checkpoint.tensors.items() if tensor.take}
    assert len(by_rows) > 10
    for key, tensor in by_rows.items():
        whole = checkpoint[key].reshape(-1, tensor.shape[-1])
        for expected, transposed in ((whole, False), (whole.T, True)):
            for index in (slice(1, 3), np.array([2, 0, 1])):
                np.testing.assert_array_equal(tensor.take(index, transposed), expected[index], err_msg=key)
        tensor.forget()
        np.testing.assert_array_equal(checkpoint[key].reshape(whole.shape), whole)


def test_damage_in_a_later_part_is_found_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_AT_ONCE", 1)
    tensors = checkpoints.tensors_of(RAW)
    tensors["model.layers.1.mlp.down_proj.weight"][100, 7] = np.nan
    folder = checkpoints.write_folder(tmp_path, RAW, tensors)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' holds nan at \[100, 7\]"):
        build_model(parse_config(RAW), open_safetensors(folder), "w8a16", 32)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def large(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("large") / "model"
    yield write_shards(folder, {"llama": LLAMA, "gpt2": GPT2}[request.param])
    shutil.rmtree(folder)  # pytest would keep those of the last three runs


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_peak_memory_is_the_weights_and_a_tenth(dtype: str, large: Path, tmp_path: Path) -> None:
    """Counted is all resident memory (VmHWM, of Linux), over what the process had with a tiny model.

    The mapped file's pages are in it. The system could take them back at any time, but whoever looks at a process's
    size does not know that, so the loader gives them back as it goes.
    """
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size > 0.9e9 and len(list(large.glob("*.safetensors"))) > 5
    peak, after, weights = measured(large, dtype, tmp_path)
    assert abs(weights / (size / {"bfloat16": 1, "int8": 2}[dtype]) - 1) < 0.06
    assert peak < 1.1 * weights, f"peak {peak / 1e6:.0f} MB for weights of {weights / 1e6:.0f} MB"
    assert after < 1.1 * weights
