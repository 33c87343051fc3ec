"""Two slices in two processes, by Ray: the bits of one process, also after one of them was killed, or hung."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import httpx2 as httpx
import numpy as np
import pytest
from command_line import Children, Shell
from conftest import answers
from drafts import NGRAM, Spoiled, assert_all_is_free
from processes import alive, descendants, wait_until_gone
from test_sliced import requests

from tinyserve import LLM, SamplingParams
from tinyserve.errors import EngineDeadError
from tinyserve.pipeline import micro_batches, on_ray
from tinyserve.pipeline.on_ray import RaySlices

if sys.platform != "linux":
    pytest.skip("asks /proc", allow_module_level=True)

DEEP = checkpoints.CONFIGS["granite-hybrid"] | {
    "num_hidden_layers": 8, "tie_word_embeddings": False, "layer_types": ["linear_attention", "full_attention"] * 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_folder(tmp_path_factory.mktemp("deep") / "model", DEEP)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def build(folder: Path, slices: int = 1, **options: Any) -> LLM:
    defaults = {"dtype": "int8", "num_threads": 1, "max_num_seqs": 6, "max_num_batched_tokens": 256}
    return LLM(folder, **defaults | options, pipeline_parallel_size=slices)


@pytest.fixture(scope="module")
def sliced(folder: Path) -> Iterator[LLM]:
    llm = build(folder, 2, speculative_config=NGRAM)
    Spoiled(llm, every=3)
    yield llm
    processes = [pid_of(llm)]
    llm.close()
    assert not wait_until_gone(processes, 60)


@pytest.fixture(scope="module")
def whole(folder: Path) -> LLM:
    return build(folder)


def on_slice(llm: LLM, function: Callable[[Any], Any]) -> Any:
    """What a function says of the first slice, in its process."""
    assert isinstance(llm.slices, RaySlices)
    return llm.slices._ray.get(llm.slices._actors[0].__ray_call__.remote(function))


def pid_of(llm: LLM) -> int:
    pid: int = on_slice(llm, lambda _: os.getpid())
    return pid


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_processes_are_one(sliced: LLM, whole: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pid_of(sliced) != os.getpid() and sliced.slices is not None
    monkeypatch.setattr(micro_batches, "LEAST", 16)
    monkeypatch.setattr(sliced.slices, "are_parallel", True)  # as on a machine with more cores
    sent, send = list[Any](), sliced.slices.send
    monkeypatch.setattr(sliced.slices, "send", lambda message: (sent.append(message), send(message))[1])
    prompts, params = requests(max_tokens=20)
    long = [prompt + checkpoints.token_ids(40, seed=i) for i, prompt in enumerate(prompts)]
    assert answers(sliced.generate(long, params)) == answers(whole.generate(long, params))
    assert len(sent) > sliced.stats().steps + 3, "micro-batches"
    params[1] = replace(params[1], prompt_logprobs=3)
    for _ in range(2):
        first, second = (llm.generate(prompts, params) for llm in (whole, sliced))
        assert answers(second) == answers(first)
        assert second[1].prompt_logprobs == first[1].prompt_logprobs
        assert second[0].metrics.cached_tokens == first[0].metrics.cached_tokens
    text = checkpoints.token_ids(70, seed=3)
    assert np.array_equal(sliced.logits(text, last=45), whole.logits(text, last=45))
    assert np.array_equal(sliced.embed([text])[0].embedding, whole.embed([text])[0].embedding)
    assert sliced.slices.num_bytes > 70 * 4 * 120
    assert_all_is_free(sliced)


def test_each_process_has_half_of_the_weights(sliced: LLM, whole: LLM) -> None:
    there = on_slice(sliced, lambda one: one._model.nbytes)
    here = sliced.model.nbytes - there
    assert here + there == whole.model.nbytes
    assert max(here, there) <= 0.6 * whole.model.nbytes, "of eight layers and two tables"
    assert on_slice(sliced, lambda one: len(one._forward.cache.layers)) == 8 - len(sliced.model.layers)


def test_the_processes_take_as_much_memory(sliced: LLM, tmp_path: Path) -> None:
    """As the kernel counts it, beside that of a process whose weights are few."""
    raw = checkpoints.CONFIGS["llama"] | {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with build(tmp_path, 2, dtype="float32", load_format="dummy", kv_cache_memory=10_000_000) as large:
        there = on_slice(large, lambda one: one._model.nbytes)
        assert 200e6 < there <= 0.55 * (there + large.model.nbytes)
        assert proportional_memory(pid_of(large)) - proportional_memory(pid_of(sliced)) == pytest.approx(there, rel=0.1)


def proportional_memory(pid: int) -> int:
    """Bytes of a process, of what it shares with others its part (PSS)."""
    (line,) = re.findall(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(line) * 1024


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_slice_that_ends_in_the_middle_costs_time_and_no_bit(
    end: int, sliced: LLM, whole: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "SILENCE", 1.0)
    monkeypatch.setattr(on_ray, "PING_SECONDS", 2.0)
    prompts, params = requests(max_tokens=40)
    params = [replace(one, max_tokens=40, seed=i + 100) for i, one in enumerate(params)]
    before, outputs = pid_of(sliced), list[Any]()
    steps = sliced.stats().steps
    asking = threading.Thread(target=lambda: outputs.extend(sliced.generate(prompts, params)))
    asking.start()
    wait_for(lambda: sliced.stats().steps >= steps + 12)
    os.kill(before, end)
    asking.join(120)
    assert answers(outputs) == answers(whole.generate(prompts, params))
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert pid_of(sliced) != before and not alive([before])
    assert_all_is_free(sliced)


def test_a_slice_that_is_slow_and_lives_is_waited_for(sliced: LLM, whole: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing for as long as it takes to be asked whether it lives, and is asked for its answer again."""
    monkeypatch.setattr(on_ray, "SILENCE", 0.3)
    prompts, params = requests(max_tokens=40)
    pid, outputs, steps = pid_of(sliced), list[Any](), sliced.stats().steps
    asking = threading.Thread(target=lambda: outputs.extend(sliced.generate(prompts, params)))
    asking.start()
    wait_for(lambda: sliced.stats().steps >= steps + 3)
    os.kill(pid, signal.SIGSTOP)
    asking.join(2)
    assert asking.is_alive()
    os.kill(pid, signal.SIGCONT)
    asking.join(120)
    assert answers(outputs) == answers(whole.generate(prompts, params))
    assert pid_of(sliced) == pid and not sum(output.metrics.preemptions for output in outputs)


