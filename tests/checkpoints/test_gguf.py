"""GGUF files against the gguf package: metadata, every tensor type, whole models, and what is damaged."""

import math
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Oracle

from tinyserve import LLM, SamplingParams
from tinyserve.checkpoints.gguf import open_gguf
from tinyserve.errors import CheckpointError, ConfigError, UserError
from tinyserve.models.gguf_config import config_from_gguf
from tinyserve.tensor import gguf_blocks, quant, reference

RAW = checkpoints.CONFIGS["llama-grouped"]
Type = gguf.GGMLQuantizationType


# --- tensors ------------------------------------------------------------------------------------------------------

# Where in a K block's bytes its float16 numbers are; all other bytes may be anything (ggml-common.h).
SCALES_AT = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}
SIMPLE_SCALES_AT = {Type.Q8_0: (0,), Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2)}


# What else the gguf package dequantizes; a byte that is a scale in E8M0 or E4M3 may be anything but nan.
RARE_SCALES_AT = {
    Type.IQ1_S: (0,), Type.IQ1_M: (), Type.IQ2_XXS: (0,), Type.IQ2_XS: (0,), Type.IQ2_S: (0,), Type.IQ3_XXS: (0,),
    Type.IQ3_S: (0,), Type.IQ4_NL: (0,), Type.IQ4_XS: (0,), Type.TQ1_0: (52,), Type.TQ2_0: (64,), Type.MXFP4: (),
}  # fmt: skip


def random_blocks(kind: Type, rows: int, blocks: int) -> np.ndarray:
    """Raw bytes of a type whose every block is valid: random, with finite scales."""
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, (rows, blocks, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    for at in (SCALES_AT | SIMPLE_SCALES_AT | RARE_SCALES_AT)[kind]:
        scales = rng.standard_normal((rows, blocks)).astype(np.float16)
        scales[0, 0] = 6e-8  # the smallest denormal
        raw[:, :, at : at + 2] = scales[:, :, None].view(np.uint8)
    return raw.reshape(rows, -1)


def same_as_gguf(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    ours = open_gguf(path).tensors
    assert set(ours) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        got = ours[tensor.name]
        assert got.dtype == np.float32 and not got.flags.writeable
        assert got.shape == ours.tensors[tensor.name].shape == shape
        np.testing.assert_array_equal(got, expected.reshape(shape), err_msg=tensor.name)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1])
@pytest.mark.parametrize("rows", [1, 64, 70])
def test_blocks_are_repacked_without_a_loss(kind: Type, rows: int) -> None:
    """What the kernels read stands for the very numbers that the gguf package finds in the blocks."""
    raw = random_blocks(kind, rows, 3)
    blocks = gguf_blocks.Blocks(kind.name, raw, (rows, 96))
    packed = gguf_blocks.repack(blocks, most_bits=8)
    assert packed is not None and packed.holds((rows, 96))
    expected = gguf.quants.dequantize(raw, kind)
    np.testing.assert_array_equal(reference.unpack(packed, rows, 96), expected)
    ids = np.array([rows - 1, 0])
    np.testing.assert_array_equal(quant.take_rows_integer(packed, ids, 96), expected[ids])
    assert (gguf_blocks.repack(blocks, most_bits=4) is None) == (kind == Type.Q8_0)


def test_other_blocks_are_not_repacked() -> None:
    raw = random_blocks(Type.Q5_0, 4, 3)
    assert gguf_blocks.repack(gguf_blocks.Blocks("Q5_0", raw, (4, 96)), most_bits=8) is None


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_tensors_that_gguf_quantizes(kind: str, tmp_path: Path) -> None:
    """Normal numbers, zeros and extremes, in one row and in many, and a vector."""
    quantization = Type[kind]
    values = {
        "normal": np.random.default_rng(0).standard_normal((5, 96), dtype=np.float32),
        "one_row": np.linspace(-3, 3, 32, dtype=np.float32).reshape(1, 32),
        "vector": np.arange(64, dtype=np.float32) / 7,
        "zeros": np.zeros((2, 32), np.float32),
        "large": np.full((2, 64), 6e4, np.float32),
        "small": np.full((2, 64), -1e-6, np.float32),
        "cube": np.random.default_rng(1).standard_normal((2, 3, 64), dtype=np.float32),
    }
    raw = {name: gguf.quants.quantize(value, quantization) for name, value in values.items()}
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", {}, raw, dict.fromkeys(raw, quantization))
    same_as_gguf(path)
    read = open_gguf(path).tensors
    if kind == "F32":
        for name, value in values.items():
            np.testing.assert_array_equal(read[name], value)
    else:
        bits = {"F16": 11, "BF16": 8, "Q8_0": 7, "Q4_0": 3, "Q4_1": 4, "Q5_0": 4, "Q5_1": 5}[kind]
        spread = np.abs(values["normal"]).max()
        assert 0 < np.abs(read["normal"] - values["normal"]).max() <= 2.0**-bits * spread * 1.01


