"""The fuzzer of chat templates finds nothing, and would say so if it did."""

import re
import subprocess
import sys
from typing import Any

import pytest

from scripts import SCRIPTS, load_script

SCRIPT = SCRIPTS / "fuzz" / "templates.py"


def fuzz(count: int, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv = ['templates.py', '--count', '{count}', '--seed', '1']; {before}\n"
    code += f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def fuzzer() -> Any:
    return load_script("fuzz/templates.py").Fuzzer(1)


def test_every_template_is_rendered_or_refused_with_a_sentence() -> None:
    done = fuzz(150)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"^150 cases, 0 of them neither", done.stdout, re.MULTILINE)


def test_not_all_templates_are_refused(fuzzer: Any) -> None:
    assert 5 <= sum(fuzzer.rendered(number) for number in range(60)) <= 55


def test_a_fault_is_reported_with_what_reproduces_it() -> None:
    done = fuzz(20, "import tinyserve.text.chat_template as t; t.checked_messages = None")
    assert done.returncode == 1
    assert "--- Case('1-" in done.stdout and "template = " in done.stdout and "TypeError" in done.stdout
    assert re.search(r"again: --seed 1 --case \d+", done.stdout), done.stdout[-3000:]
