"""The command line of scripts that do the same for each of a list of names."""

import argparse
from collections.abc import Iterable


def names(description: str, kind: str, known: Iterable[str]) -> list[str]:
    """The names on the command line, or all that are known; ends the script for any other, and for --help."""
    known = list(known)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{kind}, of {', '.join(known)}; all by default")
    given: list[str] = parser.parse_args().names
    if unknown := [name for name in given if name not in known]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return given or known
