"""How kernels are compiled: the cache folder, the cores that may be used, and plainer processors."""

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any

import numba
import pytest
from llvmlite.binding.targets import FeatureMap

from tinyserve.tensor import _jit, cgroups


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, with these variables set."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


MULTIPLY = """
import numpy as np
from tinyserve.models import matrix
from tinyserve.tensor import dot_product, matmul, reference
rows = np.random.default_rng(0)
x, w = rows.standard_normal((4, 100), np.float32), rows.standard_normal((70, 100), np.float32)
kernel = matmul.matmul_integer
for dtype in ("w8a16", "w8a8", "w4a16", "w4a8"):
    matrix = matrix.pack(w, dtype)
    matmul.matmul_integer = reference.matmul_integer
    expected = matrix.matmul(x)
    matmul.matmul_integer = kernel
    y = matrix.matmul(x)
    assert np.abs(y - expected).max() < (1e-5 if dtype.endswith("16") else 2e-3) * np.abs(expected).max(), dtype
print(dot_product.PATH)
"""


def test_the_cache_folder_depends_on_the_processor_and_moves_with_its_variable(tmp_path: Path) -> None:
    code = "from tinyserve.tensor import _jit; print(_jit.cache_folder())"
    here = Path(python(code, TINYSERVE_CACHE=str(tmp_path)))
    generic = Path(python(code, TINYSERVE_CACHE=str(tmp_path), NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=""))
    forced = Path(python(code, TINYSERVE_CACHE=str(tmp_path), TINYSERVE_DOT_PRODUCT="plain"))
    assert here.parent == generic.parent == forced.parent == tmp_path
    assert len({here, generic, forced}) == 3
    assert here.is_dir()


def test_a_cached_kernel_needs_no_compiler(tmp_path: Path) -> None:
    code = """
import numba.core.base, numpy as np
from tinyserve.tensor.moe import group_by_expert, route
prepared = []
refresh = numba.core.base.BaseContext.refresh
numba.core.base.BaseContext.refresh = lambda self: (prepared.append(1), refresh(self))[1]
ids, weights = route(np.array([[0, 3, 1]], np.float32), 2)
row_of, offsets = group_by_expert(ids, 3)
print(bool(prepared), ids.tolist(), row_of.tolist(), offsets.tolist())
"""
    same = "[[1, 2]] [[0, 1]] [0, 0, 1, 2]"
    assert python(code, TINYSERVE_CACHE=str(tmp_path)) == f"True {same}"
    assert python(code, TINYSERVE_CACHE=str(tmp_path)) == f"False {same}"
    # Another type of argument finds no machine code and compiles it, in a process that began with cached code.
    code = code.replace("print(", "group_by_expert(ids.astype(np.int32), 3)\nprint(")
    assert python(code, TINYSERVE_CACHE=str(tmp_path)) == f"True {same}"


CLOSURES = """
import sys
import numpy as np
from tinyserve.tensor._jit import cached_kernel as kernel

def tile_of(rows):
    @kernel
    def tile(x):
        total = 0.0
        for value in x:
            for row in range(rows):
                total += np.sqrt(value + row) * np.sin(value * row + 1.0)
                total += np.sqrt(value + 2 * row) * np.sin(value * row + 2.0)
        return total
    return tile

one, many = tile_of(1), tile_of(40)

@kernel
def either(x, which):
    if which == 1:
        return one(x)
    return many(x)

x = np.arange(10.0)
for call in sys.argv[1:]:
    result = {"one": lambda: one(x), "many": lambda: many(x), "both": lambda: either(x, 40) - many.py_func(x)}[call]()
print(abs(result) < 1e-9)
"""


