"""Where the pieces of an answer are printed: at once, and on a terminal wrapped at spaces, what was thought dimmed.

Knows columns and a little Markdown; who answers, and what else is printed, is not its business.
"""

import os
import re
import sys
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Protocol

from tinyserve.progress import is_terminal

if TYPE_CHECKING:
    from tinyserve.cli._backends import Piece

_DIM, _PLAIN = "\x1b[2m", "\x1b[22m"
_FENCE = re.compile(r" {0,3}(```|~~~)")
_AS_IT_IS = re.compile(r" {4}|\t| {0,3}(```|~~~|\|)")  # how lines of code and of tables begin


class Line(Protocol):
    """What a terminal shows meanwhile."""

    def clear(self) -> None:
        """Remove it."""


class AnswerPrinter:
    """Prints the pieces of one answer as they come; `text` and `reasoning` are what there is so far.

    The text goes to stdout. What is thought before it is for who looks on: it goes to stderr, and only on a terminal.
    """

    def __init__(self, line: Line, is_silent: bool = False):
        """`is_silent`: nothing is printed, only gathered."""
        self.text = self.reasoning = ""
        self._line, self._is_silent, self._is_dimmed = line, is_silent, False
        can_go_back = os.environ.get("TERM") not in ("dumb", "unknown")
        self._shows_thinking = is_terminal(sys.stderr) and not is_silent
        self._text = _Lines(is_terminal(sys.stdout) and can_go_back)
        self._thoughts = _Lines(can_go_back)

    def write(self, piece: "Piece") -> None:
        """Print a piece; nothing is held back."""
        self._line.clear()
        self.reasoning += piece.reasoning
        if piece.reasoning and self._shows_thinking:
            begin = "" if self._is_dimmed else _DIM
            print(begin + self._thoughts.wrapped(piece.reasoning), end="", file=sys.stderr, flush=True)
            self._is_dimmed = True
        if piece.text:
            self.clear()
            self.text += piece.text
            if not self._is_silent:
                print(self._text.wrapped(piece.text), end="", flush=True)

    def clear(self) -> None:
        """Remove the line that a terminal shows meanwhile, and end what is dimmed."""
        self._line.clear()
        if self._is_dimmed:
            print(f"{_PLAIN}\n", file=sys.stderr, flush=True)
            self._is_dimmed = False


class _Lines:
    """Text as it goes to a terminal, wrapped at spaces.

    A word that does not fit is taken back and goes on in the next line, so that nothing waits for its end. Lines of
    code and of tables, and words that no line holds, are left to the terminal.
    """

    def __init__(self, wraps: bool) -> None:
        self._wraps = wraps
        self._written = ""  # the line, wherever it was wrapped
        self._fence: str | None = None  # what ends the block of code
        self._column = 0
        self._word: list[str] = []  # the last one, if it may be taken back
        self._is_wrapped = False  # the row began here, and no spaces stand before its first word

    def wrapped(self, piece: str) -> str:
        """The next piece, with what goes back and on where a word does not fit."""
        if not self._wraps:
            return piece
        columns = get_terminal_size().columns
        return "".join(self._advanced(character, columns) for character in piece)

    def _advanced(self, character: str, columns: int) -> str:
        """What is to be written for a character; the last column stays empty, where terminals differ."""
        if character == "\n":
            self._end_line()
            return character
        self._written += character
        if self._is_as_it_is():
            return character
        if character == " ":
            return self._after_space(columns)
        from rich.cells import get_character_cell_size

        self._is_wrapped = False
        self._column += get_character_cell_size(character)
        self._word.append(character)
        width = sum(map(get_character_cell_size, self._word))
        if self._column < columns or self._column == width:
            return character
        if self._column - width > columns:  # it is behind a long word that the terminal has broken
            return character
        self._column = width
        before = width - get_character_cell_size(character)
        back = f"\x1b[{before}D" if before else ""
        return f"{back}\x1b[K\n{''.join(self._word)}"

    def _after_space(self, columns: int) -> str:
        self._word.clear()
        if self._is_wrapped:
            return ""
        if self._column >= columns:  # the terminal has broken a long word
            self._column %= columns
            if not self._column:
                return self._begin_row()
        if self._column + 1 >= columns:
            return self._begin_row()
        self._column += 1
        return " "

    def _begin_row(self) -> str:
        self._column, self._is_wrapped = 0, True
        return "\n"

    def _is_as_it_is(self) -> bool:
        return self._fence is not None or _AS_IT_IS.match(self._written) is not None

    def _end_line(self) -> None:
        if match := _FENCE.match(self._written):
            if self._fence is None:
                self._fence = match[1]
            elif self._fence == match[1]:
                self._fence = None
        self._written, self._column, self._is_wrapped = "", 0, False
        self._word.clear()
