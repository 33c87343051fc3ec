"""Put the bundled tasks to a model by `tinyserve eval --task` and by lm-evaluation-harness, and compare every number.

    python scripts/check_lm_eval.py                     # a tiny random model and smollm2-135m
    python scripts/check_lm_eval.py MODEL [MODEL ...]

The harness drives tinyserve.evaluation.lm_eval_model.TinyserveLM, and must find the same to the last digit. On the
tiny model its own class for transformers answers as well, and log-likelihoods must agree to rounding, answers in all
their text. Exit code 1 if anything differs. Needs the extras `test` and `lm-eval`.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import checkpoints  # noqa: E402

from tinyserve import LLM  # noqa: E402
from tinyserve.evaluation.lm_eval_model import TASKS_FOLDER, TinyserveLM  # noqa: E402
from tinyserve.evaluation.tasks import TASKS, run  # noqa: E402

DTYPES = ("int8", "float32")
ROUNDING = 2e-4  # nats, of a sum over a continuation in float32
LONG = "It was the best of times, it was the worst of times. " * 12


def harness(model: Any) -> dict[str, Any]:
    """The harness's report on every bundled task, with each answer."""
    manager = TaskManager(include_path=TASKS_FOLDER, include_defaults=False)
    names = [f"tinyserve_{name}" for name in TASKS]
    report: dict[str, Any] = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager)
    return report


def numbers(report: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, float]]:
    """By task and metric: the value and its standard error."""
    found = {}
    for name, result in report["results"].items():
        for key, value in result.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                found[name.removeprefix("tinyserve_"), metric] = (value, result[f"{metric}_stderr,{kind}"])
    return found


def same_numbers(llm: LLM, label: str) -> bool:
    """Whether both ways of asking come to the same value and standard error in every task."""
    theirs = numbers(harness(TinyserveLM(llm)))
    ours = {(s.task, s.metric): (s.value, s.stderr) for s in run(lambda _: llm, list(TASKS.values()), [llm.dtype])}
    for key, (value, error) in ours.items():
        print(
            f"{label:<28}{llm.dtype:<9}{' '.join(key):<24}{value:.6f} ± {error:.6f}   {theirs[key] == (value, error)}"
        )
    return theirs == ours


def same_as_transformers(folder: Path) -> bool:
    """Whether the harness's class for transformers finds what ours does, request by request."""
    hf, ours = HFLM(pretrained=str(folder), dtype="float32", device="cpu"), TinyserveLM(LLM(folder, dtype="float32"))
    found, expected = harness(ours), harness(hf)
    worst, texts = 0.0, True
    for name, samples in found["samples"].items():
        for a, b in zip(samples, expected["samples"][name], strict=True):
            assert a["arguments"] == b["arguments"]
            for one, other in zip(a["resps"], b["resps"], strict=True):
                if isinstance(one[0], str):
                    texts = texts and one == other
                else:
                    worst = max(worst, abs(one[0][0] - other[0][0]))
                    texts = texts and one[0][1] == other[0][1]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate((LONG, "Hi"))]
    sums = zip(ours.loglikelihood_rolling(rolling), hf.loglikelihood_rolling(rolling), strict=True)
    rolled = max(abs(a - b) / abs(b) for a, b in sums)
    empty = [Instance("loglikelihood", {}, ("", "Hello there"), 0), Instance("loglikelihood", {}, ("Hi ", "you"), 1)]
    pairs = zip(ours.loglikelihood(empty), hf.loglikelihood(empty), strict=True)
    worst = max(worst, *(abs(a[0] - b[0]) for a, b in pairs))
    print(
        f"beside transformers: log-likelihoods differ by {worst:.1e} at most, rolled ones by {rolled:.1e} of themselves"
    )
    print(f"beside transformers: texts and greedy flags are equal: {texts}")
    return worst < ROUNDING and rolled < 1e-6 and texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="presets, folders or files")
    models = parser.parse_args().models
    good = True
    with tempfile.TemporaryDirectory() as folder:
        if not models:
            raw = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 320}
            tiny = checkpoints.write_folder(Path(folder) / "tiny", raw)
            good = same_as_transformers(tiny)
            models = [str(tiny), "smollm2-135m"]
        for model in models:
            for dtype in DTYPES:
                good &= same_numbers(LLM(model, dtype=dtype, max_model_len=320), Path(model).name)
    print("all the same" if good else "something differs")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
