"""A fleet beside a plain server on the same processor, in turn, medians: what the way through a front costs.

    python scripts/bench_fleet.py front --model smollm2-135m
    python scripts/bench_fleet.py front --model llama-3.2-1b --load-format dummy --tokens 32
    python scripts/bench_fleet.py replicas
    python scripts/bench_fleet.py idle
    python scripts/bench_fleet.py ready

front: first token, throughput and processor time of a replica behind a front, by those of a server.
replicas: two replicas of half the threads, by one server of all.
idle: a server beside a Ray cluster that has nothing to do, by the same while the cluster is stopped.
ready: from the command to the first 200 of /ready, of a fleet of two replicas and of a server.

Processor time is that of all processes of a server and their children, in which a cluster of its own is. The client
reads bytes and looks for an answer's end alone, for it takes its time from the same processors.
"""

import argparse
import asyncio
import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from soaking.checks import family

TICKS = os.sysconf("SC_CLK_TCK")
END = b"data: [DONE]"


@dataclass
class Server:
    """A server of its own process."""

    url: str
    pid: int
    ready: float  # seconds from the command on

    def processor_seconds(self) -> float:
        """What it and its children have used, of those that live."""
        used = 0
        for pid in family(self.pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                used += int(fields[11]) + int(fields[12])
        return used / TICKS


@dataclass
class Load:
    """What was measured of some streams at a time."""

    tokens_per_second: float
    processor_ms: float  # for a token
    first_ms: float  # until the first event of the first stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["front", "replicas", "idle", "ready"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--threads", type=int, default=2, help="of the plain server (default: 2)")
    parser.add_argument("--streams", type=int, help="at a time (default: 8, of replicas 16)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (default: 128)")
    parser.add_argument("--rounds", type=int, default=7, help="that count; one more comes first (default: 7)")
    arguments = parser.parse_args()
    {"front": front, "replicas": replicas, "idle": idle, "ready": ready}[arguments.what](arguments)


# --- what is compared -------------------------------------------------------------------------------------------------


def front(arguments: argparse.Namespace) -> None:
    """A front with one replica, by a server."""
    with serve(arguments) as plain, serve(arguments, "--replicas", "1") as fleet:
        pair = (plain, fleet)
        firsts = in_turn([lambda one=one: load(one, 1, 1).first_ms for one in pair], 10 * arguments.rounds)  # type: ignore[misc]
        one, two = map(statistics.median, firsts)
        print(f"first token: server {one:.2f} ms, fleet {two:.2f} ms, {two - one:+.2f} ms (p50 of {len(firsts[0])})")
        streams = arguments.streams or 8
        compare("server", "fleet", pair, streams, arguments)


def replicas(arguments: argparse.Namespace) -> None:
    """Two replicas, by a server with the threads of both."""
    with serve(arguments) as plain, serve(arguments, "--replicas", "2", threads=arguments.threads // 2) as fleet:
        compare("server", "two replicas", (plain, fleet), arguments.streams or 16, arguments)


def idle(arguments: argparse.Namespace) -> None:
    """A server beside a cluster that does nothing, by the same beside one whose processes are stopped."""
    with serve(arguments) as plain, cluster() as pid:

        def measure(number: int) -> float:
            for one in family(pid):
                os.kill(one, number)
            time.sleep(0.5)
            return load(plain, arguments.streams or 1, arguments.tokens).tokens_per_second

        stopped, beside = in_turn([lambda: measure(signal.SIGSTOP), lambda: measure(signal.SIGCONT)], arguments.rounds)
        one, two = statistics.median(stopped), statistics.median(beside)
        print(f"beside an idle cluster: {two:.1f} tokens/s, alone {one:.1f}: {ratio(stopped, beside)}")


def ready(arguments: argparse.Namespace) -> None:
    """A fleet of two replicas, and a server, each started anew."""

    def started(*options: str) -> float:
        with serve(arguments, *options, threads=1) as server:
            return server.ready

    times = in_turn([lambda: started(), lambda: started("--replicas", "2")], max(1, arguments.rounds // 2))
    one, two = map(statistics.median, times)
    print(f"ready: server {one:.1f} s, two replicas {two:.1f} s ({min(times[1]):.1f} to {max(times[1]):.1f})")


def compare(name: str, other: str, servers: Sequence[Server], streams: int, arguments: argparse.Namespace) -> None:
    """Print throughput and processor time under a number of streams."""
    loads = in_turn([lambda one=one: load(one, streams, arguments.tokens) for one in servers], arguments.rounds)  # type: ignore[misc]
    speeds = [[one.tokens_per_second for one in each] for each in loads]
    costs = [statistics.median(one.processor_ms for one in each) for each in loads]
    print(
        f"{streams} streams: {name} {statistics.median(speeds[0]):.1f} tokens/s, {other} "
        f"{statistics.median(speeds[1]):.1f}: {ratio(*speeds)}\n"
        f"processor time for a token: {name} {costs[0]:.2f} ms, {other} {costs[1]:.2f}: {costs[1] - costs[0]:+.2f} ms"
    )


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    """The median of what rounds say, with the least and the most."""
    pairs = [b / a for a, b in zip(one, other, strict=True)]
    return f"{statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})"


def in_turn(works, rounds: int) -> list[list]:  # type: ignore[no-untyped-def,type-arg]
    """What each of some works says in each round, which begin with either; a first round does not count."""
    said: list[list] = [[] for _ in works]  # type: ignore[type-arg]
    for turn in range(rounds + 1):
        for place in range(len(works)) if turn % 2 else reversed(range(len(works))):
            one = works[place]()
            if turn:
                said[place].append(one)
    return said


# --- servers and clients ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(arguments: argparse.Namespace, *options: str, threads: int | None = None) -> Iterator[Server]:
    """A server that is ready."""
    command = [sys.executable, "-m", "tinyserve", "serve", arguments.model, "--port", "0", *options]
    command += ["--threads", str(threads or arguments.threads), "--dtype", arguments.dtype]
    command += ["--load-format", arguments.load_format, "--kv-cache-memory", "0.5", "--max-model-len", "1024"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    try:
        said = []
        while (line := lines.get()) and not line.startswith("http"):
            said.append(line)
        if not line:
            sys.exit("The server did not start:\n" + "".join(said[-8:]))
        url = line.split()[0]
        while not is_ready(url):
            time.sleep(0.05)
        yield Server(url, process.pid, time.monotonic() - started)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def is_ready(url: str) -> bool:
    """Whether a server says so."""
    try:
        with urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


@contextlib.contextmanager
def cluster() -> Iterator[int]:
    """A Ray cluster as a fleet has it, in another process."""
    script = """
import sys
from tinyserve.cluster import connect

with connect(None):
    print("up", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdin is not None
        while process.stdout.readline().strip() not in ("up", ""):
            pass
        time.sleep(3)
        yield process.pid
    finally:
        for one in family(process.pid):
            os.kill(one, signal.SIGCONT)
        process.communicate("")


def load(server: Server, streams: int, tokens: int) -> Load:
    """Some streams at a time, each to its end."""
    used, started = server.processor_seconds(), time.monotonic()
    firsts = asyncio.run(all_of(server, streams, tokens))
    seconds = time.monotonic() - started
    return Load(
        streams * tokens / seconds,
        (server.processor_seconds() - used) / (streams * tokens) * 1e3,
        1e3 * min(firsts),
    )


async def all_of(server: Server, streams: int, tokens: int) -> list[float]:
    """The seconds until each stream's first event."""
    return await asyncio.gather(*(stream(server.url, number, tokens) for number in range(streams)))


async def stream(url: str, number: int, tokens: int) -> float:
    """Read an answer to its end; returns the seconds until its first event."""
    body = json.dumps({
        "prompt": [(number + j) % 1000 for j in range(32)], "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }).encode()  # fmt: skip
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    started = time.monotonic()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    first, seen = 0.0, b""
    while END not in seen:
        data = await reader.read(65536)
        if not data:
            raise RuntimeError(f"a stream ended early: {seen[-300:]!r}")
        seen = seen[-len(END) :] + data if first else seen + data
        if not first and b"\ndata: " in seen:
            first = time.monotonic() - started
    writer.close()
    return first


if __name__ == "__main__":
    main()
