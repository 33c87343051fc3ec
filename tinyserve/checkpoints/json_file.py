"""JSON objects in a checkpoint's folder, read. Knows nothing of what is in them."""

import json
from pathlib import Path
from typing import Any

from tinyserve.errors import ConfigError, UserError


def read_json(path: Path, refusal: type[UserError] = ConfigError) -> dict[str, Any]:
    """The JSON object that a file holds; raises `refusal` with the file, the place in it, and the way out."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refusal(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise refusal(f"{path} is not JSON ({error}): correct it there, or download it again.") from None
    if not isinstance(value, dict):
        raise refusal(f"{path} holds a {type(value).__name__}, but must hold a JSON object: download it again.")
    return value
