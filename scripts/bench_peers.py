"""tinyserve beside other engines: the same file, prompt and threads, taking turns in one run; ratios are what counts.

Each engine lives in a process of its own that waits while the others work. Peers that are not installed are named.

    OPENBLAS_CORETYPE= python scripts/bench_peers.py --model smollm2-135m --rounds 7 [--append docs/benchmarks.md]
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Protocol

PROMPT_STEP = 7919  # prompts are arithmetic, so that every engine gets the same tokens and none has seen them before


class Engine(Protocol):
    """Seconds for a prefill of `length` tokens, and for decoding `count` tokens after a short prompt."""

    def prefill(self, length: int, seed: int) -> float: ...

    def decode(self, count: int) -> float: ...


def prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    return [(PROMPT_STEP * (i + seed)) % vocab_size for i in range(length)]


class Tinyserve:
    def __init__(self, path: str, threads: int, dtype: str):
        from tinyserve import LLM

        self.llm = LLM(path, dtype=dtype, num_threads=threads, max_model_len=2048)

    def prefill(self, length: int, seed: int) -> float:
        from tinyserve import SamplingParams

        ids = prompt(length, seed, self.llm.config.vocab_size)
        start = perf_counter()
        self.llm.generate([ids], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        return perf_counter() - start

    def decode(self, count: int) -> float:
        from tinyserve import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count + 1, ignore_eos=True)
        (output,) = self.llm.generate([[1]], params)
        return count / output.metrics.decode_tokens_per_second


class LlamaCpp:
    def __init__(self, path: str, threads: int):
        from llama_cpp import Llama

        self.llm = Llama(
            path, n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def prefill(self, length: int, seed: int) -> float:
        self.llm.reset()
        ids = prompt(length, seed, self.llm.n_vocab())
        start = perf_counter()
        self.llm.eval(ids)
        return perf_counter() - start

    def decode(self, count: int) -> float:
        self.llm.reset()
        self.llm.eval([1])
        start = perf_counter()
        for token in prompt(count, 0, self.llm.n_vocab()):
            self.llm.eval([token])
        return perf_counter() - start


def serve(name: str, path: str, threads: int) -> None:
    """The worker's loop: a JSON request a line, seconds as the answer."""
    engine: Engine = LlamaCpp(path, threads) if name == "llama.cpp" else Tinyserve(path, threads, name.split()[1])
    print("ready", flush=True)
    for line in sys.stdin:
        work, *arguments = json.loads(line)
        print(getattr(engine, work)(*arguments), flush=True)


class Worker:
    """One engine in its own process."""

    def __init__(self, name: str, path: str, threads: int):
        command = [sys.executable, __file__, "--serve", name, "--model", path, "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read()

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"An engine ended with exit code {self.process.wait()}.")
        return line

    def ask(self, *request: object) -> float:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return float(self.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a preset that is a GGUF file, or a .gguf file")
    parser.add_argument("--dtypes", nargs="+", default=["int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--append", type=Path, help="a Markdown file to append the table to")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.model, arguments.threads)
        return
    from tinyserve import hub

    path = str(hub.resolve(arguments.model))
    names = [f"tinyserve {dtype}" for dtype in arguments.dtypes]
    missing = []
    if importlib.util.find_spec("llama_cpp"):
        names.append("llama.cpp")
    else:
        missing.append("llama.cpp (pip install 'tinyserve[peers]')")
    workers = {name: Worker(name, path, arguments.threads) for name in names}
    jobs = {
        f"prefill {arguments.prefill}": ("prefill", arguments.prefill),
        f"decode {arguments.decode}": ("decode", arguments.decode),
    }
    rates: dict[tuple[str, str], list[float]] = {}
    for round_ in range(arguments.rounds + 1):
        for job, (work, count) in jobs.items():
            for name, worker in workers.items():
                seconds = worker.ask(work, count, round_) if work == "prefill" else worker.ask(work, count)
                if round_:  # the first round warms caches up
                    rates.setdefault((job, name), []).append(count / seconds)
                print(f"round {round_} {name:20} {job:12} {count / seconds:8.1f} tokens/s", file=sys.stderr)
    table = report(jobs, names, rates, arguments, missing)
    print(table)
    if arguments.append:
        with arguments.append.open("a", encoding="utf-8") as file:
            file.write("\n" + table)


def report(jobs, names, rates, arguments, missing) -> str:
    """A Markdown table of medians, with each engine's ratio to the last one, pair by pair."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [
        f"### {arguments.model}, {arguments.threads} threads, {date.today()}, commit {commit}",
        "",
        f"{processor()}; medians of {arguments.rounds} rounds, engines in turn; tokens/s.",
        "",
        "| work | " + " | ".join(names) + f" | first against {names[-1]} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for job in jobs:
        cells = [f"{statistics.median(rates[job, name]):.0f}" for name in names]
        pairs = [a / b for a, b in zip(rates[job, names[0]], rates[job, names[-1]], strict=True)]
        cells.append(f"**{statistics.median(pairs):.2f} ×** ({min(pairs):.2f} to {max(pairs):.2f})")
        lines.append(f"| {job} | " + " | ".join(cells) + " |")
    lines += [""] + [f"Not installed, so not measured: {name}." for name in missing]
    return "\n".join(lines).rstrip() + "\n"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


if __name__ == "__main__":
    main()
