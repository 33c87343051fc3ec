"""Write tests/golden/*.npz: transformers' logits of each tiny checkpoint of tests/support/checkpoints.py.

    python scripts/make_golden.py                  # all of them
    python scripts/make_golden.py gpt2 falcon-7b

Each file has `about` (JSON: this command and the versions behind the numbers), `config` (config.json as transformers
saved it), `tensors` (JSON: name -> shape; the values are checkpoints.tensor's, made of integers), `token_ids`,
`positions`, and `logits` (positions, vocab) float32. Run again with the same versions on the same processor, it writes
the same bytes; elsewhere the last digits differ. Needs torch and transformers.
"""

import json
import platform
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import checkpoints  # noqa: E402
import chosen  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
TOKENS = 70  # more than one chunk of the attention kernel
POSITIONS = [0, 1, 17, 63, 69]


def main() -> None:
    names = chosen.names(str(__doc__), "configs", checkpoints.CONFIGS)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    about = {
        "command": "python scripts/make_golden.py",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    for name in names:
        path = GOLDEN / f"{name}.npz"
        save(path, {"about": json.dumps(about)} | golden(checkpoints.CONFIGS[name]))
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def golden(raw: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of one config: what it saves, and what it computes from that."""
    token_ids = checkpoints.token_ids(TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoints.save_with_transformers(Path(scratch), raw)
        # The plainest implementation of attention is the reference; but transformers 5's adds ALiBi twice.
        attention = "sdpa" if raw.get("alibi") else "eager"
        logits = checkpoints.transformers_logits(folder, token_ids, attn_implementation=attention)
        with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        config = json.loads((folder / "config.json").read_text())
    return {
        "config": json.dumps(config, sort_keys=True),
        "tensors": json.dumps(shapes),
        "token_ids": np.array(token_ids),
        "positions": np.array(POSITIONS),
        "logits": logits[POSITIONS],
    }


def save(path: Path, arrays: dict[str, Any]) -> None:
    """np.savez_compressed without the time of day, so that the same numbers are the same file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w") as stream:
                np.lib.format.write_array(stream, np.asarray(value), allow_pickle=False)


if __name__ == "__main__":
    main()
