"""Packed checkpoints: what `tinyserve quantize` writes is what --dtype makes of the original, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, get_ident

import checkpoints
import numpy as np
import pytest
from command_line import run

from tinyserve import LLM, quantize
from tinyserve.errors import CheckpointError, ConfigError, TinyserveError, UserError

IDS = checkpoints.token_ids(60, seed=5)
GRANITES = ["granite", "granite-moe", "granite-hybrid-moe", "granite-hybrid-rope"]
QUESTION = [{"role": "user", "content": "the other é"}]


@pytest.mark.parametrize("dtype", ["int8", "w8a8", "int4", "w4a8"])
@pytest.mark.parametrize(
    "name",
    ["gpt2", "gpt2-untied", "llama", "llama-biases", "mistral", "falcon-40b", "falcon-rw", "qwen2", "qwen3", *GRANITES],
)
def test_a_packed_folder_is_its_original(
    name: str, dtype: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "packed"
    quantize.write(str(folder_of(name)), out, dtype)
    packed, original = LLM(out), LLM(folder_of(name), dtype=dtype)
    assert packed.dtype == original.dtype
    np.testing.assert_array_equal(packed.logits(IDS), original.logits(IDS))
    assert packed.model.nbytes == original.model.nbytes
    assert packed.tokenizer is not None and packed.tokenizer.encode("the other") == original.tokenizer.encode(
        "the other"
    )
    assert packed.chat_prompt([{"role": "user", "content": "a"}]) == original.chat_prompt(
        [{"role": "user", "content": "a"}]
    )


@pytest.mark.parametrize("key", ["intermediate_size", "vocab_size", "num_hidden_layers"])
def test_a_config_that_is_not_the_packed_files_takes_no_memory(
    tmp_path: Path, folder_of: Callable[[str], Path], key: str
) -> None:
    out = tmp_path / "packed"
    quantize.write(str(folder_of("llama")), out, "int8")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {key: 2**31 - 1}))
    with pytest.raises((CheckpointError, ConfigError)) as refused:
        LLM(out, kv_cache_memory=1 << 20)
    assert str(out) in str(refused.value)


def test_a_packed_gguf_is_its_original(tmp_path: Path) -> None:
    file = checkpoints.write_model_gguf(tmp_path / "model.gguf", checkpoints.CONFIGS["llama-grouped"])
    quantize.write(str(file), tmp_path / "packed", "int8")
    packed, original = LLM(tmp_path / "packed"), LLM(file, dtype="int8")
    np.testing.assert_array_equal(packed.logits(IDS), original.logits(IDS))
    assert packed.engine.eos_token_ids == original.engine.eos_token_ids
    assert packed.tokenizer.special_tokens.items() >= original.tokenizer.special_tokens.items()
    assert packed.chat_prompt([{"role": "user", "content": "é"}]) == original.chat_prompt(
        [{"role": "user", "content": "é"}]
    )


def test_weights_are_mapped_and_not_copied(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    quantize.write(str(folder_of("llama")), tmp_path / "packed", "int8")
    integers = LLM(tmp_path / "packed").model.blocks[0].mixer.qkv.matrix.packed.stream
    while isinstance(integers.base, np.ndarray):
        integers = integers.base
    assert isinstance(integers, np.memmap)


def test_whoever_may_read_the_config_may_read_the_weights(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    quantize.write(str(folder_of("gpt2")), tmp_path / "packed", "int8")
    modes = {file.stat().st_mode for file in (tmp_path / "packed").glob("[cm]*.*")}
    assert len(modes) == 1


def test_shards(folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "SHARD", 100_000)
    nbytes, files = quantize.write(str(folder_of("llama")), tmp_path / "packed", "int8")
    assert files == len(list((tmp_path / "packed").glob("model-*.safetensors"))) > 2
    assert (
        nbytes
        == json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )
    original = LLM(folder_of("llama"), dtype="int8")
    np.testing.assert_array_equal(LLM(tmp_path / "packed").logits(IDS), original.logits(IDS))


def test_bits_of_activations_may_change_and_bits_of_weights_not(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize.write(str(folder_of("gpt2")), tmp_path / "packed", "int8")
    rough, fine = LLM(tmp_path / "packed", dtype="w8a8").logits(IDS), LLM(tmp_path / "packed").logits(IDS)
    assert 0 < np.abs(rough - fine).max() < 0.1 * np.abs(fine).max()
    for dtype in ("int4", "float32", "bfloat16"):
        with pytest.raises(UserError, match="packed as w8a16"):
            LLM(tmp_path / "packed", dtype=dtype)
    with pytest.raises(UserError, match="packed already"):
        quantize.write(str(tmp_path / "packed"), tmp_path / "again", "int4")


def test_files_beside_the_weights_come_along(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "original"
    shutil.copytree(folder_of("llama"), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    quantize.write(str(folder), tmp_path / "packed", "int4")
    for file in ("generation_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"):
        assert (tmp_path / "packed" / file).read_text() == (folder / file).read_text()
    assert {7, 8} <= LLM(tmp_path / "packed").engine.eos_token_ids


def test_nothing_is_left_of_what_fails(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    source = str(folder_of("llama"))  # written before there is no space left
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space"):
        quantize.write(source, tmp_path / "packed", "int8")
    assert list(tmp_path.iterdir()) == []


def test_two_at_a_time_leave_one_whole_folder(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Whoever is slower hears of it; neither takes the other's files away."""
    source, out = str(folder_of("llama")), tmp_path / "out"
    start = Barrier(4)

    def write() -> str:
        start.wait()
        try:
            quantize.write(source, out, "int8")
        except UserError as error:
            return str(error)
        return "written"

    for _ in range(5):
        with ThreadPoolExecutor(4) as pool, patched_pids():
            said = [one.result() for one in [pool.submit(write) for _ in range(4)]]
        assert said.count("written") == 1
        assert all(words == "written" or "exists already" in words or "meanwhile" in words for words in said)
        assert {path.name for path in tmp_path.iterdir()} == {"out"}
        assert (out / "model.safetensors").is_file() and (out / "config.json").is_file()
        shutil.rmtree(out)


