"""Options that several commands share, with one help text each. Knows only Typer, and how shells complete them."""

from typing import Annotated

import typer

from tinyserve.cli import _names

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A preset, a repo id, a folder or a .gguf file.", autocompletion=_names.models
    ),
]
# What is None is not said: the model's generation_config.json decides, if it asks to sample (cli/_sampling.py).
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "--temp",
        metavar="NUMBER",
        help="0 is greedy; higher is more random.  [default: the model's own, else 0]",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        "-k",
        metavar="NUMBER",
        help="Draw from this many most likely tokens; 0 from all.  [default: the model's own, else 0]",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        "-p",
        metavar="NUMBER",
        help="Draw from the likeliest tokens of this total probability.  [default: the model's own, else 1]",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        help="Draw from tokens at least this probable relative to the best.  [default: the model's own, else 0]",
    ),
]
TypicalP = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        help="Draw from the tokens of the most usual surprise, of this total probability.  "
        "[default: the model's own, else 1]",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        help="Above 1, what has been said is less likely.  [default: the model's own, else 1]",
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
Seed = Annotated[int | None, typer.Option(metavar="NUMBER", help="Makes a random answer repeatable.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message, for models that chat.")]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="float32, bfloat16, int8 (w8a16; what auto means), w8a8, int4 (w4a16) or w4a8.",
        autocompletion=_names.dtypes,
    ),
]
Threads = Annotated[
    int | None, typer.Option(metavar="NUMBER", help="Threads; by default the cores this process may use.")
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
        help="The key that the server asks for.  [default: TINYSERVE_API_KEY in the environment]",
    ),
]
