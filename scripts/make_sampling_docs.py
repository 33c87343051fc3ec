"""Write the table of sampling parameters into docs/python-api.md, between the comments that name it.

    python scripts/make_sampling_docs.py            # writes docs/python-api.md
    python scripts/make_sampling_docs.py --check    # exits with 1 when docs/python-api.md is stale

It is the table of tinyserve/sampling_params.py.
"""

import re
from pathlib import Path

from make_cli_docs import escape, keep_current

from tinyserve import SamplingParams
from tinyserve.sampling_params import Param

PAGE = Path(__file__).parent.parent / "docs" / "python-api.md"
GENERATED = re.compile(r"(<!-- SamplingParams -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = "| Parameter | Default | Must be | Meaning | HTTP | `ask` |\n|---|---|---|---|---|---|\n"


def page(text: str) -> str:
    """The page with the table as it is today."""
    table = HEAD + "".join(f"{line(row)}\n" for row in SamplingParams.rows.values())
    return GENERATED.sub(lambda part: part[1] + table + part[2], text)


def line(row: Param) -> str:
    """One line of the table."""
    flags = ", ".join(f"`{flag}`" for flag in row.cli.split())
    cells = f"`{row.name}`", f"`{row.default!r}`", row.rule[1], row.help, "yes" if row.http is not None else "", flags
    return f"| {' | '.join(map(escape, cells))} |"


def main() -> int:
    return keep_current(PAGE, page(PAGE.read_text(encoding="utf-8")), Path(__file__).name, __doc__.splitlines()[0])


if __name__ == "__main__":
    raise SystemExit(main())
