"""`tinyserve chat`: a conversation in the terminal.

Knows the loop of asking and answering; what answers is in _backends.py.
"""

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any

import typer

from tinyserve.checkpoints import presets
from tinyserve.cli import _names
from tinyserve.cli._backends import Backend, find_backend
from tinyserve.cli._options import (
    ApiKey,
    ChatTemplateFile,
    Dtype,
    ReasoningEffort,
    Server,
    System,
    Threads,
    Verbose,
    sampling_options,
    with_options,
)
from tinyserve.cli._sampling import given
from tinyserve.errors import TinyserveError, UserError

DEFAULT_MAX_TOKENS = 512
HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer or drops a line."


@with_options(
    sampling=sampling_options(
        f"At most this many tokens an answer.  [default: the model's own, else {DEFAULT_MAX_TOKENS}]",
        leave_out=["stop"],
    )
)
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"A preset, a repo id, a folder or a .gguf file.  [default: {presets.DEFAULT}]",
            autocompletion=_names.models,
        ),
    ] = None,
    system: System = None,
    *,
    sampling: dict[str, Any],
    chat_template: ChatTemplateFile = None,
    reasoning_effort: ReasoningEffort = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    server: Server = None,
    api_key: ApiKey = None,
    verbose: Verbose = False,
) -> None:
    """Talk to a model in the terminal.

    It remembers the conversation until its context is full. Inside, /reset forgets the conversation, /exit or
    Ctrl-D leaves, Ctrl-C stops an answer.

    \b
    Examples:
      tinyserve chat
      tinyserve chat smollm2-360m --system "You are a pirate." --temp 0.7
      tinyserve chat --server http://127.0.0.1:8000
    """
    given(**sampling)
    backend = find_backend(
        model,
        dtype=dtype,
        threads=threads,
        chat_template=chat_template,
        server=server,
        api_key=api_key,
        reasoning_effort=reasoning_effort,
    )
    if not backend.chats:
        command = f"tinyserve ask {model or backend.name}" + (f" --server {server}" if server else "")
        raise UserError(f"{backend.name} has no chat template: let it continue a text with `{command}`.")
    print(f"{backend.introduction} {HELP}", file=sys.stderr)
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    if prompt:
        with suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history for input()
    interrupted = False
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if interrupted or not prompt:
                raise
            interrupted = True
            print("\n(Ctrl-C once more, Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        except UnicodeDecodeError:
            raise UserError("Standard input is not UTF-8 text: convert it first.") from None
        interrupted = False
        command = line.split()[0].lower() if line else ""
        if command in ("/exit", "/quit") or line.lower() in ("exit", "quit"):
            return
        if command == "/reset":
            messages = list(beginning)
            print("The conversation is forgotten.", file=sys.stderr)
        elif line.startswith("/"):
            print(f"There is no {command}: {HELP}", file=sys.stderr)
        elif line:
            messages += _turn(backend, messages, line, sampling, verbose)


def _turn(
    backend: Backend, messages: list[dict[str, str]], line: str, sampling: Mapping[str, Any], verbose: bool
) -> list[dict[str, str]]:
    """Ask and answer once; the two messages that the conversation has more, or none where there is no answer."""
    from tinyserve.cli._answer import AnswerPrinter, check_text

    question = {"role": "user", "content": line}
    printer = AnswerPrinter(backend.line)
    try:
        check_text(line)
        completion = backend.complete([*messages, question], sampling, DEFAULT_MAX_TOKENS)
        if verbose:
            backend.line.clear()
            print(completion.explain("the conversation so far"), file=sys.stderr)
        printer.print(completion)
    except KeyboardInterrupt:
        backend.line.clear()
        print(" [stopped]", end="", file=sys.stderr)
    except TinyserveError as error:
        backend.line.clear()
        printer.end_line()
        way_out = " (/reset begins anew)" if isinstance(error, UserError) else ""
        print(f"tinyserve: {error}{way_out}", file=sys.stderr)
        return []
    print(flush=True)
    return [question, {"role": "assistant", "content": printer.text}]
