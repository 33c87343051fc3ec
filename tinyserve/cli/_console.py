"""Where tables are printed: rich's console, ending as every other command does when nobody reads on.

Knows standard output; main() in __init__.py decides what a closed pipe means.
"""

from typing import NoReturn

from rich.console import Console


class Output(Console):
    """Standard output. A closed pipe stays a BrokenPipeError, where rich would exit with 1."""

    def on_broken_pipe(self) -> NoReturn:
        """Called by rich while it handles the BrokenPipeError."""
        raise
