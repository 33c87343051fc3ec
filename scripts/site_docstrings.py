"""An extension of griffe, which reads docstrings for the site: parameters, a line each in the source, become a list."""

import re
from typing import Any

import griffe

OPTIONS = "The options are told in [From Python](python-api.md#options-of-llm)."


def listed(text: str, parameters: set[str]) -> str:
    """A docstring whose lines "name: what it is", of parameters, are the items of a list."""
    lines = list[str]()
    for line in text.replace("{options}", OPTIONS + "\n").splitlines():
        name, colon, rest = line.partition(": ")
        if colon and name in parameters:
            if lines and lines[-1] and not re.match(r"- |    ", lines[-1]):
                lines.append("")
            line = f"- `{name}`: {rest}"
        lines.append(line)
    return "\n".join(lines)


class ParameterLists(griffe.Extension):
    """Makes the lists."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = listed(func.docstring.value, {one.name for one in func.parameters})
