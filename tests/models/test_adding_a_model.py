"""docs/adding-a-model.md tells what an architecture takes: its files exist, as long as it says, quoted as they are."""

import re
from pathlib import Path

from tinyserve.models import registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \[[^]]+\]\(\.\./(tinyserve/[^)]+)\) \| ([^|]+) \| (\d+) \|$", PAGE, re.MULTILINE)


def lines(path: str) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_the_files_to_read_are_nine_and_as_long_as_it_says() -> None:
    read = [(path, int(count)) for path, what, count in ROWS if not what.startswith(("new", "edited"))]
    assert len(read) == 9
    for path, count in read:
        assert abs(lines(path) - count) <= 0.25 * count, (path, lines(path))


def test_a_family_is_two_files_and_three_lines() -> None:
    assert {path: int(count) for path, what, count in ROWS if what == "new"} == {
        path: lines(path) for path in ("tinyserve/models/config/qwen.py", "tinyserve/models/qwen.py")
    }
    edited = [path for path, what, _ in ROWS if what.startswith("edited")]
    assert edited == ["tinyserve/models/registry.py", "tinyserve/cli/ask.py", "tinyserve/cli/__init__.py"]
    name = re.compile("(?i)qwen[23](?!-coder)")  # that is a format of tool calls, of any family
    named = [path for path in ROOT.glob("tinyserve/**/*.py") if name.search(path.read_text("utf-8"))]
    own = {f"tinyserve/{path}" for path in ("models/config/qwen.py", "models/qwen.py", "models/registry.py")}
    own |= {"tinyserve/cli/ask.py", "tinyserve/text/tokenizer/pretokenizers.py"}
    assert {str(path.relative_to(ROOT)) for path in named} == own


def test_every_family_has_its_two_files() -> None:
    for family in registry.FAMILIES:
        assert (ROOT / "tinyserve" / "models" / f"{family.module}.py").is_file()
        assert (ROOT / "tinyserve" / "models" / "config" / f"{family.module}.py").is_file()


def test_what_it_quotes_is_so() -> None:
    models = ROOT / "tinyserve" / "models"
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (models / "config" / "qwen.py", models / "qwen.py", models / "registry.py")
    ).replace('f"{layer}.', 'f"model.layers.{i}.')
    quoted = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(quoted) == 4
    for block in quoted:
        for line in block.splitlines():
            assert line.strip() in source, line
