"""`tinyserve ask`: one question, one answer. A subcommand a family, and any other model in the same place.

Four families are programs by themselves as well: `ask-gpt2` and the like. Knows how a command line names a model;
_backends.py reaches it, and _answer.py prints its answer.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.model_ref import names_a_model
from tinyserve.cli import _names
from tinyserve.cli._answer import Question, answer, read_prompt
from tinyserve.cli._backends import find_backend
from tinyserve.cli._options import (
    ApiKey,
    ChatTemplateFile,
    Dtype,
    JsonSchema,
    PipelineParallelSize,
    ReasoningEffort,
    Regex,
    Server,
    System,
    Threads,
    Verbose,
    fields_of,
    sampling_options,
    with_options,
)
from tinyserve.cli._sampling import given, structure
from tinyserve.errors import HubUnreachable, UserError
from tinyserve.sampling_params import DEFAULT_MAX_TOKENS

ANY = "any-model"  # the hidden subcommand behind every other name


class AskGroup(typer.core.TyperGroup):
    """Sends a first word that is no subcommand, and options before it, to the hidden one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and sys.stdin is not None and sys.stdin.isatty() and not ctx.resilient_parsing:
            args = ["--help"]
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = [ANY, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Show the options that every family has, then the families."""
        self.commands[ANY].format_options(ctx, formatter)
        families = [command for command in self.commands.values() if not command.hidden]
        with formatter.section("Families"):
            formatter.write_dl([(command.name, command.get_short_help_str(60)) for command in families])


class AnyModel(typer.core.TyperCommand):
    """The hidden subcommand: its name is not in its usage line either."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        formatter.write_usage(ctx.parent.command_path, "[OPTIONS] [MODEL] [PROMPT]")


ask_app = typer.Typer(
    cls=AskGroup,
    rich_markup_mode=None,
    subcommand_metavar="[MODEL] [PROMPT]",
    help="""Ask a model one question.

The answer is streamed to stdout, statistics go to stderr. MODEL is a family below, any preset
(tinyserve list --presets), a Hugging Face repo id, a folder of safetensors or a .gguf file; without one,
smollm2-135m answers. What is piped in
stands behind the prompt, or is the prompt, if none or "-" is given.

A model with a chat template answers, any other continues the text. What no option says is as the model's
generation_config.json asks; --verbose shows what came of it.

\b
Examples:
  tinyserve ask "What is the capital of France?"
  tinyserve ask gpt2 "The capital of France is" --max-tokens 20
  tinyserve ask ./my-model.gguf "Hello" --temp 0.7 --seed 1
  cat letter.txt | tinyserve ask smollm2-135m --system "Summarise in one sentence."
  tinyserve ask --server http://127.0.0.1:8000 "What is the capital of France?"
""",
    epilog="The families come in sizes: tinyserve ask llama --help.",
)

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="The text to answer or continue; standard input when left out, or '-'."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text: no chat template.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with text, token ids and statistics.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No statistics.")]


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """What `ask` can be told beside the model, the prompt and the sampling."""

    json_schema: JsonSchema = None
    regex: Regex = None
    system: System = None
    chat_template: ChatTemplateFile = None
    reasoning_effort: ReasoningEffort = None
    raw: Raw = False
    dtype: Dtype = "auto"
    threads: Threads = None
    pipeline_parallel_size: PipelineParallelSize = 1
    server: Server = None
    api_key: ApiKey = None
    json_: Json = False
    quiet: Quiet = False
    verbose: Verbose = False


_SAMPLING = sampling_options(
    "At most this many new tokens, and no more than the context has room for.  "
    f"[default: the model's own, else {DEFAULT_MAX_TOKENS}]"
)


def _ask(model: str | None, prompt: str | None, sampling: dict[str, Any], options: AskOptions) -> None:
    """Build the question and have it answered."""
    sampling = {**sampling, "structured_outputs": structure(options.json_schema, options.regex)}
    given(**sampling)
    if options.raw and options.chat_template is not None:
        raise UserError("--raw continues the text without a chat template: leave out --raw, or --chat-template.")
    default = f"--server {options.server}" if options.server else presets.DEFAULT
    question = Question(
        read_prompt(prompt, model or default),
        sampling,
        system=options.system,
        raw=options.raw,
        json=options.json_,
        quiet=options.quiet,
        verbose=options.verbose,
    )
    backend = find_backend(
        model,
        dtype=options.dtype,
        threads=options.threads,
        pipeline_parallel_size=options.pipeline_parallel_size,
        chat_template=options.chat_template,
        server=options.server,
        api_key=options.api_key,
        reasoning_effort=options.reasoning_effort,
    )
    if options.reasoning_effort is not None and (options.raw or not backend.chats):
        raise UserError(
            f"--reasoning-effort needs a chat template, which {backend.name} does not have (or --raw turns off)."
        )
    answer(question, backend)


def _variant(family: str, name: str) -> str:
    """The preset that a family's --model means; raises UserError with the variants."""
    variants = presets.variants(family)
    if name in variants:
        return variants[name]
    if name in variants.values():
        return name
    raise UserError(f"{family} has no variant {name!r}; there are {', '.join(variants)}.")


def _families_and_models(incomplete: str) -> list[str]:
    """What MODEL can be, for shells that complete it."""
    return _names.going_on(incomplete, [*FAMILIES, *_names.models(incomplete)])


@ask_app.command(ANY, hidden=True, cls=AnyModel)
@with_options(sampling=_SAMPLING, options=fields_of(AskOptions))
def any_model(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A preset, a repo id, a folder or a .gguf file; or the prompt itself.",
            autocompletion=_families_and_models,
        ),
    ] = None,
    prompt: Prompt = None,
    variant: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="The model, or a family's variant, as an option.",
            autocompletion=_names.models,
        ),
    ] = None,
    *,
    sampling: dict[str, Any],
    options: AskOptions,
) -> None:
    """Ask any model: a preset, a Hugging Face repo id, a folder of safetensors, a .gguf file."""
    words = [word for word in (model, prompt) if word is not None]
    _ask(*_model_and_prompt(words, variant), sampling, options)