@contextmanager
def patched_pids() -> Iterator[None]:
    """Threads that are told apart as processes are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize.os, "getpid", get_ident)
        patch.setattr(quantize, "_clear_away", lambda out: None)
        yield


def test_what_a_killed_process_left_is_deleted(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = {pid: tmp_path / f"out.{pid}.partial" for pid in (dead.pid, os.getppid(), "x")}
    for folder in left.values():
        folder.mkdir()
    quantize.write(str(folder_of("llama")), tmp_path / "out", "int8")
    assert not left[dead.pid].exists() and left[os.getppid()].exists() and left["x"].exists()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_another_layout_is_refused(axis: int, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    quantize.write(str(folder_of("llama")), tmp_path / "packed", "int8")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.o_proj.stream"
    tensors[name] = np.ascontiguousarray(np.delete(tensors[name], -1, axis))
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"o_proj.*is no matrix of.*tinyserve quantize"):
        LLM(tmp_path / "packed")


def test_an_older_layout_is_refused_by_its_number(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    quantize.write(str(folder_of("llama")), tmp_path / "packed", "int8")
    file = tmp_path / "packed" / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"]["version"] = 1
    file.write_text(json.dumps(raw))
    with pytest.raises(TinyserveError, match=r"config\.json.*layout 1.*reads layout 2.*again.*tinyserve quantize"):
        LLM(tmp_path / "packed")


def test_weights_too_large_for_a_scale_name_their_tensor(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"]
    tensors = checkpoints.tensors_of(raw)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = 1e9
    folder = checkpoints.write_folder(tmp_path / "large", raw, tensors)
    with pytest.raises(CheckpointError, match=r"down_proj.weight' cannot be w8a16: weights reach 1e\+09.*bfloat16"):
        LLM(folder)
    assert np.isfinite(LLM(folder, dtype="bfloat16").logits(IDS)).all()


def test_the_command(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "packed"
    done = run("quantize", folder_of("llama"), out, "--dtype", "int4")
    assert done.code == 0, done.err
    assert "w4a16" in done.out and "302.1 kB of weights" in done.out
    asked = run("ask", out, "Who?", "--max-tokens", "5", "--json")
    assert asked.code == 0 and json.loads(asked.out)["dtype"] == "w4a16"
    for arguments, words in [
        ((folder_of("llama"), out), "exists already"),
        ((folder_of("llama"), tmp_path / "x", "--dtype", "float32"), "is not quantized"),
        ((folder_of("llama"), tmp_path / "x", "--dtype", "int3"), "Did you mean 'int"),
        ((out, tmp_path / "x"), "packed already"),
        ((tmp_path / "nothing.gguf", tmp_path / "x"), "nothing.gguf"),
    ]:
        refused = run("quantize", *arguments)
        assert refused.code == 2, (arguments, refused.err)
        assert words in refused.sentence
        assert not (tmp_path / "x").exists()


def test_a_packed_checkpoint_of_another_tool_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(folder_of("llama"), folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(TinyserveError, match="gptq"):
        LLM(folder)
