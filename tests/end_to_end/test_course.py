"""The course: each chapter runs from its first cell to its last, solutions and their checks included."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

COURSE = Path(__file__).parents[2] / "docs" / "course"
CHAPTERS = sorted(COURSE.glob("*.ipynb"))
INDEX = (COURSE / "index.md").read_text(encoding="utf-8")


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request: pytest.FixtureRequest) -> Any:
    notebook = nbformat.read(request.param, as_version=4)
    notebook.metadata["path"] = request.param
    return notebook


def words_of(notebook: Any) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_the_path_has_every_chapter_in_order() -> None:
    assert [path.name[:3] for path in CHAPTERS] == [f"{number:02}-" for number in range(1, 11)]
    linked = re.findall(r"\]\((\d\d-[\w-]+\.ipynb)\)", INDEX)
    assert list(dict.fromkeys(linked)) == [path.name for path in CHAPTERS]


def test_a_chapter_says_what_it_is_for_and_asks_three_things(chapter: Any) -> None:
    words = words_of(chapter)
    first = chapter.cells[0].source
    assert re.match(rf"# {int(chapter.metadata['path'].name[:2])}\. \w", first)
    for part in ("**Goal.**", "**Time.**", "**Before.**"):
        assert part in first
    headings = re.findall(r"^## (.+)$", words, re.MULTILINE)
    assert headings[-3:] == ["Exercises", "Solutions", "Where this is in tinyserve"]
    exercises = words[words.index("## Exercises") : words.index("## Solutions")]
    assert re.findall(r"^(?:\*\*)?(\d)\.", exercises, re.MULTILINE) == ["1", "2", "3"]
    solutions = [cell for cell in chapter.cells if "solution" in cell.metadata.get("tags", [])]
    assert len(solutions) == 3
    for number, cell in enumerate(solutions, 1):
        assert cell.cell_type == "code" and cell.source.startswith(f"# Exercise {number}")
        assert re.search(r"^\s*assert ", cell.source, re.MULTILINE)


def test_a_chapter_links_to_files_that_are_there(chapter: Any) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", words_of(chapter))
    assert any(link.startswith("../../tinyserve/") for link in links)
    for link in links:
        assert (COURSE / link).exists(), link


def test_a_chapter_is_kept_without_outputs(chapter: Any) -> None:
    for cell in chapter.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_a_chapter_runs(chapter: Any) -> None:
    import nbclient

    path = chapter.metadata.pop("path")
    nbclient.NotebookClient(chapter, timeout=300, kernel_name="python3").execute(cwd=str(path.parent))
    shown = [output for cell in chapter.cells if cell.cell_type == "code" for output in cell.outputs]
    said = [line for output in shown if output.get("name") == "stderr" for line in output["text"].splitlines()]
    assert [line for line in said if not line.startswith("tinyserve: compil")] == [], "no part of a lesson"
    assert any("image/png" in output.get("data", {}) for output in shown), "a picture"