def _model_and_prompt(words: list[str], variant: str | None) -> tuple[str | None, str | None]:
    """Tell the model from the prompt among up to two words and a --model; raises UserError for one too many."""
    named = len(words) == 2 or (len(words) == 1 and (words[0] in FAMILIES or names_a_model(words[0])))
    model: str | None
    if variant is None:
        model = words.pop(0) if named else None
        if model in FAMILIES:
            model = _variant(model, FAMILIES[model].default)
    elif words and words[0] in FAMILIES:
        model = _variant(words.pop(0), variant)
    elif len(words) == 2:
        raise UserError(f"The model is given twice, as {words[0]!r} and as --model {variant}: leave one out.")
    else:
        model = variant
    return model, words[0] if words else None


@dataclass(frozen=True)
class Family:
    """A subcommand; its variants are the presets of this family."""

    default: str  # variant
    about: str
    prompt: str = "What is the capital of France?"  # in its examples


CONTINUE = "The capital of France is"
FAMILIES = {
    "gpt2": Family("small", "GPT-2 (OpenAI, 2019) continues text.", CONTINUE),
    "llama": Family("3.2-1b", "Llama 2 and 3 (Meta), and TinyLlama."),
    "mistral": Family("7b", "Mistral 7B Instruct."),
    "smollm2": Family("135m", "SmolLM2 Instruct (Hugging Face), small and open."),
    "qwen": Family("3-0.6b", "Qwen2.5 and Qwen3 (Alibaba), the dense ones."),
    "falcon": Family("7b", "Falcon (TII, 2023): all but 7b-instruct continue text.", CONTINUE),
    "granite": Family("350m", "Granite 3 and 4 (IBM): hybrids with Mamba2, dense, and mixtures of experts."),
}
PROGRAMS = {f"ask-{family}": family for family in ("gpt2", "falcon", "llama", "granite")}  # those of the zoo


class FamilyCommand(typer.core.TyperCommand):
    """A family's subcommand: its help names the variants, which are read from the presets when somebody wants them."""

    @property
    def help(self) -> str | None:
        called = self.name or ""
        name = PROGRAMS.get(called, called)
        family, variants = FAMILIES[name], list(presets.variants(name))
        program = called if called in PROGRAMS else f"tinyserve ask {name}"
        offline = f"\nWithout a network, {presets.in_zoo(name)} answers, which comes with tinyserve.\n"
        return f"""{family.about}

Variants for --model: {", ".join(variants)}.
{offline if called in PROGRAMS else ""}
\b
Examples:
  {program} "{family.prompt}"
  {program} --model {variants[-1]} "{family.prompt}" --max-tokens 20
"""

    @help.setter
    def help(self, text: str | None) -> None: ...  # Typer's, made of a docstring


def _family_command(name: str, family: Family, program: str | None = None) -> Callable[..., None]:
    """The subcommand of a family, or the program of this name, which needs no network."""

    @with_options(sampling=_SAMPLING, options=fields_of(AskOptions))
    def command(
        prompt: Prompt = None,
        variant: Annotated[
            str,
            typer.Option(
                "--model",
                "-m",
                metavar="VARIANT",
                help="The variant, or a preset's name.",
                autocompletion=lambda: list(presets.variants(name)),
            ),
        ] = family.default,
        *,
        sampling: dict[str, Any],
        options: AskOptions,
    ) -> None:
        model = _variant(name, variant)
        if program is not None and options.server is None:
            model = _at_hand(model, program)
        _ask(model, prompt, sampling, options)

    return command


def _at_hand(model: str, program: str) -> str:
    """The model, downloaded if need be; where the Hub cannot be reached, its family's that comes with tinyserve."""
    from tinyserve.checkpoints import hub
    from tinyserve.checkpoints.model_ref import ModelRef

    try:
        hub.resolve(ModelRef.of_preset(presets.get(model)), patience=hub.SHORT_PATIENCE)
    except HubUnreachable:
        stand_in = presets.in_zoo(PROGRAMS[program]) or model
        print(
            f"{program}: {model} is not on this disk and the Hugging Face Hub cannot be reached: {stand_in} answers, "
            "which comes with tinyserve.",
            file=sys.stderr,
        )
        return stand_in
    return model


for _name, _family in FAMILIES.items():
    ask_app.command(_name, cls=FamilyCommand, short_help=_family.about)(_family_command(_name, _family))


def family_program(name: str) -> typer.Typer:
    """`ask-gpt2` and the like: one command, with the options of `tinyserve ask gpt2`."""
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    family = PROGRAMS[name]
    app.command(name, cls=FamilyCommand)(_family_command(family, FAMILIES[family], name))
    return app
