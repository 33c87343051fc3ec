"""What fuzzers share: JSON that is changed a little, what a sentence is, and a loop over cases that survives a crash.

Every case is made of the seed and its own number, so that it can be made again alone. Knows nothing of what is tried.
"""

import argparse
import itertools
import json
import mmap
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

LONGEST = 1500  # characters of a sentence
MOST_GROWTH = 1 << 30  # bytes
MOST_FAULTS = 20
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64, 10**30, 10**400),
    *(0.5, -0.0, 1e-320, 1e38, 1e308, float("inf"), float("-inf"), float("nan")),
    *(
        "",
        "x",
        "auto",
        "inf",
        "\ud800",
        "\0",
        "\ufeff",
        "../x",
        "/etc/passwd",
        "ü" * 9,
        "{{",
        "{% for x in y %}",
        "x" * 5000,
    ),
    *([], [None], [1], ["x"], [[1]], [{}], [-1, 2**40], {}, {"x": 1}, {"content": 5}, {"type": "x"}, [[]] * 9),
]


# --- what is changed ------------------------------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one or two places changed, gone, or new."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2))):
        found = list(places(value))
        if not found:
            return rng.choice(ODD)
        # Of long lists and vocabularies not all are as interesting as what names them.
        tops = [place for place in found if place[0] is value]
        container, key = rng.choice(tops if rng.random() < 0.5 else found)
        other, other_key = rng.choice(found)
        match rng.randrange(7):
            case 0 if isinstance(container, dict):
                del container[key]
            case 1:
                container[key] = [container[key]]
            case 2:
                container[key] = {"x": container[key]}
            case 3:
                container[key] = json.loads(json.dumps(other[other_key]))
            case 4 if isinstance(container[key], int):
                container[key] += rng.choice((-1, 1, 3, 2**20, -(2**20)))
            case _:
                container[key] = json.loads(json.dumps(rng.choice(ODD)))
    return value


def change_bytes(data: bytes, rng: random.Random, end: int) -> bytes:
    """A few of the first `end` bytes changed, or the data cut off, or a piece of it gone."""
    content = bytearray(data)
    match rng.randrange(6):
        case 0:
            return bytes(content[: rng.randrange(len(content))])
        case 1:
            at = rng.randrange(end)
            del content[at : at + rng.choice((1, 2, 8, 50))]
        case _:
            for _ in range(rng.choice((1, 1, 2, 4))):
                at = rng.randrange(end)
                content[at] = rng.choice((0, 1, 7, 8, 9, 127, 128, 255, rng.randrange(256)))
    return bytes(content)


# --- what comes of it -----------------------------------------------------------------------------------------------

_PYTHON = re.compile(r"Traceback|<class |<function | object at 0x|Internal Server Error|\b\w+(Error|Exception)\b[(:]")


def no_sentence(text: str, given: str = "") -> str:
    """What is wrong with a message to a user, empty where nothing is; what he has written himself may be odd."""
    if not isinstance(text, str) or "\n" in text or text[-1:] not in (".", "?", "!") or len(text) > LONGEST:
        return f"no sentence: {text!r:.300}"
    if (found := _PYTHON.search(text)) and found[0] not in given:
        return f"Python's words: {text!r:.300}"
    return ""


def memory(name: str = "VmHWM") -> int:
    """Bytes of this process's memory, by default the most that it ever had."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


class Fuzzer(Protocol):
    """Tries one case after another."""

    noun: str  # what a case ought to have been

    def describe(self, number: int) -> str:
        """A case, to be read."""
        ...

    def fault(self, number: int) -> str:
        """What is wrong with a case, empty where nothing is."""
        ...


def options(description: str | None) -> argparse.ArgumentParser:
    """What every fuzzer is told on its command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other cases")
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument("--seconds", type=float, default=60, help="how long to go on")
    how_many.add_argument("--count", type=int, help="how many cases, however long they take")
    how_many.add_argument("--case", type=int, help="make this case alone, and show it")
    return parser


def numbers(arguments: argparse.Namespace) -> Iterator[int]:
    """The numbers of the cases to try: the one asked for, or so many, or what there is time for."""
    if arguments.case is not None:
        yield arguments.case
    elif arguments.count is not None:
        yield from range(arguments.count)
    else:
        end = time.monotonic() + arguments.seconds
        for number in itertools.count():
            if time.monotonic() >= end:
                return
            yield number


def main(description: str | None, make: Callable[[int], Fuzzer]) -> int:
    """Run a fuzzer as the command line says; returns the exit code. `make` is given the seed.

    It runs in a child of this process, so that what ends it, a panic or a signal, is a fault like others.
    """
    arguments = options(description).parse_args()
    at = mmap.mmap(-1, 8)  # the case, for whoever finds the child dead
    child = os.fork()
    if not child:
        code = 1
        try:
            code = _loop(make, arguments, at)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    try:
        status = os.waitpid(child, 0)[1]
    except KeyboardInterrupt:
        os.kill(child, signal.SIGKILL)
        return 130
    if os.WIFSIGNALED(status):
        number = int.from_bytes(at[:8], "little")
        print(f"case {number} ended the process: {signal.Signals(os.WTERMSIG(status)).name}{_again(arguments, number)}")
        return 1
    return os.waitstatus_to_exitcode(status)


def _again(arguments: argparse.Namespace, number: int) -> str:
    return f"\n    again: --seed {arguments.seed} --case {number}"


def _loop(make: Callable[[int], Fuzzer], arguments: argparse.Namespace, at: mmap.mmap) -> int:
    fuzzer = make(arguments.seed)
    most = memory() + MOST_GROWTH
    faults, tried, shown = 0, 0, 0.0
    for number in numbers(arguments):
        at[:8] = number.to_bytes(8, "little")
        if arguments.case is not None:
            print(fuzzer.describe(number), flush=True)
        wrong = fuzzer.fault(number)
        if not wrong and memory() > most:
            wrong, most = f"the process has grown to {memory() >> 20} MB", memory() + MOST_GROWTH
        tried += 1
        if wrong:
            faults += 1
            said = f"{fuzzer.describe(number):.1000}\n  {wrong}{_again(arguments, number)}"
            print(said.encode(errors="backslashreplace").decode(), flush=True)
        if faults == MOST_FAULTS:
            break
        if sys.stderr.isatty() and time.monotonic() > shown + 1:
            shown = time.monotonic()
            print(f"\r{tried} cases, {faults} faults ", end="", file=sys.stderr, flush=True)
    if arguments.case is not None and not faults:
        print("nothing is wrong with it")
    print(f"{tried} cases, {faults} of them {fuzzer.noun}")
    return 1 if faults else 0
