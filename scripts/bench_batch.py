"""A batch beside `LLM.generate` of the same prompts, or on Ray beside one without, in turn: what is lost on the way.

    python scripts/bench_batch.py --rounds 3
    python scripts/bench_batch.py --ray

Each has one engine of the same options, and answers of 16 to 80 tokens. Without Ray times are of all rows, from a
loaded model on. With --ray the batch is answered by one worker on a cluster of its own, and both are looked at from
their first answers on, five times a second. The answers must be the same.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tinyserve import LLM, SamplingParams
from tinyserve.batch import BatchProgress, on_ray, run_batch
from tinyserve.cluster import connect

TEXT = (
    "In the morning the ships lay still in the harbour, and the men who had come down from the hills stood on the quay "
    "and counted them. Nobody spoke."
)


class Run(NamedTuple):
    """What was answered, and how fast."""

    tokens_per_second: float
    texts: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="a worker on Ray, by a batch without")
    arguments = parser.parse_args()
    prompts = [f"{i}. {TEXT[i % 40 :]}" for i in range(arguments.rows)]
    params = [SamplingParams(max_tokens=16 + i * 37 % 65, temperature=0, ignore_eos=True) for i in range(len(prompts))]
    options = {"dtype": arguments.dtype, "enable_prefix_caching": False}
    with tempfile.TemporaryDirectory() as name:
        given, output = Path(name) / "in.jsonl", Path(name) / "out.jsonl"
        given.write_text("".join(line(*row, arguments.model) for row in zip(prompts, params, strict=True)))
        batch = partial(batched, given, output, arguments.model, options)
        works: dict[str, Callable[[], Run]] = (
            {"batch": partial(batch, from_first=True), "on Ray": partial(batch, from_first=True, address="auto")}
            if arguments.ray
            else {"generate": partial(generated, arguments.model, prompts, params, options), "batch": batch}
        )
        one, other = works
        ratios = []
        for turn in range(arguments.rounds):
            runs = {name: works[name]() for name in ((one, other) if turn % 2 else (other, one))}
            assert runs[one].texts == runs[other].texts
            ratios.append(runs[other].tokens_per_second / runs[one].tokens_per_second)
            said = "   ".join(f"{name} {runs[name].tokens_per_second:7.1f} tokens/s" for name in works)
            print(f"{said}   {ratios[-1]:.3f}", flush=True)
    print(f"{other} / {one}: {statistics.median(ratios):.3f} (median of {arguments.rounds})")


def line(prompt: str, params: SamplingParams, model: str) -> str:
    """A row as OpenAI's batches have it."""
    body = {"model": model, "prompt": prompt, "max_tokens": params.max_tokens, "temperature": 0, "ignore_eos": True}
    return json.dumps({"custom_id": prompt, "method": "POST", "url": "/v1/completions", "body": body}) + "\n"


def generated(model: str, prompts: list[str], params: list[SamplingParams], options: dict[str, Any]) -> Run:
    """All prompts by one call."""
    with LLM(model, **options) as llm:
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, progress_bar=False)
        seconds = time.perf_counter() - started
    answers = [output.outputs[0] for output in outputs]
    return Run(sum(len(answer.token_ids) for answer in answers) / seconds, [answer.text for answer in answers])


def batched(
    given: Path, output: Path, model: str, options: dict[str, Any], from_first: bool = False, address: str | None = None
) -> Run:
    """A whole batch, on a cluster of its own if there is an `address`."""
    seen: list[tuple[float, int]] = []  # seconds and tokens

    def hear(progress: BatchProgress) -> None:
        if not seen or progress.output_tokens > seen[-1][1]:
            seen.append((time.perf_counter() if from_first else progress.seconds, progress.output_tokens))

    if address is None:
        run_batch(given, output, model, restart=True, on_progress=hear, **options)
    else:
        on_ray._TICK_SECONDS = 0.2
        with connect(None):
            run_batch(given, output, model, restart=True, on_progress=hear, address=address, **options)
    begun = next(one for one in seen if one[1]) if from_first else (0.0, 0)
    rows = map(json.loads, output.read_text().split("\n")[:-1])
    texts = [row["response"]["body"]["choices"][0]["text"] for row in rows]
    return Run((seen[-1][1] - begun[1]) / (seen[-1][0] - begun[0]), texts)


if __name__ == "__main__":
    main()
