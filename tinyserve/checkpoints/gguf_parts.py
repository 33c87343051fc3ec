"""A large GGUF model comes in parts, NAME-00001-of-00003.gguf and so on: which files are one model.

Knows names alone; the first part stands for all.
"""

import re
from collections.abc import Iterable

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def parts_of(name: str) -> list[str]:
    """The names of all files of the model that a file belongs to, the first part first; one that is whole is alone."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    return [f"{match['stem']}-{number + 1:05}-of-{match['count']}.gguf" for number in range(int(match["count"]))]


def first_parts(names: Iterable[str]) -> list[str]:
    """The names that stand for the models among some files, in order: of each model's parts the first, there or not."""
    return sorted({parts_of(name)[0] for name in names if name.endswith(".gguf")})
