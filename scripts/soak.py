"""Drive a server for an hour with mixed clients, and see that it gives the same answers and keeps nothing.

    python scripts/soak.py smollm2-135m --minutes 60 --json soak.json
    python scripts/soak.py --url http://127.0.0.1:8000 --pid 4711 --minutes 5

First each request is made alone. Then clients make them all at once, whole and streamed, some of which leave midway,
between requests that are malformed or cut off, and others that fill the cache. Answers must be those given alone, to
the bit of their log-probabilities; malformed requests an error below 500; every wait bounded. At the end of --warm-up,
and every ten minutes from then on, the clients pause: no cache block may be held, descriptors, threads and processes
must be as many as before, and resident memory within --tolerance of what it was, as under load by its medians. A line
a minute says how it goes. Exits with 1 and a sentence for each violation.

What the requests are stands in soaking/cases.py, what must hold in soaking/checks.py.
"""

import argparse
import asyncio
import contextlib
import json
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
from soaking import cases, checks

SETTLE = 60.0  # seconds for what was cancelled to be gone
PAUSE_EVERY = 600.0  # seconds
TRIMMED = 12.0  # seconds until a server has given back the memory that it does not need: it does so every five
MOST_SENTENCES = 50


@dataclass
class Report:
    """What was done, and what was wrong."""

    model: str = ""
    seed: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    longest: dict[str, float] = field(default_factory=dict)  # seconds, by kind of request
    left_out: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, bytes
    memory_at_rest: list[tuple[float, int]] = field(default_factory=list)  # the same in the pauses
    idle: list[checks.Snapshot] = field(default_factory=list)  # before the load, behind the warm-up, at the end
    violations: list[str] = field(default_factory=list)
    further: int = 0

    def violated(self, sentence: str) -> None:
        """Note a violation; of very many only the number."""
        if len(self.violations) < MOST_SENTENCES:
            self.violations.append(sentence)
        else:
            self.further += 1

    def made(self, kind: str, status: int | str, seconds: float) -> None:
        """Count a request."""
        self.requests[kind] += 1
        self.statuses[str(status)] += 1
        self.longest[kind] = max(self.longest.get(kind, 0.0), seconds)


def main() -> int:
    arguments = options().parse_args()
    if (arguments.model is None) == (arguments.url is None):
        options().error("give a model, or the --url of a server that runs")
    report = Report(model=arguments.model or arguments.url, seed=arguments.seed)
    if arguments.url:
        asyncio.run(soak(arguments.url.rstrip("/"), arguments.pid, arguments, report))
    else:
        with server(arguments, report) as (url, pid):
            asyncio.run(soak(url, pid, arguments, report))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(report), indent=1), encoding="utf-8")
    print(summary(report))
    for sentence in report.violations:
        print(f"VIOLATION: {sentence}")
    if report.further:
        print(f"and {report.further} more")
    return 1 if report.violations else 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a preset or folder to serve")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="with --url, the process whose memory and descriptors are watched")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--warm-up", type=float, help="minutes; 10, or half of a shorter run")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300, help="seconds that any request may take")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of resident memory, a share")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--max-model-len", type=int, default=2048)
    # Small, so that all of it is resident before the warm-up ends: pages of a cache come with their first use.
    parser.add_argument("--kv-cache-memory", type=float, default=0.25, help="GB")
    parser.add_argument("--tool-format", default="hermes")
    parser.add_argument("--dtype", help="of the weights; the model's own by default")
    parser.add_argument("--json", type=Path, help="a file for the whole report")
    return parser


def as_json(report: Report) -> dict[str, Any]:
    """All of it."""
    return vars(report) | {"idle": [asdict(snapshot) for snapshot in report.idle]}


