"""docs/cli.md is what scripts/make_cli_docs.py writes today."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import SCRIPTS, load_script

SCRIPT = SCRIPTS / "make_cli_docs.py"


@pytest.fixture(scope="module")
def make_cli_docs() -> Any:
    return load_script("make_cli_docs.py")


def test_the_page_is_current(make_cli_docs: Any) -> None:
    page: Path = make_cli_docs.PAGE
    assert page.read_text(encoding="utf-8") == make_cli_docs.page(), "run python scripts/make_cli_docs.py"


def test_the_page_has_every_command_with_examples(make_cli_docs: Any) -> None:
    page: str = make_cli_docs.page()
    commands = ("chat", "bench", "trace", "eval", "inspect-config", "compare", "pull", "list", "rm", "warmup")
    for name in ("ask", "ask gpt2", *commands):
        _, _, section = page.partition(f"## tinyserve {name}\n")
        assert f"tinyserve {name} " in section.partition("```bash\n")[2].partition("```")[0] or name == "list"
    assert "\b" not in page
    assert (
        "| `--temperature`, `--temp` NUMBER | the model's own, else 0 | 0 is greedy; higher is more random. |" in page
    )
    assert "| `--json` |  | Print one JSON object with text, token ids and statistics. |" in page


def test_check_says_that_a_page_is_stale(make_cli_docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert subprocess.run([sys.executable, str(SCRIPT), "--check"], check=False).returncode == 0
    monkeypatch.setattr(make_cli_docs, "PAGE", tmp_path / "cli.md")
    monkeypatch.setattr(sys, "argv", ["make_cli_docs.py", "--check"])
    assert make_cli_docs.main() == 1
    assert not (tmp_path / "cli.md").exists()
    monkeypatch.setattr(sys, "argv", ["make_cli_docs.py"])
    assert make_cli_docs.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_cli_docs.py", "--check"])
    assert make_cli_docs.main() == 0
