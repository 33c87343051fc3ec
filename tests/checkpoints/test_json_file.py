"""JSON and texts of a stranger's folder: what is no file of a model is refused by its name, before it does harm."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tinyserve.checkpoints import json_file
from tinyserve.checkpoints.json_file import read_json, read_text
from tinyserve.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.fast


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_json(path, CheckpointError)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 500
    return message


@pytest.mark.parametrize("text", ["[" * 50_000, '{"a":' * 50_000, '{"a":' * 100 + "1" + "}" * 100])
def test_what_lies_too_deep_is_refused(text: str, tmp_path: Path) -> None:
    """Whether the parser gives up or the repr of a value would."""
    (tmp_path / "x.json").write_text(text)
    assert "deep" in refusal(tmp_path / "x.json")


@pytest.mark.parametrize("value", [{"\ud800": 1}, {"a": "x\udfff"}, {"a": [{"b": ["\ud800"]}]}])
def test_half_a_character_is_refused(value: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert "lone surrogate U+D" in refusal(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["{", "[]", "5", "null", "", '{"a": 1' + "0" * 5000 + "}"])
def test_what_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    refusal(tmp_path / "x.json")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": "ü"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "x.json") == {"a": "ü"}
    assert read_text(tmp_path / "x.json", ConfigError) == '{"a": "ü"}'
    (tmp_path / "x.json").write_text('{"a": "ü"}', encoding="utf-16")
    assert "is not JSON ('utf-8' codec" in refusal(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match=r"x\.json is no UTF-8"):
        read_text(tmp_path / "x.json", CheckpointError)


def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", 4 << 20)
    with (tmp_path / "x.json").open("wb") as stream:
        stream.truncate(1 << 40)  # which takes no room on the disk
    assert "larger than 4 MB" in refusal(tmp_path / "x.json")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "it is no file" in refusal(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / ("x" * 260)):
        assert "cannot be read" in refusal(path)