@pytest.mark.parametrize("kind", [*SIMPLE_SCALES_AT, *SCALES_AT, *RARE_SCALES_AT], ids=lambda kind: kind.name)
def test_tensors_of_random_blocks(kind: Type, tmp_path: Path) -> None:
    """Every bit of a block, those included that no quantizer of ours would write."""
    raw = {"wide": random_blocks(kind, 7, 3), "narrow": random_blocks(kind, 1, 1)}
    same_as_gguf(checkpoints.write_gguf(tmp_path / "x.gguf", "llama", {}, raw, dict.fromkeys(raw, kind)))


def test_every_type_that_gguf_dequantizes_is_read(tmp_path: Path) -> None:
    """Asked of the package itself, so that a type it learns is missed here."""
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        raw = np.zeros((2, size), np.uint8)
        try:
            gguf.quants.dequantize(raw, kind)
        except NotImplementedError:
            continue
        if kind in (Type.F32, Type.F16):
            continue
        path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", {}, {"x": raw}, {"x": kind})
        tensor = open_gguf(path).tensors.tensors["x"]
        assert tensor.shape == (2, block) and tensor.take is not None
        np.testing.assert_array_equal(tensor.take(slice(0, 1), False), np.asarray(open_gguf(path).tensors["x"])[:1])