def test_a_server_goes_on_and_ends_as_ever(folder: Path, start: Children) -> None:
    """Ray says nothing, and does not have SIGTERM, though it starts in a thread where Python cannot give it back."""
    server = start("serve", f"tiny={folder}", "--port", "0", "--threads", "1", "--pipeline-parallel-size", "2")
    assert server.stderr is not None and server.stdout is not None
    url = server.stderr.readline().decode().split()[0]

    def answer() -> Any:
        asked = {"prompt": "ab", "max_tokens": 9, "ignore_eos": True, "temperature": 0}
        return httpx.post(f"{url}/v1/completions", json=asked, timeout=120, trust_env=False).json()["choices"]

    first = answer()
    (pid,) = [pid for pid in descendants(server.pid) if b"SliceActor" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(pid, signal.SIGKILL)
    assert answer() == first
    server.send_signal(signal.SIGTERM)
    errors = server.stderr.read().decode()
    assert server.wait(60) == 0, errors
    assert "is lost" in errors and "once more stops at once" in errors
    assert "SIGTERM" not in errors and "raylet" not in errors
    assert server.stdout.read() == b""


MACHINES = """
import json, os, sys, threading, time
from ray.cluster_utils import Cluster
machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
others = [machines.add_node(num_cpus=1) for _ in range(2)]
os.environ["RAY_ADDRESS"] = machines.address
import ray
from tinyserve import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="int8", num_threads=1, pipeline_parallel_size=3)
def nodes():
    return ray.get([actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
                    for actor in llm.slices._actors])
before = nodes()
params = SamplingParams(temperature=0.8, seed=1, max_tokens=100, ignore_eos=True)
outputs = []
asking = threading.Thread(target=lambda: outputs.extend(llm.generate([[1, 2, 3]], params)))
asking.start()
while llm.stats().steps < 9:
    time.sleep(0.01)
machines.remove_node(next(node for node in others if node.node_id == before[0]), allow_graceful=False)
machines.add_node(num_cpus=1)
asking.join()
print(json.dumps({
    "here": ray.get_runtime_context().get_node_id(), "before": before, "after": nodes(),
    "answer": outputs[0].outputs[0].token_ids, "preemptions": outputs[0].metrics.preemptions,
}), flush=True)
llm.close()
machines.shutdown()
"""


def test_each_slice_has_a_machine_and_a_lost_one_is_replaced(folder: Path, whole: LLM) -> None:
    """Machines that are processes here: one is lost as by a power cut, and another one comes."""
    variables = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": 64 * "a", "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", MACHINES, str(folder)], env={**os.environ, **variables},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert len({told["here"], *told["before"]}) == 3, "each on one of its own, and none here"
    assert told["after"][1] == told["before"][1] and told["after"][0] not in (told["here"], *told["before"])
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=100, ignore_eos=True)
    assert told["answer"] == whole.generate([[1, 2, 3]], params)[0].outputs[0].token_ids
    assert told["preemptions"] > 0


def test_bench_tells_what_crosses(folder: Path, sliced: LLM, shell: Shell) -> None:
    works = ("--prefill", 32, "--depth", 0, "--batch", 1, "--decode", 4, "-r", 1, "--budget", 5, "--threads", 1)
    shown = shell("bench", folder, "--pipeline-parallel-size", 2, *works)
    assert shown.code == 0, shown.err
    assert re.search(r"slices: layers 0 to \d, \d to 7; 480 bytes cross the network for a token", shown.out)
    report = json.loads(shell("bench", folder, "--pipeline-parallel-size", 2, "--json", *works).out)
    assert report["slices"] == 2 and report["network_bytes"] > 480 * 36
    assert sliced.generate([[1, 2, 3]], SamplingParams(max_tokens=2))[0].outputs[0].token_ids, "others go on"


def test_a_slice_that_cannot_load_again_ends_the_engine(folder: Path, sliced: LLM) -> None:
    """On the cluster of `sliced`; last, as its model's files are gone behind it."""
    llm = build(folder, 2)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    config = folder / "config.json"
    text = config.read_text()
    config.unlink()
    try:
        with suppress(ProcessLookupError):
            os.kill(pid_of(llm), signal.SIGKILL)
        with pytest.raises(EngineDeadError, match=r"cannot load them again: .* has no config\.json"):
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=20, ignore_eos=True))
    finally:
        config.write_text(text)
        llm.close()
    assert sliced.generate([[1, 2, 3]], SamplingParams(max_tokens=2))[0].outputs[0].token_ids, "others go on"
