"""The fuzzer of chat templates finds nothing, and would say so if it did."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz" / "templates.py"


def fuzz(seconds: float, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv = ['templates.py', '--seconds', '{seconds}', '--seed', '1']; {before}\n"
    code += f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_every_template_is_rendered_or_refused_with_a_sentence() -> None:
    done = fuzz(5)
    assert done.returncode == 0, done.stderr
    tried, rendered, faults = (int(word) for word in done.stdout.split() if word.isdigit())
    assert tried > 50 and rendered > tried / 10 and faults == 0


def test_a_fault_is_reported_with_what_reproduces_it() -> None:
    broken = "import tinyserve.text.chat_template as t; t.checked_messages = None"
    done = fuzz(30, broken)
    assert done.returncode == 1
    assert "--- Case('1-" in done.stderr and "template = " in done.stderr and "TypeError" in done.stderr