def summary(report: Report) -> str:
    """A paragraph."""
    kind, seconds = max(report.longest.items(), key=lambda item: item[1], default=("", 0.0))
    lines = [
        f"{report.model}, seed {report.seed}: {report.requests.total()} requests, the longest {seconds:.1f} s ({kind})",
        "requests: " + ", ".join(f"{kind} {count}" for kind, count in sorted(report.requests.items())),
        "statuses: " + ", ".join(f"{status} {count}" for status, count in sorted(report.statuses.items())),
    ]
    if report.memory:
        every = max(1, len(report.memory) // 12)
        lines.append("memory, MB: " + " ".join(f"{size / 1e6:.0f}" for _, size in report.memory[::every]))
        lines.append("at rest, MB: " + " ".join(f"{size / 1e6:.0f}" for _, size in report.memory_at_rest))
    lines += [f"idle: {snapshot}" for snapshot in report.idle]
    lines += [f"left out: {sentence}" for sentence in report.left_out]
    return "\n".join(lines)


# --- the server -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(arguments: argparse.Namespace, report: Report) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address, and its process."""
    command = [sys.executable, "-m", "tinyserve", "serve", arguments.model, "--port", "0"]
    for name in ("threads", "max_num_seqs", "max_model_len", "kv_cache_memory", "tool_format", "dtype"):
        if (value := getattr(arguments, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    said: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:  # to its end: a full pipe would stop the server
            said.append(line.rstrip())
            lines.put(line)
            if "Traceback" in line:
                report.violated("The server's log has a traceback.")
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (line := lines.get()) is not None and not line.startswith("http"):
            pass
        if line is None:
            sys.exit("\n".join(["The server did not start:", *said[-5:]]))
        yield line.split()[0], process.pid
        if (code := process.poll()) is not None:
            report.violated(f"The server ended by itself, with exit code {code}: {' / '.join(said[-3:])}")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            if (code := process.wait(SETTLE)) != 130:
                report.violated(f"The server ended with exit code {code} after Ctrl-C, and not with 130.")
        except subprocess.TimeoutExpired:
            process.kill()
            report.violated(f"The server did not end within {SETTLE:.0f} s of Ctrl-C.")


# --- the run ----------------------------------------------------------------------------------------------------------


async def soak(url: str, pid: int | None, arguments: argparse.Namespace, report: Report) -> None:
    """All of it, into `report`."""
    if pid is None:
        report.left_out.append("memory, descriptors and threads: no --pid was given")
    begun = time.monotonic()
    async with session(url) as client:
        await ready(client, arguments.timeout)
        works = await alone(client, await cases.made_for(client), arguments, report)
    seconds = 60 * arguments.minutes
    warm_up = 60 * arguments.warm_up if arguments.warm_up is not None else min(600.0, seconds / 2)
    report.idle.append(await idle(url, pid, report))
    await asyncio.wait_for(burst(url, arguments.clients), arguments.timeout)
    watcher = asyncio.create_task(watch(pid, begun, min(60.0, seconds / 6), report))
    try:
        pauses = max(1, round((seconds - warm_up) / PAUSE_EVERY))
        for phase, length in enumerate((warm_up, *[(seconds - warm_up) / pauses] * pauses)):
            await drive(url, works, length, phase, arguments, report)
            report.idle.append(await idle(url, pid, report, None if phase == 0 else report.idle[1]))
            await asyncio.sleep(min(TRIMMED, length / 10))
            if phase == 0:
                warm = time.monotonic() - begun
            if pid is not None and (size := checks.resident(pid)) is not None:
                report.memory_at_rest.append((time.monotonic() - begun, size))
    finally:
        watcher.cancel()
    for snapshot in report.idle[2:]:
        for sentence in checks.lost(report.idle[1], snapshot):
            report.violated(sentence)
    for sentence in checks.unsteady([one for one in report.memory if one[0] >= warm], arguments.tolerance):
        report.violated(sentence)
    for sentence in checks.grown_at_rest(report.memory_at_rest, arguments.tolerance):
        report.violated(sentence)
    for kind in sorted({work.kind for work in works} - report.requests.keys()):
        report.violated(f"No request of the kind {kind!r} was made: the run was too short.")


def session(url: str) -> httpx.AsyncClient:
    """A client whose requests are bounded by the caller."""
    return httpx.AsyncClient(base_url=url, timeout=None, trust_env=False)


async def ready(client: httpx.AsyncClient, timeout: float) -> None:
    """Wait until the model is there."""
    async with asyncio.timeout(timeout):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.2)


async def alone(
    client: httpx.AsyncClient, works: list[cases.Case], arguments: argparse.Namespace, report: Report
) -> list[cases.Case]:
    """Each case with the answer that it gets alone; one that this model cannot do is left out, and said."""
    kept = []
    for case in works:
        response = await asyncio.wait_for(client.post(case.path, json=case.body), arguments.timeout)
        if response.status_code == 400:
            report.left_out.append(f"{case.kind}: {response.json()['error']['message']}")
            continue
        if response.status_code != 200:
            report.violated(f"{case.kind}, alone: status {response.status_code}, {response.text[:200]}")
            continue
        case.expected = checks.essence(response.json())
        kept.append(case)
    if not kept:
        report.violated("No request was answered, even alone.")
    return kept


async def burst(url: str, clients: int) -> None:
    """Many requests at one moment: pools of threads and processes, which grow when they are asked, become full."""

    async def one(number: int) -> None:
        async with session(url) as client:
            for case in cases.for_pools(number):
                await client.post(case.path, json=case.body)

    await asyncio.gather(*(one(number) for number in range(4 * clients)))


async def drive(
    url: str, works: list[cases.Case], seconds: float, phase: int, arguments: argparse.Namespace, report: Report
) -> None:
    """Clients that make one request after another, until the time is over."""
    end = time.monotonic() + seconds

    async def one(number: int) -> None:
        chance = random.Random(f"{arguments.seed} {phase} {number}")
        async with session(url) as client:
            deck: list[cases.Action] = []
            while time.monotonic() < end:
                if not deck:  # every action once, before any comes again
                    deck = cases.actions(works, chance)
                    chance.shuffle(deck)
                action, start = deck.pop(), time.monotonic()
                status: int | str = "hang"
                try:
                    status, sentence = await asyncio.wait_for(action.run(client, chance), arguments.timeout)
                except TimeoutError:
                    sentence = f"no end within {arguments.timeout:g} s"
                except (httpx.HTTPError, OSError) as error:
                    status, sentence = "broken", f"the connection broke: {error!r}"
                report.made(action.kind, status, time.monotonic() - start)
                if sentence is not None:
                    report.violated(f"{action.kind} (client {number}, phase {phase}): {sentence}")
                if status == "broken":
                    await asyncio.sleep(1)  # the server may be gone: not a million sentences

    await asyncio.gather(*(one(number) for number in range(arguments.clients)))


async def idle(
    url: str, pid: int | None, report: Report, before: checks.Snapshot | None = None, settle: float = SETTLE
) -> checks.Snapshot:
    """What the server holds when nobody asks: once nothing is held, or as many as `before`, or after a while."""
    end = time.monotonic() + settle
    previous: checks.Snapshot | None = None
    while True:
        try:
            async with session(url) as client:
                text = (await asyncio.wait_for(client.get("/metrics"), settle)).text
        except (httpx.HTTPError, TimeoutError) as error:
            report.violated(f"/metrics did not answer: {error!r}")
            return checks.Snapshot()
        snapshot = checks.snapshot(text, pid)
        if time.monotonic() > end:
            break
        steady = snapshot == previous and not checks.held(snapshot)  # connections that end are gone
        if steady and (before is None or not checks.lost(before, snapshot)):
            break
        previous = snapshot
        await asyncio.sleep(0.2)
    for sentence in checks.held(snapshot):
        report.violated(sentence)
    return snapshot


async def watch(pid: int | None, begun: float, interval: float, report: Report) -> None:
    """Note the memory every second, and print a line now and then."""
    line = begun + interval
    while True:
        now = time.monotonic()
        if pid is not None and (size := checks.resident(pid)) is not None:
            report.memory.append((now - begun, size))
        if now >= line:
            line += interval
            memory = f", {report.memory[-1][1] / 1e6:.0f} MB" if report.memory else ""
            longest = max(report.longest.values(), default=0.0)
            print(
                f"{(now - begun) / 60:5.1f} min: {report.requests.total()} requests{memory}, "
                f"the longest {longest:.1f} s, {len(report.violations) + report.further} violations",
                flush=True,
            )
        await asyncio.sleep(min(1.0, interval / 2))


if __name__ == "__main__":
    sys.exit(main())