def test_a_model_of_a_rare_type_is_the_model_of_what_gguf_makes_of_it(tmp_path: Path) -> None:
    """Read a few rows at a time, in the order that the model wants them in."""
    raw = checkpoints.CONFIGS["llama"] | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    raw |= {"intermediate_size": 256}
    metadata, tensors = checkpoints.gguf_metadata(raw), checkpoints.gguf_tensors(raw)
    matrices = [name for name, value in tensors.items() if value.ndim == 2]
    rng = np.random.default_rng(0)
    for kind, at in ((Type.IQ4_XS, 0), (Type.TQ2_0, 64)):
        packed, widened = dict(tensors), dict(tensors)
        for name in matrices:
            blocks = rng.integers(0, 256, (len(tensors[name]), gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
            blocks[:, at : at + 2] = np.full(len(blocks), 3e-5, np.float16)[:, None].view(np.uint8)
            packed[name], widened[name] = blocks, gguf.quants.dequantize(blocks, kind)
        rare = checkpoints.write_gguf(tmp_path / "rare.gguf", "llama", metadata, packed, dict.fromkeys(matrices, kind))
        plain = checkpoints.write_gguf(tmp_path / "plain.gguf", "llama", metadata, widened)
        ids = checkpoints.token_ids(20)
        for dtype in ("float32", "int8"):
            np.testing.assert_array_equal(LLM(rare, dtype=dtype).logits(ids), LLM(plain, dtype=dtype).logits(ids))


def test_float64_tensors(tmp_path: Path) -> None:
    values = {"x": np.random.default_rng(0).standard_normal((3, 5))}
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", {}, values)
    np.testing.assert_array_equal(open_gguf(path).tensors["x"], values["x"].astype(np.float32))


def test_another_alignment(tmp_path: Path) -> None:
    """Data begins at a multiple of general.alignment, which is 32 unless the file says otherwise."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(4096)
    for i in range(3):
        writer.add_tensor(f"t{i}", np.full(3, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same_as_gguf(tmp_path / "x.gguf")


# --- metadata -----------------------------------------------------------------------------------------------------

KINDS = gguf.GGUFValueType
VALUES: list[tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]] = [
    (0, KINDS.UINT8, None),
    (255, KINDS.UINT8, None),
    (-128, KINDS.INT8, None),
    (65535, KINDS.UINT16, None),
    (-32768, KINDS.INT16, None),
    (2**32 - 1, KINDS.UINT32, None),
    (-(2**31), KINDS.INT32, None),
    (2**64 - 1, KINDS.UINT64, None),
    (-(2**63), KINDS.INT64, None),
    (0.1, KINDS.FLOAT32, None),
    (-math.inf, KINDS.FLOAT32, None),
    (0.1, KINDS.FLOAT64, None),
    (True, KINDS.BOOL, None),
    (False, KINDS.BOOL, None),
    ("", KINDS.STRING, None),
    ("naïve 日本語 👍🏽\n\0", KINDS.STRING, None),
    ([1, 2, 255], KINDS.ARRAY, KINDS.UINT8),
    ([-1, 2], KINDS.ARRAY, KINDS.INT8),
    ([1, 65535], KINDS.ARRAY, KINDS.UINT16),
    ([-1, 1], KINDS.ARRAY, KINDS.INT16),
    ([1, 2**31], KINDS.ARRAY, KINDS.UINT32),
    ([-1, 2**31 - 1], KINDS.ARRAY, KINDS.INT32),
    ([1, 2**63], KINDS.ARRAY, KINDS.UINT64),
    ([-1, 2**62], KINDS.ARRAY, KINDS.INT64),
    ([0.1, 2.0], KINDS.ARRAY, KINDS.FLOAT32),
    ([0.1, 2.0], KINDS.ARRAY, KINDS.FLOAT64),
    ([True, False, True], KINDS.ARRAY, KINDS.BOOL),
    (["a", "", "日本"], KINDS.ARRAY, KINDS.STRING),
]


def test_metadata_of_every_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for i, (value, kind, element) in enumerate(VALUES):
        writer.add_key_value(f"key.{i}", value, kind, element)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = open_gguf(tmp_path / "x.gguf").metadata
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    theirs = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert ours == theirs
    for i, (value, _, _) in enumerate(VALUES):
        got = ours[f"key.{i}"]
        numbers = value if isinstance(value, list) else [value]
        is_float = all(isinstance(number, float) for number in numbers)
        assert got == (pytest.approx(value, rel=1e-7) if is_float else value)
        assert type(got) is type(value)


# --- whole models -------------------------------------------------------------------------------------------------


# What GGUF has no key for.
UNSAID: dict[str, dict[str, Any]] = {
    "gpt2-untied": {"scale_attn_weights": True},
    "granite-hybrid-rope": {"time_step_limit": None},
}


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "gpt2-untied", "llama", "llama-grouped", "llama-head-dim", "llama-linear", "llama-biases"),
        *("falcon-7b", "falcon-40b", "falcon-11b"),
        *(name for name in checkpoints.CONFIGS if name.startswith("granite")),
        *("qwen2", "qwen2-tied", "qwen3", "qwen3-head-dim", "qwen3-biases"),
    ],
)
def test_a_gguf_is_its_folder(name: str, llm_of: Callable[..., LLM], tmp_path: Path) -> None:
    """The same weights by way of llama.cpp's names and permutations give the same logits, and the text the same ids."""
    raw = checkpoints.CONFIGS[name] | UNSAID.get(name, {})
    folder = llm_of(name)
    if name in UNSAID:
        folder = LLM(checkpoints.write_folder(tmp_path / "folder", raw), dtype="float32")
    llm = LLM(checkpoints.write_model_gguf(tmp_path / "model.gguf", raw), dtype="float32")
    ids = checkpoints.token_ids(50)
    got, expected = llm.logits(ids), folder.logits(ids)
    if "hybrid" in name:  # exp(A_log), rounded in the file
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    else:
        np.testing.assert_array_equal(got, expected)
    text = "The other one <|user|> 日本"
    params = SamplingParams(temperature=0.0, max_tokens=8)
    [ours], [theirs] = llm.generate(text, params), folder.generate(text, params)
    assert ours.prompt_token_ids == theirs.prompt_token_ids
    assert ours.outputs[0].text == theirs.outputs[0].text
    messages = [{"role": "user", "content": "hi"}]
    assert llm.chat_prompt(messages) == folder.chat_prompt(messages) == [258, 260, 104, 105, 10]
    assert llm.engine.eos_token_ids == folder.engine.eos_token_ids == {checkpoints.EOS}


def rope_divisors(scaling: dict[str, Any], head_dim: int) -> np.ndarray:
    """llama.cpp's rope_freqs.weight (LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py)."""
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * scaling["rope_theta"] ** (i / head_dim)
        smooth = (scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"]
        )
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(scaling["factor"])
        else:
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, np.float32)


def test_llama_3_scaling_from_its_divisors(tmp_path: Path) -> None:
    """Llama 3.1's numbers: of 12 waves some are kept, some are slowed, some lie between."""
    scaling = checkpoints.CONFIGS["llama-3"]["rope_parameters"] | {
        "rope_theta": 500000.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    raw = checkpoints.CONFIGS["llama-3"] | {"rope_parameters": scaling}
    divisors = rope_divisors(scaling, 24)
    assert divisors[0] == 1 and divisors[-1] == 8 and np.any((divisors > 1) & (divisors < 8))
    ids = checkpoints.token_ids(100)
    path = checkpoints.write_model_gguf(tmp_path / "model.gguf", raw, rope_freqs__weight=divisors)
    got = LLM(path, dtype="float32").logits(ids)
    folder = LLM(checkpoints.write_folder(tmp_path / "folder", raw), dtype="float32")
    expected = folder.logits(ids)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    unscaled = LLM(checkpoints.write_model_gguf(tmp_path / "unscaled.gguf", raw), dtype="float32").logits(ids)
    assert np.abs(unscaled - expected).max() > 1e-3 * np.abs(expected).max(), "the scaling makes no difference here"


def test_divisors_of_another_rule_are_refused(tmp_path: Path) -> None:
    """Divisors that Llama 3's rule does not give would be a silent error in every token."""
    raw = checkpoints.CONFIGS["llama-3"]
    divisors = rope_divisors(raw["rope_parameters"], 24)  # original context 32, which the file does not say
    path = checkpoints.write_model_gguf(tmp_path / "model.gguf", raw, rope_freqs__weight=divisors)
    assert "'rope_freqs.weight'" in refusal(path)


def test_quantized_models_run(tmp_path: Path) -> None:
    """A Q8_0 model is the float32 model of its dequantized weights, and int8 keeps close to both."""
    raw = checkpoints.CONFIGS["llama"] | {"hidden_size": 160, "intermediate_size": 192}
    tensors = checkpoints.gguf_tensors(raw)
    matrices = [name for name, value in tensors.items() if value.ndim == 2]
    packed = tensors | {name: gguf.quants.quantize(tensors[name], Type.Q8_0) for name in matrices}
    widened = tensors | {name: gguf.quants.dequantize(packed[name], Type.Q8_0) for name in matrices}
    metadata = checkpoints.gguf_metadata(raw)
    quantized = checkpoints.write_gguf(
        tmp_path / "q8.gguf", "llama", metadata, packed, dict.fromkeys(matrices, Type.Q8_0)
    )
    plain = checkpoints.write_gguf(tmp_path / "f32.gguf", "llama", metadata, widened)
    ids = checkpoints.token_ids(30)
    expected = LLM(plain, dtype="float32").logits(ids)
    np.testing.assert_array_equal(LLM(quantized, dtype="float32").logits(ids), expected)
    assert np.abs(LLM(quantized, dtype="int8").logits(ids) - expected).max() <= 0.12 * np.abs(expected).max()


# --- a model in parts ---------------------------------------------------------------------------------------------


def write_parts(folder: Path, raw: dict[str, Any], at_most: int = 10) -> list[Path]:
    """A model's GGUF file in parts of so many tensors, as gguf's own writer splits it."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=at_most))
        checkpoints.write_model_gguf(folder / "m.gguf", raw)
    return sorted(folder.glob("*.gguf"))


@pytest.mark.parametrize("name", ["llama-grouped", "llama", "gpt2"])
def test_a_model_in_parts_is_the_model_in_one_file(name: str, tmp_path: Path) -> None:
    """Whichever part is given, and their folder; output.weight, which says that nothing is tied, may be in the last."""
    raw, ids = checkpoints.CONFIGS[name], checkpoints.token_ids(20)
    expected = LLM(checkpoints.write_model_gguf(tmp_path / "whole.gguf", raw), dtype="float32").logits(ids)
    parts = write_parts(tmp_path / "parts", raw)
    assert len(parts) >= 3 and parts[0].name == f"m-00001-of-{len(parts):05}.gguf"
    for path in (*parts, parts[0].parent):
        np.testing.assert_array_equal(LLM(path, dtype="float32").logits(ids), expected)
    assert config_from_gguf(parts[1]) == config_from_gguf(tmp_path / "whole.gguf")


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_part_is_named(lost: int, tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts", RAW)
    parts[lost].unlink()
    for path in (*(part for part in parts if part.exists()), parts[0].parent):
        with pytest.raises(CheckpointError, match=rf"{parts[lost].name} does not exist, which is part {lost + 1} of "):
            LLM(path)


def test_a_part_under_another_name_or_of_another_model_is_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts", RAW)
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    assert "'split.count' is 3" in refusal(tmp_path / "renamed.gguf")
    other = write_parts(tmp_path / "other", RAW, at_most=15)
    shutil.copy(other[1], parts[1])
    with pytest.raises(CheckpointError, match=rf"{parts[1].name}: 'split.count' is 2, but by its name it is 3"):
        open_gguf(parts[0])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(CheckpointError, match=rf"{parts[1].name}: 'split.no' is 2, but by its name it is 1"):
        open_gguf(parts[0])


@pytest.mark.parametrize("value", ["3", [3], 2**31, True, 1.5, 100_000])
def test_a_number_of_parts_that_is_none_is_refused(value: Any, tmp_path: Path) -> None:
    path = checkpoints.write_gguf(tmp_path / "x-00001-of-00003.gguf", "llama", {"split.count": value}, {})
    assert "'split.count'" in refusal(path)


def test_tensors_of_parts_are_counted(tmp_path: Path) -> None:
    for i, tensors in enumerate(({"a": np.ones(3, np.float32)}, {"b": np.ones(3, np.float32)})):
        metadata = {"split.count": 2, "split.no": i, "split.tensors.count": 3}
        checkpoints.write_gguf(tmp_path / f"x-{i + 1:05}-of-00002.gguf", "llama", metadata, tensors)
    assert "'split.tensors.count' is 3, but the 2 parts have 2" in refusal(tmp_path / "x-00001-of-00002.gguf")


# --- damaged files ------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        LLM(path, dtype="float32")
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def small_file(path: Path) -> tuple[Path, int]:
    """A few kinds of metadata and two tensors; and the byte at which the last tensor ends (padding follows)."""
    metadata = {"llama.block_count": 1, "a.list": [1, 2, 3], "a.text": "text", "tokenizer.ggml.tokens": ["a", "bc"]}
    tensors = {"first": np.ones((2, 3), np.float32), "last": np.full((1, 5), 2, np.float32)}
    checkpoints.write_gguf(path, "llama", metadata, tensors)
    return path, path.read_bytes().rindex(struct.pack("<f", 2)) + 4


def test_every_prefix_is_truncated(tmp_path: Path) -> None:
    path, end = small_file(tmp_path / "x.gguf")
    whole = path.read_bytes()
    assert open_gguf(path).tensors["last"].tolist() == [[2.0] * 5]
    for length in range(end):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            open_gguf(path)
        assert str(path) in str(caught.value), length
    path.write_bytes(whole[:end])
    assert open_gguf(path).tensors["last"].tolist() == [[2.0] * 5]


def test_a_truncated_model_names_the_tensor(tmp_path: Path) -> None:
    path = checkpoints.write_model_gguf(tmp_path / "model.gguf", RAW)
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(path)
    assert "truncated" in message and "tensor '" in message


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_no_damage_is_a_crash(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file with any bytes changed is read, or refused by its name: no other exception, no endless loop."""
    folder = tmp_path_factory.getbasetemp() / "damaged-gguf"
    folder.mkdir(exist_ok=True)
    path, end = small_file(folder / "x.gguf")
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.sampled_from([0, 1, 7, 8, 9, 127, 128, 255]) | st.integers(0, 255))
    path.write_bytes(content)
    try:
        config_from_gguf(path)
    except (CheckpointError, ConfigError) as error:
        assert str(path) in str(error)
    try:
        tensors = open_gguf(path).tensors
        for name in tensors:
            assert tensors[name].shape == tensors.tensors[name].shape
    except CheckpointError as error:
        assert str(path) in str(error)


def test_arrays_within_arrays_without_end(tmp_path: Path) -> None:
    """Each level costs 12 bytes of file and a level of recursion."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 9)
    (tmp_path / "x.gguf").write_bytes(head + struct.pack("<IQ", 9, 1) * 5000)
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        open_gguf(tmp_path / "x.gguf")


def tensor_entry(dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    """A file with one tensor, 'x', and 64 bytes of data."""
    entry = struct.pack("<Q1sI", 1, b"x", len(dimensions)) + struct.pack(f"<{len(dimensions)}Q", *dimensions)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry + struct.pack("<IQ", kind, offset)
    return head + bytes(-len(head) % 32 + 64)


@pytest.mark.parametrize(
    ("dimensions", "kind", "offset"),
    [
        ([2**63], 0, 0),
        ([2**32, 2**32], 0, 0),
        ([2**63, 2], 0, 0),
        ([2**31, 2**31, 2**31, 2**31], 0, 0),
        ([16], 0, 2**63),
        ([16], 0, 32),
        ([17], 0, 0),
        ([33], 8, 0),
    ],
)
def test_an_impossible_tensor(dimensions: list[int], kind: int, offset: int, tmp_path: Path) -> None:
    """Sizes whose product overflows, data past the end, and rows that are no whole blocks."""
    (tmp_path / "x.gguf").write_bytes(tensor_entry(dimensions, kind, offset))
    with pytest.raises(CheckpointError, match=r"x\.gguf.*tensor 'x'"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("length", [100, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_an_impossible_string(length: int, tmp_path: Path) -> None:
    """A string longer than the file, and an array with one; 2**63 and more are no index on any machine."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1s", 1, b"k")
    for value in (
        struct.pack("<IQ", 8, length),
        struct.pack("<IIQQ", 9, 8, 1, length),
        struct.pack("<IIQ", 9, 8, length),
    ):
        (tmp_path / "x.gguf").write_bytes(head + value + bytes(20))
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("dimensions", [[16], [], [4, 4], [1, 1, 1, 1], [0], [0, 3], [3, 0]])
def test_a_tensor_of_any_rank(dimensions: list[int], tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(tensor_entry(dimensions))
    tensors = open_gguf(tmp_path / "x.gguf").tensors
    assert tensors["x"].shape == tensors.tensors["x"].shape == tuple(reversed(dimensions))


@pytest.mark.parametrize("alignment", [0, "x", 2.5, [32]])
def test_an_alignment_that_aligns_nothing(alignment: Any, tmp_path: Path) -> None:
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", {"general.alignment": alignment}, {})
    with pytest.raises(CheckpointError, match=r"x\.gguf: general\.alignment"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "0 bytes"),
        (b"GGUF", "4 bytes"),
        (b"GGML" + bytes(60), "GGUF"),
        (b"<!doctype html><html><body>404</body></html>", "GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(99), "truncated or corrupt"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(99), "truncated or corrupt"),
    ],
)
def test_what_is_no_gguf(content: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert part in refusal(path)


def test_an_unknown_tensor_type(tmp_path: Path) -> None:
    """One that gguf knows and tinyserve does not, and one that nobody knows."""
    raw = np.zeros((2, 40), np.uint8)
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", {}, {"odd.weight": raw}, {"odd.weight": Type.Q8_1})
    assert "'odd.weight'" in refusal(path) and "Q8_1" in refusal(path) and "Q8_0" in refusal(path)
    content = path.read_bytes()
    at = content.index(b"odd.weight") + len("odd.weight") + 4 + 16
    assert struct.unpack_from("<I", content, at) == (Type.Q8_1,)
    path.write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
    assert "'odd.weight'" in refusal(path) and "type 999" in refusal(path)


@pytest.mark.parametrize("architecture", ["qwen3moe", "gemma", "bloom"])
def test_an_unknown_architecture(architecture: str, tmp_path: Path) -> None:
    path = checkpoints.write_gguf(tmp_path / "x.gguf", architecture, {}, {"x": np.ones(3, np.float32)})
    message = refusal(path)
    assert "general.architecture" in message and repr(architecture) in message and "llama" in message


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.embedding_length",
        "llama.attention.head_count",
        "llama.feed_forward_length",
        "llama.context_length",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
    ],
)
def test_a_missing_metadata_key(key: str, tmp_path: Path) -> None:
    metadata = checkpoints.gguf_metadata(RAW)
    del metadata[key]
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", metadata, checkpoints.gguf_tensors(RAW))
    assert key in refusal(path)


