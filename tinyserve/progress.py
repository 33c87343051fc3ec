"""The progress of a program that asked for none: what takes a while the first time is said once, on stderr."""

import sys
from collections.abc import Callable

_ANNOUNCED = {
    "compile": "compiling kernels for this processor (the first time, up to a minute)",
    "wait": "another process is compiling the kernels: waiting for it",
}


def announcer() -> Callable[[str, int, int], None]:
    """A `progress` for LLM that knows what it has said."""
    said: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        kind = stage.split()[0]
        if kind in _ANNOUNCED and kind not in said:
            print(f"tinyserve: {_ANNOUNCED[kind]}", file=sys.stderr)  # noqa: T201
            said.add(kind)

    return report


def count(number: float) -> str:
    """Write a count as people do: 340.3 M, 1.46 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{1 if unit != 'B' else 2}f} {unit}"
    return f"{number:g}"


def size(number: float) -> str:
    """Write bytes in decimal units: 8.2 kB, 22.6 MB, 1.36 GB."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= step:
            return f"{number / step:.{1 if unit != 'GB' else 2}f} {unit}"
    return f"{number:g} B"
