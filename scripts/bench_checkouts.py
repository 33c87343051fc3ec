"""Two checkouts of tinyserve beside each other: has a change made it slower?

    git worktree add ../before d5bd724
    python scripts/bench_checkouts.py ../before .

Each checkout works in a process of its own, and they take turns. A process keeps its own luck with memory, of 2 or 3 %,
so several pairs of processes are started, now the one first and now the other. Prints medians, and quartiles of ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

WORK = """
import json, sys, time
from tinyserve import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype=sys.argv[2], load_format=sys.argv[3], max_model_len=2048, max_num_seqs=16)
text = [i * 7919 % 20000 + 100 for i in range(512)]
def answer(prompts, tokens, **how):
    params = SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True} | how)
    return llm.generate(prompts, params)[0].metrics
answer([text[:64]], 4), answer([text[:64]] * 2, 4, temperature=0.8, top_p=0.9, seed=3)
print("ready", flush=True)
for i, _ in enumerate(sys.stdin):
    rates = {"decode": answer([[i + 11] + text[:31]], 96).decode_tokens_per_second}
    rates["sampled"] = answer([[i + 12] + text[:31]], 64, temperature=0.8, top_p=0.9, seed=3).decode_tokens_per_second
    rates["prefill of 512"] = answer([[i + 5] + text[:511]], 1).prefill_tokens_per_second
    start = time.perf_counter()
    answer([[100 * i + j + 1] + text[:127] for j in range(16)], 48)
    print(json.dumps(rates | {"batch of 16": 16 * 48 / (time.perf_counter() - start)}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--pairs", type=int, default=4, help="of processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="of each pair (default: %(default)s)")
    arguments = parser.parse_args()
    checkouts = [arguments.before.resolve(), arguments.after.resolve()]
    for checkout in checkouts:
        if not (checkout / "tinyserve" / "llm.py").is_file():
            parser.error(f"{checkout} is no checkout of tinyserve: give the folder that has tinyserve/ in it")
    rates: list[list[dict[str, float]]] = [[], []]
    model = [arguments.model, arguments.dtype, arguments.load_format]
    for pair in range(arguments.pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        processes = {which: start(checkouts[which], model) for which in order}
        for turn in range(arguments.rounds):
            for which in order if turn % 2 == 0 else order[::-1]:
                rates[which].append(ask(processes[which]))
        for process in processes.values():
            process.communicate()
    print("| work | before, tokens/s | after, tokens/s | after over before |\n|---|---:|---:|---|")
    for work in rates[0][0]:
        before, after = ([rate[work] for rate in side] for side in rates)
        low, middle, high = statistics.quantiles((b / a for a, b in zip(before, after, strict=True)), n=4)
        print(
            f"| {work} | {statistics.median(before):.0f} | {statistics.median(after):.0f} "
            f"| **{middle:.3f}** ({low:.3f} to {high:.3f}) |"
        )


def start(checkout: Path, model: list[str]) -> "subprocess.Popen[str]":
    """A process that imports tinyserve from there, with the model loaded; it waits for lines, and does nothing else."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, *model],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
    )  # fmt: skip
    if said(process) != "ready":
        raise SystemExit(f"{checkout} could not load the model: what it said stands above.")
    return process


def ask(process: "subprocess.Popen[str]") -> dict[str, float]:
    """One round's rates, in tokens a second."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    rates: dict[str, float] = json.loads(said(process))
    return rates


def said(process: "subprocess.Popen[str]") -> str:
    """The next line."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


if __name__ == "__main__":
    main()
