"""lm-evaluation-harness over HTTP, as its users run it, beside `tinyserve eval --task` in process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers import running

from tinyserve import LLM
from tinyserve.evaluation.tasks import TASKS, run

NAMES = ("cloze", "arithmetic")
FOLDER = Path(__file__).parents[2] / "tinyserve" / "evaluation" / "tasks" / "harness"


def test_the_harness_gets_the_same_numbers_over_http(smollm2: Path, tmp_path: Path) -> None:
    """Likelihoods of given texts (cloze), free answers (arithmetic): values to the last digit, and standard errors."""
    llm = LLM(smollm2, dtype="int8", max_model_len=320)
    ours = {
        (score.task, score.metric): (score.value, score.stderr)
        for score in run(lambda _: llm, [TASKS[name] for name in NAMES], [llm.dtype])
    }
    with running({"smollm2-135m": smollm2}, dtype="int8", max_model_len=320) as server:
        arguments = f"base_url={server.url}/v1/completions,model=smollm2-135m,tokenizer_backend=remote,num_concurrent=4"
        done = subprocess.run(
            [
                sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments,
                "--tasks", ",".join(f"tinyserve_{name}" for name in NAMES), "--include_path", str(FOLDER),
                "--output_path", str(tmp_path / "results.json"),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = tmp_path.rglob("*.json")
    theirs = {}
    for task, result in json.loads(report.read_text())["results"].items():
        for key, value in result.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                theirs[task.removeprefix("tinyserve_"), metric] = (value, result[f"{metric}_stderr,{kind}"])
    assert {name: value for name, (value, _) in theirs.items()} == {name: value for name, (value, _) in ours.items()}
    for name, (_, stderr) in theirs.items():
        assert stderr == pytest.approx(ours[name][1], rel=1e-12)  # sum() rounds differently from Python 3.12 on
