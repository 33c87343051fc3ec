"""Every version of every kernel in the workshop still computes what the reference does; nothing is timed here."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tinyserve.tensor import _jit

WORKSHOP = Path(__file__).parents[2] / "scripts" / "kernels"


# By the names that the files have as scripts: Numba's cache remembers them, and tests and scripts share it.
sys.path.insert(0, str(WORKSHOP))
FILES = [importlib.import_module(path.stem) for path in sorted(WORKSHOP.glob("[!_]*.py"))]
VERSIONS = [
    pytest.param(file, version, id=f"{file.__name__}-{version.function.__name__}-{version.threads}")
    for file in FILES
    for version in file.VERSIONS
]


def test_every_kernel_has_its_file() -> None:
    assert {file.__name__ for file in FILES} == {"attention", "mamba2", "matmul"}


@pytest.mark.parametrize(("file", "version"), VERSIONS)
def test_version(file: ModuleType, version) -> None:
    try:
        file.check(version)
    finally:
        _jit.set_threads(None)


def test_every_climb_ends_with_the_kernel_that_runs() -> None:
    for file in FILES:
        assert file.VERSIONS[-1].function.__name__.endswith("_tinyserves")
