"""Other implementations, whose numbers are the measure. Where one is missing its tests are skipped; in CI they fail."""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

Oracle = Callable[[str], Any]  # the module of this name


def import_oracle(name: str) -> Any:
    """The module; where CI is set in the environment an oracle that cannot be imported is a failure, else a skip."""
    try:
        return import_module(name)
    except ImportError as error:
        message = f"{name}, which this is compared with, cannot be imported ({error}): pip install -e '.[test]'"
        if os.environ.get("CI"):
            pytest.fail(message)
        return pytest.skip(message)