def test_closures_of_one_name_stay_apart_whoever_compiled_them(tmp_path: Path) -> None:
    """One process compiles a tile of one row; another loads it, compiles a tile of forty, and what calls both."""
    script = tmp_path / "closures.py"
    script.write_text(CLOSURES)
    for calls in (["one"], ["many", "both"], ["both"]):
        command = [sys.executable, str(script), *calls]
        environment = os.environ | {"TINYSERVE_CACHE": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    assert done.stdout == "True\n"


def double(x: Any) -> Any:
    return x + x


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A kernel that has been compiled for two types of argument, and kept."""
    monkeypatch.setattr(_jit, "cache_folder", lambda: tmp_path)
    compiled = _jit.cached_kernel(double)
    assert (compiled(1), compiled(0.5)) == (2, 1.0)
    assert [path.suffix for path in tmp_path.iterdir()] == [".kernel", ".kernel"]
    return compiled


def test_a_kernel_is_loaded_for_its_own_types(kept: Any, tmp_path: Path) -> None:
    for types in kept.overloads:
        loaded = _jit._KernelCache(double).load_overload(types, kept.targetctx)
        assert loaded is not None and loaded.signature.args == types
    first, second = tmp_path.iterdir()  # one under the other's name
    first.write_bytes(second.read_bytes())
    found = [_jit._KernelCache(double).load_overload(types, kept.targetctx) for types in kept.overloads]
    assert found.count(None) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:1000] + bytes([data[1000] ^ 4]) + data[1001:],
        lambda data: bytes(len(data)),
    ],
)
def test_what_is_damaged_is_compiled_again(kept: Any, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, data in whole.items():
        path.write_bytes(damage(data))
    assert all(_jit._KernelCache(double).load_overload(types, kept.targetctx) is None for types in kept.overloads)
    again = _jit.cached_kernel(double)
    assert (again(1), again(0.5)) == (2, 1.0)
    assert all(_jit._KernelCache(double).load_overload(types, kept.targetctx) for types in kept.overloads)
    assert set(tmp_path.iterdir()) == whole.keys()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_cannot_be_kept_is_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def write_a_part(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_jit, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(Path, "write_bytes", write_a_part)
    monkeypatch.setattr(_jit, "_tell_that_nothing_is_kept", cache(_jit._tell_that_nothing_is_kept.__wrapped__))
    compiled = _jit.cached_kernel(double)
    assert (compiled(1), compiled(0.5)) == (2, 1.0)
    assert not any(tmp_path.iterdir())
    (said,) = [record.getMessage() for record in caplog.records]
    assert os.strerror(number) in said and "TINYSERVE_CACHE" in said and str(tmp_path) in said


class Presser:
    """Reports compiled kernels: presses Ctrl-C at the first, and lets it take a second more."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def __call__(self, kernel: str) -> None:
        self.threads.append(threading.current_thread())
        if len(self.threads) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            sleep(1)


def wait_for_compilers() -> None:
    end = monotonic() + 60
    while _jit.is_compiling() and monotonic() < end:
        sleep(0.02)


def test_ctrl_c_while_a_kernel_is_compiled_is_raised_at_once_and_the_kernel_compiles_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jit, "cache_folder", lambda: tmp_path)
    compiled, presser = _jit.cached_kernel(double), Presser()
    start = monotonic()
    with pytest.raises(KeyboardInterrupt), _jit.on_compile(presser):
        compiled(1)
    assert monotonic() - start < 0.9 and _jit.is_compiling()
    wait_for_compilers()
    assert not _jit.is_compiling() and not compiled.overloads and not any(tmp_path.iterdir())
    assert (compiled(1), compiled(0.5)) == (2, 1.0)


def test_an_inner_kernel_that_nobody_waits_for_any_more_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jit, "cache_folder", lambda: tmp_path)
    inner, presser = _jit.kernel(double), Presser()
    outer = _jit.cached_kernel(lambda x: inner(x) + 1)
    with _jit.on_compile(presser):
        with pytest.raises(KeyboardInterrupt):
            outer(1)
        wait_for_compilers()
    assert len(presser.threads) == 1
    assert outer(1) == 3


def test_a_kernel_is_compiled_in_the_thread_that_calls_it_where_no_ctrl_c_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jit, "cache_folder", lambda: tmp_path)
    compiled, threads = _jit.cached_kernel(double), list[threading.Thread]()
    with _jit.on_compile(lambda _: threads.append(threading.current_thread())):
        caller = threading.Thread(target=compiled, args=(1,))
        caller.start()
        caller.join()
    assert threads == [caller]


def test_what_does_not_compile_says_so_to_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jit, "cache_folder", lambda: tmp_path)
    with pytest.raises(numba.TypingError, match="nothing_of_the_kind"):
        _jit.cached_kernel(lambda x: x.nothing_of_the_kind)(1)


def test_where_no_thread_can_be_started_kernels_are_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_jit, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert _jit.cached_kernel(double)(1) == 2


