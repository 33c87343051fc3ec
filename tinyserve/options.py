"""Dataclasses of options: what does not exist, or is out of range, is refused in a sentence that says what would do."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Self

from tinyserve.errors import RequestError

Rule = tuple[Callable[[Any], bool], str]  # whether a value will do, and what it must be


class Options:
    """A dataclass that refuses an option that does not exist, naming the nearest one, and checks those that do."""

    __dataclass_fields__: dict[str, Any]

    def __new__(cls, **options: Any) -> Self:
        for name in options.keys() - cls.__dataclass_fields__.keys():
            raise RequestError(f"{cls.__name__} has no option {name!r}{cls._reason(name)}", param=name)
        return super().__new__(cls)

    @classmethod
    def _reason(cls, name: str) -> str:
        """What follows "has no option": the rest of the sentence, and the way out."""
        nearest = get_close_matches(name, cls.__dataclass_fields__, n=1, cutoff=0.4)
        return f". Did you mean {nearest[0]!r}?" if nearest else "."

    def _check(self, rules: Mapping[str, Rule]) -> None:
        """Raise RequestError for the first option outside its range."""
        for name, (holds, range_) in rules.items():
            value = getattr(self, name)
            try:
                good = holds(value)
            except (TypeError, ValueError):
                good = False
            if not good:
                raise RequestError(f"{name} is {value!r:.200}; it must be {range_}.", param=name)
