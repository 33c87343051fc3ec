"""The recorder of clients, with the one library that is always here: all its calls are made, and written."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "clients"


@pytest.fixture
def record_clients(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("record_clients")


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    about, *requests = map(json.loads, (folder / "openai.jsonl").read_text(encoding="utf-8").splitlines())
    return about, requests


def test_a_library_is_recorded_again(record_clients: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["record_clients.py", "openai", "--out", str(tmp_path)])
    assert record_clients.main() == 0
    about, requests = read(tmp_path)
    assert about["library"] == "openai" and set(about["versions"]) == {"openai"}
    kept_about, kept = read(DATA)
    assert [one["call"] for one in requests] == [one["call"] for one in kept]
    if about["versions"] == kept_about["versions"]:
        assert requests == kept


def test_a_call_that_fails_is_named(
    record_clients: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["record_clients.py", "openai", "--url", "http://127.0.0.1:9"])
    assert record_clients.main() == 1
    said = capsys.readouterr().out
    assert "openai: chat: APIConnectionError: Connection error." in said and said.count("\n") > 40


def test_what_is_not_installed_is_named(
    record_clients: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(record_clients.LIBRARIES, "dspy", "no_such_module.at_all")
    monkeypatch.setattr("sys.argv", ["record_clients.py", "dspy", "--out", str(tmp_path)])
    assert record_clients.main() == 1
    assert "no_such_module.at_all is not installed here" in capsys.readouterr().out and not list(tmp_path.iterdir())
