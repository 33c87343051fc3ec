"""What a model's name means: a path, a preset, or a repository of the Hub. The only file that reads such a name.

Knows this disk and the presets; no network, and of a file only whether it is GGUF.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.gguf_parts import first_parts
from tinyserve.checkpoints.presets import Preset
from tinyserve.errors import CheckpointError, UserError

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:/(?P<file>(?!.*\.\.).+\.gguf))?")


@dataclass(frozen=True)
class ModelRef:
    """A model's name, read: it has a `path` or a `repo`, and perhaps the `preset` that names it.

    `path` is a folder with a config.json, or a file: a GGUF file, or one for the reader to judge. `revision` is what
    the name asks for, None where it leaves that to the preset or to "main"; `file` is one GGUF file of a repository.
    """

    name: str  # as it was given
    path: Path | None = None
    preset: Preset | None = None
    repo: str = ""
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, model: str | os.PathLike[str], revision: str | None = None) -> Self:
        """In this order: a path that exists, a preset, "owner/name", or "owner/name/file.gguf".

        Presets and repositories may end in "@revision", which stands behind `revision`. A file or folder that only
        has a preset's name and holds no model is no path. Raises UnknownModelError with the nearest names, and
        CheckpointError for a path that is wrong.
        """
        text = os.fspath(model)
        if (path := _local(text)) is not None:
            return cls(text, path)
        looks_like_a_path = (
            not isinstance(model, str) or text.startswith((".", "~", "/", "\\")) or Path(text).is_absolute()
        )
        if text.endswith(".gguf"):
            looks_like_a_path |= text.count("/") < 2 or _existing(text.rpartition("/")[0]) is not None
        if looks_like_a_path:
            raise CheckpointError(f"There is no file or folder {text}: check the path.")
        ref = cls.parse_download(text, revision)
        if ref is None:
            raise presets.unknown_model(text)
        return ref

    @classmethod
    def parse_download(cls, name: str, revision: str | None = None) -> Self | None:
        """The same without paths, for a name that is of a download anyway; None for neither preset nor repository."""
        base, _, at_revision = name.partition("@")
        revision = revision or at_revision or None
        if revision is not None and any(character.isspace() for character in revision):
            return None
        if (preset := presets.find(base)) is not None:
            return cls.of_preset(preset, name, revision)
        if (match := _REPOSITORY.fullmatch(base)) is not None:
            return cls(name, repo=match["repo"], revision=revision, file=match["file"])
        return None

    @classmethod
    def of_preset(cls, preset: Preset, name: str | None = None, revision: str | None = None) -> Self:
        """A preset itself, whatever is on this disk by that name; raises UserError for a revision of the zoo's."""
        if preset.folder is not None and revision is not None:
            raise UserError(f"{preset.name} comes with tinyserve and has no revision {revision}: leave that out.")
        return cls(name or preset.name, preset.folder, preset, preset.repo, revision)

    @property
    def is_default(self) -> bool:
        """Whether it is the default model as its preset has it, which a GGUF file from elsewhere can stand in for."""
        return self.preset is not None and self.preset.name == presets.DEFAULT and self.revision is None

    @property
    def revision_in_force(self) -> str:
        """The branch, tag or commit of the repository."""
        return self.revision or (self.preset.revision if self.preset else "main")

    @property
    def label(self) -> str:
        """What `tinyserve pull` takes to download it, without a revision."""
        if self.preset is not None:
            return self.preset.name
        return f"{self.repo}/{self.file}" if self.file else self.repo


def names_a_model(word: str) -> bool:
    """Whether a word by itself is meant as a model, be it a wrong one: it parses, has a slash, or is on this disk."""
    try:
        ModelRef.parse(word)
    except UserError:
        is_one_word = not any(character.isspace() for character in word)
        return word.endswith(".gguf") or (is_one_word and ("/" in word or _existing(word) is not None))
    return True


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its name or by its first bytes."""
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _local(text: str) -> Path | None:
    """The file, or the folder with a model in it; raises CheckpointError for a folder that holds none."""
    path = _existing(text)
    if path is None:
        return None
    is_preset = presets.find(text) is not None  # and what is here may have its name by chance
    if path.is_file():
        return None if is_preset and not is_gguf(path) else path
    if (path / "config.json").is_file():
        return path
    ggufs = first_parts(file.name for file in path.glob("*.gguf"))
    if len(ggufs) == 1:
        return path / ggufs[0]
    if is_preset:
        return None
    if ggufs:
        names = ", ".join(ggufs[:6])
        raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files ({names}): give the path of one of them.")
    raise CheckpointError(
        f"The folder {path} has no config.json: give a folder with config.json, the tokenizer's files and "
        "*.safetensors, or a .gguf file."
    )


def _existing(text: str) -> Path | None:
    """The file or folder at a path; None for a text that is none, such as a prompt that is too long for a path."""
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None
