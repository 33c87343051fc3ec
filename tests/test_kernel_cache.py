"""Which models find their kernels compiled: those that have run, and no other of the same architecture."""

import gc
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import pytest
from gguf import GGMLQuantizationType as Type

from tinyserve import LLM, model_runner
from tinyserve.model_runner import ModelRunner
from tinyserve.progress import silent
from tinyserve.tensor import _jit
from tinyserve.tensor.program import Instruction, Planned, compiling


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that have run their kernels, with nothing marked as compiled at the beginning."""
    ran: list[str] = []
    run_kernels = ModelRunner._run_kernels

    def counted(self: ModelRunner) -> None:
        ran.append(self.model.config.model_type)
        run_kernels(self)

    monkeypatch.setattr(_jit, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(ModelRunner, "_run_kernels", counted)
    return ran


def test_siblings_of_one_model_type_compile_what_is_their_own(
    compiled: list[str], tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    """Attention alone, with Mamba2, and with experts: all are granitemoehybrid."""
    dense = checkpoints.CONFIGS["granite-hybrid"] | {"layer_types": ["full_attention"] * 3}
    names = [
        checkpoints.write_folder(tmp_path / "dense", dense),
        folder_of("granite-hybrid"),
        folder_of("granite-hybrid-moe"),
    ]
    for number, name in enumerate(names, 1):
        for _ in range(2):  # the second time it is known
            LLM(name, dtype="float32", max_model_len=16)
            assert compiled == ["granitemoehybrid"] * number
    LLM(names[0], dtype="bfloat16", max_model_len=16)
    LLM(names[0], dtype="float32", kv_cache_dtype="int8", max_model_len=16)
    assert len(compiled) == len(names) + 2


def test_files_of_other_bits_compile_their_own(compiled: list[str], tmp_path: Path) -> None:
    """Of GGUF files, 4 bits stay 4 bits in w8a16, and are another kernel's."""
    raw = checkpoints.CONFIGS["llama"] | {"hidden_size": 160, "head_dim": 32, "intermediate_size": 96}
    tensors, metadata = checkpoints.gguf_tensors(raw), checkpoints.gguf_metadata(raw)
    matrices = [name for name, array in tensors.items() if array.ndim == 2]
    for number, kind in enumerate((Type.Q8_0, Type.Q4_0, Type.Q4_1), 1):
        packed = tensors | {name: gguf.quants.quantize(tensors[name], kind) for name in matrices}
        file = tmp_path / f"{kind.name}.gguf"
        checkpoints.write_gguf(file, "llama", metadata, packed, dict.fromkeys(matrices, kind))
        for _ in range(2):
            LLM(file, max_model_len=16)
            assert len(compiled) == number


@pytest.mark.parametrize("name", ["gpt2", "falcon-40b", "llama-grouped", "granite-hybrid-moe"])
@pytest.mark.parametrize("dtype", ["float32", "w8a8"])
def test_what_is_compiled_was_planned(
    name: str, dtype: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that whoever waits sees how much of it is done."""
    llm = LLM(folder_of(name), dtype=dtype, max_model_len=16)
    gc.unfreeze()  # or they are not listed
    for one in gc.get_objects():
        if type(one) is Instruction:  # a dead proxy has no class to be asked for
            monkeypatch.setattr(one, "_codes", {})
    planned, seen, code = set[Planned](), set[Planned](), Instruction.code

    def noted(self: Instruction, kinds: tuple[Hashable, ...]) -> int:
        found = code(self, kinds)
        if found:
            seen.add(Planned(self, kinds))
        return found

    monkeypatch.setattr(Instruction, "code", noted)
    monkeypatch.setattr(model_runner, "compiling", lambda told: (planned.update(told), compiling(told))[1])
    runner: Any = llm.engine.runner
    runner.forward._steps.clear()
    runner._run_kernels()
    assert seen == planned and len(seen) > 10


def test_whoever_waits_for_the_compiler_is_told(
    compiled: list[str], tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    from filelock import FileLock

    llm = LLM(folder_of("llama"), dtype="float32", max_model_len=16)
    lock = FileLock(tmp_path / "compiling.lock")
    heard: list[tuple[str, int, int]] = []
    lock.acquire()
    llm.engine.runner.compile_kernels("float32", silent)  # knows what it has compiled, and waits for nobody
    llm.engine.runner.compile_kernels("another", lambda *told: (heard.append(told), lock.release())[0])
    assert heard == [("wait", 0, 0)]
