"""The models tinyserve knows by name: a JSON file each, with repository, revision and upstream's config.

Knows no network: what a preset's file says is what can be said offline, and the downloaded config.json wins. A few
have no repository: they are in `zoo/`, with their weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tinyserve.errors import UnknownModelError

DEFAULT = "smollm2-135m"


@dataclass(frozen=True)
class Preset:
    """A named model; `unverified` lists the keys, its own or its config's, that no copy has confirmed.

    `folder` is where a model of the zoo is; all others have a `repo` and a `revision`.
    """

    name: str
    family: str  # the subcommand of `tinyserve ask`
    variant: str
    gated: bool  # the Hub asks for a token and an accepted licence
    chat: bool  # tuned to follow instructions
    license: str
    unverified: tuple[str, ...]
    parameters: int  # what its config comes to
    raw_config: dict[str, Any]
    generation_config: Mapping[str, Any]  # how its makers say it is sampled best; empty where they say nothing
    repo: str = ""
    revision: str = ""  # a commit, or "main" where none is known for certain
    folder: Path | None = None

    @property
    def source(self) -> str:
        """Where its config is from, for errors."""
        return f"presets/{self.name}.json" if self.folder is None else str(self.folder / "config.json")


def names() -> list[str]:
    """Every preset's name, in alphabetical order; reads the folder and none of its files."""
    return sorted(file.name[: -len(".json")] for file in files(__name__).iterdir() if file.name.endswith(".json"))


@cache
def find(name: str) -> Preset | None:
    """The preset of this name, or None."""
    if name not in names():
        return None
    data = json.loads((files(__name__) / f"{name}.json").read_text(encoding="utf-8"))
    data["unverified"] = tuple(data["unverified"])
    generation_config = data.pop("generation_config", {})
    if data.pop("zoo", False):
        folder = Path(str(files(__name__))) / "zoo" / name
        data |= {"folder": folder, "config": json.loads((folder / "config.json").read_text(encoding="utf-8"))}
    return Preset(name=name, raw_config=data.pop("config"), generation_config=generation_config, **data)


def get(name: str) -> Preset:
    """The preset of this name; raises UnknownModelError with the nearest ones."""
    preset = find(name)
    if preset is None:
        raise unknown_model(name)
    return preset


def variants(family: str) -> dict[str, str]:
    """The presets of one family, as variant -> preset name, the smallest model first."""
    presets = [preset for preset in map(get, names()) if preset.family == family]
    presets.sort(key=lambda preset: preset.parameters)
    return {preset.variant: preset.name for preset in presets}


def in_zoo(family: str) -> str | None:
    """The preset of a family that comes with tinyserve: the largest, if there are several."""
    of_zoo = [name for name in variants(family).values() if get(name).folder is not None]
    return of_zoo[-1] if of_zoo else None


def nearest(name: str, k: int = 3) -> list[str]:
    """Up to `k` preset names that look like `name`, the likest first."""
    return get_close_matches(name.lower().rpartition("/")[2], names(), n=k, cutoff=0.5)


def unknown_model(name: str) -> UnknownModelError:
    """The error for a name that is no preset, folder, file or repository."""
    close = nearest(name)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return UnknownModelError(
        f"There is no model {name!r}: it is no preset, no folder with a config.json, no .gguf file and no "
        f"repository at hand.{hint} The presets are {', '.join(names())}."
    )
