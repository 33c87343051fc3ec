"""Files that a command is told to write, checked before the work that fills them."""

import importlib.util
import os
from pathlib import Path

from tinyserve.errors import UserError


def check_writable(option: str, path: Path) -> None:
    """Raise UserError for a file that could not be written."""
    if path.is_dir():
        raise UserError(f"{option} is {path}, which is a folder: give the name of a file.")
    if not path.parent.is_dir():
        raise UserError(f"{option} is {path}, whose folder does not exist: make it, or give another one.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} is {path}, which cannot be written: give another file.")


def check_plot(path: Path) -> None:
    """The same for --plot, which needs an extra and writes one kind of file."""
    check_writable("--plot", path)
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot is {path}; it writes PNG files: give a name that ends with .png.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'tinyserve[plot]'.")
