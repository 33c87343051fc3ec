"""What containers leave to a process: limits of its own control group, and of all those it lies in."""

from pathlib import Path

import pytest

from tinyserve.tensor import cgroups

NONE = float("inf")
V1 = {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroups, "MOUNT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    return tmp_path


def write(tree: Path, own: str, files: dict[str, str]) -> None:
    (tree / "own").write_text(own)
    for name, content in files.items():
        file = tree / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, NONE),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "300000 100000"}, 1.0),
        ("0::/a/b\n", {"a/c/cpu.max": "100000 100000"}, NONE),  # somebody else's
        ("0::/host/path\n", {"cpu.max": "100000 100000"}, 1.0),  # a container that sees its own group as the root
        ("2:cpu,cpuacct:/\n0::/\n", {f"cpu/{name}": text for name, text in V1.items()}, 0.5),
        ("2:cpu,cpuacct:/a\n", {f"cpu,cpuacct/a/{name}": text for name, text in V1.items()}, 0.5),
        ("2:cpuset:/a\n", {f"cpu/a/{name}": text for name, text in V1.items()}, NONE),
        ("", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, NONE),
        ("nonsense\n::\n", {"cpu.max": "nonsense"}, NONE),
        ("0::/\n", {"cpu.max": "100000 0"}, NONE),
        ("0::/../../etc\n", {}, NONE),
        ("", {}, NONE),
    ],
)
def test_the_tightest_processor_quota_counts(tree: Path, own: str, files: dict[str, str], cores: float) -> None:
    write(tree, own, files)
    assert cgroups.processor_quota() == cores


def version_2(folder: str, limit: str, used: int, files: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {files}\n"
    return {f"{folder}memory.max": limit, f"{folder}memory.current": str(used), f"{folder}memory.stat": stat}


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/\n", version_2("", "1000", 600, 50), 450),
        ("0::/\n", version_2("", "max", 600), NONE),
        ("0::/a/b\n", version_2("a/", "1000", 900) | version_2("a/b/", "500", 100), 100),
        ("0::/a/b\n", version_2("a/", "max", 900) | version_2("a/b/", "500", 100), 400),
        (
            "4:memory:/a\n0::/\n",
            {
                "memory/a/memory.limit_in_bytes": "1000",
                "memory/a/memory.usage_in_bytes": "300",
                "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 20\n",
            },
            720,
        ),
        ("0::/\n", {"memory.max": "1000"}, NONE),
    ],
)
def test_the_least_memory_counts(
    tree: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], left: float
) -> None:
    write(tree, own, files)
    assert cgroups.memory_left() == left
    if left != NONE:
        assert cgroups.available_memory() == left


def test_what_is_taken_beyond_a_limit_is_nothing_left(tree: Path) -> None:
    write(tree, "0::/\n", version_2("", "1000", 1600))
    assert cgroups.available_memory() == 0
