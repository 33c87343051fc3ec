"""The keys of one file of a checkpoint, JSON or GGUF metadata, each read as what it must be.

A stranger's file may hold anything under any key: a reader per kind of value checks it, and refuses by file, key and
value. Knows nothing of what the keys mean.
"""

import math
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from tinyserve.errors import ConfigError, UserError

MISSING: Final = object()
MAX_INTEGER: Final = 2**31 - 1  # what kernels count with; no size and no token id comes near it
MAX_FLOAT: Final = 3.4028234e38  # of float32
# How files say that there is no such token: -1, which is 2**32 - 1 where the type has no sign (LLAMA_TOKEN_NULL).
NO_TOKEN: Final = (None, -1, 2**32 - 1)


class Fields:
    """The keys of one file: `source` names it in errors, which are of the class `refusal`.

    A reader takes a key's spellings in order of preference. Without a `default` the key is required; a `null`
    counts as absent, as it does in transformers.
    """

    def __init__(self, raw: Mapping[str, Any], source: str, refusal: type[UserError] = ConfigError) -> None:
        self.raw = raw
        self.source = source
        self.refusal = refusal

    def refuse(self, message: str) -> NoReturn:
        """Raise the error: `message` continues the sentence that starts with the file's name."""
        raise self.refusal(f"{self.source}: {message}")

    def has(self, key: str) -> bool:
        """Whether the key is there with a value; its truth is the reader's business."""
        return self.raw.get(key) is not None

    def _read(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for key in keys:
            if self.has(key):
                return key, self.raw[key]
        if default is MISSING:
            others = f" (or {', '.join(map(repr, keys[1:]))})" if len(keys) > 1 else ""
            self.refuse(
                f"the required key {keys[0]!r}{others} is missing or null; take the file that belongs to the weights."
            )
        return keys[0], default

    def integer(self, *keys: str, default: Any = MISSING, minimum: int = 1, maximum: int = MAX_INTEGER) -> Any:
        """Read an int from `minimum` to `maximum`."""
        key, value = self._read(keys, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(f"{key!r} must be an integer, but it is {shown(value)} ({type(value).__name__}).")
        if value < minimum:
            self.refuse(f"{key!r} must be at least {minimum}, but it is {shown(value)}.")
        if value > maximum:
            self.refuse(f"{key!r} must be at most {maximum}, but it is {shown(value)}.")
        return value

    def number(self, *keys: str, default: Any = MISSING, positive: bool = True) -> float:
        """Read a number that float32 can hold, greater than zero unless `positive` is off."""
        key, value = self._read(keys, default)
        number = as_float(value)
        if number is None or not math.isfinite(number):
            self.refuse(f"{key!r} must be a finite number, but it is {shown(value)} ({type(value).__name__}).")
        if abs(number) > MAX_FLOAT:
            self.refuse(f"{key!r} must be a number that float32 can hold, but it is {shown(value)}.")
        if positive and number <= 0:
            self.refuse(f"{key!r} must be greater than 0, but it is {shown(value)}.")
        return number

    def boolean(self, key: str, *, default: bool) -> bool:
        """Read true or false; 0 and 1 are neither."""
        _, value = self._read((key,), default)
        if not isinstance(value, bool):
            self.refuse(f"{key!r} must be true or false, but it is {shown(value)}.")
        return value

    def choice(self, key: str, supported: tuple[str, ...], *, default: Any = MISSING) -> str:
        """Read a name that must be one of those that are built."""
        _, value = self._read((key,), default)
        if value not in supported:
            self.refuse(f"{key!r} is {shown(value)}, which is not supported; supported: {', '.join(supported)}.")
        return str(value)

    def text(self, key: str, *, default: Any = MISSING) -> Any:
        """Read a text."""
        _, value = self._read((key,), default)
        if value is not default and not isinstance(value, str):
            self.refuse(f"{key!r} must be text, but it is {shown(value)} ({type(value).__name__}).")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """Read a list of names; empty where the key is absent."""
        return tuple(self.listed(key, str, "names"))

    def listed(self, key: str, kind: type, words: str, *, default: Any = ()) -> list[Any]:
        """Read a list whose members are all of one kind, "names" or "numbers" in `words`."""
        _, value = self._read((key,), default)
        kinds = {type(each) for each in value} if isinstance(value, list | tuple) else {type(None)}
        if not all(issubclass(each, kind) and each is not bool for each in kinds):  # True is an int
            self.refuse(f"{key!r} must be a list of {words}, but it is {shown(value)}.")
        return list(value)

    def objects(self, key: str) -> Mapping[str, Any]:
        """Read an object; empty where the key is absent."""
        _, value = self._read((key,), {})
        if not isinstance(value, Mapping):
            self.refuse(f"{key!r} must be an object, but it is {shown(value)}.")
        return value

    def inside(self, key: str, raw: Mapping[str, Any]) -> "Fields":
        """The fields of an object that lies under a key."""
        return type(self)(raw, f"{self.source}: in {key!r}", self.refusal)

    def token_id(self, key: str, *, default: int | None = None) -> int | None:
        """Read one token id, or None where the file says that there is none (absent takes the default)."""
        if key in self.raw and _is_no_token(self.raw[key]):
            return None
        value: int | None = self.integer(key, default=default, minimum=0)
        return value

    def token_ids(self, key: str, *, default: int | None = None) -> tuple[int, ...]:
        """Read one token id or a list of them, as a tuple without repeats and without those that say "none"."""
        value = self.raw.get(key, default)
        listed = value if isinstance(value, list | tuple) else [value]
        ids = [token for token in listed if not _is_no_token(token)]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= MAX_INTEGER:
                self.refuse(f"{key!r} must be a token id or a list of them, but it is {shown(value)}.")
        return tuple(dict.fromkeys(ids))


def _is_no_token(value: Any) -> bool:
    return type(value) in (int, type(None)) and value in NO_TOKEN


def as_float(value: Any) -> float | None:
    """Turn a JSON number, or infinity in any of its JSON spellings, into a float; None if it is neither."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        value = value["__float__"]
    if isinstance(value, str) and value.lower().lstrip("+-") in ("inf", "infinity"):
        return float(value) if value.count("+") + value.count("-") <= 1 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def shown(value: Any) -> str:
    """A value as a sentence shows it: not all of what is long."""
    return f"{value!r:.80}"