def test_how_wide_a_head_of_qwen3_is_must_be_said(tmp_path: Path) -> None:
    """Not hidden by heads, which a Llama may leave unsaid, nor the 128 that transformers takes where it is absent."""
    raw = checkpoints.CONFIGS["qwen3"]
    metadata = checkpoints.gguf_metadata(raw)
    del metadata["qwen3.attention.key_length"]
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "qwen3", metadata, checkpoints.gguf_tensors(raw))
    assert "lacks the metadata key 'qwen3.attention.key_length'" in refusal(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count", [6, 6, 6]),
        ("llama.attention.head_count", "six"),
        ("llama.attention.head_count", 0),
        ("llama.embedding_length", "wide"),
        ("llama.block_count", 2.5),
        ("llama.rope.freq_base", "fast"),
        ("llama.rope.scaling.type", "yarn"),
        ("tokenizer.ggml.tokens", "abc"),
        ("tokenizer.ggml.tokens", 3),
        ("tokenizer.ggml.merges", 3),
        ("tokenizer.ggml.pre", "martian"),
        ("tokenizer.ggml.model", "martian"),
        ("tokenizer.ggml.eos_token_id", 99999),
        ("tokenizer.ggml.eos_token_id", "end"),
    ],
)
def test_a_metadata_key_with_a_wrong_value(key: str, value: Any, tmp_path: Path) -> None:
    """An error of ours that names the file; never an exception from somewhere inside."""
    metadata = checkpoints.gguf_metadata(RAW) | {key: value}
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", metadata, checkpoints.gguf_tensors(RAW))
    refusal(path)


