"""Files that are written whole or not at all, lines of JSON, and a sentence for what the system refuses."""

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tinyserve.errors import TinyserveError
from tinyserve.server.sse import LINE_ENDS

PAUSES = (0.01, 0.05, 0.25, 1.0)  # seconds between two tries to rename


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say in a sentence where something cannot be written, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        raise TinyserveError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}. What is answered is kept: make "
            "room, and run the same command again."
        ) from None


@contextmanager
def new_file(place: Path, temporary: Path) -> Iterator[Path]:
    """A file in the folder `temporary`, which is safe on the disk and in its place where the block ends well."""
    path = temporary / uuid.uuid4().hex
    yield path
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    _replace(path, place)
    with suppress(OSError):  # not all systems know how
        descriptor = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(path: Path, place: Path) -> None:
    """Rename over `place`; Windows refuses as long as anybody reads what is there, be it a virus scanner."""
    for pause in PAUSES if sys.platform == "win32" else ():
        with suppress(PermissionError):
            path.replace(place)
            return
        time.sleep(pause)
    path.replace(place)


def encoded(value: Any) -> bytes:
    """A line of JSON. What only Parquet has is written as a text, such as a date, or as null, where it is no number."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), default=str)
    try:
        return text.translate(LINE_ENDS).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return json.dumps(_finite(value), separators=(",", ":"), default=str).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
