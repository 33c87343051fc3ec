"""Safetensors folders as read-only mappings: every dtype, shards and damaged files."""

import json
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Oracle
from safetensors.numpy import save_file

from tinyserve import LLM
from tinyserve.checkpoints.hub import cache
from tinyserve.checkpoints.safetensors import open_safetensors
from tinyserve.errors import CheckpointError, ConfigError
from tinyserve.models.config import parse_config

RAW = checkpoints.CONFIGS["llama"]
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """A safetensors file written by hand: name -> (dtype, shape, bytes)."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_dtype(dtype: str, tmp_path: Path, oracle: Oracle) -> None:
    """All bit patterns of the small types and many of the large ones become the float32 that torch makes of them."""
    torch = oracle("torch")
    size = FLOATS[dtype]
    patterns = np.arange(256, dtype=np.uint8) if size == 1 else np.arange(65536, dtype=np.uint16)
    if size > 2:
        shape = (4096, size)
        patterns = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        patterns[:, -2:] = np.random.default_rng(1).integers(0x2F, 0x4F, (4096, 2))  # exponents float32 has
    content = patterns.tobytes()
    count = len(content) // size
    write_raw(tmp_path / "model.safetensors", {"x": (dtype, [count // 4, 4], content)})
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    names |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    expected = torch.frombuffer(bytearray(content), dtype=getattr(torch, names[dtype])).float().numpy()
    got = open_safetensors(tmp_path)["x"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected.reshape(count // 4, 4))  # a NaN equals a NaN


def test_known_values_of_every_dtype(tmp_path: Path) -> None:
    """The same without torch: 1.5, -2 and 0 by their bits in the formats' papers."""
    bits = {
        "F64": np.array([1.5, -2, 0]).tobytes(),
        "F32": np.array([1.5, -2, 0], np.float32).tobytes(),
        "F16": bytes.fromhex("003e 00c0 0000"),
        "BF16": bytes.fromhex("c03f 00c0 0000"),
        "F8_E4M3": bytes.fromhex("3c c0 00"),
        "F8_E5M2": bytes.fromhex("3e c0 00"),
    }
    write_raw(tmp_path / "model.safetensors", {name: (name, [3], content) for name, content in bits.items()})
    checkpoint = open_safetensors(tmp_path)
    assert set(checkpoint) == set(bits) == set(FLOATS)
    for name in bits:
        assert checkpoint[name].tolist() == [1.5, -2.0, 0.0], name