METADATA_OF_OTHER_TYPES = [
    ("tokenizer.ggml.model", ["gpt2"]), ("tokenizer.ggml.pre", ["gpt-2"]), ("tokenizer.ggml.tokens", [1, 2, 3]),
    ("tokenizer.ggml.token_type", 1), ("tokenizer.ggml.token_type", ["x"]), ("tokenizer.ggml.merges", [1]),
    ("tokenizer.ggml.bos_token_id", "1"), ("tokenizer.ggml.padding_token_id", [1]), ("tokenizer.chat_template", 5),
    ("tokenizer.ggml.eos_token_id", [1, 2]), ("tokenizer.ggml.eot_token_id", 1.5), ("tokenizer.chat_template.x", [5]),
    ("tokenizer.ggml.add_bos_token", 1), ("tokenizer.ggml.add_eos_token", "yes"), ("general.alignment", "32"),
    ("general.architecture", ["llama"]), ("llama.rope.freq_base", [1.0]), ("llama.rope.scaling.type", 1),
    ("llama.rope.scaling.factor", "2"), ("llama.block_count", [1, 2]), ("llama.block_count", 2**31),
    ("llama.context_length", 1.5), ("llama.attention.head_count_kv", ["x"]), ("llama.vocab_size", [1]),
    ("llama.attention.layer_norm_rms_epsilon", [1e-5]), ("general.sampling.temp", [1.0]), ("split.count", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), METADATA_OF_OTHER_TYPES)
