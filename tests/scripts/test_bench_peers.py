"""The comparison's tables on made-up numbers, and what it says of peers that are not there. Nothing is measured."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench_peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_peers")


def test_every_preset_can_be_measured(bench_peers: Any) -> None:
    """How long its prompts may be follows from its config, which has no such key in older families."""
    assert {name: bench_peers.models.positions(name) for name in ("gpt2", "falcon-7b", "granite-350m")} == {
        "gpt2": 1024, "falcon-7b": 2048, "granite-350m": 32768,
    }  # fmt: skip


def measurement(engine: str, work: str, round_: int, tokens: int, seconds: float) -> dict[str, Any]:
    return {"engine": engine, "work": work, "round": round_, "tokens": tokens, "seconds": seconds}


@pytest.fixture
def run() -> dict[str, Any]:
    ours, theirs, third = "tinyserve int8", "llama.cpp Q8_0", "ctranslate2 int8"
    seconds = {ours: [99.0, 1.0, 0.5, 0.25], theirs: [0.001, 2.0, 2.0, 1.0], third: [1.0, 4.0]}
    return {
        "model": "gpt2",
        "weights": "random weights of this shape",
        "threads": 2,
        "rounds": 3,
        "date": "2026-01-02",
        "commit": "abc1234",
        "processor": "Some Processor",
        "dot_product": "avx2",
        "versions": {"llama-cpp-python": "0.3"},
        "engines": [ours, "tinyserve int4", theirs, third],
        "works": ["prefill of 100 tokens"],
        "measurements": [
            measurement(engine, "prefill of 100 tokens", round_, 100, value)
            for engine, values in seconds.items()
            for round_, value in enumerate(values)
        ],
        "not_measured": [
            {"engine": "tinyserve int4", "work": "", "reason": "there is no such dtype"},
            {"engine": third, "work": "prefill of 100 tokens", "reason": "it stopped"},
        ],
        "missing": [{"name": "openvino", "install": "`pip install openvino-genai` (needs openvino_genai)"}],
    }


def test_the_table_has_medians_and_ratios_of_rounds_without_the_first(bench_peers: Any, run: dict[str, Any]) -> None:
    table = bench_peers.report.markdown(json.loads(json.dumps(run)))
    assert table.splitlines() == [
        "### gpt2, 2 threads, 2026-01-02, commit abc1234",
        "",
        "Some Processor (dot products: avx2); random weights of this shape; medians of 3 rounds, engines in turn; "
        "llama-cpp-python 0.3.",
        "",
        "| prefill of 100 tokens | tokens/s | tinyserve int8 against it |",
        "|---|---:|---|",
        "| tinyserve int8 | 200 |  |",
        "| tinyserve int4 | not measured |  |",
        "| llama.cpp Q8_0 | 50.0 | **4.00 ×** (2.00 to 4.00) |",
        "| ctranslate2 int8 | 25.0 | **4.00 ×** |",
        "",
        "- Not measured: tinyserve int4: there is no such dtype",
        "- Not measured: ctranslate2 int8, prefill of 100 tokens: it stopped",
        "- Not installed, so not measured: openvino. `pip install openvino-genai` (needs openvino_genai)",
    ]


def test_without_tinyserve_the_first_engine_is_compared(bench_peers: Any, run: dict[str, Any]) -> None:
    run["measurements"] = [m for m in run["measurements"] if not m["engine"].startswith("tinyserve")]
    table = bench_peers.report.markdown(run)
    assert "| tinyserve int8 | not measured |  |" in table
    assert "| prefill of 100 tokens | tokens/s | llama.cpp Q8_0 against it |" in table
    assert "| ctranslate2 int8 | 25.0 | **2.00 ×** |" in table


def test_a_missing_peer_is_named_with_its_command(bench_peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Peer.missing` asks the import system, so a name that cannot be found stands for a package not installed."""
    absent = bench_peers.Peer("llama.cpp", "x", ("no_such_module", "json"), ("Q8_0",), "pip install it", ())
    monkeypatch.setitem(bench_peers.PEERS, "llama.cpp", absent)
    chosen, missing = bench_peers.choose(["llama.cpp"], ["int8"])
    assert [(peer.name, format) for peer, format in chosen] == [("tinyserve", "int8")]
    assert missing == [{"name": "llama.cpp", "install": "`pip install it` (needs no_such_module)"}]


@pytest.mark.parametrize("name", ["no_such_package.part", "json.no_such_part"])
def test_a_missing_part_of_a_package_is_missing_too(bench_peers: Any, name: str) -> None:
    assert bench_peers.Peer("p", "x", (name,), (), "", ()).missing() == [name]


def test_peers_are_chosen_with_formats(bench_peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers.Peer, "missing", lambda self: [])
    chosen, missing = bench_peers.choose(["transformers", "llama.cpp:Q4_0,bf16"], ["int8", "bfloat16"])
    assert [(peer.name, format) for peer, format in chosen] == [
        ("tinyserve", "int8"), ("tinyserve", "bfloat16"), ("transformers", "float32"), ("transformers", "bfloat16"),
        ("llama.cpp", "Q4_0"), ("llama.cpp", "bf16"),
    ]  # fmt: skip
    assert missing == []
    with pytest.raises(SystemExit, match=r"no peer 'vllm'; there are llama\.cpp, openvino"):
        bench_peers.choose(["vllm"], ["int8"])


def test_every_seed_has_prompts_of_its_own(bench_peers: Any) -> None:
    arguments = argparse.Namespace(prefill=512, decode=64, depth=0, batch=3)
    (work, first), tokens = bench_peers.order("prefill", arguments, 0, 50257)
    (_, second), _ = bench_peers.order("prefill", arguments, 1, 50257)
    assert (work, len(first), tokens) == ("prefill", 512, 512)
    assert all(a != b for a, b in zip(first, second, strict=True))  # no engine can reuse a prefix
    assert bench_peers.order("decode", arguments, 0, 50257) == (["decode", first[:1], 64], 64)
    assert bench_peers.order("batch", arguments, 0, 50257) == (["batch", [[t] for t in first[:3]], 64], 192)


def test_the_worker_answers_with_the_reason_of_what_it_cannot_do(tmp_path: Path) -> None:
    """A process of its own, up to the first line of its answer; the file it is given is no model."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    setting: dict[str, Any] = {
        "action": "serve",
        "peer": "tinyserve",
        "format": "int8",
        "path": str(broken),
        "threads": 1,
    }
    setting |= {"max_length": 8, "sequences": 0, "options": {}}
    command = [sys.executable, "-m", "peers.worker", json.dumps(setting)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, cwd=SCRIPTS)
    assert "broken.gguf" in json.loads(done.stdout)["reason"]


def test_works_longer_than_the_model_are_left_out_and_named(bench_peers: Any) -> None:
    run: dict[str, Any] = {"not_measured": []}
    arguments = argparse.Namespace(
        model="gpt2", work=["prefill", "decode"], prefill=512, decode=64, depth=4096, batch=32
    )
    assert bench_peers.possible(run, arguments) == {"prefill": "prefill of 512 tokens"}
    (note,) = run["not_measured"]
    assert note == {
        "engine": "all engines",
        "work": "decode of 64 tokens at depth 4096",
        "reason": "gpt2 has only 1024 positions",
    }
