"""A script of scripts/ as a module: its functions, without what it does when it is run."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load_script(path: str) -> Any:
    """The module of scripts/`path`."""
    name = path.removesuffix(".py").replace("/", "_")
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module
