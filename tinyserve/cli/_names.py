"""Names that a shell completes: models, downloads, dtypes. Each function takes the beginning of a word.

Knows where names come from; it opens no model and no network.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.gguf_parts import first_parts
from tinyserve.models.dtypes import SHOWN

_PLAIN = re.compile(r"[\w.+-]+")  # what no shell has to quote


def models(incomplete: str) -> list[str]:
    """Presets, and the GGUF files in this folder. Of a path there is none: shells complete paths themselves."""
    here = first_parts(path.name for path in Path().glob("*.gguf") if _PLAIN.fullmatch(path.name))
    return going_on(incomplete, [*presets.names(), *here])


def downloads(incomplete: str) -> list[str]:
    """The models that `tinyserve rm` can delete."""
    from tinyserve.checkpoints.hub import cached

    return going_on(incomplete, [model.name for model in cached()])


def dtypes(incomplete: str) -> list[str]:
    """What --dtype takes."""
    return going_on(incomplete, SHOWN)


def going_on(incomplete: str, names: Iterable[str]) -> list[str]:
    """The names that begin so, each once."""
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
