"""What Linux alone has is asked for before it is used; texts have an encoding, and files names, that hold anywhere.

What comes of it on another system is played in test_other_systems.py.
"""

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from systems import missing_names, unguarded_uses

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "tinyserve").rglob("*.py"))
NO_FILES = {"pipeline/slice.py": "opens a part of a model"}
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def test_what_a_system_lacks_is_asked_for_before_it_is_used() -> None:
    found = {str(file.relative_to(ROOT)): unguarded_uses(file.read_text(encoding="utf-8")) for file in SOURCES}
    assert {file: uses for file, uses in found.items() if uses} == {}


def test_what_systems_lack_is_known() -> None:
    assert {"fork", "sched_getaffinity", "setsid", "killpg", "nice", "sysconf"} <= missing_names("os", "win32")
    assert {"SIGKILL", "SIGSTOP", "SIGPROF", "pthread_kill"} <= missing_names("signal", "win32")
    assert {"sched_getaffinity", "pidfd_open"} <= missing_names("os", "darwin")
    assert not {"fork", "setsid", "sysconf", "replace"} & missing_names("os", "darwin")
    assert "MADV_NOHUGEPAGE" in missing_names("mmap", "darwin") & missing_names("mmap", "win32")
    assert "SIGBREAK" in missing_names("signal", "linux")


@pytest.mark.parametrize(
    ("code", "uses"),
    [
        ("os.fork()", {("os.fork", "win32")}),
        ("os.sched_getaffinity(0)", {("os.sched_getaffinity", "darwin"), ("os.sched_getaffinity", "win32")}),
        ("signal.signal(signal.SIGBREAK, stop)", {("signal.SIGBREAK", "darwin"), ("signal.SIGBREAK", "linux")}),
        ("import fcntl", {("fcntl", "win32")}),
        ("import resource as limits\nlimits.getrlimit(0)", {("resource", "win32"), ("resource.getrlimit", "win32")}),
        ("from os import killpg", {("os.killpg", "win32")}),
        ("getattr(os, 'fork')()", {("os.fork", "win32")}),
        ("getattr(os, 'fork', None)", set()),
        ("os.replace(a, b)", set()),
        ("path.fork()", set()),
        # Behind a check, and behind a check of something else.
        ("if hasattr(os, 'fork'):\n    os.fork()", set()),
        ("if hasattr(os, 'nice'):\n    os.fork()", {("os.fork", "win32")}),
        ("if hasattr(os, 'fork'):\n    pass\nelse:\n    os.fork()", {("os.fork", "win32")}),
        ("os.fork() if hasattr(os, 'fork') else 0", set()),
        ("hasattr(os, 'fork') and os.fork()", set()),
        ("not hasattr(os, 'fork') or os.fork()", set()),
        ("hasattr(os, 'fork') or os.fork()", {("os.fork", "win32")}),
        ("sys.platform == 'win32' or os.fork()", set()),
        ("sys.platform == 'win32' and os.fork()", {("os.fork", "win32")}),
        ("if sys.platform != 'win32':\n    os.fork()", set()),
        ("if sys.platform == 'win32':\n    os.fork()", {("os.fork", "win32")}),
        ("if sys.platform == 'win32' or slow:\n    pass\nelse:\n    os.fork()", set()),
        ("if sys.platform != 'win32':\n    os.sched_getaffinity(0)", {("os.sched_getaffinity", "darwin")}),
        ("if sys.platform == 'linux':\n    os.sched_getaffinity(0)", set()),
        ("def f():\n    if sys.platform == 'win32':\n        return 0\n    return os.fork()", set()),
        ("def f():\n    if sys.platform == 'win32':\n        print()\n    return os.fork()", {("os.fork", "win32")}),
        ("def f():\n    if slow and sys.platform == 'win32':\n        return 0\n    os.fork()", {("os.fork", "win32")}),
        ("try:\n    os.fork()\nexcept AttributeError:\n    pass", set()),
        ("try:\n    os.fork()\nexcept OSError:\n    pass", {("os.fork", "win32")}),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", set()),
        ("with suppress(OSError, AttributeError):\n    os.fork()", set()),
        ("with suppress(OSError):\n    os.fork()", {("os.fork", "win32")}),
    ],
)
def test_a_use_without_a_check_is_found(code: str, uses: set[tuple[str, str]]) -> None:
    found = unguarded_uses(f"import os, signal, sys\nfrom contextlib import suppress\n{code}\n")
    assert {(name, system) for _, name, system in found} == uses


