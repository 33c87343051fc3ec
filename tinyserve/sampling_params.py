"""How one request is decoded, under vLLM's names: a table with a row for each parameter. Plain data, nothing samples.

What else knows a parameter by name reads its row: range checks, docstrings and the refusals of beam search here, HTTP
bodies (server/protocol.py), options of the command line (cli/_options.py, cli/_sampling.py), generation_config.json
(models/config/generation.py), the table in docs/python-api.md. To add one: a row here, its name in FILTERS of
tensor/sampling.py with its kernel (or in PROCESSORS, with a method in sampler.py), the same in
tensor/reference_sampling.py; then scripts/make_option_docs.py and make_cli_docs.py.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from operator import index
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from tinyserve.errors import RequestError, did_you_mean

# --- a table of options: what a row says, and what follows from it ---------------------------------------------------

Rule = tuple[Callable[[Any], bool], str]  # whether a value will do, and what it must be
# Where in the chain (tensor/sampling.py) a parameter acts: it forbids tokens, adds to their logits, counts what has
# been said, or only decides which of several tokens is drawn.
Stage = Literal["mask", "bias", "penalty", "draw"]


@dataclass(frozen=True, kw_only=True)
class Param:
    """One parameter: its row. Its default changes nothing, but for the temperature."""

    name: str
    default: Any
    kind: Any  # int, float, bool, list[int] ...: its type without None, and without what stands for a list
    rule: Rule  # None will do as well where it is the default
    help: str
    stage: Stage | None  # None: it says where an answer ends, or what is returned
    file: str | None  # its key in transformers' generation_config.json
    gguf: str | None  # its name in a GGUF file's metadata, behind general.sampling
    cli: str  # its options of `ask` and `chat`, "--temperature --temp"; empty where they have none
    cli_help: str
    http: Any  # the type of the field of this name in an HTTP body; None where it has none


def param(
    default: Any = MISSING,
    *,
    rule: Rule,
    help: str,
    stage: Stage | None = None,
    file: str | None = None,
    gguf: str | None = None,
    cli: str = "",
    cli_help: str = "",
    http: Any = None,
    hash: bool | None = None,
) -> Any:
    """A dataclass field with its row; `http` is True for the field's own type, `cli_help` stands in for `help`."""
    row = {"rule": rule, "help": help, "stage": stage, "file": file, "gguf": gguf, "http": http}
    return field(default=default, hash=hash, metadata=row | {"cli": cli, "cli_help": cli_help or help})


class Options:
    """A dataclass that refuses an option that does not exist, naming the nearest one, and checks those that do."""

    __dataclass_fields__: dict[str, Any]
    rows: ClassVar[Mapping[str, Param]] = {}  # of its parameters, by name

    def __new__(cls, **options: Any) -> Self:
        for name in options.keys() - cls.__dataclass_fields__.keys():
            raise RequestError(f"{cls.__name__} has no option {name!r:.80}{cls._reason(name)}", param=name[:80])
        return super().__new__(cls)

    def __repr__(self) -> str:
        """The call that makes it: what differs from the defaults."""
        values = ((name, getattr(self, name), each.default) for name, each in self.__dataclass_fields__.items())
        given = ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)
        return f"{type(self).__name__}({given})"

    @classmethod
    def _reason(cls, name: str) -> str:
        """What follows "has no option": the rest of the sentence, and the way out."""
        return f".{did_you_mean(name, cls.__dataclass_fields__)}"

    def _check(self) -> None:
        """Raise RequestError for the first option outside its range; a list becomes a tuple."""
        for name, row in self.rows.items():
            if get_origin(row.kind) is list:
                object.__setattr__(self, name, _as_tuple(row, getattr(self, name)))
        for name, row in self.rows.items():
            value = getattr(self, name)
            holds, range_ = row.rule
            try:
                good = (value is None and row.default is None) or holds(value)
            except (TypeError, ValueError):
                good = False
            if not good:
                raise RequestError(f"{name} is {value!r:.200}; it must be {range_}.", param=name)


T = TypeVar("T", bound=type[Options])


