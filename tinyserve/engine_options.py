"""What an engine can be told, in one table: each option with its default, its range and what it means.

`LLM`'s signature and help, the checks and their sentences, `tinyserve serve` and the draft model's engine read these
fields. Plain data: nothing here loads a model.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from os import PathLike
from typing import Any, Final, Self, TypedDict, TypeVar

from tinyserve.errors import UserError, did_you_mean
from tinyserve.models.dtypes import HELP as DTYPE_HELP
from tinyserve.models.dtypes import KV_CACHE_DTYPES, resolve_dtype, resolve_kv_cache_dtype, weight_dtype
from tinyserve.scheduling.speculative import SpeculativeConfig

LOAD_FORMATS: Final = ("auto", "dummy")
BACKENDS: Final = ("ray", "uni")
PIPELINE_PARALLEL_SIZE_HELP: Final = "Cut the layers into so many processes, on Ray's machines, or on this one."
CHAT_TEMPLATE_HELP: Final = "Chat by the Jinja template in this file.  [default: the model's own]"
Check = Callable[[str, Any], None]
Constructor = TypeVar("Constructor", bound=Callable[..., None])


def _whole(least: int = 1, most: int | None = None, multiple: int = 1, *, required: bool = False) -> Check:
    """A whole number in a range; None where it may be left out."""

    def check(name: str, value: Any) -> None:
        if value is None and not required:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
        if most is not None and value > most:
            raise UserError(f"{name} is {value}; it must be at most {most}.")
        if value % multiple:
            raise UserError(f"{name} is {value}; it must be a multiple of {multiple}.")

    return check


def _switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; it must be True or False.")


def check_load_format(name: str, value: Any) -> None:
    """Raise UserError for a load format that does not exist."""
    if value not in LOAD_FORMATS:
        raise UserError(f"{name} {value!r} does not exist; there are {' and '.join(LOAD_FORMATS)}.")


def _backend(name: str, value: Any) -> None:
    if value is not None and value not in BACKENDS:
        raise UserError(f"{name} {value!r} does not exist; there are {' and '.join(BACKENDS)}.")


def _dtype(name: str, value: Any) -> None:
    weight_dtype(value)


def _kv_cache_dtype(name: str, value: Any) -> None:
    resolve_kv_cache_dtype(value, "auto")


def _speculative_config(name: str, value: Any) -> None:
    config = SpeculativeConfig.parse(value)
    if config is not None and config.dtype is not None:
        weight_dtype(config.dtype)


def _chat_template(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, str | PathLike) or not str(value)):
        raise UserError(f"{name} is {value!r:.60}; it must be a file with a Jinja template, or the template itself.")


@dataclass(frozen=True)
class Flag:
    """How a command shows an option: in `unit`s of its own, such as GB, and between two bounds where it says so.

    `kind` is what it takes, where that is less than Python does.
    """

    name: str
    metavar: str
    help: str
    unit: float = 1
    bounds: tuple[float, float] | None = None
    kind: Any = None


def _option(default: Any, check: Check, help: str, flag: Flag | None = None) -> Any:
    return field(default=default, metadata={"check": check, "help": help, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options of one engine. Raises UserError, with the name and the value, for what is out of range."""

    dtype: str = _option(
        "auto",
        _dtype,
        '"float32"; "bfloat16"; "w8a16" (also "int8" and "auto"): 8-bit weights, 16-bit activations; "w8a8"; "w4a16" '
        '(also "int4"); "w4a8".',
        Flag("--dtype", "DTYPE", DTYPE_HELP),
    )
    max_model_len: int | None = _option(
        None,
        _whole(2),
        "tokens of prompt and answer together; by default the model's own limit, or what memory holds.",
        Flag("--max-model-len", "TOKENS", "Of prompt and answer.  [default: the model's own, or what fits]"),
    )
    max_num_seqs: int = _option(
        16,
        _whole(most=1 << 16, required=True),  # each has a place in the queue, whether it is ever taken or not
        "how many sequences run at once; each of a request's n answers is one.",
        Flag("--max-num-seqs", "NUMBER", "Sequences that run at once."),
    )
    max_num_batched_tokens: int = _option(
        512,
        _whole(required=True),
        "how many tokens one step computes.",
        Flag("--max-num-batched-tokens", "NUMBER", "Tokens of one step."),
    )
    kv_cache_memory: int | None = _option(
        None,
        _whole(),
        "bytes for keys, values and states; by default at most half of what is free.",
        Flag("--kv-cache-memory", "GB", "For each model's cache.  [default: what fits]", 1e9, (1e-6, 1e6)),
    )
    kv_cache_dtype: str = _option(
        "auto",
        _kv_cache_dtype,
        '"float32", "bfloat16", "int8", or "auto": bfloat16 unless dtype is float32.',
        Flag("--kv-cache-dtype", "DTYPE", f"{', '.join(KV_CACHE_DTYPES)} or auto."),
    )
    block_size: int = _option(
        16, _whole(16, multiple=16, required=True), "tokens in a block of the cache, a multiple of 16."
    )
    enable_prefix_caching: bool = _option(
        True,
        _switch,
        "keep what finished requests have computed while nobody else needs its room, and take it over where a prompt "
        "begins with the same tokens; no answer changes by a bit.",
    )
    speculative_config: Mapping[str, Any] | None = _option(
        None,
        _speculative_config,
        '{"method": "ngram"} lets an answer that repeats what was said come several tokens a step, {"method": '
        '"draft_model", "model": ...} one that a smaller model drafts; no token changes. Also num_speculative_tokens '
        "(11 and 6), prompt_lookup_max (6), prompt_lookup_min (1), the draft's dtype.",
    )
    num_threads: int | None = _option(
        None,
        _whole(),
        "by default the cores this process may use.",
        Flag("--threads", "NUMBER", "Threads; by default the cores this process may use.", bounds=(1, 4096)),
    )
    pipeline_parallel_size: int = _option(
        1,
        _whole(most=256, required=True),
        "into how many processes the layers are cut, for a model that one machine has no room for; each has a range of "
        "them, and this one the last.",
        Flag("--pipeline-parallel-size", "NUMBER", PIPELINE_PARALLEL_SIZE_HELP),
    )
    distributed_executor_backend: str | None = _option(
        None,
        _backend,
        'where they are: "ray", the default, on the machines of the cluster at RAY_ADDRESS, or on this one; "uni" in '
        "this process, for trying.",
    )
    seed: int | None = _option(None, _whole(0), "makes requests that have no seed of their own repeatable.")
    load_format: str = _option(
        "auto",
        check_load_format,
        '"auto", or "dummy" for synthetic weights of the right shapes without a download.',
        Flag("--load-format", "FORMAT", "auto, or dummy: synthetic weights, token ids only, no download."),
    )
    chat_template: str | PathLike[str] | None = _option(  # noqa: RUF009  # it makes a field
        None,
        _chat_template,
        "a file with a Jinja template, or the template itself, to chat by in place of the checkpoint's own.",
        Flag("--chat-template", "FILE", CHAT_TEMPLATE_HELP, kind=str | None),
    )

    def __post_init__(self) -> None:
        for row in fields(self):
            row.metadata["check"](row.name, getattr(self, row.name))

    @classmethod
    def of(cls, options: Mapping[str, Any], others: tuple[str, ...] = ()) -> Self:
        """The options of these names; raises UserError for one that does not exist, with the nearest.

        `others` are what the caller takes beside them.
        """
        names = (*(row.name for row in fields(cls)), *others)
        for name in options:
            if name not in names:
                raise UserError(
                    f"LLM has no option {name!r}.{did_you_mean(name, names)} The options are {', '.join(names)}."
                )
        return cls(**options)

    def as_dict(self) -> dict[str, Any]:
        """The options by name, as `LLM` takes them."""
        return {row.name: getattr(self, row.name) for row in fields(self)}

    @property
    def speculative(self) -> SpeculativeConfig | None:
        """What `speculative_config` asks for."""
        return SpeculativeConfig.parse(self.speculative_config)

    def resolved(self, packed_dtype: str | None) -> Self:
        """The same with dtypes by their own names, for a checkpoint that is packed in this dtype, or in none.

        Raises UserError where a packed checkpoint cannot be read so.
        """
        dtype = resolve_dtype(self.dtype, packed_dtype)
        return replace(self, dtype=dtype, kv_cache_dtype=resolve_kv_cache_dtype(self.kv_cache_dtype, dtype))


