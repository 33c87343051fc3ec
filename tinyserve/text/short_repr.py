"""What a notebook shows of an answer: some lines, however long it is.

Knows dataclasses; it does not know what their fields mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from reprlib import Repr
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np

_MEMBERS, _CHARACTERS = 6, 300  # of a list and of a text


class ShortRepr:
    """A dataclass (with repr=False) that shows what differs from the defaults, and of long fields the beginning."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._shown())})"

    def _shown(self) -> Iterator[str]:
        for field in fields(self):
            value = getattr(self, field.name)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if field.repr and (default is MISSING or value != default):
                yield f"{field.name}={_short.repr(value)}"


class _Short(Repr):
    """The standard library's, which tells in addition how long a list is, and does not cut what shortens itself."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxother = _CHARACTERS, 1 << 20

    def repr_list(self, x: Sequence[Any], level: int) -> str:
        shown = [self.repr1(member, level - 1) for member in x[:_MEMBERS]]
        return f"[{', '.join(shown)}{f', ... {len(x)} in all' if len(x) > _MEMBERS else ''}]"

    def repr_ndarray(self, x: "np.ndarray", level: int) -> str:
        return f"array of {' x '.join(map(str, x.shape))} {x.dtype}"


_short = _Short()
