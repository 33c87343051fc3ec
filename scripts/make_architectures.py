"""Write what commands print into docs/architectures.md, between the comments that name them.

    python scripts/make_architectures.py            # writes docs/architectures.md
    python scripts/make_architectures.py --check    # exits with 1 when docs/architectures.md is stale

From <!-- tinyserve compare gpt2 --markdown --> to <!-- end --> stands what that command prints; from
<!-- tinyserve inspect-config gpt2 : Layers --> only the paragraph that begins with this word. Tables in Markdown stand
as they are, all else in a block. The presets' own configs are taken, not downloaded ones.
"""

import os
import re
from pathlib import Path

from make_cli_docs import keep_current
from typer.testing import CliRunner

from tinyserve import cli

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
GENERATED = re.compile(r"(<!-- tinyserve (.+?)(?: : (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """The page with every generated part as its command prints it today."""
    return GENERATED.sub(lambda part: part[1] + generated(part[2], part[3]) + part[4], text)


def generated(command: str, beginning: str | None) -> str:
    """What `tinyserve COMMAND` prints, as Markdown; raises SystemExit where it fails or lacks the paragraph."""
    variables = {"COLUMNS": "80", "TERM": "dumb", "FORCE_COLOR": None, "HF_HUB_CACHE": os.devnull}
    result = CliRunner().invoke(cli.app, command.split(), env=variables)
    if result.exit_code:
        raise SystemExit(f"tinyserve {command}: {result.exception}")
    text = "\n".join(line.rstrip() for line in result.stdout.splitlines()).strip("\n")
    if beginning is not None:
        paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.startswith(beginning)]
        if len(paragraphs) != 1:
            raise SystemExit(f"tinyserve {command}: {len(paragraphs)} paragraphs begin with {beginning!r}.")
        (text,) = paragraphs
    return f"\n{text}\n\n" if "--markdown" in command else f"```text\n{text}\n```\n"


def main() -> int:
    wanted = page(PAGE.read_text(encoding="utf-8"))
    return keep_current(PAGE, wanted, Path(__file__).name, __doc__.splitlines()[0])


if __name__ == "__main__":
    raise SystemExit(main())
