"""Small tests of what a model can do: questions that come with tinyserve, and how often it is right.

Each task is a file of questions beside this one and a few lines here; scripts/make_tasks.py writes the questions that
are made and not thought up, and the same tasks for lm-evaluation-harness. Knows the Python API and no terminal.
"""

import gc
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from tinyserve.errors import UserError, did_you_mean
from tinyserve.evaluation.likelihood import encode, encode_pair, loglikelihoods, tokenizer_of
from tinyserve.progress import Progress, renamed, silent
from tinyserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tinyserve.llm import LLM

Item = Mapping[str, Any]  # prompt; choices and the place of the right one; or the right answer
Outcomes = dict[str, list[bool]]  # by metric, for each item


@dataclass(frozen=True)
class Task(ABC):
    """Questions of one kind; a subclass knows how they are asked and marked."""

    name: str
    about: str

    @property
    def content(self) -> bytes:
        """The questions' file, a JSON object a line."""
        return (files(__name__) / f"{self.name}.jsonl").read_bytes()

    @property
    def sha256(self) -> str:
        """Which questions they are: numbers of others cannot be compared."""
        return hashlib.sha256(self.content).hexdigest()

    def items(self, limit: int | None = None) -> list[Item]:
        """The questions, or the first `limit` of them."""
        lines = self.content.rstrip().split(b"\n")  # and not at the other ends of lines that Unicode knows
        return [json.loads(line) for line in lines[:limit]]

    @abstractmethod
    def outcomes(self, llm: "LLM", items: Sequence[Item], progress: Progress = silent) -> Outcomes:
        """Which of the questions the model gets right, by each metric."""


@dataclass(frozen=True)
class MultipleChoice(Task):
    """The likeliest choice after the prompt is taken: by log-probability, and by the same over its characters."""

    def outcomes(self, llm: "LLM", items: Sequence[Item], progress: Progress = silent) -> Outcomes:
        pairs = [encode_pair(llm, item["prompt"], f" {choice}") for item in items for choice in item["choices"]]
        scores = iter(loglikelihoods(llm, pairs, progress))
        found: Outcomes = {"acc": [], "acc_norm": []}
        for item in items:
            sums = [next(scores).logprob for _ in item["choices"]]
            means = [logprob / len(choice) for logprob, choice in zip(sums, item["choices"], strict=True)]
            found["acc"].append(_first_largest(sums) == item["answer"])
            found["acc_norm"].append(_first_largest(means) == item["answer"])
        return found


@dataclass(frozen=True)
class ExactMatch(Task):
    """The model writes on greedily after the examples and the prompt, up to a stop, and has to write the answer."""

    examples: str
    stop: tuple[str, ...]
    max_tokens: int

    def outcomes(self, llm: "LLM", items: Sequence[Item], progress: Progress = silent) -> Outcomes:
        params = SamplingParams(temperature=0, max_tokens=self.max_tokens, stop=self.stop)
        outputs = llm.generate([encode(llm, self.examples + item["prompt"]) for item in items], params)
        texts = [output.outputs[0].text.strip() for output in outputs]
        return {"exact_match": [text == item["answer"] for text, item in zip(texts, items, strict=True)]}


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        ExactMatch(
            "arithmetic",
            "sums and differences of numbers below 20, half in digits, half in words; greedy, after four examples",
            examples="5 + 3 = 8\n20 - 6 = 14\nfive plus three is eight\ntwenty minus six is fourteen\n",
            stop=("\n", "."),
            max_tokens=16,
        ),
        MultipleChoice("cloze", "the last word of an everyday sentence, of four"),
        MultipleChoice("facts", "the capital of a country, of four of the same continent"),
    )
}


@dataclass(frozen=True)
class Score:
    """How a model in one dtype did in a task, by one metric; shares are from 0 to 1."""

    dtype: str
    task: str
    metric: str  # acc, acc_norm, exact_match: lm-evaluation-harness's names
    n: int
    value: float
    stderr: float  # of the mean over these questions, as a sample of all there could be


def find(names: Iterable[str]) -> list[Task]:
    """The tasks of these names, each once; raises UserError with the nearest name there is."""
    for name in names:
        if name not in TASKS:
            raise UserError(f"There is no task {name!r}.{did_you_mean(name, TASKS)} The tasks are {', '.join(TASKS)}.")
    return [TASKS[name] for name in dict.fromkeys(names)]


def run(
    load: Callable[[str], "LLM"],
    tasks: Sequence[Task],
    dtypes: Sequence[str],
    limit: int | None = None,
    progress: Progress = silent,
) -> Iterator[Score]:
    """Put the first `limit` questions of each task to a model in each of `dtypes`, of which one is in memory.

    `progress` hears of what is being done, of the tokens read and of all. Raises UserError for a model without a
    tokenizer and for a limit below 2, of which there is no standard error.
    """
    if limit is not None and limit < 2:
        raise UserError(f"The limit is {limit}; a standard error takes at least 2 questions.")
    for dtype in dict.fromkeys(dtypes):
        gc.collect()  # nobody names the model before this one, but it may be part of a cycle
        llm = load(dtype)
        tokenizer_of(llm)
        for task in tasks:
            found = task.outcomes(llm, task.items(limit), renamed(progress, f"{dtype} {task.name}"))
            yield from (score(dtype, task.name, metric, right) for metric, right in found.items())
        del llm


def score(dtype: str, task: str, metric: str, right: Sequence[bool]) -> Score:
    """The mean of two outcomes or more, and its standard error: the sample's deviation over the root of n."""
    n = len(right)
    value = sum(right) / n
    deviation = math.sqrt(sum((one - value) ** 2 for one in right) / (n - 1))
    return Score(dtype, task, metric, n, value, deviation / math.sqrt(n))


def _first_largest(numbers: Sequence[float]) -> int:
    return max(range(len(numbers)), key=numbers.__getitem__)
