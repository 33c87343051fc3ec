"""The engine's benchmark, run for real on a tiny model: what it measures and says. No speed is asserted."""

import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
CHUNK, STREAMS, LONG, SHARED, WAVE, SEQUENCES, STEPS = 32, 3, 200, 48, 3, 4, 8
SIZES = {
    "rounds": 1, "threads": 1, "max-num-batched-tokens": CHUNK,
    "requests": 6, "prompt": 8, "output": 4, "loop": 2,
    "wave": WAVE, "shared": SHARED, "own": 5, "sequences": SEQUENCES, "steps": STEPS, "streams": STREAMS, "long": LONG,
}  # fmt: skip


@pytest.fixture
def bench_engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_engine")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """The run as JSON, the tables, and the progress, of all works with a model of three layers."""
    folder = tmp_path_factory.mktemp("bench")
    model = checkpoints.write_folder(
        folder / "tiny", checkpoints.CONFIGS["llama"] | {"max_position_embeddings": LONG + 20}
    )
    command = [sys.executable, str(SCRIPTS / "bench_engine.py"), "--model", str(model), "--workdir", str(folder)]
    command += [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    command += ["--dtypes", "float32", "--peers", "--max-num-seqs", "2", "4"]
    command += ["--json", str(folder / "run.json"), "--append", str(folder / "tables.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tables = (folder / "tables.md").read_text(encoding="utf-8")
    assert done.stdout.strip() == tables.strip()
    return json.loads((folder / "run.json").read_text(encoding="utf-8")), tables, done.stderr


def counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert {row["round"] for row in rows} == {0, 1}
    return [row for row in rows if row["round"] > 0]


def test_nothing_is_left_out(outcome: tuple[dict[str, Any], str, str]) -> None:
    run, tables, progress = outcome
    assert run["not_measured"] == run["missing"] == []
    assert "not measured" not in tables
    assert progress.count("round 1") == 2 + 2 + 2 + 1
    assert tables.startswith("\n### tiny, 1 threads, ")
    assert "the folder's weights; one round, engines in turn; numba" in tables


def test_throughput_goes_on_with_the_best_number_at_once(outcome: tuple[dict[str, Any], str, str]) -> None:
    run, tables, _ = outcome
    (family,) = run["search"]
    names = ["tinyserve float32, 2 at once", "tinyserve float32, 4 at once"]
    assert [row["engine"] for row in family] == names
    best = min(family, key=lambda row: row["seconds"])["engine"]
    loop = "a loop in tinyserve float32"
    assert sorted(run["engines"]) == sorted([best, loop])
    assert {row["engine"]: row["tokens"] for row in counted(run["measurements"])} == {best: 6 * 4, loop: 2 * 4}
    (row,) = [row for row in counted(run["measurements"]) if row["engine"] == best]
    assert 0 < row["in_model"] < row["seconds"]
    assert f"Of that time in the model: {best} {100 * row['in_model'] / row['seconds']:.1f} %." in tables
    rate = row["tokens"] / row["seconds"]
    assert f"| {best} | {rate:.0f} | {rate / 4:.2f} |" in tables


def test_a_second_wave_computes_its_own_tokens_only(outcome: tuple[dict[str, Any], str, str]) -> None:
    run, tables, _ = outcome
    rows = counted(run["prefix"]["measurements"])
    assert [row["caching"] for row in rows] == ["with", "without"]
    cached, computed = rows
    for row in rows:
        assert [len(wave["seconds"]) for wave in row["waves"]] == [WAVE, WAVE]
        assert all(seconds > 0 for wave in row["waves"] for seconds in wave["seconds"])
    assert cached["waves"][0]["cached"][0] == 0  # the system prompt is a new one in each round
    assert cached["waves"][1]["cached"] == [SHARED] * WAVE
    assert [wave["cached"] for wave in computed["waves"]] == [[0] * WAVE] * 2
    first, second = (statistics.median(wave["seconds"]) for wave in cached["waves"])
    assert f"| **{first / second:.2f} ×** |" in tables  # no range, of one round


def test_a_step_is_longer_than_its_time_in_the_model(outcome: tuple[dict[str, Any], str, str]) -> None:
    run, tables, _ = outcome
    rows = counted(run["overhead"]["measurements"])
    assert [row["sampling"] for row in rows] == ["greedy", "sampled"]
    for row in rows:
        # The last of the steps that decode has none after it to end its time.
        assert len(row["whole"]) == len(row["in_model"]) == STEPS - 1
        assert all(0 < inside < whole for whole, inside in zip(row["whole"], row["in_model"], strict=True))
        figures = [1000 * statistics.fmean(row[key]) for key in ("whole", "in_model")]
        assert f"| {row['sampling']} | {figures[0]:.2f} | {figures[1]:.2f} |" in tables


def test_streams_go_on_while_a_long_prompt_is_read(outcome: tuple[dict[str, Any], str, str]) -> None:
    run, tables, _ = outcome
    (row,) = counted(run["gaps"]["measurements"])
    assert len(row["chunks"]) == LONG // CHUNK
    # Each of the steps that read it leaves a token of each stream behind, and ends a gap of each.
    steps = -(-LONG // (CHUNK - STREAMS))
    assert steps * STREAMS <= len(row["during"]) <= (steps + 1) * STREAMS
    assert len(row["before"]) >= STREAMS
    assert min(row["before"] + row["during"] + row["chunks"]) > 0
    assert f"| {max(row['during']):.3f} |" in tables


def test_prompts_are_the_same_for_every_engine_and_begin_differently(bench_engine: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.CONFIGS["llama"]))
    arguments = bench_engine.options().parse_args(["--model", str(tmp_path)])
    prompts = bench_engine.prompts_of(arguments, "a", 64, 5)
    assert prompts == bench_engine.prompts_of(arguments, "a", 64, 5) != bench_engine.prompts_of(arguments, "b", 64, 5)
    assert len({prompt[0] for prompt in prompts}) == 64
    assert {len(prompt) for prompt in prompts} == {5}
    assert all(0 <= token < checkpoints.VOCAB for prompt in prompts for token in prompt)


def test_a_prompt_longer_than_the_model_is_left_out_and_named(bench_engine: Any) -> None:
    run = {"model": "gpt2", "not_measured": []}
    arguments = bench_engine.options().parse_args(["--model", "gpt2"])
    bench_engine.gaps(run, arguments, [])
    (note,) = run["not_measured"]
    assert note == {
        "engine": "all engines",
        "work": "8 streams and a prompt of 4096 tokens",
        "reason": "gpt2 has only 1024 positions",
    }
    assert "gaps" not in run