def test_texts_are_read_and_written_with_an_encoding() -> None:
    found = [file for file in SOURCES for _ in texts_of_any_encoding(file.read_text(encoding="utf-8"))]
    by_file = Counter(str(file.relative_to(ROOT / "tinyserve").as_posix()) for file in found)
    assert by_file == Counter(dict.fromkeys(NO_FILES, 1))


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("path.read_text()", 1),
        ("path.write_text(text)", 1),
        ("path.open()", 1),
        ("path.open('a')", 1),
        ("open(path)", 1),
        ("subprocess.run(command, text=True)", 1),
        ("path.read_text('ascii')", 0),
        ("path.write_text(text, encoding='utf-8')", 0),
        ("path.open('rb')", 0),
        ("open(path, 'w', encoding='utf-8')", 0),
        ("archive.open(member)", 0),
        ("subprocess.run(command, text=True, encoding='utf-8')", 0),
    ],
)
def test_a_text_without_an_encoding_is_found(code: str, count: int) -> None:
    assert len(texts_of_any_encoding(code)) == count


def texts_of_any_encoding(source: str) -> list[int]:
    """The lines of calls that leave the encoding of a text to the system."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if _is_of_any_encoding(call)]


def _is_of_any_encoding(call: ast.Call) -> bool:
    named = {keyword.arg for keyword in call.keywords}
    if "encoding" in named or None in named:
        return False
    modes = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    match call.func:
        case ast.Attribute(attr="read_text"):
            return not call.args
        case ast.Attribute(attr="write_text"):
            return len(call.args) < 2
        case ast.Attribute(value=ast.Name(id="subprocess")):
            return bool({"text", "universal_newlines"} & named)
        case ast.Attribute(attr="open"):
            return not call.args or any(set(mode) <= set("rwxa+t") for mode in modes)
        case ast.Name(id="open"):
            return not any("b" in mode for mode in modes)
    return False


def test_file_names_hold_on_other_file_systems() -> None:
    """As Windows has them; and in no folder are there two that differ in the case of letters alone."""
    for top in ("tinyserve", "tests", "scripts", "docs", "examples"):
        paths = [path for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts]
        for path in paths:
            assert not set('<>:"\\|?*') & set(path.name), path
            assert not path.name.endswith((" ", ".")) and not _RESERVED.fullmatch(path.name), path
            assert len(str(path.relative_to(ROOT))) < 140, path  # a folder's own path is to have room before it
        twice = [name for name, count in Counter(str(path).casefold() for path in paths).items() if count > 1]
        assert not twice


def test_the_workflow_tries_each_python_on_each_system_with_tests_that_are_there() -> None:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    promised = {word for one in project["classifiers"] for word in re.findall(r"Python :: (3\.\d+)$", one)}
    matrices = [set(re.findall(r"3\.\d+", line)) for line in re.findall(r"python: \[(.*)\]", workflow)]
    assert len(matrices) == 2 and all(promised <= tried for tried in matrices)
    for system in ("ubuntu-latest", "ubuntu-24.04-arm", "macos-latest", "windows-latest"):
        assert re.search(rf"(os: \[|, |runs-on: ){re.escape(system)}\b", workflow), system
    named = re.findall(r"tests/[\w/]+(?:\.py)?", workflow)
    assert named and all((ROOT / name).exists() for name in named)
    on_windows = [
        file for name in named for file in (ROOT.glob(f"{name}/*.py") if not name.endswith(".py") else [ROOT / name])
    ]
    for file in on_windows:
        assert not [use for use in unguarded_uses(file.read_text(encoding="utf-8")) if use.system == "win32"], file
