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
import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from peers import PEERS, NotMeasured, Peer, models, report  # noqa: E402
from peers.worker import Worker  # noqa: E402

SHIPPED = "weights as shipped, in Q4_1, from which the other formats are made"
PROMPT_STEP = 7919  # prompts are arithmetic: the same for every engine, and no two begin alike


def main() -> None:
    arguments = parse()
    chosen, missing = choose(arguments.peers, arguments.dtypes)
    run = describe(arguments, chosen, missing)
    measure(run, arguments, chosen)
    table = report.markdown(run)
    print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if arguments.append:
        with arguments.append.open("a", encoding="utf-8") as file:
            file.write("\n" + table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.REAL, help="a preset (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=PEERS["tinyserve"].formats, help="of tinyserve (default: int8)")
    others = [name for name in PEERS if name != "tinyserve"]
    formats = "; ".join(f"{name}:{','.join(PEERS[name].formats)}" for name in others)
    parser.add_argument("--peers", nargs="*", default=others, help=f"PEER or PEER:FORMAT,... (default: {formats})")
    parser.add_argument("--work", nargs="+", default=["prefill", "decode"], choices=["prefill", "decode", "batch"])
    parser.add_argument("--prefill", type=int, default=512, help="tokens to read (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=64, help="tokens to choose (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=0, help="tokens before those of decode (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sequences at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="that count; one more comes first (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, help="for the built models (default: in the user's cache folder)")
    parser.add_argument("--json", type=Path, help="a file for all single measurements")
    parser.add_argument("--append", type=Path, help="a Markdown file to append the tables to")
    arguments = parser.parse_args()
    if arguments.workdir is None:
        import platformdirs

        arguments.workdir = Path(platformdirs.user_cache_dir("tinyserve", appauthor=False)) / "peers"
    return arguments


def choose(peers: list[str], dtypes: list[str]) -> tuple[list[tuple[Peer, str]], list[dict[str, str]]]:
    """What to measure, as engines in their formats, and what is not installed, with the way to it."""
    chosen = [(PEERS["tinyserve"], dtype) for dtype in dtypes]
    missing = []
    for name, _, formats in (peer.partition(":") for peer in peers):
        if name not in PEERS or name == "tinyserve":
            raise SystemExit(f"There is no peer {name!r}; there are {', '.join(p for p in PEERS if p != 'tinyserve')}.")
        peer = PEERS[name]
        if peer.missing():
            missing.append({"name": name, "install": f"`{peer.install}` (needs {', '.join(peer.missing())})"})
        else:
            chosen += [(peer, format) for format in (formats.split(",") if formats else peer.formats)]
    return chosen, missing


def describe(
    arguments: argparse.Namespace, chosen: list[tuple[Peer, str]], missing: list[dict[str, str]]
) -> dict[str, Any]:
    """The run so far: everything but measurements."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, cwd=ROOT
    )
    packages = {name for peer, _ in chosen for name in peer.packages}
    return {
        "model": arguments.model,
        "weights": SHIPPED if arguments.model == models.REAL else "random weights of this shape",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "date": str(date.today()),
        "commit": commit.stdout.strip() or "unknown",
        "processor": processor(),
        "dot_product": dot_product_path(),
        "versions": {name: metadata.version(name) for name in sorted(packages)},
        "engines": [f"{peer.name} {format}" for peer, format in chosen],
        "works": [],
        "measurements": [],
        "not_measured": [],
        "missing": missing,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


def dot_product_path() -> str:
    try:
        from tinyserve.tensor import dot_product
    except ImportError:
        return "unknown"
    return dot_product.PATH


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
    setting = {
        "model": arguments.model,
        "workdir": str(arguments.workdir.resolve()),
        "threads": arguments.threads,
        "max_length": longest(jobs, arguments),
        "sequences": arguments.batch if "batch" in jobs else 0,
    }
    for engine, (peer, format) in zip(run["engines"], chosen, strict=True):
        print(f"{engine}: building and loading", file=sys.stderr)
        try:
            workers[engine] = Worker(engine, {"peer": peer.name, "format": format, **setting})
        except NotMeasured as problem:
            note(run, engine, "", str(problem))


def note(run: dict[str, Any], engine: str, work: str, reason: str) -> None:
    """Say, now and in the report, what was not measured; without a work, all of them."""
    print(f"{engine} not measured{work and f', {work}'}: {reason}", file=sys.stderr)
    run["not_measured"].append({"engine": engine, "work": work, "reason": reason})


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
