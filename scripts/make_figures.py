"""Draw docs/images/: architectures side by side, each block of docs/architectures.md, and the engine, as SVG.

    python scripts/make_figures.py            # writes the pictures
    python scripts/make_figures.py --check    # exits with 1 when one of them is stale

Blocks are drawn from the page's own figures in letters, and their sizes from the presets' configs. A picture's name is
that of the image that stands before its letters.
"""

import re
from pathlib import Path
from typing import NamedTuple

from figures import block, engine, families
from make_cli_docs import keep_current

from tinyserve.models.config import preset_config

DOCS = Path(__file__).parent.parent / "docs"
IMAGES = DOCS / "images"
FIGURE = re.compile(
    r"\(images/(?P<file>block-[\w.-]+\.svg)\)\n\n"
    r"<!-- (?P<half>second half of a )?block of (?P<model>\S+), layer (?P<layer>\d+) -->\n"
    r"```text\n(?P<letters>.*?)```",
    re.DOTALL,
)


class Figure(NamedTuple):
    """A block of the page in letters."""

    file: str
    model: str
    layer: int
    letters: str
    is_half: bool

    def svg(self) -> str:
        return block.block(self.model, self.letters, preset_config(self.model), self.layer, self.is_half)


def figures() -> list[Figure]:
    """The blocks that the page has in letters."""
    text = (DOCS / "architectures.md").read_text(encoding="utf-8")
    return [
        Figure(one["file"], one["model"], int(one["layer"]), one["letters"], bool(one["half"]))
        for one in FIGURE.finditer(text)
    ]


def pictures() -> dict[str, str]:
    """Every picture, by the name of its file."""
    blocks = figures()
    letters = {one.model: one.letters for one in blocks}
    return {
        "architectures.svg": families.families(letters),
        "engine.svg": engine.engine(),
        **{one.file: one.svg() for one in blocks},
    }


def main() -> int:
    wanted = pictures()
    return max(
        keep_current(IMAGES / name, svg, Path(__file__).name, __doc__.splitlines()[0]) for name, svg in wanted.items()
    )


if __name__ == "__main__":
    raise SystemExit(main())
