"""The command line: parses, calls, prints. One file a command; heavy imports live inside the functions.

Every error becomes one sentence on stderr and an exit code; TINYSERVE_DEBUG=1 lets unforeseen ones through.
"""

import os
import sys

import typer

from tinyserve import __version__
from tinyserve.cli.ask import ask_app
from tinyserve.cli.bench import bench
from tinyserve.cli.chat import chat
from tinyserve.cli.compare import compare
from tinyserve.cli.inspect_config import inspect_config
from tinyserve.cli.list_ import list_models
from tinyserve.cli.pull import pull
from tinyserve.cli.rm import rm
from tinyserve.cli.warmup import warmup
from tinyserve.errors import TinyserveError

INTERRUPTED, PIPE_CLOSED = 130, 141  # as a shell reports death by SIGINT and SIGPIPE

app = typer.Typer(
    name="tinyserve",
    help="Run GPT-2, Llama, Mistral and SmolLM2 on a CPU, from Hugging Face checkpoints and GGUF files.",
    epilog="Start with:  tinyserve ask 'What is the capital of France?'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tinyserve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None: ...


app.add_typer(ask_app, name="ask")
app.command("chat")(chat)
app.command("bench")(bench)
app.command("inspect-config")(inspect_config)
app.command("compare")(compare)
app.command("pull")(pull)
app.command("list")(list_models)
app.command("rm")(rm)
app.command("warmup")(warmup)


def main() -> None:
    """Run a command line; the process ends here, with 0, 1 (our fault), 2 (the user's), 130 or 141."""
    try:
        app(standalone_mode=True)
    except TinyserveError as error:
        _end(f"tinyserve: {error}", error.exit_code)
    except KeyboardInterrupt:
        _end("", INTERRUPTED)
    except BrokenPipeError:
        _end("", PIPE_CLOSED)
    except Exception as error:
        if os.environ.get("TINYSERVE_DEBUG"):
            raise
        _end(
            f"tinyserve: internal error ({type(error).__name__}: {error}). This is a bug: please report it with the "
            f"traceback that TINYSERVE_DEBUG=1 shows.",
            1,
        )


def _end(message: str, code: int) -> None:
    if message:
        print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(code)
