"""What the benchmarks have in common: their options, what a run says of itself, and where its tables go.

Knows the machine, the commit and the command line; what is measured, and how, is each benchmark's business.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from peers import PEERS, Peer, models

ROOT = Path(__file__).parent.parent.parent
SHIPPED = "weights as shipped, in Q4_1, from which the other formats are made"


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--model", default=models.REAL, help="a preset, or a folder (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    help_of_rounds = "that count; one more comes first (default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=rounds, help=help_of_rounds)
    parser.add_argument("--workdir", type=Path, help="for the built models (default: in the user's cache folder)")
    parser.add_argument("--json", type=Path, help="a file for all single measurements")
    parser.add_argument("--append", type=Path, help="a Markdown file to append the tables to")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if arguments.workdir is None:
        import platformdirs

        arguments.workdir = Path(platformdirs.user_cache_dir("tinyserve", appauthor=False)) / "peers"
    arguments.workdir = arguments.workdir.resolve()
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
        "model": Path(arguments.model).name,
        "weights": SHIPPED if arguments.model == models.REAL else models.weights(arguments.model),
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


def note(run: dict[str, Any], engine: str, work: str, reason: str) -> None:
    """Say, now and in the report, what was not measured; without a work, all of them."""
    print(f"{engine} not measured{work and f', {work}'}: {reason}", file=sys.stderr)
    run["not_measured"].append({"engine": engine, "work": work, "reason": reason})


def finish(run: dict[str, Any], table: str, arguments: argparse.Namespace) -> None:
    """Print the tables, and put them and the run where the options say."""
    print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if arguments.append:
        with arguments.append.open("a", encoding="utf-8") as file:
            file.write("\n" + table)


def settings(arguments: argparse.Namespace, max_length: int, sequences: int, **options: Any) -> dict[str, Any]:
    """What a worker is told beside its engine; `options` go to the engine as they are."""
    return {
        "model": arguments.model,
        "workdir": str(arguments.workdir),
        "threads": arguments.threads,
        "max_length": max_length,
        "sequences": sequences,
        "options": options,
    }


def names_of_peers(others: Sequence[str]) -> str:
    return "; ".join(f"{name}:{','.join(PEERS[name].formats)}" for name in others)
