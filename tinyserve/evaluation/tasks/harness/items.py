"""The questions of a task, as lm-evaluation-harness asks for them: the configurations in this folder name `load`."""

from typing import Any


def load(task: str, **_: Any) -> Any:
    """A split named test; the harness calls this with a configuration's dataset_kwargs."""
    from datasets import Dataset, DatasetDict

    from tinyserve.evaluation.tasks import TASKS

    return DatasetDict({"test": Dataset.from_list([dict(item) for item in TASKS[task].items()])})
