"""How one request is decoded, under vLLM's names. Plain data: nothing here samples."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import index
from typing import Any

from tinyserve.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Raises RequestError, with the number, for a value outside its range."""

    temperature: float = 1.0
    """0 is greedy; higher is more random."""
    top_p: float = 1.0
    """Keep the most likely tokens that together have this probability."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the most likely one."""
    seed: int | None = None
    """The same seed and prompt give the same answer; None is different every time."""
    max_tokens: int = 16
    """At most this many new tokens."""
    stop: tuple[str, ...] | list[str] | str = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] | list[int] = ()
    """Tokens that end the answer, beside the model's own."""
    ignore_eos: bool = False
    """Go on past the model's end token."""
    logprobs: int | None = None
    """Return the log-probabilities of this many most likely tokens, and of the chosen one, at each step."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        ids = self.stop_token_ids
        object.__setattr__(self, "stop_token_ids", (ids,) if isinstance(ids, int) else tuple(ids or ()))
        rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("temperature", lambda t: 0 <= t < float("inf"), "a number of at least 0 (0 is greedy)"),
            ("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
            ("top_k", lambda k: _whole(k) >= -1, "a whole number: at least 1, or 0 for all tokens"),
            ("min_p", lambda p: 0 <= p <= 1, "between 0 and 1"),
            ("max_tokens", lambda n: _whole(n) >= 1, "a whole number of at least 1"),
            ("seed", lambda n: n is None or _whole(n) >= 0, "a whole number of at least 0"),
            ("logprobs", lambda n: n is None or 0 <= _whole(n) <= 100, "a whole number between 0 and 100"),
            ("stop", lambda texts: all(map(_is_text, texts)), "texts of at least one character"),
            ("stop_token_ids", lambda ids: all(_whole(i) >= 0 for i in ids), "token ids, whole numbers from 0 on"),
        )
        for name, holds, range_ in rules:
            value = getattr(self, name)
            try:
                good = holds(value)
            except (TypeError, ValueError):
                good = False
            if not good:
                raise RequestError(f"{name} is {value!r}; it must be {range_}.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever was given."""
        return tuple(self.stop)


def _whole(number: Any) -> int:
    """An integer, of NumPy or Python; raises TypeError for 3.0 and True, which are something else."""
    if isinstance(number, bool):
        raise TypeError
    return index(number)


def _is_text(text: Any) -> bool:
    return isinstance(text, str) and bool(text)