def test_metadata_of_another_type_are_refused_by_their_key(key: str, value: Any, tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"]
    metadata = checkpoints.gguf_metadata(raw) | {key: value}
    message = refusal(checkpoints.write_gguf(tmp_path / "x.gguf", "llama", metadata, checkpoints.gguf_tensors(raw)))
    named = {
        "llama.rope.freq_base": "rope_theta", "llama.context_length": "max_position_embeddings",
        "llama.attention.head_count_kv": "num_key_value_heads", "llama.vocab_size": "vocab_size",
        "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps", "general.sampling.temp": "temperature",
    }  # fmt: skip
    assert named.get(key, key) in message and len(message) < 600


def test_ids_that_say_none_are_no_tokens(tmp_path: Path) -> None:
    """llama.cpp's LLAMA_TOKEN_NULL is -1, in a type without a sign."""
    raw = checkpoints.CONFIGS["llama"]
    none = {f"tokenizer.ggml.{name}_token_id": 2**32 - 1 for name in ("bos", "eos", "padding", "unknown", "eot")}
    metadata = checkpoints.gguf_metadata(raw) | none
    llm = LLM(checkpoints.write_gguf(tmp_path / "x.gguf", "llama", metadata, checkpoints.gguf_tensors(raw)))
    assert llm.end_tokens == {}


@pytest.mark.parametrize(
    ("scaling", "stretched"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, True),
        ({"rope.scaling.factor": 4.0}, True),
        ({"rope.scale_linear": 4.0}, True),
        ({"rope.scale_linear": 8.0, "rope.scaling.factor": 4.0}, True),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, False),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, False),
        ({"rope.scaling.factor": 1.0}, False),
        ({}, False),
    ],
)
def test_a_rope_is_stretched_as_llama_cpp_stretches_it(
    scaling: dict[str, Any], stretched: bool, tmp_path: Path
) -> None:
    """A factor is linear if no type says otherwise, also under the name that the specification keeps for old files."""
    metadata = checkpoints.gguf_metadata(checkpoints.CONFIGS["llama"])
    metadata |= {f"llama.{key}": value for key, value in scaling.items()}
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", metadata, {"token_embd.weight": np.ones((3, 4))})
    theta = {"rope_theta": 10000.0}
    linear = {"rope_type": "linear", "factor": 4.0}
    assert config_from_gguf(path)["rope_parameters"] == theta | (linear if stretched else {"rope_type": "default"})


