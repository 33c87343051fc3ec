"""The drawn figures are current, have all names of those in letters, and need nothing from elsewhere."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
DOCS = SCRIPTS.parent / "docs"
TEXT = (DOCS / "architectures.md").read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"

pytestmark = pytest.mark.fast


@pytest.fixture
def make_figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import make_figures

    return make_figures


@pytest.fixture
def pictures(make_figures: Any) -> dict[str, ET.Element]:
    """Each file by its name."""
    return {name: ET.parse(DOCS / "images" / name).getroot() for name in make_figures.pictures()}


def words(picture: ET.Element) -> list[str]:
    """Its lines of text, without what only those hear who do not see it."""
    return ["".join(text.itertext()) for text in picture.iter(f"{SVG}text")]


def test_the_figures_are_current() -> None:
    script = [sys.executable, str(SCRIPTS / "make_figures.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_check_writes_nothing(make_figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_figures, "IMAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_figures.py", "--check"])
    assert make_figures.main() == 1
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["make_figures.py"])
    assert make_figures.main() == 0
    assert {path.name for path in tmp_path.iterdir()} == set(make_figures.pictures())


def test_every_figure_in_letters_is_drawn_and_every_picture_shown(make_figures: Any) -> None:
    figures = make_figures.figures()
    assert len(figures) == len(re.findall(r"<!-- (?:second half of a )?block of ", TEXT)) >= 9
    assert len({figure.file for figure in figures}) == len(figures)
    shown = set[str]()
    for page in ("architectures.md", "index.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        shown |= {file for alt, file in re.findall(r"!\[([^\]]+)\]\(images/([\w.-]+\.svg)\)", text) if len(alt) > 20}
    assert set(make_figures.pictures()) <= shown
    assert {path.name for path in (DOCS / "images").glob("block-*.svg")} == {figure.file for figure in figures}


def test_a_drawn_block_has_the_words_of_its_letters(make_figures: Any, pictures: dict[str, ET.Element]) -> None:
    """As often as they are there, weights and operations both."""
    for figure in make_figures.figures():
        drawn = Counter(re.findall(r"\w+", " ".join(words(pictures[figure.file]))))
        # Less what says where a line goes on, and what a paragraph explains.
        plain = re.sub(r"(?m)^\w+:|\b[xy]\b", "", figure.letters)
        letters = Counter(re.findall(r"\w+", plain))
        assert letters - drawn == Counter(), figure.file
        operators = len(re.findall(r"[+×](?= ─|─)", figure.letters))
        assert len(pictures[figure.file].findall(f"{SVG}circle[@class='plain strong']")) == operators, figure.file


def test_the_families_have_the_names_of_their_checkpoints(pictures: dict[str, ET.Element]) -> None:
    from tinyserve.models.config import preset_config

    drawn = set(re.findall(r"\w+", re.sub(r"_ ", "_", " ".join(words(pictures["architectures.svg"])))))
    for model in ("gpt2", "falcon-7b", "llama-3.1-8b", "granite-350m"):
        names = {tensor.name for tensor in preset_config(model).tensor_shapes()}
        assert {re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[2] for name in names} <= drawn, model


def test_the_engines_parts_are_where_the_figure_says(make_figures: Any) -> None:
    for band in make_figures.engine.BANDS:
        for part in (part for row in band.rows for part in (row.part, row.side)):
            path = SCRIPTS.parent / "tinyserve" / part.file
            assert path.exists(), part.file
            sources = [path] if path.is_file() else path.glob("*.py")
            name, _, method = part.call.partition(".")
            source = "".join(one.read_text(encoding="utf-8") for one in sources)
            assert f"\nclass {name}" in source or part.call == "Numba kernels", part.call
            assert not method or f"    def {method}(" in source, part.call
    drawn = set(re.findall(r"\w+_\w+", " ".join(words(ET.fromstring(make_figures.engine.engine())))))
    files = ("models/batch.py", "scheduling/sequence.py", "engine.py", "model_runner.py")
    source = "".join((SCRIPTS.parent / "tinyserve" / file).read_text(encoding="utf-8") for file in files)
    assert drawn - {"model_runner"} <= set(re.findall(r"\w+", source))


def test_pictures_are_told_and_need_nothing_from_elsewhere(pictures: dict[str, ET.Element]) -> None:
    for name, picture in pictures.items():
        assert picture.findtext(f"{SVG}title") and picture.findtext(f"{SVG}desc"), name
        assert float(picture.attrib["viewBox"].split()[2]) <= 760, name
        assert {one.tag.removeprefix(SVG) for one in picture.iter()} <= {
            "svg", "title", "desc", "style", "rect", "circle", "path", "polygon", "text",
        }  # fmt: skip
        attributes = {attribute for one in picture.iter() for attribute in one.attrib}
        assert not {one for one in attributes if "href" in one or one.startswith("on")}, name
        style = picture.findtext(f"{SVG}style") or ""
        assert "prefers-color-scheme:dark" in style and "url(" not in style and "@import" not in style, name


def test_nothing_is_drawn_beside_the_picture_or_over_another_text(pictures: dict[str, ET.Element]) -> None:
    for name, picture in pictures.items():
        left, top, width, height = map(float, picture.attrib["viewBox"].split())
        boxes = list[tuple[float, float, float, float, str]]()
        for text in picture.iter(f"{SVG}text"):
            label, size, x, y = "".join(text.itertext()), *(float(text.attrib[key]) for key in ("font-size", "x", "y"))
            taken, classes = 0.62 * size * len(label), text.attrib["class"].split()
            x -= 0 if "start" in classes else taken if "end" in classes else taken / 2
            boxes.append((x, y - 0.75 * size, x + taken, y, label))
        for x0, y0, x1, y1, label in boxes:
            assert left <= x0 and x1 <= left + width and top <= y0 and y1 <= top + height, (name, label)
        for a, b in combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (name, a[4], b[4])


def test_a_text_that_is_too_long_is_refused(make_figures: Any) -> None:
    from figures.svg import Drawing, wrapped

    with pytest.raises(ValueError, match="'post_attention_layernorm' may take"):
        Drawing("", "").text(0, 0, "post_attention_layernorm", 13, "mono", room=100)
    assert wrapped("post_attention_layernorm", 10, 100) == ["post_attention_", "layernorm"]
    assert wrapped("q_proj k_proj v_proj", 10, 100) == ["q_proj k_proj", "v_proj"]
    assert wrapped("c_attn: q k v", 10, 50) == ["c_attn:", "q k v"]


def test_letters_are_read_as_a_graph(make_figures: Any) -> None:
    from figures.letters import halves, parse

    (half,) = halves("x ─┬─ norm ─┬─ a ─┐\n   │        └─ b ─×─ c ─ + ─ x'\n   └─────────────────────┘\n")
    assert {node.label: [one.label for one in half.inputs(node)] for node in half.nodes} == {
        "norm": [], "a": ["norm"], "b": ["norm"], "×": ["a", "b"], "c": ["×"],
    }  # fmt: skip
    assert (half.x, half.result) == ("x", "x'")
    with pytest.raises(ValueError, match="leads nowhere, from line 0, column 9"):
        parse("x ─ norm ─\n")
