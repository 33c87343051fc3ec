"""tinyserve beside other engines: the same weights, tokens and threads, in turn in one run; ratios are what counts.

    python scripts/bench_peers.py --model smollm2-135m --rounds 7 --append docs/benchmarks.md
    python scripts/bench_peers.py --model gpt2 --work decode batch --peers llama.cpp:Q8_0 openvino --json gpt2.json

smollm2-135m has its real weights; of any other preset the shape is measured, with random weights. Each model is built
once, into the work folder. All engines are in memory at once, each in a process of its own that waits while the others
work: a large model wants a choice by --peers. The first round warms up and is thrown away.

    prefill   tokens read, up to the logits of the last
    decode    tokens chosen greedily, one sequence, after the first; --depth is how long the prompt was
    batch     the same for several sequences at once, each after a prompt of one token
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from peers import PEERS, NotMeasured, Peer, models, report  # noqa: E402
from peers.runs import add_options, choose, describe, finish, names_of_peers, note, parse, settings  # noqa: E402
from peers.worker import Worker  # noqa: E402

HELP_OF_DTYPES = "of tinyserve (default: int8); int8@Q8_0 is int8 on llama.cpp's file of Q8_0"
PROMPT_STEP = 7919  # prompts are arithmetic: the same for every engine, and no two begin alike


def main() -> None:
    arguments = parse(options())
    chosen, missing = choose(arguments.peers, arguments.dtypes)
    run = describe(arguments, chosen, missing)
    measure(run, arguments, chosen)
    finish(run, report.markdown(run), arguments)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=7)
    parser.add_argument("--dtypes", nargs="+", default=PEERS["tinyserve"].formats, help=HELP_OF_DTYPES)
    others = [name for name in PEERS if name != "tinyserve"]
    help_of_peers = f"PEER or PEER:FORMAT,... (default: {names_of_peers(others)})"
    parser.add_argument("--peers", nargs="*", default=others, help=help_of_peers)
    parser.add_argument("--work", nargs="+", default=["prefill", "decode"], choices=["prefill", "decode", "batch"])
    parser.add_argument("--prefill", type=int, default=512, help="tokens to read (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=64, help="tokens to choose (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=0, help="tokens before those of decode (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sequences at once (default: %(default)s)")
    return parser


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(run: dict[str, Any], arguments: argparse.Namespace, chosen: list[tuple[Peer, str]]) -> None:
    """Start the engines, and let them take turns; what happens is written into the run."""
    jobs = possible(run, arguments)
    run["works"] = list(jobs.values())
    if not jobs:
        return
    vocab_size = models.vocab_size(arguments.model)
    workers: dict[str, Worker] = {}
    try:
        start(workers, jobs, run, arguments, chosen)
        for round_ in range(arguments.rounds + 1):
            for i, (work, label) in enumerate(jobs.items()):
                request, tokens = order(work, arguments, round_ * len(jobs) + i, vocab_size)
                for engine, worker in workers.items():
                    if label in worker.refused:
                        continue
                    try:
                        seconds = worker.ask(request)
                    except NotMeasured as problem:
                        worker.refused.update(jobs.values() if worker.is_dead() else [label])
                        note(run, engine, label, str(problem))
                        continue
                    print(f"round {round_} {label}: {engine:24} {tokens / seconds:9.1f} tokens/s", file=sys.stderr)
                    run["measurements"].append(
                        {"round": round_, "work": label, "engine": engine, "tokens": tokens, "seconds": seconds}
                    )
    finally:
        for worker in workers.values():
            worker.end()


def possible(run: dict[str, Any], arguments: argparse.Namespace) -> dict[str, str]:
    """The works, with what the tables call them, for which the model has positions enough."""
    labels = {
        "prefill": f"prefill of {arguments.prefill} tokens",
        "decode": f"decode of {arguments.decode} tokens at depth {arguments.depth}",
        "batch": f"decode of {arguments.batch} sequences, {arguments.decode} tokens each",
    }
    limit = models.positions(arguments.model)
    jobs = {}
    for work in arguments.work:
        if longest([work], arguments) > limit:
            note(run, "all engines", labels[work], f"{arguments.model} has only {limit} positions")
        else:
            jobs[work] = labels[work]
    return jobs


def longest(works: Iterable[str], arguments: argparse.Namespace) -> int:
    """The positions that the longest of these works takes: prompt and answer."""
    lengths = {
        "prefill": arguments.prefill + 1,
        "decode": max(1, arguments.depth) + arguments.decode + 1,
        "batch": 1 + arguments.decode,
    }
    return max(lengths[work] for work in works)


def start(
    workers: dict[str, Worker],
    jobs: Iterable[str],
    run: dict[str, Any],
    arguments: argparse.Namespace,
    chosen: list[tuple[Peer, str]],
) -> None:
    """Fill `workers` with an engine each, as far as they can load the model."""
    setting = settings(arguments, longest(jobs, arguments), arguments.batch if "batch" in jobs else 0)
    for engine, (peer, format) in zip(run["engines"], chosen, strict=True):
        print(f"{engine}: building and loading", file=sys.stderr)
        try:
            workers[engine] = Worker(engine, {"peer": peer.name, "format": format, **setting})
        except NotMeasured as problem:
            note(run, engine, "", str(problem))


def order(work: str, arguments: argparse.Namespace, seed: int, vocab_size: int) -> tuple[list[Any], int]:
    """The request of a work, and the tokens that its seconds are for."""
    count = arguments.decode
    if work == "prefill":
        return ["prefill", prompt(arguments.prefill, seed, vocab_size)], arguments.prefill
    if work == "decode":
        return ["decode", prompt(max(1, arguments.depth), seed, vocab_size), count], count
    prompts = [prompt(1, seed + i, vocab_size) for i in range(arguments.batch)]
    return ["batch", prompts, count], count * arguments.batch


def prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    return [PROMPT_STEP * (i + seed + 1) % vocab_size for i in range(length)]


if __name__ == "__main__":
    main()
