"""What is lost on the way where a model's layers are in two processes: A B A B in one run, medians.

python scripts/bench_distributed.py slices
python scripts/bench_distributed.py slices --model llama-3.2-1b --load-format dummy --tokens 40

Each process has one thread, as a step has it in one of them at a time: the rows are what a second process costs.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from time import perf_counter

from tinyserve import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["slices"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--tokens", type=int, default=100, help="of an answer (default: 100)")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the long prompt (default: 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more comes first (default: 5)")
    slices(parser.parse_args())


def slices(arguments: argparse.Namespace) -> None:
    """Two slices of a thread each, by one process of one thread."""
    options = {
        "dtype": arguments.dtype, "load_format": arguments.load_format, "num_threads": 1, "max_num_seqs": 8,
        "max_model_len": 4096, "enable_prefix_caching": False,
    }  # fmt: skip
    with LLM(arguments.model, **options) as whole, LLM(arguments.model, **options, pipeline_parallel_size=2) as sliced:
        print("| work | one process | two slices | ratio | more for each step |")
        print("|---|---:|---:|---:|---:|")
        works: dict[str, tuple[int, int, int]] = {
            "decode, one stream": (1, 64, arguments.tokens),
            "decode, 8 streams": (8, 64, arguments.tokens),
            f"prefill of {arguments.prefill} tokens": (1, arguments.prefill, 1),
        }
        for name, (streams, prompt, tokens) in works.items():
            one, two = in_turn(
                partial(seconds, streams=streams, prompt=prompt, tokens=tokens), whole, sliced, arguments.rounds
            )
            steps = tokens if tokens > 1 else -(-prompt // 512)
            print(
                f"| {name} | {streams * max(tokens, prompt // tokens) / one:.1f} tokens/s | "
                f"{streams * max(tokens, prompt // tokens) / two:.1f} | {one / two:.3f} | "
                f"{(two - one) / steps * 1e3:.2f} ms |",
                flush=True,
            )


def seconds(llm: LLM, streams: int, prompt: int, tokens: int) -> float:
    """What answers to some prompts take; without the prompts' own time where they are short."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = perf_counter()
    outputs = llm.generate([[(i + j) % 1000 for j in range(prompt)] for i in range(streams)], params)
    if tokens == 1:
        return perf_counter() - start
    first = max(output.metrics.first_token or 0.0 for output in outputs)
    return max(output.metrics.last_token or 0.0 for output in outputs) - first


def in_turn(work: Callable[[LLM], float], one: LLM, two: LLM, rounds: int) -> tuple[float, float]:
    """The medians of both, taken in turn."""
    taken: dict[LLM, list[float]] = {one: [], two: []}
    for round_ in range(rounds + 1):
        for llm in (one, two) if round_ % 2 else (two, one):
            took = work(llm)
            if round_:
                taken[llm].append(took)
    return statistics.median(taken[one]), statistics.median(taken[two])


if __name__ == "__main__":
    main()
