"""What the workshop's files share: what this machine can do, how a version is timed, and the table.

Knows nothing of what is computed. A comparison on one thread is measured in that thread's processor time, so that
neighbours on a shared machine disturb it little; on more threads only a clock can tell. The shortest run counts.
"""

import platform
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyserve.tensor import _jit, dot_product
from tinyserve.tensor._jit import cached_kernel
from tinyserve.tensor.quant import LARGEST_16, PAIR, activation_dtype, store_activations
from tinyserve.tensor.simd import LANES, WIDE, load, round_to_int, splat, store
from tinyserve.tensor.tiles import (
    PANELS,
    dot_rows,
    fma_rows,
    load_rows,
    load_tile,
    scaled_rows,
    start_rows,
    store_rows,
    zeros,
)

Array = np.ndarray

CHAINS = 12 if WIDE else 6  # sums of 16 floats that fill the registers
TILE = 3 * PANELS  # sums of 16 integers, in a tile of three rows
DEPTH = 256  # inputs of an integer tile that stays in the nearest cache
FAR = 1 << 26  # bytes that no nearby cache holds
BUDGET = 0.4  # seconds that a version is repeated for


def shortest(calls: Sequence[Callable[[], Any]], threads: int = 1, budget: float = BUDGET) -> float:
    """Seconds of one call: all of them in turn, again and again, and the shortest turn divided by their number."""
    clock = time.process_time if threads == 1 else time.perf_counter
    budget *= 1 if threads == 1 else 4  # a clock needs more luck
    _jit.set_threads(threads)
    turns, end = [], time.perf_counter() + budget
    while len(turns) < 2 or time.perf_counter() < end:
        begin = clock()
        for call in calls:
            call()
        turns.append((clock() - begin) / len(calls))
        if turns[0] * len(calls) > 5 * budget:  # the slow first versions: once is enough
            break
    return min(turns)


