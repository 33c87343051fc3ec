"""tinyserve, through its public API; `format` is a dtype, or "int8@Q8_0": a dtype on llama.cpp's file of that format.

Of the real model 4-bit dtypes take the file as shipped, whose bits they keep, and others its float32 widening: int8
would keep 4 bits as well, which is no match for 8. What only tinyserve is asked, by bench_engine.py, comes last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any

from peers import NotMeasured, models
from peers.step_clock import StepClock
from tinyserve import LLM, SamplingParams, TinyserveError

SAMPLING = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.8, "top_p": 0.95, "top_k": 50}}


def prepare(model: str, format: str, workdir: Path) -> str:
    if file := format.partition("@")[2]:
        from peers import llama_cpp_engine

        return llama_cpp_engine.prepare(model, file, workdir)
    keeps_bits = model == models.REAL and format in ("int4", "w4a16", "w4a8")
    return str(models.shipped_gguf() if keeps_bits else models.checkpoint(model, workdir))


class Engine:
    def __init__(self, path: str, format: str, threads: int, max_length: int, sequences: int, **options: Any):
        """`options` are an LLM's own; without, no prefix is cached: what is measured is computed."""
        try:
            self.llm = LLM(
                path,
                dtype=format.partition("@")[0],
                num_threads=threads,
                max_model_len=max_length,
                max_num_seqs=max(1, sequences),
                **{"enable_prefix_caching": False, **options},
            )
        except TinyserveError as error:
            raise NotMeasured(str(error)) from error
        self.in_model = 0.0

    def prefill(self, prompt: list[int]) -> float:
        start = perf_counter()
        self.llm.generate([prompt], _greedy(1))
        return perf_counter() - start

    def decode(self, prompt: list[int], count: int) -> float:
        (output,) = self.llm.generate([prompt], _greedy(count + 1))
        return count / output.metrics.decode_tokens_per_second

    def batch(self, prompts: list[list[int]], count: int) -> float:
        with self._clock() as clock:
            start = perf_counter()
            self.llm.generate(prompts, _greedy(count))
            seconds = perf_counter() - start
        self.in_model = sum(step.in_model for step in clock.steps)
        return seconds

    # --- of the engine alone ------------------------------------------------------------------------------------

    def one_by_one(self, prompts: list[list[int]], count: int) -> float:
        """The same as `batch` for somebody who knows of no batches."""
        start = perf_counter()
        for prompt in prompts:
            self.llm.generate([prompt], _greedy(count))
        return perf_counter() - start

    def seconds_in_model(self) -> float:
        """Of the last `batch`, the part that was spent in the model and its head."""
        return self.in_model

    def wave(self, prompts: list[list[int]], count: int) -> dict[str, list[float]]:
        """Of requests that arrive together, the seconds to the first token, and how many tokens were not computed."""
        outputs = self.llm.generate(prompts, _greedy(count))
        return {
            "seconds": [output.metrics.time_to_first_token for output in outputs],
            "cached": [output.metrics.cached_tokens for output in outputs],
        }

    def steps(self, prompts: list[list[int]], count: int, sampling: str) -> dict[str, list[float]]:
        """The steps in which every sequence decodes: seconds from one to the next, and those in the model."""
        params = SamplingParams(max_tokens=count, ignore_eos=True, **SAMPLING[sampling])
        with self._clock() as clock:
            self.llm.generate(prompts, params)
        full = [
            (following.began - step.began, step.in_model)
            for step, following in pairwise(clock.steps)
            if step.tokens == step.sequences == following.tokens == len(prompts)
        ]
        if not full:
            raise NotMeasured(f"never did {len(prompts)} sequences decode together: ask for more tokens")
        return {"whole": [whole for whole, _ in full], "in_model": [in_model for _, in_model in full]}

    def chunks(self, prompt: list[int]) -> list[float]:
        """Seconds of each full step of a prompt that is read with nothing beside it."""
        with self._clock() as clock:
            self.llm.generate([prompt], _greedy(1))
        steps = clock.steps
        ends = [following.began for following in steps[1:]] + [steps[-1].ended]
        most = max(step.tokens for step in steps)
        return [end - step.began for step, end in zip(steps, ends, strict=True) if step.tokens == most]

    def gaps(self, prompts: list[list[int]], count: int, late: list[int], lead: int) -> dict[str, list[float]]:
        """Seconds between tokens of streams before, and while, a late prompt is read.

        It comes when all have decoded together for `lead` steps. The engine waits until all streams are queued, and
        until it is, so that those of a model that takes no time are not over by then.
        """
        runner, queued, waits, goes_on, together = self.llm.engine.runner, Event(), Event(), Event(), 0
        forward = runner.forward

        def wait(work: Any, rows: Any, all_hidden: bool = False, stream: Any = None) -> Any:
            nonlocal together
            queued.wait()
            together += len(work) == len(prompts) == sum(len(token_ids) for token_ids, _ in work)
            if together > lead and not waits.is_set():
                waits.set()
                goes_on.wait()
            return forward(work, rows, all_hidden, stream)

        wait.begin = forward.begin  # type: ignore[attr-defined]  # as the runner asks a step
        runner.forward = wait
        try:
            streams = [self.llm.stream(prompt, _greedy(count)) for prompt in prompts]
            queued.set()
            while not waits.wait(0.1):
                if not self.llm.engine.has_work():
                    raise NotMeasured(f"never did {len(prompts)} streams decode together: give them more tokens")
            settled, late_stream = perf_counter(), self.llm.stream(late, _greedy(1))
        finally:
            runner.forward = forward
            queued.set()
            goes_on.set()
        times = [list(stream)[-1].metrics.token_times for stream in streams]
        (metrics,) = [chunk.metrics for chunk in late_stream]
        began, ended = metrics.first_scheduled, metrics.first_token
        if ended > min(own[-1] for own in times):
            raise NotMeasured("the streams ended before the late prompt was read: give them more tokens")
        gaps = [pair for own in times for pair in pairwise(own)]
        return {
            "before": [b - a for a, b in gaps if max(own[0] for own in times) <= a and b <= settled],
            "during": [b - a for a, b in gaps if b > began and a < ended],
        }

    @contextmanager
    def _clock(self) -> Iterator[StepClock]:
        runner = self.llm.engine.runner
        forward = runner.forward
        runner.forward = clock = StepClock(forward)
        try:
            yield clock
        finally:
            runner.forward = forward


def _greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
