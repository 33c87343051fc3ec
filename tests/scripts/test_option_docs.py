"""The tables of options and parameters in docs/python-api.md are those of the package."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_option_docs.py"


def test_the_tables_are_current() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (SCRIPT.parents[1] / "docs" / "python-api.md").read_text(encoding="utf-8")
    assert "\n| `top_p` | `1.0` | above 0 and at most 1 | Draw from the likeliest tokens of this total" in text
    assert "\n| `max_num_seqs` | `16` | How many sequences run at once; " in text
    assert " | `--max-num-seqs` |\n" in text
