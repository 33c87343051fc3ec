"""tinyserve's engine under load: many requests at once, shared prefixes, a long prompt, and what scheduling adds.

    python scripts/bench_engine.py --append docs/benchmarks.md
    python scripts/bench_engine.py --work throughput --requests 16 --max-num-seqs 8 16 --llama-batches 8 16

Models and engines are those of bench_peers.py: one process each, in turn, and the first round is not counted. A folder
of safetensors is a model too.

    throughput   requests that are all there at the beginning: tinyserve's engine, a loop of single requests in
                 tinyserve, and llama.cpp in batches, as its llama-batched-bench works. Of several numbers of sequences
                 at once the first round finds each engine's best, and only that goes on.
    prefix       requests that arrive together and share a system prompt, then a second such wave, with prefix caching
                 and without: the time to the first token
    overhead     what scheduling and sampling add to a step in which all sequences decode
    gaps         the longest wait between tokens of running streams while a long prompt is read beside them, and the
                 time of one chunk of that prompt, read alone

All prompts are random tokens. prefix, overhead and gaps are measured in the first of --dtypes.
"""

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from peers import NotMeasured, Peer, engine_report, models  # noqa: E402
from peers.runs import add_options, choose, describe, finish, note, parse, settings  # noqa: E402
from peers.worker import Worker  # noqa: E402

LEAD = 8  # tokens that every stream has for itself before the long prompt comes

Run = dict[str, Any]
Chosen = list[tuple[Peer, str]]


def main() -> None:
    arguments = parse(options())
    chosen, missing = choose(arguments.peers if "throughput" in arguments.work else [], arguments.dtypes)
    run = describe(arguments, chosen, missing) | {"engines": [], "search": []}
    for work in arguments.work:
        WORKS[work](run, arguments, chosen)
    finish(run, engine_report.markdown(run), arguments)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--work", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--dtypes", nargs="+", default=["int8", "w8a8"], help="of tinyserve (default: int8 w8a8)")
    parser.add_argument("--peers", nargs="*", default=["llama.cpp:Q8_0"], help="llama.cpp or llama.cpp:FORMAT,...")
    parser.add_argument("--max-num-batched-tokens", default=512, **number, help="tokens of a step (default: 512)")
    group = parser.add_argument_group("throughput")
    group.add_argument("--requests", default=64, **number, help="(default: 64)")
    group.add_argument("--prompt", default=128, **number, help="tokens of each prompt (default: 128)")
    group.add_argument("--output", default=64, **number, help="tokens of each answer (default: 64)")
    group.add_argument("--loop", default=8, **number, help="requests of them in the loop of single ones (default: 8)")
    several = number | {"nargs": "+"}
    group.add_argument("--max-num-seqs", default=[64], **several, help="tinyserve's, at once (default: 64)")
    group.add_argument("--llama-batches", default=[8, 16, 32, 64], **several, help="at once (default: 8 16 32 64)")
    group = parser.add_argument_group("prefix")
    group.add_argument("--wave", default=16, **number, help="requests of a wave (default: 16)")
    group.add_argument("--shared", default=400, **number, help="tokens of the system prompt (default: 400)")
    group.add_argument("--own", default=20, **number, help="tokens that follow it in each prompt (default: 20)")
    group = parser.add_argument_group("overhead")
    group.add_argument("--sequences", default=32, **number, help="(default: 32)")
    group.add_argument("--steps", default=64, **number, help="(default: 64)")
    group = parser.add_argument_group("gaps")
    group.add_argument("--streams", default=8, **number, help="(default: 8)")
    group.add_argument("--long", default=4096, **number, help="tokens of the long prompt (default: 4096)")
    return parser


