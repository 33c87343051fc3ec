"""How one request is decoded, under vLLM's names. Plain data: nothing here samples."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from operator import index
from typing import Any, Self

from tinyserve.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Raises RequestError, with the number, for a value outside its range.

    n: how many answers to give; answer i of a request with a seed draws from seed + i.
    temperature: 0 is greedy; higher is more random.
    top_p: keep the most likely tokens that together have this probability.
    top_k: keep this many of the most likely tokens; 0 keeps all.
    min_p: keep tokens at least this probable relative to the most likely one.
    seed: the same seed and prompt give the same answer; None is different every time.
    max_tokens: at most this many new tokens (16, as in vLLM: raise it for answers).
    stop: texts that end the answer; they are not part of it.
    stop_token_ids: tokens that end the answer, beside the model's own.
    ignore_eos: go on past the model's end token.
    logprobs: return the log-probabilities of this many most likely tokens, and of the chosen one, at each step.
    skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __new__(cls, **options: Any) -> Self:
        """Refuse an option that does not exist, naming the nearest one."""
        for name in options.keys() - cls.__dataclass_fields__.keys():
            nearest = get_close_matches(name, cls.__dataclass_fields__, n=1, cutoff=0.4)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise RequestError(f"SamplingParams has no option {name!r}.{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, kind in (("stop", str), ("stop_token_ids", int)):
            value = getattr(self, name)
            if isinstance(value, kind):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, list | tuple) or value is None:
                object.__setattr__(self, name, tuple(value or ()))
            else:
                raise RequestError(f"{name} is {value!r}; it must be a list.")
        rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("n", lambda n: _whole(n) >= 1, "a whole number of at least 1"),
            ("temperature", lambda t: 0 <= t < float("inf"), "a finite number of at least 0 (0 is greedy)"),
            ("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
            ("top_k", lambda k: _whole(k) >= -1, "a whole number: at least 1, or 0 for all tokens"),
            ("min_p", lambda p: 0 <= p <= 1, "between 0 and 1"),
            ("max_tokens", lambda n: _whole(n) >= 1, "a whole number of at least 1"),
            ("seed", lambda n: n is None or _whole(n) >= 0, "a whole number of at least 0"),
            ("logprobs", lambda n: n is None or 0 <= _whole(n) <= 100, "a whole number between 0 and 100"),
            ("stop", lambda texts: all(map(_is_text, texts)), "texts of at least one character"),
            ("ignore_eos", lambda yes: yes is bool(yes), "True or False"),
            ("skip_special_tokens", lambda yes: yes is bool(yes), "True or False"),
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