def far_apart(arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Copies of the arguments, so many that when they take turns each comes from memory, as a model's layers do."""
    count = max(2, -(-FAR // nbytes(arguments)))
    return [tuple(copied(a) for a in arguments) for _ in range(count)]


def copied(argument: Any) -> Any:
    if isinstance(argument, tuple):  # a named one
        return type(argument)(*[copied(part) for part in argument])
    return argument.copy() if isinstance(argument, np.ndarray) else argument


def nbytes(arguments: tuple[Any, ...]) -> int:
    """Bytes of all arrays, also of those in named tuples."""
    sizes = (a.nbytes if isinstance(a, np.ndarray) else nbytes(a) if isinstance(a, tuple) else 0 for a in arguments)
    return sum(sizes)


def error(got: Array, expected: Array) -> float:
    """The largest difference, in parts of the largest number."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# --- what this machine can do, on one thread ------------------------------------------------------------------------


@cached_kernel
def _fused_products(x, times, out):
    sums, factor = load_rows(CHAINS, 1, x, 0, LANES), load_tile(1, x, 0, 0)
    for _ in range(times):
        sums = fma_rows(sums, factor, x, 0, 0)
    store_rows(out, 0, LANES, sums, 1, LANES)


@cached_kernel
def _integer_products(w, q, starts, ones, times, out):
    sums = start_rows(3, PANELS, q, starts, 0, 0)
    for _ in range(times):
        for k in range(0, DEPTH, 4):
            sums = dot_rows(sums, PANELS, w, PAIR * k, PAIR * DEPTH, q, k, DEPTH)
    # Every sum is used, or the compiler would leave it out.
    total = scaled_rows(zeros(TILE), sums, load_tile(PANELS, ones, 0, 0), ones, 0, 0)
    store_rows(out, 0, PANELS * LANES, total, PANELS, PANELS * LANES)


@cached_kernel
def _sum(x):
    """Reads every number once, in four places at a time: what a processor fetches ahead, it fetches for each."""
    s0 = s1 = s2 = s3 = splat(np.float32(0.0))
    quarter = x.size // 4
    for i in range(0, quarter, LANES):
        s0, s1 = s0 + load(x, i), s1 + load(x, quarter + i)
        s2, s3 = s2 + load(x, 2 * quarter + i), s3 + load(x, 3 * quarter + i)
    out = np.empty(LANES, np.float32)
    store(out, 0, (s0 + s1) + (s2 + s3))
    return out


@cached_kernel
def _keep(x, q):
    """Whole numbers, as the dot product wants them."""
    for k in range(0, x.size, LANES):
        store_activations(q, k, round_to_int(load(x, k)))


@cache
def float_peak() -> float:
    """Multiply-adds of float32 a second, on numbers that are in registers."""
    x, out, times = np.ones(CHAINS * LANES, np.float32), np.empty(CHAINS * LANES, np.float32), 1 << 18
    _fused_products(x, 1, out)
    return times * CHAINS * LANES / shortest([lambda: _fused_products(x, times, out)])


@cache
def integer_peak() -> float:
    """Multiply-adds a second of 8-bit weights with 16-bit activations, on a tile of three rows in the nearest cache."""
    random = np.random.default_rng(0)
    w = random.integers(-128, 128, max(2, PANELS) * LANES * DEPTH).astype(np.int8)
    q = np.empty(3 * DEPTH, activation_dtype(16, 8))
    _keep(random.integers(-LARGEST_16, LARGEST_16, 3 * DEPTH).astype(np.float32), q)
    starts, ones, out = np.zeros(1, np.int32), np.ones(LANES, np.float32), np.empty(TILE * LANES, np.float32)
    _integer_products(w, q, starts, ones, 1, out)
    times = 1 << 11
    return times * TILE * LANES * DEPTH / shortest([lambda: _integer_products(w, q, starts, ones, times, out)])


@cache
def reading_speed() -> float:
    """Bytes a second that one thread reads from memory."""
    x = np.ones(FAR // 2, np.float32)
    _sum(x[: 4 * LANES])
    return x.nbytes / shortest([lambda: _sum(x)])


def processor() -> str:
    """Its name, and the dot product that tinyserve uses on it."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({dot_product.PATH})"


def describe_machine() -> None:
    print(f"{processor()}; one thread of it, measured here:")
    print(f"  {float_peak() / 1e9:.1f} billion multiply-adds of floats a second,", end=" ")
    print(f"{integer_peak() / 1e9:.1f} of 8-bit weights with 16-bit activations, {reading_speed() / 1e9:.1f} GB/s read")


# --- the table ------------------------------------------------------------------------------------------------------


def name(version: Any) -> str:
    """A row's first cell."""
    threads = f", {version.threads} threads" if version.threads > 1 else ""
    return f"{version.function.__name__}{threads}"


class Table:
    """A row of Markdown a version: `products` multiply-adds a call, and the share that a limit allows."""

    def __init__(self, title: str, products: int, limit: str):
        self.products = products
        self.seconds: dict[str, float] = {}
        print(f"\n{title}\n")
        print(f"| {'version':28} | {'ms':>8} | 10⁹ products/s | {limit:>11} | gain |")
        print(f"|{'-' * 30}|{'-' * 9}:|{'-' * 15}:|{'-' * 12}:|{'-' * 5}:|")

    def row(self, name: str, seconds: float, least: float, before: str | None = None) -> None:
        """`least`: the seconds that the limit alone would take. The gain is over the row `before`, or the last one."""
        before = before or next(reversed(self.seconds), None)
        gain = f"{self.seconds[before] / seconds:.2f}" if before else ""
        self.seconds[name] = seconds
        rate = self.products / seconds / 1e9
        print(f"| {name:28} | {1e3 * seconds:8.2f} | {rate:14.2f} | {100 * least / seconds:9.1f} % | {gain:>4} |")
