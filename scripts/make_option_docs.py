"""Write the tables of engine options and sampling parameters into docs/python-api.md, between comments that name them.

    python scripts/make_option_docs.py            # writes docs/python-api.md
    python scripts/make_option_docs.py --check    # exits with 1 when docs/python-api.md is stale

They are the tables of tinyserve/engine_options.py and tinyserve/sampling_params.py.
"""

import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from make_cli_docs import escape, keep_current

from tinyserve import SamplingParams
from tinyserve.engine_options import EngineOptions
from tinyserve.sampling_params import Param

PAGE = Path(__file__).parent.parent / "docs" / "python-api.md"


def page(text: str) -> str:
    """The page with the tables as they are today."""
    options = table(("Option", "Default", "Meaning", "`serve`"), map(option, fields(EngineOptions)))
    rows = SamplingParams.rows.values()
    params = table(("Parameter", "Default", "Must be", "Meaning", "HTTP", "`ask`"), map(parameter, rows))
    return within(within(text, "EngineOptions", options), "SamplingParams", params)


def within(text: str, name: str, lines: str) -> str:
    """The text with these lines between the comments of this name."""
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not place.search(text):
        raise SystemExit(f"{PAGE} has no comment <!-- {name} -->.")
    return place.sub(lambda part: part[1] + lines + part[2], text)


def table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [heads, ("---",) * len(heads), *(map(escape, row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- |", "|---|").replace(" --- |", "---|")


def option(row: Field[Any]) -> tuple[str, ...]:
    """One line of the engine's."""
    flag, help = row.metadata["flag"], row.metadata["help"]
    shown = f"`{flag.name}`" + (f" ({flag.metavar})" if flag.unit != 1 else "") if flag else ""
    return f"`{row.name}`", f"`{row.default!r}`", help[0].upper() + help[1:], shown


def parameter(row: Param) -> tuple[str, ...]:
    """One line of those of a request."""
    flags = ", ".join(f"`{flag}`" for flag in row.cli.split())
    return f"`{row.name}`", f"`{row.default!r}`", row.rule[1], row.help, "yes" if row.http is not None else "", flags


def main() -> int:
    return keep_current(PAGE, page(PAGE.read_text(encoding="utf-8")), Path(__file__).name, __doc__.splitlines()[0])


if __name__ == "__main__":
    raise SystemExit(main())