def test_positions_that_are_stretched_twice_are_refused(tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama-3"]
    metadata = checkpoints.gguf_metadata(raw) | {"llama.rope.scaling.factor": 4.0}
    tensors = checkpoints.gguf_tensors(raw) | {"rope_freqs.weight": rope_divisors(raw["rope_parameters"], 24)}
    message = refusal(checkpoints.write_gguf(tmp_path / "x.gguf", "llama", metadata, tensors))
    assert "llama.rope.scaling.factor is 4" in message and "rope_freqs.weight" in message


def test_a_token_that_would_take_minutes_to_cut_is_refused(tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"]
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) * 40_000 for i in range(3))]
    metadata = checkpoints.gguf_metadata(raw) | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    metadata |= {"tokenizer.ggml.token_type": [1] * 6, "tokenizer.ggml.scores": [0.0] * 6}
    metadata |= {f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("unknown", "bos", "eos"))}
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", metadata, checkpoints.gguf_tensors(raw))
    assert "tokens of up to 40000 characters" in refusal(path)


@pytest.mark.parametrize("dimensions", [[1] * 5, [1] * 100, [0, 2**47, 2**47], [2**62, 0]])
def test_a_shape_that_no_tensor_has_is_refused(dimensions: list[int], tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(tensor_entry(dimensions))
    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor 'x' has "):
        open_gguf(tmp_path / "x.gguf")


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    whole = tensor_entry([16])
    entry = whole[24 : 24 + 8 + 1 + 4 + 8 + 4 + 8]
    content = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + entry + entry
    (tmp_path / "x.gguf").write_bytes(content + bytes(-len(content) % 32 + 64))
    with pytest.raises(CheckpointError, match=r"two tensors 'x'"):
        open_gguf(tmp_path / "x.gguf")


def test_lists_without_end_are_not_read(tmp_path: Path) -> None:
    """A gigabyte of zeros that takes no room on the disk would be 16 GB of integers."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 9)
    for kind in (0, 8):
        (tmp_path / "x.gguf").write_bytes(head + struct.pack("<IQ", kind, 2**28))
        with (tmp_path / "x.gguf").open("ab") as stream:
            stream.truncate(1 << 30)
        with pytest.raises(CheckpointError, match=r"x\.gguf: (the lists of its|its header goes on)|inside its header"):
            open_gguf(tmp_path / "x.gguf")


def test_no_tensors_and_no_tokens(tmp_path: Path) -> None:
    metadata = {key: value for key, value in checkpoints.gguf_metadata(RAW).items() if "ggml" not in key}
    path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", metadata, {"x": np.ones(3, np.float32)})
    assert "token_embd.weight" in refusal(path) or "tokenizer.ggml" in refusal(path)


@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "output_norm.weight", "token_embd.weight"])
def test_a_missing_or_misshapen_tensor(name: str, tmp_path: Path) -> None:
    tensors = checkpoints.gguf_tensors(RAW)
    cut = tensors | {name: np.ascontiguousarray(tensors[name][:-2])}
    path = checkpoints.write_gguf(tmp_path / "cut.gguf", "llama", checkpoints.gguf_metadata(RAW), cut)
    assert "shape" in refusal(path) and str(list(cut[name].shape)) in refusal(path)
    del tensors[name]
    path = checkpoints.write_gguf(tmp_path / "less.gguf", "llama", checkpoints.gguf_metadata(RAW), tensors)
    assert "has no tensor" in refusal(path)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "qwen3", "qwen3-head-dim", "qwen3-biases"])
def test_transformers_reads_the_same_from_a_qwen(name: str, tmp_path: Path) -> None:
    """Names and rows as the file has them, by a second reader; the sizes are handed in, as it reads only some."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw, ids = checkpoints.CONFIGS[name], checkpoints.token_ids(70)
    path = checkpoints.write_model_gguf(tmp_path / "model.gguf", raw)
    config = transformers.AutoConfig.for_model(**raw)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, config=config, gguf_file=path.name, dtype=torch.float32
    )
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    assert checkpoints.error(LLM(path, dtype="float32").logits(ids), theirs) <= 1e-4


# --- the default model, for real ----------------------------------------------------------------------------------

TEXT = "The history of science is the story of how people learned to"


def test_smollm2_is_what_transformers_makes_of_it(smollm2: Path, oracle: Oracle) -> None:
    """Sixty-four greedy tokens of the same file, dequantized by both to float32."""
    torch = oracle("torch")
    transformers = oracle("transformers")
    llm = LLM(smollm2, dtype="float32", max_model_len=256)
    [output] = llm.generate(TEXT, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True))
    where = {"gguf_file": smollm2.name} if smollm2.is_file() else {}
    folder = smollm2.parent if smollm2.is_file() else smollm2
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    # Each of our tokens is transformers' choice after those before it, and so the whole text is.
    assert theirs.argmax(axis=1)[-65:-1].tolist() == output.outputs[0].token_ids
    ours = llm.logits(ids)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    llm = LLM(smollm2, dtype="int8", max_model_len=256)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    [output] = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=32))
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
