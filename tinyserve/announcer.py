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
