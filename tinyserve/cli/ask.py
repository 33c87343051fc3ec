"""`tinyserve ask`: one question, one answer. A subcommand an architecture, and any other model in the same place.

Knows how a command line names a model; who that is, is in _speakers.py, and answering in _answer.py.
"""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.model_ref import names_a_model
from tinyserve.cli import _names
from tinyserve.cli._answer import DEFAULT_MAX_TOKENS, Question, answer, read_prompt
from tinyserve.cli._options import (
    ApiKey,
    Dtype,
    JsonSchema,
    MinP,
    Regex,
    RepetitionPenalty,
    Seed,
    Server,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
    TypicalP,
    Verbose,
)
from tinyserve.cli._sampling import given, structure
from tinyserve.cli._speakers import find_speaker
from tinyserve.errors import UserError

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
smollm2-135m answers. Without a prompt, or with "-", the prompt is read from standard input.

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
MaxTokens = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        help="At most this many new tokens, and no more than the context has room for.  "
        f"[default: the model's own, else {DEFAULT_MAX_TOKENS}]",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End the answer before this text; can be given several times."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text: no chat template.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with text, token ids and statistics.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No statistics.")]


SAMPLING = (
    "temperature", "max_tokens", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "seed", "stop",
)  # fmt: skip
WHO = ("dtype", "threads", "server", "api_key")


def _ask(model: str | None, prompt: str | None, options: dict[str, Any]) -> None:
    """Build the question and have it answered; `options` are the flags by name."""
    sampling = {name: options[name] for name in SAMPLING}
    sampling["structured_outputs"] = structure(options["json_schema"], options["regex"])
    given(**sampling)
    rest = {name: options[name] for name in ("system", "raw", "quiet", "verbose")}
    default = f"--server {options['server']}" if options["server"] else presets.DEFAULT
    question = Question(read_prompt(prompt, model or default), sampling, json=options["json_"], **rest)
    answer(question, find_speaker(model, **{name: options[name] for name in WHO}))


def _family_command(family: str, default: str) -> Callable[..., None]:
    def command(
        prompt: Prompt = None,
        variant: Annotated[
            str,
            typer.Option(
                "--model",
                "-m",
                metavar="VARIANT",
                help="The variant, or a preset's name.",
                autocompletion=lambda: FAMILIES[family][2].split(", "),
            ),
        ] = default,
        temperature: Temperature = None,
        max_tokens: MaxTokens = None,
        top_k: TopK = None,
        top_p: TopP = None,
        min_p: MinP = None,
        typical_p: TypicalP = None,
        repetition_penalty: RepetitionPenalty = None,
        seed: Seed = None,
        stop: Stop = None,
        json_schema: JsonSchema = None,
        regex: Regex = None,
        system: System = None,
        raw: Raw = False,
        dtype: Dtype = "auto",
        threads: Threads = None,
        server: Server = None,
        api_key: ApiKey = None,
        json_: Json = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> None:
        options = locals().copy()
        _ask(_variant(family, variant), prompt, options)

    return command


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
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    typical_p: TypicalP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    system: System = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    server: Server = None,
    api_key: ApiKey = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Ask any model: a preset, a Hugging Face repo id, a folder of safetensors, a .gguf file."""
    options = locals().copy()
    words = [word for word in (model, prompt) if word is not None]
    _ask(*_model_and_prompt(words, variant), options)


def _model_and_prompt(words: list[str], variant: str | None) -> tuple[str | None, str | None]:
    """Tell the model from the prompt among up to two words and a --model; raises UserError for one too many."""
    named = len(words) == 2 or (len(words) == 1 and (words[0] in FAMILIES or names_a_model(words[0])))
    model: str | None
    if variant is None:
        model = words.pop(0) if named else None
        if model in FAMILIES:
            model = _variant(model, FAMILIES[model][0])
    elif words and words[0] in FAMILIES:
        model = _variant(words.pop(0), variant)
    elif len(words) == 2:
        raise UserError(f"The model is given twice, as {words[0]!r} and as --model {variant}: leave one out.")
    else:
        model = variant
    return model, words[0] if words else None


# The default variant of each family, what its help says, and its variants, which would take too long to read here.
FAMILIES = {
    "gpt2": ("small", "GPT-2 (OpenAI, 2019) continues text.", "small, medium, large, xl"),
    "llama": ("3.2-1b", "Llama 2 and 3 (Meta), and TinyLlama.", "tinyllama, 3.2-1b, 3.2-3b, 7b, 3.1-8b, 13b"),
    "mistral": ("7b", "Mistral 7B Instruct.", "7b"),
    "smollm2": ("135m", "SmolLM2 Instruct (Hugging Face), small and open.", "135m, 360m, 1.7b"),
    "falcon": ("7b", "Falcon (TII, 2023): all but 7b-instruct continue text.", "rw-1b, 7b, 7b-instruct, 40b"),
    "granite": (
        "350m",
        "Granite 3 and 4 (IBM): hybrids with Mamba2, dense, and mixtures of experts.",
        "350m, dense-350m, moe-1b, 1b, dense-1b, h-tiny",
    ),
}


def _family_help(family: str, words: str, variants: str) -> str:
    prompt = "The capital of France is" if family in ("gpt2", "falcon") else "What is the capital of France?"
    return f"""{words}

Variants for --model: {variants}.

\b
Examples:
  tinyserve ask {family} "{prompt}"
  tinyserve ask {family} --model {variants.split(", ")[-1]} "{prompt}" --max-tokens 20
"""


for _family, (_default, _words, _variants) in FAMILIES.items():
    _command = _family_command(_family, _default)
    ask_app.command(_family, help=_family_help(_family, _words, _variants), short_help=_words)(_command)
