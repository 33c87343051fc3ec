"""`tinyserve ask`: one question, one answer. A subcommand an architecture, and any other model in the same place.

Knows how a command line names a model; answering is in _answer.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyserve import presets
from tinyserve.cli._answer import DEFAULT_MAX_TOKENS, Question, answer, read_prompt
from tinyserve.errors import UserError

ANY = "any-model"  # the hidden subcommand behind every other name


class AskGroup(typer.core.TyperGroup):
    """Sends a first word that is no subcommand, and options before it, to the hidden one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and sys.stdin is not None and sys.stdin.isatty():
            args = ["--help"]
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = [ANY, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Show the options that every subcommand has, then the subcommands."""
        self.commands[ANY].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


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

\b
Examples:
  tinyserve ask "What is the capital of France?"
  tinyserve ask gpt2 "The capital of France is" --max-tokens 20
  tinyserve ask ./my-model.gguf "Hello" --temp 0.7 --seed 1
  cat letter.txt | tinyserve ask smollm2-135m --system "Summarise in one sentence."
""",
    epilog="The families come in sizes: tinyserve ask llama --help.",
)

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="The text to answer or continue; standard input when left out, or '-'."),
]
Temperature = Annotated[float, typer.Option("--temperature", "--temp", "-t", help="0 is greedy; higher is more random.")]
MaxTokens = Annotated[int, typer.Option(help="At most this many new tokens.")]
TopK = Annotated[int, typer.Option("--top-k", "-k", help="Draw from this many most likely tokens; 0 from all.")]
TopP = Annotated[
    float, typer.Option("--top-p", "-p", help="Draw from the most likely tokens of this total probability.")
]
MinP = Annotated[float, typer.Option(help="Draw from tokens at least this probable relative to the best.")]
Seed = Annotated[int | None, typer.Option(help="Makes a random answer repeatable.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End the answer before this text; can be given several times."),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message, for models that chat.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text: no chat template.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with text, token ids and statistics.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No statistics.")]


def _ask(model: str, prompt: str | None, options: dict[str, Any]) -> None:
    """Build the question and have it answered; `options` are the flags by name."""
    from tinyserve.sampling_params import SamplingParams

    sampling = ("temperature", "max_tokens", "top_k", "top_p", "min_p", "seed")
    params = SamplingParams(stop=options["stop"] or (), **{name: options[name] for name in sampling})
    rest = {name: options[name] for name in ("system", "raw", "dtype", "threads", "quiet")}
    answer(Question(model, read_prompt(prompt, model), params, json=options["json_"], **rest))


def _family_command(family: str, default: str) -> Callable[..., None]:
    def command(
        prompt: Prompt = None,
        model: Annotated[str, typer.Option("--model", "-m", help="The variant, or a preset's name.")] = default,
        temperature: Temperature = 0.0,
        max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
        top_k: TopK = 0,
        top_p: TopP = 1.0,
        min_p: MinP = 0.0,
        seed: Seed = None,
        stop: Stop = None,
        system: System = None,
        raw: Raw = False,
        dtype: Dtype = "auto",
        threads: Threads = None,
        json_: Json = False,
        quiet: Quiet = False,
    ) -> None:
        options = locals().copy()
        _ask(_variant(family, model), prompt, options)

    return command


def _variant(family: str, name: str) -> str:
    """The preset that a family's --model means; raises UserError with the variants."""
    variants = presets.variants(family)
    if name in variants:
        return variants[name]
    if name in variants.values():
        return name
    raise UserError(f"{family} has no variant {name!r}; there are {', '.join(variants)}.")


@ask_app.command(ANY, hidden=True)
def any_model(
    model: Annotated[str, typer.Argument(help="A preset, a repo id, a folder or a .gguf file; or the prompt itself.")],
    prompt: Prompt = None,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    system: System = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask any model: a preset, a Hugging Face repo id, a folder of safetensors, a .gguf file."""
    options = locals().copy()
    if prompt is None and not names_a_model(model):
        model, prompt = presets.DEFAULT, model
    if model in FAMILIES:
        model = _variant(model, FAMILIES[model][0])
    _ask(model, prompt, options)


def names_a_model(word: str) -> bool:
    """Whether a word by itself is a model, not a prompt: a preset, a family, something on disk, or owner/name."""
    if word in FAMILIES or presets.find(word.partition("@")[0]) or word.endswith(".gguf"):
        return True
    if any(character.isspace() for character in word):
        return False
    return word.count("/") >= 1 or Path(word).expanduser().exists()


# The default variant of each family, and what its help says.
FAMILIES = {
    "gpt2": ("small", "GPT-2 (OpenAI, 2019): continues text. Variants small, medium, large, xl."),
    "llama": ("3.2-1b", "Llama (Meta): variants 7b and 13b (Llama 2), 3.1-8b, 3.2-1b, 3.2-3b, tinyllama."),
    "mistral": ("7b", "Mistral 7B Instruct."),
    "smollm2": ("135m", "SmolLM2 Instruct (Hugging Face): small and open. Variants 135m, 360m, 1.7b."),
    "falcon": ("7b", "Falcon (TII): variants 7b, 7b-instruct, 40b, rw-1b. Not built yet."),
    "granite": ("350m", "Granite (IBM): variants 350m and 1b (hybrids) and more. Not built yet."),
}

for _family, (_default, _help) in FAMILIES.items():
    ask_app.command(_family, help=_help)(_family_command(_family, _default))
