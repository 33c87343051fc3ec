"""Options that several commands share, with one help text each, and how a command takes many of them at once.

Knows Typer, how shells complete, and the tables of sampling parameters and engine options; not what any of them does.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any

import typer

from tinyserve.cli import _names
from tinyserve.engine_options import CHAT_TEMPLATE_HELP, PIPELINE_PARALLEL_SIZE_HELP, EngineOptions, Flag
from tinyserve.errors import UserError
from tinyserve.models import dtypes
from tinyserve.sampling_params import Param, SamplingParams
from tinyserve.server.options import API_KEY_VARIABLE

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A preset, a repo id, a folder or a .gguf file.", autocompletion=_names.models
    ),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Answer in JSON that matches this schema: a file, or the schema itself."),
]
Regex = Annotated[str | None, typer.Option(metavar="TEXT", help="The whole answer matches this regular expression.")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Tell on stderr how it is decoded, who has decided it, and where it ends."),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message, for models that chat.")]
ChatTemplateFile = Annotated[str | None, typer.Option("--chat-template", metavar="FILE", help=CHAT_TEMPLATE_HELP)]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help=dtypes.HELP,
        autocompletion=_names.dtypes,
    ),
]
Threads = Annotated[
    int | None, typer.Option(metavar="NUMBER", help="Threads; by default the cores this process may use.")
]
PipelineParallelSize = Annotated[
    int,
    typer.Option("--pipeline-parallel-size", min=1, metavar="NUMBER", help=PIPELINE_PARALLEL_SIZE_HELP),
]
Server = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Ask a running server, tinyserve's or another with OpenAI's API, and load nothing here: MODEL is one of "
        "its models, by default the first, and it decides what no option says.",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help=f"The key that the server asks for.  [default: {API_KEY_VARIABLE} in the environment]",
    ),
]


ReasoningEffort = Annotated[
    str | None,
    typer.Option(
        "--reasoning-effort",
        metavar="TEXT",
        help="How much a model that thinks is to think, in its chat template's words: none, low, medium, high.",
    ),
]


# --- many at once -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Options that a command takes as one argument, and what makes it of their values by name."""

    make: Callable[..., Any]
    options: tuple[inspect.Parameter, ...]


def fields_of(kind: type) -> Group:
    """A dataclass whose fields are options."""
    return Group(kind, tuple(inspect.signature(kind).parameters.values()))


def sampling_options(max_tokens: str, leave_out: Collection[str] = (), *, greedy: bool = True) -> Group:
    """Those of SamplingParams as a dict, None where nothing is said; `max_tokens` is what the command says of that one.
    `greedy`: where neither a user nor a model says so, nothing is drawn.

    What is None the model's generation_config.json decides, if it asks to sample (cli/_sampling.py).
    """
    rows = (row for row in SamplingParams.rows.values() if row.cli and row.name not in leave_out)
    helps = {"max_tokens": max_tokens}
    return Group(dict, tuple(_sampling_option(row, helps.get(row.name) or _help(row, greedy)) for row in rows))


def _help(row: Param, greedy: bool) -> str:
    """A sentence, and what holds where nothing is said."""
    default = 0 if greedy and row.name == "temperature" else row.default
    if default in (None, ()):
        return row.cli_help
    own = "the model's own, else " if row.file is not None else ""
    return f"{row.cli_help}  [default: {own}{default:g}]"


def _sampling_option(row: Param, help: str) -> inspect.Parameter:
    metavar = "NUMBER" if row.kind in (int, float) else "TEXT"
    option = typer.Option(*row.cli.split(), metavar=metavar, help=help)
    kind = Annotated[row.kind | None, option]  # type: ignore[name-defined]  # known when the program runs
    return inspect.Parameter(row.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def engine_options() -> Group:
    """Those of EngineOptions that have a flag, as an EngineOptions. Raises UserError for a number out of range."""
    flags = {row.name: row.metadata["flag"] for row in fields(EngineOptions) if row.metadata["flag"]}
    names = {flag.name.removeprefix("--").replace("-", "_"): name for name, flag in flags.items()}

    def make(**said: Any) -> EngineOptions:
        given = {names[word]: value for word, value in said.items()}
        for name, value in given.items():
            flag = flags[name]
            if value is not None and flag.bounds is not None:
                check_range(flag.name, value, *flag.bounds)
            if value is not None and flag.unit != 1:
                given[name] = round(value * flag.unit)
        return EngineOptions(**given)

    return Group(make, tuple(_engine_option(word, name, flags[name]) for word, name in names.items()))


def _engine_option(word: str, name: str, flag: Flag) -> inspect.Parameter:
    row = EngineOptions.__dataclass_fields__[name]
    kind = float | None if flag.unit != 1 else flag.kind or row.type
    completion = _names.dtypes if name == "dtype" else None
    option = typer.Option(flag.name, metavar=flag.metavar, help=flag.help, autocompletion=completion)
    return inspect.Parameter(
        word, inspect.Parameter.KEYWORD_ONLY, default=row.default, annotation=Annotated[kind, option]
    )


def check_range(option: str, value: float, low: float, high: float) -> None:
    """Raise UserError for a number that is out of range."""
    if not low <= value <= high:
        raise UserError(f"{option} is {value}; it must be between {low:g} and {high:g}.")


def with_options(**groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Have a command take the options of a group in the place of its parameter of that name."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function)
        spread = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in own.parameters.items()
            for each in (groups[name].options if name in groups else (parameter,))
        ]

        @wraps(function)
        def command(**said: Any) -> None:
            for name, group in groups.items():
                said[name] = group.make(**{each.name: said.pop(each.name) for each in group.options})
            function(**said)

        command.__signature__ = own.replace(parameters=spread)  # type: ignore[attr-defined]  # what Typer reads
        command.__annotations__ = {each.name: each.annotation for each in spread}
        return command

    return decorate