def throughput(run: Run, arguments: argparse.Namespace, chosen: Chosen) -> None:
    """Round by round, one way of answering all requests after the other; rates are of the answers' tokens."""
    count, length = arguments.requests, arguments.prompt + arguments.output
    label = f"{count} requests of {arguments.prompt} + {arguments.output} tokens"
    if not fits(run, arguments, label, length):
        return
    run["works"].append(label)
    with workers() as start:
        ways = start_ways(run, label, arguments, chosen, start)
        for round_ in range(arguments.rounds + 1):
            prompts = prompts_of(arguments, f"throughput {round_}", count, arguments.prompt)
            for way in list(ways):
                name, (worker, method, requests) = way, ways[way]
                try:
                    seconds = worker.ask([method, prompts[:requests], arguments.output])
                except NotMeasured as problem:
                    note(run, name, label, str(problem))
                    del ways[way]
                    continue
                tokens = requests * arguments.output
                say(round_, name, f"{tokens / seconds:.1f} tokens/s")
                measurement = {"round": round_, "work": label, "engine": name, "tokens": tokens, "seconds": seconds}
                run["measurements"].append(measurement | {"requests": requests})
                if name.startswith("tinyserve "):
                    run["measurements"][-1]["in_model"] = worker.ask(["seconds_in_model"])
            if round_ == 0:
                ways = best_of(run, ways)
        run["engines"] = list(ways)


def start_ways(
    run: Run, label: str, arguments: argparse.Namespace, chosen: Chosen, start: Callable[..., Worker]
) -> dict[str, tuple[Worker, str, int]]:
    """Name -> (worker, its method, requests): an engine with a number of sequences at once, or tinyserve's loop."""
    ways: dict[str, tuple[Worker, str, int]] = {}
    budget = arguments.max_num_batched_tokens
    length = arguments.prompt + arguments.output + 1
    for peer, format in chosen:
        is_ours = peer.name == "tinyserve"
        for sequences in arguments.max_num_seqs if is_ours else arguments.llama_batches:
            name = f"{peer.name} {format}, {sequences} at once"
            more = {"max_num_batched_tokens": budget} if is_ours else {}
            try:
                worker = start(name, peer.name, format, settings(arguments, length, sequences, **more))
                # The first round is for choosing: nobody shall compile, or touch memory for the first time, in it.
                worker.ask(["batch", prompts_of(arguments, "warm-up", min(sequences, 8), arguments.prompt), 4])
            except NotMeasured as problem:
                note(run, name, label, str(problem))
                continue
            ways[name] = worker, "batch", arguments.requests
            if is_ours:
                loop = f"a loop in tinyserve {format}"
                ways.setdefault(loop, (worker, "one_by_one", min(arguments.loop, arguments.requests)))
    return ways


def best_of(run: Run, ways: dict[str, tuple[Worker, str, int]]) -> dict[str, tuple[Worker, str, int]]:
    """The ways without those that another number of sequences at once has beaten in the first round."""
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for measurement in run["measurements"]:
        if measurement["round"] == 0 and measurement["engine"] in ways:
            families[measurement["engine"].partition(",")[0]].append(measurement)
    best = {max(family, key=lambda m: m["tokens"] / m["seconds"])["engine"] for family in families.values()}
    run["search"] = [family for family in families.values() if len(family) > 1]
    return {name: way for name, way in ways.items() if name in best}


def prefix(run: Run, arguments: argparse.Namespace, chosen: Chosen) -> None:
    """Two waves a round; a system prompt is a new one in each round, and the ends are never the same."""
    label = f"waves of {arguments.wave} requests, {arguments.shared} shared tokens and {arguments.own} of their own"
    length = arguments.shared + arguments.own + LEAD
    if not fits(run, arguments, label, length):
        return
    run["prefix"] = {"label": label, "measurements": []}
    with workers() as start:
        engines = {
            name: start_ours(start, arguments, chosen, f"{name} prefix caching", length, arguments.wave, **option)
            for name, option in (
                ("with", {"enable_prefix_caching": True}), ("without", {"enable_prefix_caching": False}),
            )
        }  # fmt: skip
        for round_ in range(arguments.rounds + 1):
            (system,) = prompts_of(arguments, f"system {round_}", 1, arguments.shared)
            waves = [
                [system + end for end in prompts_of(arguments, f"end {round_} {i}", arguments.wave, arguments.own)]
                for i in range(2)
            ]
            for name, worker in engines.items():
                answers = [worker.ask(["wave", wave, LEAD]) for wave in waves]
                say(round_, name, f"{[max(answer['seconds']) for answer in answers]} s to the last first token")
                run["prefix"]["measurements"].append({"round": round_, "caching": name, "waves": answers})


