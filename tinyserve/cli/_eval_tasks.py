"""`tinyserve eval --task`: how often a model is right in the tasks that come with tinyserve, by dtype.

Knows how to print; the asking and marking is in tinyserve/evaluation/tasks/.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from tinyserve import __version__

if TYPE_CHECKING:
    from tinyserve.evaluation.tasks import Score
    from tinyserve.llm import LLM

LIST = "list"
MAX_MODEL_LEN = 1024  # no question comes near, and a cache of a model's whole context would


def print_list() -> None:
    """The tasks there are, a line each."""
    from tinyserve.evaluation.tasks import TASKS

    for task in TASKS.values():
        print(f"{task.name:<12}{len(task.items()):>4} questions: {task.about}")


def evaluate_tasks(
    model: str, names: Sequence[str], dtypes: Sequence[str], limit: int | None, threads: int | None, as_json: bool
) -> None:
    """Put the tasks to the model in each dtype, and print a table or an object."""
    from tinyserve.cli._load import load
    from tinyserve.evaluation import tasks
    from tinyserve.loading import open_model
    from tinyserve.models.dtypes import resolve_dtype
    from tinyserve.progress import ProgressBar
    from tinyserve.tensor._jit import cpu_name

    chosen = tasks.find(names)
    resolved = [resolve_dtype(name) for name in dtypes]
    files = open_model(model)
    max_model_len = min(MAX_MODEL_LEN, files.config.max_position_embeddings)

    def load_in(dtype: str) -> "LLM":
        nonlocal threads
        llm, _ = load(model, dtype, threads, max_model_len=max_model_len)
        threads = llm.num_threads  # what there are: that some are missing is said once
        return llm

    with ProgressBar() as bar:
        scores = list(tasks.run(load_in, chosen, resolved, limit, bar))
    assert files.path is not None
    if as_json:
        recipe = {
            "tinyserve": __version__,
            "processor": cpu_name(),
            "threads": threads,
            "model": files.name,
            "weights": files.path.name,
            "tasks_sha256": {task.name: task.sha256 for task in chosen},
        }
        print(json.dumps({**recipe, "results": [asdict(score) for score in scores]}))
        return
    print(f"{files.name} ({files.path.name}) on the tasks of tinyserve {__version__}, without a chat template")
    _print_table(scores)


def _print_table(scores: "Sequence[Score]") -> None:
    """A line for each dtype, task and metric."""
    print(f"{'dtype':<10}{'task':<12}{'metric':<13}{'n':>5}{'right':>9}{'std. error':>13}")
    for score in scores:
        print(
            f"{score.dtype:<10}{score.task:<12}{score.metric:<13}{score.n:>5}{score.value * 100:>7.1f} %"
            f"{score.stderr * 100:>11.1f} %"
        )
