"""The documents as a site: it builds without a warning, has every page that is linked to, and fetches nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinyserve
from scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(target)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "EXECUTE_COURSE": "false"},  # test_course.py runs it
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr
    return target


def test_sources_are_pages_of_it(site: Path) -> None:
    assert "class LLM" in re.sub("<[^>]+>", "", (site / "source/tinyserve/llm.py/index.html").read_text())
    index = (site / "index.html").read_text()
    assert 'href="source/tinyserve/llm.py/"' in index and "../tinyserve/" not in index
    assert 'href="../source/Dockerfile/"' in (site / "serving" / "index.html").read_text()
    assert "FROM" in (site / "source" / "Dockerfile" / "index.html").read_text()


def test_chapters_are_pages_of_it(site: Path) -> None:
    course = (site / "course" / "index.html").read_text()
    page = (site / "course" / "02-one-block" / "index.html").read_text()
    assert 'href="02-one-block/"' in course and ".ipynb" not in course
    assert 'href="../03-attention-and-the-kv-cache/"' in page and 'href="../../source/tinyserve/' in page
    assert 'id="exercises"' in page and "softmax" in page


def test_a_chapter_is_run_for_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nprint(6 * 7)"),
        nbformat.v4.new_markdown_cell("[two](02-two.ipynb#three)"),
    ])  # fmt: skip
    nbformat.write(notebook, tmp_path / "01-one.ipynb")
    notebooks = load_script("site_notebooks.py")
    monkeypatch.setattr(notebooks, "EXECUTES", True)
    text, pictures = notebooks.page_of(str(tmp_path / "01-one.ipynb"), str(tmp_path))
    assert "    42\n" in text and "```python" in text
    ((name, picture),) = pictures.items()
    assert f"]({name})" in text and picture.startswith(b"\x89PNG")
    assert "[two](02-two.md#three)" in notebooks.on_page_markdown(text, None, None, None)
    monkeypatch.setattr(notebooks, "EXECUTES", False)
    assert notebooks.page_of(str(tmp_path / "01-one.ipynb"), str(tmp_path))[1] == {}


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(script|img|link)[^>]* (src|href)=\"?https?://(?!\S+canonical)", text), page


def test_all_that_is_exported_is_in_the_reference(site: Path) -> None:
    reference = (site / "reference" / "index.html").read_text(encoding="utf-8")
    ids = set(re.findall(r'id="tinyserve[\w.]*\.(\w+)"', reference))
    assert set(tinyserve.__all__) - {"__version__"} <= ids
    assert "{options}" not in reference


def test_parameters_become_a_list() -> None:
    listed = load_script("site_docstrings.py").listed
    text = "Do it.\n\na: one thing\n    and more.\nb: another.\n\nc: is no parameter."
    assert listed(text, {"a", "b"}) == (
        "Do it.\n\n- `a`: one thing\n    and more.\n- `b`: another.\n\nc: is no parameter."
    )