class EngineKeywords(TypedDict, total=False):
    """The names and types of EngineOptions for editors and type checkers, which do not run the program."""

    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory: int | None
    kv_cache_dtype: str
    block_size: int
    enable_prefix_caching: bool
    speculative_config: Mapping[str, Any] | None
    num_threads: int | None
    pipeline_parallel_size: int
    distributed_executor_backend: str | None
    seed: int | None
    load_format: str
    chat_template: str | PathLike[str] | None


def describe_options() -> str:
    """What each option means, a line each, for help()."""
    return "\n".join(f"        {row.name}: {row.metadata['help']}" for row in fields(EngineOptions))


def takes_engine_options(function: Constructor) -> Constructor:
    """Show the options in the signature and the help of a constructor that takes them as `**options`."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    first_keyword = next((i for i, p in enumerate(own) if p.kind is inspect.Parameter.KEYWORD_ONLY), len(own))
    rows = [_parameter(row) for row in fields(EngineOptions)]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own[:first_keyword], *rows, *own[first_keyword:]]
    )
    function.__doc__ = (function.__doc__ or "").replace("{options}", describe_options().lstrip())
    return function


def _parameter(row: Field[Any]) -> inspect.Parameter:
    assert row.default is not MISSING
    return inspect.Parameter(row.name, inspect.Parameter.KEYWORD_ONLY, default=row.default, annotation=row.type)
