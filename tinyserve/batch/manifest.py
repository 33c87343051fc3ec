"""What a job was begun with, kept in its folder: a job that goes on must be the same."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tinyserve.batch.disk import new_file, writing
from tinyserve.errors import UserError

MANIFEST, FINGERPRINT = "_job.json", "_fingerprint"


class Manifest(NamedTuple):
    """What a job is. `files` are the inputs, by path, size and digest; `settings` all that decides an answer."""

    files: list[dict[str, Any]]
    settings: dict[str, Any]


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none; raises UserError for one that is damaged."""
    path = folder / MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_bytes()))
        assert all(file["path"] and file["size"] >= 0 and file["digest"] for file in manifest.files)
        assert isinstance(manifest.settings, dict)
        return manifest
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError):
        raise damaged(path) from None


def damaged(path: Path) -> UserError:
    """The error of a file of ours that is not as we write it."""
    return UserError(f"{path} is damaged, so that the job cannot go on: --restart begins it anew.")


def write_manifest(folder: Path, temporary: Path, manifest: Manifest) -> None:
    """Keep it, unless there is one."""
    with writing(folder):
        if not (folder / MANIFEST).exists():
            with new_file(folder / MANIFEST, temporary) as path:
                path.write_text(json.dumps(manifest._asdict(), indent=1), encoding="utf-8")


def record_fingerprint(folder: Path, fingerprint: str, *, any_bits: bool) -> None:
    """Keep what bits a worker computes, if it is the first; raises UserError for others, unless they are allowed."""
    place = folder / FINGERPRINT
    with writing(folder):
        with (
            suppress(FileExistsError),
            place.open("x", encoding="utf-8") as file,
        ):  # of several workers one is the first
            file.write(fingerprint)
        known = place.read_text(encoding="utf-8")
        if not known:  # whoever made it has not written it yet, or never will
            place.write_text(fingerprint, encoding="utf-8")
            known = fingerprint
    if known != fingerprint and not any_bits:
        raise UserError(
            f"{folder} was begun by a machine, or with a model's files, whose answers may be others than here "
            f"(fingerprint {known}, here {fingerprint}): --any-bits goes on all the same, --restart begins anew."
        )


def compare(output: Path, begun: Manifest, wanted: Manifest) -> None:
    """Raises UserError that names the first difference."""
    way_out = "give the same again, or --restart to answer all anew."
    before, now = ([file["path"] for file in one.files] for one in (begun, wanted))
    if before != now:
        raise UserError(f"{output} was begun with {_few(before)} as input, not {_few(now)}: {way_out}")
    for old, new in zip(begun.files, wanted.files, strict=True):
        if old != new:
            sizes = f"{old['size']} bytes then, {new['size']} now" if old["size"] != new["size"] else "as many bytes"
            raise UserError(
                f"{old['path']} has changed since {output} was begun ({sizes}): bring it back, or say --restart to "
                "answer all anew."
            )
    for name in {**begun.settings, **wanted.settings}:
        # As JSON has them: there a mapping's keys are texts.
        old_value, new_value = (json.dumps(one.settings.get(name), sort_keys=True) for one in (begun, wanted))
        if old_value != new_value:
            raise UserError(f"{output} was begun with {name} {old_value}, and this is {new_value}: {way_out}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
