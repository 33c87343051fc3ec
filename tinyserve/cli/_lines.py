"""What is typed into `chat`: a message at a time, and those of earlier sessions at the arrow keys.

Knows terminals and the file of the history; what a message means is decided in chat.py.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tinyserve.errors import UserError

if TYPE_CHECKING:
    from prompt_toolkit.history import History

PROMPT = "> "
KEPT_MESSAGES, KEPT_BYTES = 1000, 1_000_000  # of the history, when a session begins


def is_interactive() -> bool:
    """Whether a person types, and sees what is typed."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def reader(commands: Iterable[str]) -> Callable[[], str]:
    """A function that reads one message, or raises EOFError, KeyboardInterrupt, or UserError for what is no text.

    On a terminal lines that are pasted are one message, Alt-Enter begins another line, Tab completes `commands`, and
    a message that Ctrl-C drops is empty. Elsewhere each line is a message.
    """
    return _prompter(list(commands)) if is_interactive() else _read_line


def _read_line() -> str:
    if sys.stdin is None:  # closed before the process began
        raise EOFError
    try:
        return input()
    except UnicodeDecodeError:
        raise UserError("Standard input is not UTF-8 text: convert it first.") from None


def _prompter(commands: Sequence[str]) -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def begin_another_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    # Where the cursor stands matters to menus only, and a terminal that does not tell would be waited for.
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    session: PromptSession[str] = PromptSession(
        history=history(history_file()),
        completer=WordCompleter(list(commands), sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
        key_bindings=keys,
        enable_suspend=True,
    )

    def read() -> str:
        try:
            return session.prompt(PROMPT)
        except KeyboardInterrupt:
            if session.default_buffer.text:
                return ""  # it has dropped a message that was begun
            raise

    return read


def history_file() -> Path:
    """Where what was typed is kept: $XDG_STATE_HOME/tinyserve, or the system's folder of that kind."""
    from platformdirs import user_state_path

    return user_state_path("tinyserve", appauthor=False) / "chat-history"


def history(file: Path) -> "History":
    """The messages of earlier sessions, for this user's eyes only; without them where the file cannot be used."""
    from prompt_toolkit.history import FileHistory

    class Kept(FileHistory):
        def load_history_strings(self) -> Iterable[str]:
            try:
                return list(super().load_history_strings())
            except OSError:
                return []

        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeError):
                super().store_string(string)

    kept = Kept(str(file))
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(0o600)
        file.chmod(0o600)
        _shorten(kept, file)
    return kept


def _shorten(kept: "History", file: Path) -> None:
    """Drop the oldest messages of a file with too many or too much in it."""
    messages = list(kept.load_history_strings())  # the newest first
    if len(messages) <= KEPT_MESSAGES and file.stat().st_size <= KEPT_BYTES:
        return
    room, newest = KEPT_BYTES // 2, []
    for message in messages[: KEPT_MESSAGES // 2]:
        room -= len(message.encode()) + message.count("\n") + 100  # a sign before each of its lines, and the time
        if room < 0:
            break
        newest.append(message)
    shorter = file.with_name(f"{file.name}.{os.getpid()}")
    shorter.touch(0o600)
    for message in reversed(newest):
        type(kept)(str(shorter)).store_string(message)  # type: ignore[call-arg]
    shorter.replace(file)
