"""Texts and JSON objects in a checkpoint's folder, read: a stranger's files, so their size and depth are bounded.

Knows nothing of what is in them.
"""

import json
from pathlib import Path
from typing import Any

from tinyserve.errors import ConfigError, UserError

MAX_BYTES = 64 << 20  # the largest tokenizer.json about has half of it
MAX_JSON_BYTES = 32 << 20  # what becomes twenty times as much in memory; the largest index about has a third of it
MAX_DEPTH = 64  # of objects and lists in each other: what shows or copies a value later calls itself for each


def read_bytes(path: Path, refusal: type[UserError], most: int) -> bytes:
    """What a file holds, without a byte order mark; raises `refusal` with the file, the reason, and the way out."""
    try:
        if not path.is_file() and path.exists():  # to open a pipe is to wait for somebody to write
            raise refusal(f"{path} cannot be read: it is no file.")
        long = path.stat().st_size > most
        data = b"" if long else path.read_bytes()
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that is none
        raise refusal(f"{path} cannot be read ({getattr(error, 'strerror', error)}): check its permissions.") from None
    if long:
        raise refusal(f"{path} is larger than {most >> 20} MB, which no file of its kind is: download it again.")
    return data.removeprefix(b"\xef\xbb\xbf")


def read_text(path: Path, refusal: type[UserError], errors: str = "strict") -> str:
    """The text that a file holds; raises `refusal` as `read_bytes` does, and for what is no UTF-8 unless `errors` says
    otherwise (bytes.decode).
    """
    try:
        return read_bytes(path, refusal, MAX_BYTES).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise refusal(f"{path} is no UTF-8 ({error}): save it as UTF-8, or download it again.") from None


def read_json(path: Path, refusal: type[UserError] = ConfigError) -> dict[str, Any]:
    """The JSON object that a file holds; raises `refusal` with the file, the place in it, and the way out."""
    data = read_bytes(path, refusal, MAX_JSON_BYTES)
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise refusal(_too_deep(path)) from None
    except ValueError as error:
        raise refusal(f"{path} is not JSON ({error!s:.200}): correct it there, or download it again.") from None
    if not isinstance(value, dict):
        raise refusal(f"{path} holds a {type(value).__name__}, but must hold a JSON object: download it again.")
    _check(value, path, refusal)
    return value


def _check(value: dict[str, Any], path: Path, refusal: type[UserError]) -> None:
    """Refuse what json lets through and others trip over: depth, and half a character, which JSON can spell."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for each in level:
            for text in each if isinstance(each, dict) else ():
                _check_text(text, text, path, refusal)
            for key, member in each.items() if isinstance(each, dict) else enumerate(each):
                if isinstance(member, str):
                    _check_text(member, key, path, refusal)
                elif isinstance(member, dict | list):
                    inner.append(member)
        level = inner
        if not level:
            return
    raise refusal(_too_deep(path))


def _check_text(text: str, key: Any, path: Path, refusal: type[UserError]) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise refusal(
            f"{path}: the text at {key!r:.80} has the lone surrogate {code}, which is no character: correct it there, "
            "or download it again."
        ) from None


def _too_deep(path: Path) -> str:
    return f"{path} is no file of a model: its objects and lists lie more than {MAX_DEPTH} deep; download it again."
