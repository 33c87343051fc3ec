"""`tinyserve rm`: deletes a downloaded model. It knows only `hub.cached` and `hub.remove`."""

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

    All its revisions and unfinished downloads go with it.

    \b
    Examples:
      tinyserve rm gpt2
      tinyserve rm owner/name --yes
    """
    from tinyserve.checkpoints.hub import cached, remove
    from tinyserve.errors import UserError
    from tinyserve.progress import size

    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"Removing {model} needs a yes, and there is no terminal to ask: add --yes.")
        nbytes = sum(found.bytes for found in cached() if model in (found.name, found.repo))
        known = f" ({size(nbytes)})" if nbytes else ""
        if not typer.confirm(f"Delete {model}{known} from this disk?", err=True):
            print("Nothing was deleted.", file=sys.stderr)
            return
    print(f"Removed {model}: {size(remove(model))} freed.", file=sys.stderr)
