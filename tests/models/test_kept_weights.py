"""What is kept in memory of the weights, in words that every command, the server and its page share."""

from collections.abc import Callable
from pathlib import Path

import checkpoints
import gguf
import numpy as np
import pytest
from command_line import Shell
from gguf import GGMLQuantizationType as Type
from servers import running

from tinyserve import LLM
from tinyserve.models.dtypes import WEIGHT_DTYPES, kept_weights
from tinyserve.models.matrix import pack
from tinyserve.progress import size
from tinyserve.quantize import write


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def gguf_file(path: Path, *kinds: Type) -> Path:
    """A Llama in GGUF; its matrices are of these kinds in turn."""
    raw = checkpoints.CONFIGS["llama"] | {"hidden_size": 160, "head_dim": 32, "intermediate_size": 96}
    tensors, metadata = checkpoints.gguf_tensors(raw), checkpoints.gguf_metadata(raw)
    matrices = [name for name, array in tensors.items() if array.ndim == 2]
    chosen = {name: kinds[i % len(kinds)] for i, name in enumerate(matrices)}
    packed = tensors | {name: gguf.quants.quantize(tensors[name], kind) for name, kind in chosen.items()}
    checkpoints.write_gguf(path, "llama", metadata, packed, chosen)
    return path


@pytest.mark.parametrize(
    ("dtype", "weights", "words"),
    [
        ("float32", {32: 9}, "float32: 32 bits a weight, 1.5 kB"),
        ("bfloat16", {16: 9}, "bfloat16: 16 bits a weight, 1.5 kB"),
        ("w8a16", {8: 9}, "int8 (w8a16): 8 bits a weight, 1.5 kB"),
        ("w8a8", {8: 9}, "w8a8: 8 bits a weight, 1.5 kB"),
        ("w8a16", {4: 9}, "int8 (w8a16): at most 8 bits; this file's 4 bits are kept, 1.5 kB"),
        ("w8a16", {4: 9, 8: 2}, "int8 (w8a16): at most 8 bits; this file's 4 bits are kept, 1.5 kB"),
        ("w8a8", {4: 2, 8: 9}, "w8a8: at most 8 bits; where this file has 4 they are kept, 1.5 kB"),
        ("w4a16", {4: 9, 8: 2}, "int4 (w4a16): 4 bits a weight, 8 in embeddings and heads, 1.5 kB"),
        ("w4a8", {4: 9}, "w4a8: 4 bits a weight, 1.5 kB"),
    ],
)
def test_the_words(dtype: str, weights: dict[int, int], words: str) -> None:
    assert kept_weights(dtype, weights, 1500) == words


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_a_matrix_has_the_bits_of_its_dtype(dtype: str) -> None:
    assert pack(np.ones((64, 128), np.float32), dtype).bits == WEIGHT_DTYPES[dtype].weight_bits


@pytest.mark.parametrize(
    ("kinds", "dtype", "words"),
    [
        ((Type.Q4_0,), "int8", "int8 (w8a16): at most 8 bits; this file's 4 bits are kept"),
        ((Type.Q4_1,), "w8a8", "w8a8: at most 8 bits; this file's 4 bits are kept"),
        ((Type.Q8_0,), "int8", "int8 (w8a16): 8 bits a weight"),
        ((Type.Q4_0,), "float32", "float32: 32 bits a weight"),
        ((Type.Q8_0,), "int4", "int4 (w4a16): 4 bits a weight, 8 in embeddings and heads"),
    ],
)
def test_a_model_says_what_it_has(tmp_path: Path, kinds: tuple[Type, ...], dtype: str, words: str) -> None:
    llm = LLM(gguf_file(tmp_path / "m.gguf", *kinds), dtype=dtype, max_model_len=16)
    assert llm.model.kept == f"{words}, {size(llm.model.nbytes)}"


def test_what_quantize_wrote_is_told_alike(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    write(str(folder_of("llama")), tmp_path / "packed", "int4")
    packed, folded = LLM(tmp_path / "packed", max_model_len=16), LLM(folder_of("llama"), dtype="int4", max_model_len=16)
    assert packed.model.kept == folded.model.kept


def test_every_place_says_the_same(shell: Shell, tmp_path: Path) -> None:
    """`ask --verbose`, `bench`, `trace` and the server, whose page prints what it is told."""
    file = gguf_file(tmp_path / "m.gguf", Type.Q4_0)
    words = LLM(file, max_model_len=16).model.kept
    assert "this file's 4 bits are kept" in words
    verbose = shell("ask", file, "Hi", "--raw", "--max-tokens", "1", "--verbose").err
    assert f"weights      {words}\n" in verbose
    short = ("--prefill", "8", "--depth", "0", "--batch", "1", "--decode", "2", "-r", "1")
    assert shell("bench", file, *short).out.startswith(f"{file} in {words}; ")
    assert shell("trace", file, "--depth", "4").out.startswith(f"{file} in {words}; ")
    with running({"tiny": file}, num_threads=1) as server:
        assert server.get("/v1/models/tiny").json()["weights"] == words


def test_the_cache_is_said_to_be_room(shell: Shell, folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("granite-hybrid"), max_model_len=64)
    assert str(llm.cache_plan).endswith(" (room that is taken only as it is used)")
    verbose = shell("ask", folder_of("granite-hybrid"), "Hi", "--raw", "--max-tokens", "1", "--verbose").err
    assert "(room that is taken only as it is used)\n" in verbose
