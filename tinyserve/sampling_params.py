"""How one request is decoded, under vLLM's names. Plain data: nothing here samples."""

from collections.abc import Callable
from dataclasses import dataclass
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
        for name, kind in (("stop", str), ("stop_token_ids", int)):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, kind) else tuple(value or ()))
        rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("temperature", lambda t: 0 <= t < float("inf"), "a number of at least 0 (0 is greedy)"),
            ("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
            ("top_k", lambda k: k == int(k) >= -1, "a whole number: at least 1, or 0 for all tokens"),
            ("min_p", lambda p: 0 <= p <= 1, "between 0 and 1"),
            ("max_tokens", lambda n: n == int(n) >= 1, "a whole number of at least 1"),
            ("seed", lambda n: n is None or n == int(n) >= 0, "a whole number of at least 0"),
            ("logprobs", lambda n: n is None or 0 <= n == int(n) <= 100, "a whole number between 0 and 100"),
            (
                "stop",
                lambda texts: all(text and isinstance(text, str) for text in texts),
                "texts of at least one character",
            ),
        )
        for name, holds, range_ in rules:
            value = getattr(self, name)
            try:
                good = holds(value)
            except (TypeError, ValueError, OverflowError):
                good = False
            if not good:
                raise RequestError(f"{name} is {value!r}; it must be {range_}.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever was given."""
        return tuple(self.stop)