def overhead(run: Run, arguments: argparse.Namespace, chosen: Chosen) -> None:
    sequences, budget = arguments.sequences, arguments.max_num_batched_tokens
    label = f"a step of {sequences} sequences"
    prompt = max(1, budget // sequences)  # all prompts in one step: all sequences begin and end together
    length = prompt + arguments.steps + 1
    if not fits(run, arguments, label, length):
        return
    run["overhead"] = {"label": label, "measurements": []}
    with workers() as start:
        worker = start_ours(start, arguments, chosen, "overhead", length, sequences)
        for round_ in range(arguments.rounds + 1):
            for sampling in ("greedy", "sampled"):
                prompts = prompts_of(arguments, f"overhead {round_} {sampling}", sequences, prompt)
                answer = worker.ask(["steps", prompts, arguments.steps + 1, sampling])
                added = 1000 * (sum(answer["whole"]) - sum(answer["in_model"])) / len(answer["whole"])
                say(round_, sampling, f"{added:.2f} ms a step")
                run["overhead"]["measurements"].append({"round": round_, "sampling": sampling, **answer})


def gaps(run: Run, arguments: argparse.Namespace, chosen: Chosen) -> None:
    streams, budget = arguments.streams, arguments.max_num_batched_tokens
    label = f"{streams} streams and a prompt of {arguments.long} tokens"
    left = budget - streams
    # While prompts are read, streams that are ready go on; and small models make many tokens before the late one comes.
    count = 10 * LEAD + ceil(streams * arguments.prompt / left) + ceil(arguments.long / left)
    length = max(arguments.long + 1, arguments.prompt + count)
    if not fits(run, arguments, label, length):
        return
    run["gaps"] = {"label": label, "chunk": budget, "measurements": []}
    with workers() as start:
        worker = start_ours(start, arguments, chosen, "gaps", length + 1, streams + 1)
        for round_ in range(arguments.rounds + 1):
            first, second = prompts_of(arguments, f"long {round_}", 2, arguments.long)
            prompts = prompts_of(arguments, f"streams {round_}", streams, arguments.prompt)
            chunks = worker.ask(["chunks", first])
            answer = worker.ask(["gaps", prompts, count, second, LEAD])
            say(round_, "gaps", f"slowest {max(answer['during']):.3f} s, slowest chunk alone {max(chunks):.3f} s")
            run["gaps"]["measurements"].append({"round": round_, "chunks": chunks, **answer})


WORKS = {"throughput": throughput, "prefix": prefix, "overhead": overhead, "gaps": gaps}


# --- parts ----------------------------------------------------------------------------------------------------------


@contextmanager
def workers() -> Iterator[Callable[..., Worker]]:
    """A function that starts workers, each model in each format built once; all of them end with the block."""
    started: list[Worker] = []
    paths: dict[tuple[str, str], str] = {}

    def start(name: str, peer: str, format: str, setting: dict[str, Any]) -> Worker:
        print(f"{name}: building and loading", file=sys.stderr)
        built = {"path": paths[peer, format]} if (peer, format) in paths else {}
        started.append(Worker(name, {"peer": peer, "format": format, **setting, **built}))
        paths[peer, format] = started[-1].path
        return started[-1]

    try:
        yield start
    finally:
        for worker in started:
            worker.end()


def start_ours(
    start: Callable[..., Worker],
    arguments: argparse.Namespace,
    chosen: Chosen,
    name: str,
    max_length: int,
    sequences: int,
    **more: Any,
) -> Worker:
    peer, format = chosen[0]
    more["max_num_batched_tokens"] = arguments.max_num_batched_tokens
    setting = settings(arguments, max_length, sequences, **more)
    return start(f"{peer.name} {format} {name}", peer.name, format, setting)


def fits(run: Run, arguments: argparse.Namespace, work: str, length: int) -> bool:
    limit = models.positions(arguments.model)
    if length >= limit:
        note(run, "all engines", work, f"{run['model']} has only {limit} positions")
    return length < limit


def prompts_of(arguments: argparse.Namespace, seed: str, count: int, length: int) -> list[list[int]]:
    """Random tokens, the same for every engine; no two prompts begin alike."""
    numbers, vocab_size = random.Random(seed), models.vocab_size(arguments.model)
    firsts = numbers.sample(range(vocab_size), count)
    return [[first, *numbers.choices(range(vocab_size), k=length - 1)] for first in firsts]


def say(round_: int, name: str, result: str) -> None:
    print(f"round {round_} {name:32} {result}", file=sys.stderr)


if __name__ == "__main__":
    main()
