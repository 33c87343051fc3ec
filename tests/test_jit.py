"""How kernels are compiled: the cache folder, the cores that may be used, and plainer processors."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from tinyserve.tensor import _jit


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, with these variables set."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


MULTIPLY = """
import numpy as np
from tinyserve import quantize
from tinyserve.tensor import dot_product, matmul, reference
rows = np.random.default_rng(0)
x, w = rows.standard_normal((4, 100), np.float32), rows.standard_normal((70, 100), np.float32)
kernel = matmul.matmul_integer
for dtype in ("w8a16", "w8a8", "w4a16", "w4a8"):
    matrix = quantize.pack(w, dtype)
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
    assert here.parent == generic.parent == tmp_path
    assert here != generic
    assert here.is_dir()


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code = "from tinyserve.tensor import _jit; print(_jit.cache_folder())"
    folder = Path(python(code, TINYSERVE_CACHE=str(tmp_path / "file"), TMPDIR=str(tmp_path)))
    assert folder.is_dir()
    assert tmp_path in folder.parents


def test_a_users_own_kernels_keep_their_cache() -> None:
    before = numba.config.CACHE_DIR
    _jit.kernel(lambda x: x)
    assert before == numba.config.CACHE_DIR


@pytest.mark.parametrize(
    "files, cores",
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ({"cpu.max": "nonsense"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_the_containers_quota(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert _jit._cgroup_quota(tmp_path) == cores


@pytest.mark.parametrize("quota, expected", [(0.5, 1), (1.9, 1), (1e9, None)])
def test_quotas_are_rounded_down_to_at_least_one(
    monkeypatch: pytest.MonkeyPatch, quota: float, expected: int | None
) -> None:
    monkeypatch.setattr(_jit, "_cgroup_quota", lambda: quota)
    assert _jit.usable_cores() == (expected or len(os.sched_getaffinity(0)))


def test_threads_are_bounded_and_the_environment_is_left_alone() -> None:
    before = dict(os.environ)
    assert _jit.set_threads(10_000) == numba.config.NUMBA_NUM_THREADS
    assert _jit.set_threads(1) == numba.get_num_threads() == 1
    assert _jit.set_threads(None) == min(_jit.usable_cores(), numba.config.NUMBA_NUM_THREADS)
    assert dict(os.environ) == before