def _table(options: T) -> T:
    """Gather the rows of a dataclass, and add a line for each parameter to its docstring."""
    rows = {}
    for each in fields(options):  # type: ignore[arg-type]  # what derives from Options is a dataclass
        row = {**each.metadata, "kind": _kind(each.type)}
        if row["http"] is True:
            row["http"] = row["kind"]
        rows[each.name] = Param(name=each.name, default=each.default, **row)
    options.rows = rows
    lines = (f"    {name}: {row.help}" for name, row in rows.items())
    options.__doc__ = f"{options.__doc__}\n\n" + "\n".join(lines) + "\n"
    return options


def _kind(annotation: Any) -> Any:
    """int of `int | None`, list[int] of `tuple[int, ...] | list[int] | None`."""
    members = get_args(annotation) if isinstance(annotation, UnionType) else ()
    kind = next((member for member in members if member is not NoneType), annotation)
    return list[get_args(kind)[0]] if get_origin(kind) is tuple else kind  # type: ignore[misc]


def _as_tuple(row: Param, value: Any) -> tuple[Any, ...] | None:
    """A list's tuple: of one where its only member is given, empty for None where None is no default."""
    if isinstance(value, get_args(row.kind)):
        return (value,)
    if value is None:
        return None if row.default is None else ()
    if not isinstance(value, list | tuple):
        raise RequestError(f"{row.name} is {value!r:.200}; it must be a list.", param=row.name)
    return tuple(value)


# --- what an answer must look like ------------------------------------------------------------------------------------

