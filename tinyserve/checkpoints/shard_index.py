"""Which safetensors file of a folder holds which tensor: model.safetensors.index.json.

Knows names and no format; a stranger's index may name any file, so only those inside its folder are taken.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath

from tinyserve.checkpoints.fields import shown
from tinyserve.checkpoints.json_file import read_json
from tinyserve.errors import CheckpointError

WHOLE = "model.safetensors"  # beside which no index counts
INDEX = "model.safetensors.index.json"
_LONGEST = 255  # bytes of a file's name, on any file system


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by the tensor's name; raises CheckpointError naming the index and the entry at fault."""
    weight_map = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{path}: 'weight_map' must be an object that names the file of each tensor, but it is "
            f"{shown(weight_map)}: download it again."
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _lies_inside(file):
            raise CheckpointError(
                f"{path}: 'weight_map' says that tensor {name!r:.80} is in {shown(file)}, which names no file inside "
                "the index's own folder: take an index that belongs to the weights."
            )
    return weight_map


def _lies_inside(file: str) -> bool:
    """Whether a name stays in its folder, by its letters alone and on any system: no root, no drive, no ".."."""
    parts = file.split("/")
    is_relative = not PurePosixPath(file).is_absolute() and not PureWindowsPath(file).anchor
    are_names = all(part not in ("", ".", "..") and len(part.encode()) <= _LONGEST for part in parts)
    return is_relative and are_names and "\\" not in file and "\0" not in file and len(parts) <= 8
