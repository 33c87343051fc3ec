"""How one request is decoded, under vLLM's names. Plain data: nothing here samples."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import index
from typing import Any

from tinyserve.errors import RequestError
from tinyserve.options import Options, Rule
from tinyserve.structured_outputs import StructuredOutputs


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Options):
    """How to choose tokens, and when to stop. Raises RequestError, with the number, for a value outside its range.

    n: how many answers to give; answer i of a request with a seed draws from seed + i.
    best_of: give the n likeliest of this many answers; None is n.
    temperature: 0 is greedy; higher is more random.
    top_p: keep the most likely tokens that together have this probability.
    top_k: keep this many of the most likely tokens; 0 keeps all.
    min_p: keep tokens at least this probable relative to the most likely one.
    typical_p: keep the tokens of the most usual surprise that together have this probability.
    repetition_penalty: above 1 makes tokens of prompt and answer less likely, below 1 more.
    frequency_penalty: take this off a token's logit for each time the answer has it.
    presence_penalty: take this off a token's logit if the answer has it.
    logit_bias: add this to the logit of a token id.
    allowed_token_ids: no tokens but these; None is all.
    banned_token_ids: none of these tokens.
    bad_words: texts that the answer does not come to have: no token that would complete one of them.
    seed: the same seed and prompt give the same answer; None is different every time.
    max_tokens: at most this many new tokens (16, as in vLLM: raise it for answers).
    min_tokens: no token that ends the answer before there are this many.
    stop: texts that end the answer; they are not part of it, unless include_stop_str_in_output.
    stop_token_ids: tokens that end the answer, beside the model's own.
    ignore_eos: go on past the model's end token.
    logprobs: return the log-probabilities of this many most likely tokens, and of the chosen one, at each step.
    prompt_logprobs: the same for each token of the prompt but the first.
    skip_special_tokens: leave special tokens out of the text.
    structured_outputs: what the answer must look like.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    banned_token_ids: tuple[int, ...] | list[int] = ()
    bad_words: tuple[str, ...] | list[str] | str = ()
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] | list[str] | str = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        for name, kind in _LISTS.items():
            value = getattr(self, name)
            if isinstance(value, kind):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, list | tuple) or value is None:
                if value is not None or name != "allowed_token_ids":
                    object.__setattr__(self, name, tuple(value or ()))
            else:
                raise RequestError(f"{name} is {value!r:.200}; it must be a list.", param=name)
        self._check(_RULES)
        if self.logit_bias is not None:  # JSON has no whole numbers for keys
            object.__setattr__(self, "logit_bias", {int(token): bias for token, bias in self.logit_bias.items()})
        for contradiction in self._contradictions():
            raise RequestError(contradiction, param=contradiction.split(maxsplit=1)[0])

    def _contradictions(self) -> Iterator[str]:
        if self.min_tokens > self.max_tokens:
            yield f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}: an answer cannot be both."
        if self.best_of is not None and self.best_of < self.n:
            yield f"best_of is {self.best_of} and n {self.n}: there must be at least as many answers to choose from."
        if self.allowed_token_ids is not None and set(self.allowed_token_ids) <= set(self.banned_token_ids):
            yield "banned_token_ids has every token of allowed_token_ids: none is left to choose from."
        if self.structured_outputs is not None:
            for name in ("ignore_eos", "min_tokens"):
                if getattr(self, name):
                    yield f"{name} is {getattr(self, name)!r} beside structured_outputs, which end where they are done."
        for name in ("stop", "stop_token_ids"):
            if self.ignore_eos and getattr(self, name):
                yield f"{name} is {getattr(self, name)!r:.200} and ignore_eos True: leave out one of the two."

    def check_vocabulary(self, size: int) -> None:
        """Raise RequestError for a token id that a model of this vocabulary does not have, naming the parameter."""
        for name in ("logit_bias", "allowed_token_ids", "banned_token_ids"):
            for token in getattr(self, name) or ():
                if token >= size:
                    raise RequestError(
                        f"{name} has token id {token}, and the model's vocabulary ends at {size - 1}.", param=name
                    )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever was given."""
        return tuple(self.stop)

    @cached_property
    def penalises(self) -> bool:
        """Whether tokens that have been said are less likely, or more."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    @cached_property
    def changes_logits(self) -> bool:
        """Whether there is anything to do before the temperature."""
        lists = self.logit_bias or self.banned_token_ids or self.bad_words or self.allowed_token_ids is not None
        return bool(lists) or self.min_tokens > 0 or self.penalises


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams(Options):
    """How wide and how far to search for the likeliest answers. Raises RequestError as SamplingParams does.

    beam_width: go on with this many of the likeliest texts at each token, and give as many answers; 1 is greedy.
    max_tokens: at most this many new tokens.
    ignore_eos: go on past the model's end token.
    temperature: 0, as nothing is sampled.
    length_penalty: answers are compared by the sum of their log-probabilities / number of tokens ** length_penalty:
        above 0 longer ones gain, below 0 shorter ones.
    include_stop_str_in_output: the text has the end token's too.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self._check(_BEAM_RULES)

    @classmethod
    def _reason(cls, name: str) -> str:
        if name in _SAMPLING:
            return ": beam search does not sample, it keeps the beam_width likeliest. Leave it out, or use generate."
        if name in SamplingParams.__dataclass_fields__:
            return f", SamplingParams has: beam search takes {', '.join(cls.__dataclass_fields__)}."
        return super()._reason(name)


def _whole(number: Any) -> int:
    """An integer, of NumPy or Python; raises TypeError for 3.0 and True, which are something else."""
    if isinstance(number, bool):
        raise TypeError
    return index(number)


def _is_text(text: Any) -> bool:
    return isinstance(text, str) and bool(text)


def _are_token_ids(ids: Any) -> bool:
    return all(_whole(i) >= 0 for i in ids)


def _are_biases(biases: Any) -> bool:
    if not isinstance(biases, Mapping):
        raise TypeError
    ids = [int(token) if isinstance(token, str) else token for token in biases]
    return _are_token_ids(ids) and all(-100 <= bias <= 100 for bias in biases.values())


_LISTS = {"stop": str, "bad_words": str, "stop_token_ids": int, "allowed_token_ids": int, "banned_token_ids": int}

# What would change the odds of tokens that are drawn, or which of them are.
_SAMPLING = {
    "top_p", "top_k", "min_p", "typical_p", "seed", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "logit_bias",
}  # fmt: skip

_INFINITY = float("inf")
_TOKEN_IDS = "token ids, whole numbers from 0 on"
_PENALTY = (lambda p: -2 <= p <= 2, "between -2 and 2 (0 is off)")
_SHARE = (lambda p: 0 < p <= 1, "above 0 and at most 1")
_COUNT = (lambda n: _whole(n) >= 1, "a whole number of at least 1")
_LOGPROBS = (lambda n: n is None or 0 <= _whole(n) <= 100, "a whole number between 0 and 100")
_TEXTS = (lambda texts: all(map(_is_text, texts)), "texts of at least one character")
_SWITCH = (lambda yes: yes is bool(yes), "True or False")
_RULES: Mapping[str, Rule] = {
    "n": _COUNT,
    "best_of": (lambda n: n is None or _whole(n) >= 1, "a whole number of at least 1"),
    "temperature": (lambda t: 0 <= t < _INFINITY, "a finite number of at least 0 (0 is greedy)"),
    "top_p": _SHARE,
    "top_k": (lambda k: _whole(k) >= -1, "a whole number: at least 1, or 0 for all tokens"),
    "min_p": (lambda p: 0 <= p <= 1, "between 0 and 1"),
    "typical_p": _SHARE,
    "repetition_penalty": (lambda p: 0 < p < _INFINITY, "a finite number above 0 (1 is off)"),
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "logit_bias": (
        lambda biases: biases is None or _are_biases(biases),
        "a mapping of token ids to numbers between -100 and 100",
    ),
    "allowed_token_ids": (
        lambda ids: ids is None or (len(ids) > 0 and _are_token_ids(ids)),
        f"{_TOKEN_IDS}, at least one; None allows all",
    ),
    "banned_token_ids": (_are_token_ids, _TOKEN_IDS),
    "bad_words": _TEXTS,
    "seed": (lambda n: n is None or _whole(n) >= 0, "a whole number of at least 0"),
    "max_tokens": _COUNT,
    "min_tokens": (lambda n: _whole(n) >= 0, "a whole number of at least 0"),
    "stop": _TEXTS,
    "include_stop_str_in_output": _SWITCH,
    "stop_token_ids": (_are_token_ids, _TOKEN_IDS),
    "ignore_eos": _SWITCH,
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "skip_special_tokens": _SWITCH,
    "structured_outputs": (lambda s: s is None or isinstance(s, StructuredOutputs), "a StructuredOutputs or None"),
}
_BEAM_RULES: Mapping[str, Rule] = {
    # Each beam's step asks for as many log-probabilities, and those of the end tokens: 100 are the most there are.
    "beam_width": (lambda n: 1 <= _whole(n) <= 50, "a whole number between 1 and 50"),
    "max_tokens": _COUNT,
    "ignore_eos": _SWITCH,
    "temperature": (lambda t: t == 0, "0: beam search does not sample"),
    "length_penalty": (lambda p: -10 <= p <= 10, "between -10 and 10 (0 is off)"),
    "include_stop_str_in_output": _SWITCH,
}