DEFAULT_MAX_TOKENS = 256  # of an answer, where neither a request nor a model's makers say how long it may be
KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, kw_only=True, repr=False)
class StructuredOutputs(Options):
    """Exactly one kind of structure. Raises RequestError, with the field, for what is none.

    json: a JSON schema: an object, its text, or a pydantic model's class.
    regex: the whole answer matches this (Rust's syntax: no look-around, no back-references).
    choice: the answer is one of these texts.
    grammar: a context-free grammar in llguidance's dialect of Lark; its first rule is `start`.
    json_object: True for any JSON object.
    """

    json: Any = None  # afterwards the schema's text
    regex: str | None = None
    choice: Sequence[str] | None = None  # afterwards a tuple
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if self.json_object is not bool(self.json_object):
            message = f"json_object is {self.json_object!r:.60}; it must be True or False."
            raise RequestError(message, param="json_object")
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            have = f"{' and '.join(given)} are given" if given else "none is given"
            message = f"Structured outputs take one of {', '.join(KINDS)}; {have}."
            raise RequestError(message, param=given[1] if given else "structured_outputs")
        if self.json is not None:
            object.__setattr__(self, "json", json.dumps(schema_of(self.json), ensure_ascii=False))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for text in (self.json, self.regex, self.grammar, "\0".join(self.choice or ())):
            _check_unicode(text, self.kind)
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and text.strip()):
                message = f"{name} is {text!r:.60}; it must be text of at least one character."
                raise RequestError(message, param=name)

    @property
    def kind(self) -> str:
        """The name of the one field that is given."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))


def schema_of(schema: Any, where: str = "json") -> dict[str, Any]:
    """A JSON schema as a dict of its own, from an object, its text, or a pydantic model's class."""
    if hasattr(schema, "model_json_schema"):
        schema = _closed(schema.model_json_schema())
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        elif isinstance(schema, Mapping):
            schema = json.loads(json.dumps(dict(schema), allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {error}.", param=where) from None
    if not isinstance(schema, dict):
        raise RequestError(f"{where} is {schema!r:.60}; it must be a JSON schema: an object.", param=where)
    return schema


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a class, which has the fields that it has and no others, unless it says so itself."""
    closed = dict(schema)
    if "properties" in schema:
        closed.setdefault("additionalProperties", False)
    if "$defs" in schema:
        closed["$defs"] = {name: _closed(one) for name, one in schema["$defs"].items()}
    return closed


def _check_unicode(text: Any, where: str) -> None:
    """Raise RequestError for half a character."""
    try:
        _ = text.encode() if isinstance(text, str) else b""
    except UnicodeEncodeError as error:
        code = f"U+{ord(error.object[error.start]):04X}"
        message = f"{where} has the lone surrogate {code}, which is no character: nothing can match it."
        raise RequestError(message, param=where) from None


def _choices(choice: Any) -> tuple[str, ...]:
    texts = () if isinstance(choice, str) or not isinstance(choice, Sequence) else tuple(choice)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        message = f"choice is {choice!r:.60}; it must be a list of texts of at least one character."
        raise RequestError(message, param="choice")
    return texts


# --- what a value must be ---------------------------------------------------------------------------------------------


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


_INFINITY = float("inf")
_COUNT: Rule = (lambda n: _whole(n) >= 1, "a whole number of at least 1")
_FROM_ZERO: Rule = (lambda n: _whole(n) >= 0, "a whole number of at least 0")
_LOGPROBS: Rule = (lambda n: 0 <= _whole(n) <= 100, "a whole number between 0 and 100")
_PENALTY: Rule = (lambda p: -2 <= p <= 2, "between -2 and 2 (0 is off)")
_SHARE: Rule = (lambda p: 0 < p <= 1, "above 0 and at most 1")
_SWITCH: Rule = (lambda yes: yes is bool(yes), "True or False")
_TEXTS: Rule = (lambda texts: all(map(_is_text, texts)), "texts of at least one character")
_TOKEN_IDS: Rule = (_are_token_ids, "token ids, whole numbers from 0 on")

# --- the tables -------------------------------------------------------------------------------------------------------


@_table
@dataclass(frozen=True, kw_only=True, repr=False)
class SamplingParams(Options):
    """How to choose tokens, and when to stop. Raises RequestError, with the number, for a value outside its range."""

    n: int = param(
        1,
        rule=_COUNT,
        help="How many answers to give; answer i of a request with a seed draws from seed + i.",
        http=True,
    )
    best_of: int | None = param(
        None, rule=_COUNT, help="Give the n likeliest of this many answers; None is n.", http=True
    )
    temperature: float = param(
        1.0,
        rule=(lambda t: 0 <= t < _INFINITY, "a finite number of at least 0 (0 is greedy)"),
        help="0 is greedy; higher is more random.",
        stage="draw",
        file="temperature",
        gguf="temp",
        cli="--temperature --temp",
        http=True,
    )
    max_tokens: int = param(
        16,
        rule=_COUNT,
        help="At most this many new tokens (16, as in vLLM: raise it for answers).",
        file="max_new_tokens",
        cli="--max-tokens",
        cli_help="At most this many new tokens.",
        http=True,
    )
    top_k: int = param(
        0,
        rule=(lambda k: _whole(k) >= -1, "a whole number: at least 1, or 0 for all tokens"),
        help="Draw from this many most likely tokens; 0 from all.",
        stage="draw",
        file="top_k",
        gguf="top_k",
        cli="--top-k -k",
        http=True,
    )
    top_p: float = param(
        1.0,
        rule=_SHARE,
        help="Draw from the likeliest tokens of this total probability.",
        stage="draw",
        file="top_p",
        gguf="top_p",
        cli="--top-p -p",
        http=True,
    )
    min_p: float = param(
        0.0,
        rule=(lambda p: 0 <= p <= 1, "between 0 and 1"),
        help="Draw from tokens at least this probable relative to the best.",
        stage="draw",
        file="min_p",
        gguf="min_p",
        cli="--min-p",
        http=True,
    )
    typical_p: float = param(
        1.0,
        rule=_SHARE,
        help="Draw from the tokens of the most usual surprise, of this total probability.",
        stage="draw",
        file="typical_p",
        cli="--typical-p",
        http=True,
    )
    top_n_sigma: float = param(
        0.0,
        rule=(lambda n: -_INFINITY < n < _INFINITY, "a finite number (0 or less is off)"),
        help="Draw from tokens whose logit is at most this many standard deviations below the best; 0 from all.",
        stage="draw",
        cli="--top-n-sigma",
        http=True,
    )
    repetition_penalty: float = param(
        1.0,
        rule=(lambda p: 0 < p < _INFINITY, "a finite number above 0 (1 is off)"),
        help="Above 1, tokens of prompt and answer are less likely, below 1 more.",
        stage="penalty",
        file="repetition_penalty",
        gguf="penalty_repeat",
        cli="--repetition-penalty",
        cli_help="Above 1, what has been said is less likely.",
        http=True,
    )
    frequency_penalty: float = param(
        0.0,
        rule=_PENALTY,
        help="Take this off a token's logit for each time the answer has it.",
        stage="penalty",
        http=True,
    )
    presence_penalty: float = param(
        0.0, rule=_PENALTY, help="Take this off a token's logit if the answer has it.", stage="penalty", http=True
    )
    logit_bias: Mapping[int, float] | None = param(
        None,
        rule=(_are_biases, "a mapping of token ids to numbers between -100 and 100"),
        help="Add this to the logit of a token id.",
        stage="bias",
        http=dict[str, float],
        hash=False,
    )
    allowed_token_ids: tuple[int, ...] | list[int] | None = param(
        None,
        rule=(lambda ids: len(ids) > 0 and _are_token_ids(ids), f"{_TOKEN_IDS[1]}, at least one; None allows all"),
        help="No tokens but these; None is all.",
        stage="mask",
        http=True,
    )
    banned_token_ids: tuple[int, ...] | list[int] = param(
        (), rule=_TOKEN_IDS, help="None of these tokens.", stage="mask", http=True
    )
    bad_words: tuple[str, ...] | list[str] | str = param(
        (),
        rule=_TEXTS,
        help="Texts that the answer does not come to have: no token that would complete one of them.",
        stage="mask",
        http=True,
    )
    seed: int | None = param(
        None,
        rule=_FROM_ZERO,
        help="The same seed and prompt give the same answer; None is different every time.",
        stage="draw",
        cli="--seed",
        cli_help="Makes a random answer repeatable.",
        http=True,
    )
    stop: tuple[str, ...] | list[str] | str = param(
        (),
        rule=_TEXTS,
        help="Texts that end the answer; they are not part of it, unless include_stop_str_in_output.",
        cli="--stop",
        cli_help="End the answer before this text; can be given several times.",
        http=str | list[str],
    )
    include_stop_str_in_output: bool = param(
        False, rule=_SWITCH, help="The answer has the text that ended it.", http=True
    )
    stop_token_ids: tuple[int, ...] | list[int] = param(
        (), rule=_TOKEN_IDS, help="Tokens that end the answer, beside the model's own.", http=True
    )
    min_tokens: int = param(
        0,
        rule=_FROM_ZERO,
        help="No token that ends the answer before there are this many.",
        stage="mask",
        http=True,
    )
    ignore_eos: bool = param(False, rule=_SWITCH, help="Go on past the model's end token.", http=True)
    logprobs: int | None = param(
        None,
        rule=_LOGPROBS,
        help="Return the log-probabilities of this many most likely tokens, and of the chosen one, at each step.",
    )
    prompt_logprobs: int | None = param(
        None, rule=_LOGPROBS, help="The same for each token of the prompt but the first."
    )
    skip_special_tokens: bool = param(True, rule=_SWITCH, help="Leave special tokens out of the text.", http=True)
    thinking_token_budget: int | None = param(
        None,
        rule=_FROM_ZERO,
        help="At most this many tokens of thinking, then </think>; None is no limit.",
        cli="--thinking-token-budget",
        http=True,
    )
    structured_outputs: StructuredOutputs | None = param(
        None,
        rule=(lambda s: isinstance(s, StructuredOutputs), "a StructuredOutputs or None"),
        help="What the answer must look like.",
    )

    def __post_init__(self) -> None:
        self._check()
        if self.logit_bias is not None:  # JSON has no whole numbers for keys
            object.__setattr__(self, "logit_bias", {int(token): bias for token, bias in self.logit_bias.items()})
        for name, contradiction in self._contradictions():
            raise RequestError(f"{name} {contradiction}", param=name)

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """A parameter, and what its name begins: why it cannot be beside another."""
        if self.min_tokens > self.max_tokens:
            yield "min_tokens", f"is {self.min_tokens} and max_tokens {self.max_tokens}: an answer cannot be both."
        if self.best_of is not None and self.best_of < self.n:
            yield "best_of", f"is {self.best_of} and n {self.n}: there must be at least as many answers to choose from."
        if self.allowed_token_ids is not None and set(self.allowed_token_ids) <= set(self.banned_token_ids):
            yield "banned_token_ids", "has every token of allowed_token_ids: none is left to choose from."
        if self.structured_outputs is not None:
            for name in ("ignore_eos", "min_tokens"):
                if value := getattr(self, name):
                    yield name, f"is {value!r} beside structured_outputs, which end where they are done."
        for name in ("stop", "stop_token_ids"):
            if self.ignore_eos and (value := getattr(self, name)):
                yield name, f"is {value!r:.200} and ignore_eos True: leave out one of the two."

    def check_vocabulary(self, size: int) -> None:
        """Raise RequestError for a token id that a model of this vocabulary does not have, naming the parameter."""
        for name in ("logit_bias", "allowed_token_ids", "banned_token_ids"):
            for token in getattr(self, name) or ():
                if token >= size:
                    message = f"{name} has token id {token}, and the model's vocabulary ends at {size - 1}."
                    raise RequestError(message, param=name)

    @cached_property
    def has_penalties(self) -> bool:
        """Whether tokens that have been said are less likely, or more."""
        return self._asks_for("penalty")

    @cached_property
    def changes_logits(self) -> bool:
        """Whether there is anything to do before the temperature."""
        return self._asks_for("mask", "bias", "penalty")

    @cached_property
    def takes_largest(self) -> bool:
        """Whether a token is the largest of the logits as the model computes them, and nothing else is asked."""
        return self.temperature == 0 and self.logprobs is None and not self.changes_logits

    def _asks_for(self, *stages: Stage) -> bool:
        """Whether a parameter of these stages is neither empty nor its default, which changes nothing."""
        rows = self.rows.values()
        values = ((getattr(self, row.name), row.default) for row in rows if row.stage in stages)
        return any(value and value != default for value, default in values)


@_table
@dataclass(frozen=True, kw_only=True, repr=False)
class BeamSearchParams(Options):
    """How wide and how far to search for the likeliest answers. Raises RequestError as SamplingParams does."""

    beam_width: int = param(
        # Each beam's step asks for as many log-probabilities, and those of the end tokens: 100 are the most there are.
        rule=(lambda n: 1 <= _whole(n) <= 50, "a whole number between 1 and 50"),
        help="Go on with this many of the likeliest texts at each token, and give as many answers; 1 is greedy.",
    )
    max_tokens: int = param(rule=_COUNT, help="At most this many new tokens.")
    ignore_eos: bool = param(False, rule=_SWITCH, help="Go on past the model's end token.")
    temperature: float = param(
        0.0, rule=(lambda t: t == 0, "0: beam search does not sample"), help="0, as nothing is sampled."
    )
    length_penalty: float = param(
        1.0,
        rule=(lambda p: -10 <= p <= 10, "between -10 and 10 (0 is off)"),
        help="Answers are compared by the sum of their log-probabilities / number of tokens ** length_penalty: above 0 "
        "longer ones gain, below 0 shorter ones.",
    )
    include_stop_str_in_output: bool = param(False, rule=_SWITCH, help="The text has the end token's too.")

    def __post_init__(self) -> None:
        self._check()

    @classmethod
    def _reason(cls, name: str) -> str:
        row = SamplingParams.rows.get(name)
        if row is None:
            return super()._reason(name)
        if row.stage in ("bias", "penalty", "draw"):  # what would change the odds of tokens that are drawn
            return ": beam search does not sample, it keeps the beam_width likeliest. Leave it out, or use generate."
        return f", SamplingParams has: beam search takes {', '.join(cls.__dataclass_fields__)}."
