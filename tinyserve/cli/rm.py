"""`tinyserve rm`: deletes a downloaded model. It knows only the hub's plan for that."""

import sys
from typing import Annotated

import typer

from tinyserve.cli import _names


def rm(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name, as `tinyserve list` shows it.",
            show_default=False,
            autocompletion=_names.downloads,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a downloaded model.

    Of the Hub's cache, which other programs use too, goes what tinyserve loads of one revision, and what was left of
    unfinished downloads. Other revisions, other files, and what several of them share stay.

    \b
    Examples:
      tinyserve rm gpt2
      tinyserve rm owner/name --yes
      tinyserve rm owner/name@revision
    """
    from tinyserve.checkpoints.hub import planned_removal
    from tinyserve.errors import UserError
    from tinyserve.progress import size

    removal = planned_removal(model)  # before anything is asked
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"Removing {model} needs a yes, and there is no terminal to ask: add --yes.")
        if not typer.confirm(f"Delete {model} ({size(removal.bytes)}) from this disk?", err=True):
            print("Nothing was deleted.", file=sys.stderr)
            return
    freed = removal.execute()
    shared = removal.bytes - freed
    stays = f"; {size(shared)} stay, which others in the cache share" if shared > 0 else ""
    print(f"Removed {model}: {size(freed)} freed{stays}.", file=sys.stderr)
