"""`tinyserve chat`: a conversation in the terminal.

Knows the commands; what is typed is read in _lines.py, what was said is kept in _conversation.py.
"""

import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from tinyserve.checkpoints import presets
from tinyserve.cli import _lines, _names
from tinyserve.cli._backends import find_backend
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
from tinyserve.errors import UserError, did_you_mean

DEFAULT_MAX_TOKENS = 512
COMMANDS = {
    "/help": "lists commands and keys",
    "/reset": "forgets the conversation",
    "/quit": "leaves, as /exit and Ctrl-D do",
}
KEYS = {
    "Ctrl-C": "stops an answer, or drops what is typed",
    "Alt-Enter": "begins another line of a message; lines that are pasted are one message",
    "Up, Down": "bring back what was typed, in earlier sessions too",
    "Tab": "completes a command",
}
BANNER = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."
_COMMAND = re.compile(r"/\w*(?=\s|$)")  # and not /etc/hosts, nor // a comment


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

    It remembers the conversation; where the context is full the oldest turns are dropped, which is said. Inside,
    /help lists the commands, /reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer. Lines
    that are pasted are one message. The arrow keys bring back what was typed, in earlier sessions too.

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
    from tinyserve.cli._conversation import Conversation

    print(f"{backend.introduction} {BANNER}", file=sys.stderr)
    conversation = Conversation(backend, sampling, DEFAULT_MAX_TOKENS, system, verbose)
    for message in _messages():
        command = _command(message)
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            conversation.reset()
            print("The conversation is forgotten.", file=sys.stderr)
        elif command == "/help":
            print("\n".join(f"{name:<10} {words}" for name, words in {**COMMANDS, **KEYS}.items()), file=sys.stderr)
        elif command:
            nearest = did_you_mean(command, [*COMMANDS, "/exit"])
            print(f"There is no {command}.{nearest} /help lists what there is.", file=sys.stderr)
        elif message:
            conversation.answer(message)


def _messages() -> Iterator[str]:
    """What is typed, until its end."""
    read, interrupted = _lines.reader(COMMANDS), False
    while True:
        try:
            message = read().strip()
        except EOFError:
            if not _lines.is_interactive():
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if interrupted or not _lines.is_interactive():
                raise
            interrupted = True
            print("(Ctrl-C once more, Ctrl-D or /quit leaves)", file=sys.stderr)
            continue
        interrupted = False
        yield message


def _command(message: str) -> str:
    """The command that a message is, or nothing; one of several lines is none, whatever it begins with."""
    if message.lower() in ("exit", "quit"):
        return "/quit"
    found = _COMMAND.match(message) if "\n" not in message else None
    return found[0].lower() if found else ""
