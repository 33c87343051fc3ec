"""The command line: parses, calls, prints. One file a command; heavy imports live inside the functions.

Every error becomes one sentence on stderr and an exit code; TINYSERVE_DEBUG=1 lets unforeseen ones through.
"""

import _thread
import errno
import gc
import io
import os
import signal
import sys
import threading
import warnings
from contextlib import suppress
from typing import Any

import typer

from tinyserve import __version__
from tinyserve.cli.ask import ANY, PROGRAMS, ask_app, family_program
from tinyserve.cli.batch import batch
from tinyserve.cli.bench import bench
from tinyserve.cli.chat import chat
from tinyserve.cli.compare import compare
from tinyserve.cli.completion import VARIABLE, answer, completion
from tinyserve.cli.eval_ import evaluate
from tinyserve.cli.explain import explain
from tinyserve.cli.inspect_config import inspect_config
from tinyserve.cli.list_ import list_models
from tinyserve.cli.pull import pull
from tinyserve.cli.quantize import quantize
from tinyserve.cli.rm import rm
from tinyserve.cli.serve import serve
from tinyserve.cli.trace import trace
from tinyserve.cli.warmup import warmup
from tinyserve.errors import TinyserveError, UserError

INTERRUPTED, PIPE_CLOSED = 130, 141  # as a shell reports death by SIGINT and SIGPIPE
NO_MEMORY = "tinyserve: there is not enough memory: take a smaller model, or --dtype int4."
_UsageError: Any = typer.BadParameter.__mro__[1]  # from click, which newer versions of Typer bring along


class Commands(typer.core.TyperGroup):
    """Lists the commands in the order in which a new user needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in _ORDER if name in self.commands]


_ORDER = (
    "ask",
    "chat",
    "serve",
    "batch",
    "explain",
    "bench",
    "trace",
    "eval",
    "inspect-config",
    "compare",
    "pull",
    "list",
    "rm",
    "warmup",
    "quantize",
    "completion",
)

app = typer.Typer(
    name="tinyserve",
    cls=Commands,
    help="""Run GPT-2, Falcon, Llama, Mistral, SmolLM2, Qwen and Granite on a CPU, from Hugging Face checkpoints or
GGUF.

\b
Start with:
  tinyserve ask "What is the capital of France?"
  tinyserve chat
  tinyserve list --presets
""",
    epilog="tinyserve COMMAND --help explains a command. Errors end with code 2 where the command line, a file or a "
    "prompt is wrong, and with 1 otherwise.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help keeps examples in their lines, and starts sooner
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
app.command("serve")(serve)
app.command("batch")(batch)
app.command("explain")(explain)
app.command("bench")(bench)
app.command("trace")(trace)
app.command("eval")(evaluate)
app.command("inspect-config")(inspect_config)
app.command("compare")(compare)
app.command("pull")(pull)
app.command("list")(list_models)
app.command("rm")(rm)
app.command("warmup")(warmup)
app.command("quantize")(quantize)
app.command("completion")(completion)


def main(called: str = "tinyserve") -> None:
    """Run `tinyserve` or a family's program; the process ends here with 0, 1 (ours), 2 (the user's), 130 or 141."""
    gc.set_threshold(100_000)  # imports and vocabularies make many objects and no garbage: looking for it takes 0.1 s
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of an overflow: what comes of it is said in a sentence
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    try:
        _end("", run(sys.argv[1:], called))
    except TinyserveError as error:
        _end(f"tinyserve: {error}", error.exit_code)
    except KeyboardInterrupt:
        _end("", INTERRUPTED)
    except BrokenPipeError:
        _end("", PIPE_CLOSED)
    except MemoryError:
        _end(NO_MEMORY, 1)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            _end(NO_MEMORY, 1)
        _end(f"tinyserve: {error.filename or _what_failed(error)}: {error.strerror or error}.", 1)
    except Exception as error:
        if _comes_of_interruption(error):
            _end("", INTERRUPTED)
        if os.environ.get("TINYSERVE_DEBUG"):
            raise
        _end(
            f"tinyserve: internal error ({type(error).__name__}: {error}). This is a bug: please report it with the "
            f"traceback that TINYSERVE_DEBUG=1 shows.",
            1,
        )


def deliver_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """A `sys.unraisablehook`: a Ctrl-C that came within a finalizer or a callback comes again a moment later."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    timer = threading.Timer(0.05, _interrupt)  # not at once: that would be within this very finalizer
    timer.daemon = True
    timer.start()


def _interrupt() -> None:
    thread = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and thread is not None:
        signal.pthread_kill(thread, signal.SIGINT)  # which wakes it where it waits
    else:
        _thread.interrupt_main()


def _comes_of_interruption(error: BaseException | None) -> bool:
    """Whether a Ctrl-C is behind an error: who was interrupted may have made another one of it."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _what_failed(error: OSError) -> str:
    """What an error is about that names no file: a write, to standard output or elsewhere, or anything."""
    writing = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return "what was to be written cannot be" if error.errno in writing else "the system refuses"


def run(arguments: list[str], called: str = "tinyserve") -> int:
    """Parse and call; returns the exit code. Raises UserError for a command line that cannot be parsed.

    Typer's own entry would turn a closed pipe into exit code 1 and a usage error into four lines.
    """
    try:
        command = typer.main.get_command(family_program(called) if called in PROGRAMS else app)
        if VARIABLE in os.environ:
            return answer(command)
        if not arguments and called not in PROGRAMS:
            arguments = ["--help"]
        with command.make_context(called, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:  # a question answered by Ctrl-C or Ctrl-D
        print(file=sys.stderr)
        return INTERRUPTED
    except _UsageError as error:
        words = " ".join(error.format_message().split()).rstrip(".")
        path = error.ctx.command_path if error.ctx else called
        raise UserError(f"{words}; see {path.removesuffix(' ' + ANY)} --help.") from None
    return 0


def _end(message: str, code: int) -> None:
    jit = sys.modules.get("tinyserve.tensor._jit")
    if code == INTERRUPTED and jit is not None and getattr(jit, "is_compiling", bool)():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):
                stream.flush()
        os._exit(code)  # one call of LLVM may take seconds, and nothing stops it
    if message:
        print(message, file=sys.stderr)
    if sys.stdout is None:  # closed before the process began (>&-): what was printed went nowhere
        raise SystemExit(code)
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        closed = isinstance(error, BrokenPipeError)
        if not closed and not message:
            print(f"tinyserve: standard output: {error.strerror}.", file=sys.stderr)
        code = code or (PIPE_CLOSED if closed else 1)
    raise SystemExit(code)