TAKE_ROWS = """
import numpy as np
from tinyserve.tensor import _jit, rows
compiled = []
with _jit.on_compile(compiled.append):
    taken = rows.take_rows(np.ones((3, 4), np.float32), np.arange(2))
print(taken.shape, len(compiled), _jit.cache_folder())
"""
READ_ONLY = """
import errno, os, pathlib, tempfile
def refuse(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
pathlib.Path.write_bytes = pathlib.Path.write_text = pathlib.Path.touch = refuse
tempfile.mkdtemp = tempfile.mkstemp = refuse
os.access = lambda path, mode, **more: not mode & os.W_OK
"""


def test_a_folder_that_is_complete_and_only_to_be_read_is_used(tmp_path: Path) -> None:
    """An image, or ProtectSystem=strict: the user that runs kernels is not the one who compiled them."""
    cold = python(TAKE_ROWS, TINYSERVE_CACHE=str(tmp_path)).split(") ")[1].split()
    warm = python(READ_ONLY + TAKE_ROWS, TINYSERVE_CACHE=str(tmp_path)).split(") ")[1].split()
    assert int(cold[0]) > 0 and warm == ["0", cold[1]]


def test_where_nothing_can_be_written_there_is_an_answer(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    (tmp_path / "file").write_text("in the way")
    code = f"""
import tempfile
def refuse(*_, **__):
    raise FileNotFoundError(2, "No usable temporary directory found")
tempfile.mkdtemp = tempfile.mkstemp = tempfile.gettempdir = refuse
from tinyserve import LLM, SamplingParams
llm = LLM({str(folder_of("llama"))!r}, num_threads=1, max_num_seqs=2, max_model_len=32)
print(len(llm.generate("a", SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids))
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"TINYSERVE_CACHE": str(tmp_path / "file" / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    assert done.stdout == "2\n"
    assert done.stderr.count("TINYSERVE_CACHE") == 1


@pytest.mark.parametrize("quota, expected", [(0.5, 1), (1.9, 1), (1e9, None)])
def test_quotas_are_rounded_down_to_at_least_one(
    monkeypatch: pytest.MonkeyPatch, quota: float, expected: int | None
) -> None:
    monkeypatch.setattr(cgroups, "processor_quota", lambda: quota)
    assert _jit.usable_cores() == (expected or _jit.cores())


@pytest.mark.parametrize(("counted", "expected"), [(3, 3), (None, 1)])
def test_without_affinity_all_cores_count(monkeypatch: pytest.MonkeyPatch, counted: int | None, expected: int) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert _jit.cores() == _jit.usable_cores() == expected


def test_threads_are_bounded_and_the_environment_is_left_alone() -> None:
    before = dict(os.environ)
    assert _jit.set_threads(10_000) == _jit.get_threads() == _jit.MAX_THREADS
    assert _jit.set_threads(1) == _jit.get_threads() == 1
    assert _jit.set_threads(None) == _jit.usable_cores()
    assert dict(os.environ) == before


# --- the dot product of other processors --------------------------------------------------------------------------

ASSEMBLY = """
from numba import types
from tinyserve.tensor import dot_product, probe
for weights, activations in ((types.int8, types.int16), (types.uint8, types.int8)):
    arrays = (types.Array(t, 1, "C") for t in (weights, types.float32, activations, types.float32))
    probe.dot_32.compile(tuple(arrays))
print(dot_product.PATH)
print(*(probe.dot_32.inspect_asm(signature) for signature in probe.dot_32.signatures))
"""
X86 = "+avx,+avx2,+fma,+f16c"
VNNI = f"{X86},+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni"


@pytest.mark.parametrize(
    ("cpu", "features", "path", "instructions"),
    [
        ("znver5", VNNI, "avx512-vnni", ["vpdpbusd\t%zmm"]),
        ("alderlake", f"{X86},+avxvnni", "avx-vnni", ["vpdpbusd\t%ymm"]),
        ("haswell", X86, "avx2", ["vpmaddwd\t", "vpmaddubsw\t"]),
    ],
)
def test_each_path_is_its_instruction(
    cpu: str, features: str, path: str, instructions: list[str], tmp_path: Path
) -> None:
    """Machine code for processors that this one need not be: compiled and read, not run."""
    told = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "TINYSERVE_DOT_PRODUCT": path}
    out = python(ASSEMBLY, **told, TINYSERVE_CACHE=str(tmp_path))
    assert out.startswith(path)
    for instruction in instructions:
        assert instruction in out.replace("(%", "%")


FOR_NEON = """
import llvmlite.binding as llvm
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
for triple, cpu, features in (
    ("aarch64-unknown-linux-gnu", "neoverse-n1", "+dotprod"), ("arm64-apple-macosx14.0.0", "apple-m1", "")
):
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    print(machine.emit_assembly(parsed))
"""
NEON = """
from llvmlite import ir
from numba import types
from tinyserve.tensor import dot_product
from tinyserve.tensor.simd import i8x64, i32x16
module = ir.Module("neon")
function = ir.Function(module, ir.FunctionType(i32x16.llvm, [i32x16.llvm, i32x16.llvm, i8x64.llvm, i32x16.llvm]), "dot")
builder = ir.IRBuilder(function.append_basic_block())
total, high, weights, inputs = function.args
w, q = types.Array(types.int8, 1, "C"), types.Array(types.int16, 1, "C")
widened = dot_product.emit_widen(builder, w, q, weights)
a, b = dot_product.emit_dot(builder, w, q, [high, total], widened, [inputs, inputs])
builder.ret(builder.add(a, b))
"""


def test_neon_has_its_instruction(tmp_path: Path) -> None:
    """For ARM's processors the IR is built, checked and compiled: two digits of 16 outputs are eight sdot.

    Of Apple's the name is enough, as LLVM tells no features of them.
    """
    assembly = python(NEON + FOR_NEON, TINYSERVE_DOT_PRODUCT="neon", TINYSERVE_CACHE=str(tmp_path))
    assert len(re.findall(r"sdot(\.4s)?\tv", assembly)) == 2 * 8
    assert len(re.findall(r"eor(\.16b)?\tv", assembly)) >= 2  # unsigned weights become signed


TICKS = """
from llvmlite import ir
from tinyserve.tensor import native
native.X86, native.ARM = False, True
module = ir.Module("ticks")
builder = ir.IRBuilder(ir.Function(module, ir.FunctionType(native.WORD, []), "now").append_basic_block())
_, emit = native.ticks._defn(None)
builder.ret(emit(None, builder, None, []))
"""


def test_arm_has_a_clock(tmp_path: Path) -> None:
    """What LLVM calls a clock is a zero there, or a register that is the system's."""
    assert len(re.findall(r"mrs\tx0, CNTVCT_EL0", python(TICKS + FOR_NEON), re.IGNORECASE)) == 2


@pytest.mark.parametrize(
    ("system", "machine", "told", "features"),
    [
        ("darwin", "arm64", {}, "+neon,+dotprod"),  # LLVM does not know how to ask
        ("darwin", "arm64", RuntimeError("failed to get host cpu features."), "+neon,+dotprod"),
        ("linux", "aarch64", {"neon": True, "sve": False}, "+neon,-sve"),
        ("linux", "riscv64", {}, ""),
    ],
)
def test_features_are_known_where_llvm_tells_none(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, told: dict[str, bool] | Exception, features: str
) -> None:
    def tell() -> FeatureMap:
        if isinstance(told, Exception):
            raise told
        return FeatureMap(told)

    monkeypatch.setattr(_jit.llvm, "get_host_cpu_features", tell)
    monkeypatch.setattr(_jit, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(_jit.platform, "machine", lambda: machine)
    assert _jit.cpu_features.__wrapped__() == features


def test_windows_gives_the_processor_away_by_its_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyserve.tensor import native

    give_way = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
    _jit.llvm.add_symbol("SwitchToThread", give_way)
    for system, symbol in (("win32", "SwitchToThread"), ("darwin", "sched_yield"), ("linux", "sched_yield")):
        monkeypatch.setattr(native, "sys", SimpleNamespace(platform=system))

        @numba.njit
        def give() -> None:
            native.yield_processor()

        give()
        (code,) = give.inspect_llvm().values()
        assert f"@{symbol}(" in code


def test_an_instruction_that_kills_its_process_is_not_taken(tmp_path: Path) -> None:
    """The probe's verdict is remembered, and a path that died falls back to the next one."""
    code = """
from tinyserve.tensor import _jit
kill = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
print(_jit.runs("dies", kill, {}), _jit.runs("lives", "pass", {}), _jit.runs("dies", "pass", {}))
for path in ("avx512-vnni", "avx-vnni", "avx2"):
    (_jit.cache_folder() / f"dot-{path}.runs").write_text("no")
from tinyserve.tensor import dot_product
print(dot_product.PATH)
"""
    assert python(code, TINYSERVE_CACHE=str(tmp_path)).split() == ["False", "True", "False", "plain"]


def test_the_probe_of_the_paths_in_use_passes() -> None:
    python("from tinyserve.tensor import probe; probe.check(); probe.check_bfloat16()")


# --- pairs of bfloat16 --------------------------------------------------------------------------------------------

ATTEND = """
import hashlib
import numpy as np
from tinyserve.tensor import attention, bfloat16, kv_cache
from tinyserve.tensor.rope import RopeTable
random, count = np.random.default_rng(0), 700
pages = kv_cache.Pages(
    np.zeros((44, 2, 12, 16), np.uint32), np.zeros((44, 2, 8, 32), np.uint32), *2 * [np.zeros((0, 0, 0), np.float32)]
)
where = np.arange(count)
tokens = kv_cache.Tokens(where, where, np.zeros(count, np.int64), np.arange(44, dtype=np.int32).reshape(1, 44))
qkv, heads = random.standard_normal((count, 10 * 24), np.float32), kv_cache.Heads(6, 2, 24)
kv_cache.rotate_and_store(qkv, heads, RopeTable(*2 * [np.zeros((0, 0), np.float32)]), tokens, pages)
scoring = attention.Scoring(np.float32(0.2), 0, np.zeros((0, 0), np.float32))
last = kv_cache.Tokens(*(array[-1:] for array in tokens[:3]), tokens.block_tables)
out = attention.attention(qkv, heads, scoring, tokens, pages)
assert np.array_equal(out[-1:], attention.attention(qkv[-1:], heads, scoring, last, pages))
print(bfloat16.PATH, hashlib.sha256(out.tobytes()).hexdigest())
"""


def test_two_multiply_adds_are_what_the_instruction_is() -> None:
    """The same bits of attention in prompts and in decoding, whichever a processor has."""
    own, digest = python(ATTEND).split()
    assert own == ("avx512-bf16" if _jit.has_feature("avx512f", "avx512bw", "avx512bf16") else "fma")
    assert python(ATTEND, TINYSERVE_BFLOAT16="fma").split() == ["fma", digest]


def test_the_pairs_instruction_is_in_the_machine_code(tmp_path: Path) -> None:
    code = """
from numba import types
from tinyserve.tensor import bfloat16, probe
kinds = types.float32, types.uint32, types.uint32, types.float32
probe.dot_pairs.compile(tuple(types.Array(kind, 1, "C") for kind in kinds))
print(bfloat16.PATH, *(probe.dot_pairs.inspect_asm(signature) for signature in probe.dot_pairs.signatures))
"""
    told = {"NUMBA_CPU_NAME": "znver5", "NUMBA_CPU_FEATURES": f"{VNNI},+avx512bf16", "TINYSERVE_CACHE": str(tmp_path)}
    assert "vdpbf16ps\t" in python(code, **told, TINYSERVE_BFLOAT16="avx512-bf16")
    other = python(code, **told, TINYSERVE_BFLOAT16="fma")
    assert "vdpbf16ps" not in other and other.count("vfmadd") == 2


NEON_PAIRS = """
from llvmlite import ir
from tinyserve.tensor import bfloat16
from tinyserve.tensor.simd import I32, f32x16, i32x16
module = ir.Module("neon")
function = ir.Function(module, ir.FunctionType(f32x16.llvm, [f32x16.llvm, i32x16.llvm, I32]), "dot")
builder = ir.IRBuilder(function.append_basic_block())
total, words, word = function.args
builder.ret(bfloat16.emit_dot(builder, total, bfloat16.emit_operand(builder, words), word))
"""


def test_neon_multiplies_pairs_in_two_multiply_adds(tmp_path: Path) -> None:
    """Two for each quarter of 16 sums."""
    assembly = python(NEON_PAIRS + FOR_NEON, TINYSERVE_BFLOAT16="fma", TINYSERVE_CACHE=str(tmp_path))
    assert assembly.count("fmla\tv") == 8


def test_a_pairs_instruction_that_failed_its_probe_is_not_taken(tmp_path: Path) -> None:
    code = """
from tinyserve.tensor import _jit
(_jit.cache_folder() / "avx512-bf16.runs").write_text("no")
from tinyserve.tensor import bfloat16
print(bfloat16.PATH)
"""
    assert python(code, TINYSERVE_CACHE=str(tmp_path)) == "fma"