def test_the_mapping_is_read_only_and_lazy(tmp_path: Path) -> None:
    save_file({"x": np.ones((2, 3), np.float32)}, tmp_path / "model.safetensors")
    checkpoint = open_safetensors(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        checkpoint["x"][0, 0] = 2
    with pytest.raises(KeyError):
        checkpoint["y"]
    assert len(checkpoint) == 1 and "x" in checkpoint and "y" not in checkpoint
    assert checkpoint.tensors["x"].shape == (2, 3)


@pytest.mark.parametrize("dtype", ["I64", "I32", "I8", "U8", "BOOL"])
def test_an_integer_dtype_is_refused(dtype: str, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, RAW)
    tensors = checkpoints.tensors_of(RAW)
    kinds = {"I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(kinds[dtype])
    save_file(tensors, folder / "model.safetensors")
    message = refusal(folder)
    assert "model.safetensors" in message and "'model.norm.weight'" in message and dtype in message


# --- shards -------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, raw: dict[str, Any], count: int = 3) -> dict[str, str]:
    """A folder of shards with an index; returns tensor -> shard."""
    checkpoints.write_folder(folder, raw)
    (folder / "model.safetensors").unlink()
    tensors = checkpoints.tensors_of(raw)
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        shard = dict(list(tensors.items())[i::count])
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        LLM(folder, dtype="float32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path, RAW)
    ids = checkpoints.token_ids(20)
    whole = checkpoints.write_folder(tmp_path / "whole", RAW)
    np.testing.assert_array_equal(LLM(tmp_path, dtype="float32").logits(ids), LLM(whole, dtype="float32").logits(ids))


def test_the_index_decides_what_a_shard_is_read_for(tmp_path: Path) -> None:
    """A tensor that lies in a second shard too is read from the one the index names."""
    weight_map = write_shards(tmp_path, RAW)
    shard = sorted(set(weight_map.values()))[-1]
    name = next(name for name, file in weight_map.items() if file != shard)
    mine = {key: checkpoints.tensor(key, value.shape) for key, value in checkpoints.tensors_of(RAW).items()}
    stale = {key: mine[key] for key, file in weight_map.items() if file == shard} | {name: mine[name] * 0}
    save_file(stale, tmp_path / shard)
    np.testing.assert_array_equal(open_safetensors(tmp_path)[name], mine[name])


@pytest.mark.parametrize("gone", [True, False])
def test_a_whole_file_wins_over_an_index_that_was_left_behind(gone: bool, tmp_path: Path) -> None:
    """The shards that it names are gone, or have the weights of before; transformers takes the whole file too."""
    weight_map = write_shards(tmp_path, RAW)
    tensors = checkpoints.tensors_of(RAW)
    for shard in set(weight_map.values()):
        old = {name: tensors[name] * 0 for name, file in weight_map.items() if file == shard}
        (tmp_path / shard).unlink() if gone else save_file(old, tmp_path / shard)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_safetensors(tmp_path)
    assert set(checkpoint) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(checkpoint[name], value)


@pytest.mark.parametrize(
    "file",
    [
        *("../other/model.safetensors", "a/../../other/model.safetensors", "..", ".", "", "a//b", "a/./b"),
        *("/etc/passwd", "//server/share", "C:\\model.safetensors", "C:model.safetensors", "..\\other", "\\x"),
        *("x" * 5000, "ü" * 200, "a/" * 500 + "a", "a\0b", 5, None, ["a"], {"a": 1}),
    ],
)
def test_an_index_names_files_in_its_own_folder_alone(file: Any, tmp_path: Path) -> None:
    checkpoints.write_folder(tmp_path / "other", RAW)
    folder = checkpoints.write_folder(tmp_path / "model", RAW)
    (folder / "model.safetensors").unlink()
    weight_map = dict.fromkeys(checkpoints.tensors_of(RAW), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(folder)
    assert "index.json: 'weight_map' says that tensor 'model.embed_tokens.weight' is in" in message
    assert len(message) < 500 and message.isprintable()
    assert not cache.has_weights(folder)


def test_shards_in_a_folder_of_their_own_are_read(tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, RAW)
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "a.safetensors")
    weight_map = dict.fromkeys(checkpoints.tensors_of(RAW), "weights/a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8-sig")
    assert len(open_safetensors(folder)) == len(weight_map) and cache.has_weights(folder)


def test_a_tensor_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": np.ones(3, np.float32), name: np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors has tensor 'x', and so has .*a\.safetensors"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("shape", [[0], [3, 0], [0, 3], [2, 0, 3], [0, 0], []])
def test_a_tensor_without_numbers_is_a_tensor(shape: list[int], tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"x": ("F32", shape, bytes(4 * int(np.prod(shape))))})
    checkpoint = open_safetensors(tmp_path)
    assert checkpoint["x"].shape == checkpoint.tensors["x"].shape == tuple(shape)
    (folder := tmp_path / "model").mkdir()
    tensors = checkpoints.tensors_of(RAW) | {"model.norm.weight": np.zeros(shape, np.float32)}
    assert str(shape) in refusal(checkpoints.write_folder(folder, RAW, tensors))


def test_a_missing_shard(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, RAW)
    lost = sorted(set(weight_map.values()))[1]
    (tmp_path / lost).unlink()
    assert lost in refusal(tmp_path) and "missing" in refusal(tmp_path)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, RAW)
    promised = weight_map["model.norm.weight"]
    save_file({"unrelated": np.ones(3, np.float32)}, tmp_path / promised)
    message = refusal(tmp_path)
    lost = min(name for name, file in weight_map.items() if file == promised)
    assert promised in message and repr(lost) in message


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', '{"weight_map": {"a": ', "\xff"]
)
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    write_shards(tmp_path, RAW)
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_an_empty_index_has_no_tensors(tmp_path: Path) -> None:
    write_shards(tmp_path, RAW)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "'model.embed_tokens.weight'" in refusal(tmp_path)


# --- damaged and incomplete files ---------------------------------------------------------------------------------


def test_a_missing_tensor(tmp_path: Path) -> None:
    tensors = checkpoints.tensors_of(RAW)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    message = refusal(checkpoints.write_folder(tmp_path, RAW, tensors))
    assert str(tmp_path) in message and "'model.layers.1.mlp.up_proj.weight'" in message


def test_a_missing_bias(tmp_path: Path) -> None:
    """Biases are optional to a layer and not to a config that has them."""
    raw = checkpoints.CONFIGS["llama-biases"]
    tensors = checkpoints.tensors_of(raw)
    del tensors["model.layers.2.self_attn.k_proj.bias"]
    assert "'model.layers.2.self_attn.k_proj.bias'" in refusal(checkpoints.write_folder(tmp_path, raw, tensors))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.2.self_attn.k_proj.weight"])
def test_a_misshapen_tensor(name: str, tmp_path: Path) -> None:
    """The message has both shapes, and the weights before it are not converted for nothing."""
    tensors = checkpoints.tensors_of(RAW)
    right, tensors[name] = list(tensors[name].shape), tensors[name][:-1]
    message = refusal(checkpoints.write_folder(tmp_path, RAW, tensors))
    assert "model.safetensors" in message and repr(name) in message
    assert str(right) in message and str(list(tensors[name].shape)) in message


def test_a_transposed_tensor(tmp_path: Path) -> None:
    """GPT-2's matrices as [out, in] are another model's."""
    raw = checkpoints.CONFIGS["gpt2"]
    tensors = checkpoints.tensors_of(raw)
    tensors["h.0.attn.c_attn.weight"] = np.ascontiguousarray(tensors["h.0.attn.c_attn.weight"].T)
    message = refusal(checkpoints.write_folder(tmp_path, raw, tensors))
    assert "'h.0.attn.c_attn.weight'" in message and "[360, 120]" in message and "[120, 360]" in message


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, RAW)
    whole = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        assert "model.safetensors" in refusal(folder), length
    (folder / "model.safetensors").write_bytes(whole + b"more")
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "damaged",
    [
        b"\xff" * 64,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b"not json!",
        b"<html>Too many requests</html>" * 9,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    ],
)
def test_a_corrupt_header(damaged: bytes, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, RAW)
    (folder / "model.safetensors").write_bytes(damaged)
    assert "model.safetensors" in refusal(folder)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_no_damage_is_a_crash(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file with any bytes changed is read, or refused by its name."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = write_raw(folder / "model.safetensors", {"x": ("F32", [2, 3], b"\0" * 24), "y": ("F16", [4], b"\0" * 8)})
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        checkpoint = open_safetensors(folder)
        for name in checkpoint:
            assert checkpoint[name].shape == checkpoint.tensors[name].shape
    except CheckpointError as error:
        assert str(path) in str(error)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, RAW)
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert str(folder) in message and "safetensors" in message


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "falcon-7b", "qwen3", "granite-hybrid"])
def test_a_tied_model_may_hold_its_head_alone(name: str, tmp_path: Path) -> None:
    """The embedding and the head are one matrix, and transformers takes it under either name."""
    raw, ids = checkpoints.CONFIGS[name], checkpoints.token_ids(9)
    tensors = checkpoints.tensors_of(raw)
    embedding = next(tensor.name for tensor in parse_config(raw).tensor_shapes() if tensor.component == "embedding")
    expected = LLM(checkpoints.write_folder(tmp_path / "embedding", raw, tensors), dtype="float32").logits(ids)
    tensors["lm_head.weight"] = tensors.pop(embedding)
    head = LLM(checkpoints.write_folder(tmp_path / "head", raw, tensors), dtype="float32")
    np.testing.assert_array_equal(head.logits(ids), expected)
    untied = checkpoints.write_folder(tmp_path / "untied", raw | {"tie_word_embeddings": False}, tensors)
    assert embedding in refusal(untied)


def test_only_pickles(tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, RAW)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message and "safetensors" in message


@pytest.mark.parametrize("content", ["", "{", "[]", '"llama"', "\xff\xfe"])
def test_a_config_that_is_none(content: str, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, RAW)
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        LLM(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff\xfe"])
@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_small_file_that_is_damaged(file: str, content: str, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, RAW)
    (folder / file).write_bytes(content.encode("latin-1"))
    with pytest.raises((ConfigError, CheckpointError), match=file.replace(".", r"\.")):
        LLM(folder)


@pytest.mark.parametrize("ends", [5, [5, 6], None])
def test_generation_config_adds_end_tokens(ends: Any, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, RAW)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    expected = {checkpoints.EOS} | ({ends} if isinstance(ends, int) else set(ends or ()))
    assert LLM(folder, dtype="float32").engine.eos_token_ids == expected
