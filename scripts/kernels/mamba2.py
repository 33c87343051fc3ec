"""The selective scan of Mamba2, from the obvious loop to the kernel that tinyserve runs: each checked, each timed.

    python scripts/kernels/mamba2.py
    python scripts/kernels/mamba2.py --tokens 512 --heads 48 --d-head 64

One sequence and one group of heads; the shape is granite-4.0-h-350m's unless told otherwise. Letters as in
tinyserve/tensor/mamba2.py, whose kernel is the last of the table. What was learned is said in each version's first
lines, and in docs/kernels.md with figures.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np

from tinyserve.tensor import _jit, reference_mamba2
from tinyserve.tensor._jit import kernel
from tinyserve.tensor.mamba2 import Scan, Sequences, broadcast, selective_scan
from tinyserve.tensor.program import allocating_instruction, instruction
from tinyserve.tensor.simd import LANES, exp, fma, load, splat, store, sum_lanes
from tinyserve.tensor.thread_pool import own_items
from tinyserve.tensor.tiles import fma_rows, load_rows, load_tile, store_rows

sys.path.insert(0, str(Path(__file__).parent))
import _workshop

Array = np.ndarray
ROWS = 4  # of a register tile
CHUNK = 64  # tokens

# Every version: x (tokens, heads·d_head), dt (heads, tokens), already positive, A and D (heads,), B and C (tokens,
# d_state), and the states, updated in place: (heads, d_head, d_state) in v1 and v2, (heads, d_state, d_head) later.


def returns_y(function: Callable[..., None]) -> Callable[..., Array]:
    """A version as a function that makes its last argument, y (tokens, heads·d_head), and returns it."""

    @functools.wraps(function, assigned=("__name__", "__doc__"), updated=())
    def version(x: Array, *others: Array) -> Array:
        y = np.empty_like(x)
        function(x, *others, y)
        return y

    return version


@returns_y
@instruction
def v1_obvious_loop(team, x, dt, A, B, C, D, states, y):
    """The formula, number by number: S = exp(dt·A)·S + dt·B⊗x; y = C·S + D·x."""
    heads, d_head, d_state = states.shape
    for head in range(*own_items(team, heads)):
        for t in range(x.shape[0]):
            decay = np.exp(dt[head, t] * A[head])
            for p in range(d_head):
                v = x[t, head * d_head + p]
                total = D[head] * v
                for n in range(d_state):
                    s = decay * states[head, p, n] + dt[head, t] * v * B[t, n]
                    states[head, p, n] = s
                    total += s * C[t, n]
                y[t, head * d_head + p] = total


@returns_y
@instruction
def v2_lanes_of_d_state(team, x, dt, A, B, C, D, states, y):
    """A vector is 16 numbers along d_state, as the paper lays the state out: every output ends in a sum over lanes."""
    heads, d_head, d_state = states.shape
    for head in range(*own_items(team, heads)):
        for t in range(x.shape[0]):
            decay = splat(np.exp(dt[head, t] * A[head]))
            for p in range(d_head):
                v = x[t, head * d_head + p]
                step, total = splat(dt[head, t] * v), splat(np.float32(0.0))
                for n in range(0, d_state, LANES):
                    at = (head * d_head + p) * d_state + n
                    s = fma(load(states, at), decay, step * load(B, t * d_state + n))
                    store(states, at, s)
                    total = fma(s, load(C, t * d_state + n), total)
                y[t, head * d_head + p] = D[head] * v + sum_lanes(total)


@returns_y
@instruction
def v3_lanes_of_d_head(team, x, dt, A, B, C, D, states, y):
    """A vector is 16 numbers along d_head: no sum over lanes, but the state goes to the nearest cache and back."""
    tokens, width = x.shape
    heads, d_state, d_head = states.shape
    for head in range(*own_items(team, heads)):
        for t in range(tokens):
            decay = splat(np.exp(dt[head, t] * A[head]))
            for p in range(0, d_head, LANES):
                v = load(x, t * width + head * d_head + p)
                step, total = splat(dt[head, t]) * v, splat(D[head]) * v
                for n in range(d_state):
                    at = (head * d_state + n) * d_head + p
                    s = fma(load(states, at), decay, step * broadcast(B, t * d_state + n))
                    store(states, at, s)
                    total = fma(s, broadcast(C, t * d_state + n), total)
                store(y, t * width + head * d_head + p, total)


@returns_y
@allocating_instruction
def v4_rows_in_registers(team, x, dt, A, B, C, D, states, y):
    """Four rows of the state stay in registers while a chunk of tokens passes; the outputs go to the cache instead.

    Each number is still computed token after token, and a state row after the other: the same bits as v3's.
    """
    tokens, width = x.shape
    heads, d_state, d_head = states.shape
    for head in range(*own_items(team, heads)):
        decays, steps = np.empty(CHUNK, np.float32), np.empty(CHUNK * d_head, np.float32)
        totals = np.empty(CHUNK * d_head, np.float32)
        for start in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - start)  # a loop of constant length is unrolled, and spills the registers
            for t in range(count):
                decays[t] = np.exp(dt[head, start + t] * A[head])
                for p in range(0, d_head, LANES):
                    v = load(x, (start + t) * width + head * d_head + p)
                    store(steps, t * d_head + p, splat(dt[head, start + t]) * v)
                    store(totals, t * d_head + p, splat(D[head]) * v)
            for n in range(0, d_state, ROWS):
                for p in range(0, d_head, LANES):
                    at = (head * d_state + n) * d_head + p
                    s0, s1 = load(states, at), load(states, at + d_head)
                    s2, s3 = load(states, at + 2 * d_head), load(states, at + 3 * d_head)
                    for t in range(count):
                        b, decay = (start + t) * d_state + n, broadcast(decays, t)
                        step, total = load(steps, t * d_head + p), load(totals, t * d_head + p)
                        s0 = fma(s0, decay, step * broadcast(B, b))
                        s1 = fma(s1, decay, step * broadcast(B, b + 1))
                        s2 = fma(s2, decay, step * broadcast(B, b + 2))
                        s3 = fma(s3, decay, step * broadcast(B, b + 3))
                        total = fma(s0, broadcast(C, b), total)
                        total = fma(s1, broadcast(C, b + 1), total)
                        total = fma(s2, broadcast(C, b + 2), total)
                        store(totals, t * d_head + p, fma(s3, broadcast(C, b + 3), total))
                    store(states, at, s0)
                    store(states, at + d_head, s1)
                    store(states, at + 2 * d_head, s2)
                    store(states, at + 3 * d_head, s3)
            for t in range(count):
                for p in range(0, d_head, LANES):
                    store(y, (start + t) * width + head * d_head + p, load(totals, t * d_head + p))


@kernel
def _add_product(x, x_at, x_row, x_step, w, w_at, w_row, K, y, y_at, y_row, N):
    """y (ROWS, N) += x (ROWS, K) · w (K, N): flat indices of the first numbers, and strides; N in vectors of 16."""
    for n in range(0, N, LANES):
        tile = load_rows(ROWS, 1, y, y_at + n, y_row)
        for k in range(K):
            tile = fma_rows(tile, load_tile(1, w, w_at + k * w_row + n, 0), x, x_at + k * x_step, x_row)
        store_rows(y, y_at + n, y_row, tile, 1, LANES)


@allocating_instruction
def _chunks_products(team, B, C, G):
    """G (tokens, CHUNK) = C · Bᵀ within each chunk, the same for every head."""
    tokens, d_state = B.shape
    for chunk in range(*own_items(team, tokens // CHUNK)):
        start = chunk * CHUNK
        B_transposed = B[start : start + CHUNK].T.copy()
        for t in range(0, CHUNK, ROWS):
            row, seen = start + t, t // LANES * LANES + LANES
            _add_product(C, row * d_state, d_state, 1, B_transposed, 0, CHUNK, d_state, G, row * CHUNK, CHUNK, seen)


@allocating_instruction
def _pass_chunks(team, x, dt, A, B, C, D, states, G, y):
    """Every head's chunks, one after the other."""
    tokens, width = x.shape
    heads, d_state, d_head = states.shape
    for head in range(*own_items(team, heads)):
        S = head * d_state * d_head
        steps, M = np.empty((CHUNK, d_head), np.float32), np.empty((CHUNK, CHUNK), np.float32)
        inside, past = np.empty((CHUNK, d_head), np.float32), np.empty((CHUNK, d_head), np.float32)
        logs, B_decayed = np.empty(CHUNK, np.float32), np.empty((CHUNK, d_state), np.float32)
        for start in range(0, tokens, CHUNK):
            log = np.float32(0.0)
            for t in range(CHUNK):
                log += dt[head, start + t] * A[head]
                logs[t] = log
                past[t] = 0.0
                for p in range(0, d_head, LANES):
                    v = load(x, (start + t) * width + head * d_head + p)
                    store(steps, t * d_head + p, splat(dt[head, start + t]) * v)
                    store(inside, t * d_head + p, splat(D[head]) * v)
            for t in range(CHUNK):
                for s in range(0, t + 1, LANES):
                    weights = exp(splat(logs[t]) - load(logs, s)) * load(G, (start + t) * CHUNK + s)
                    store(M, t * CHUNK + s, weights)
                M[t, t + 1 : t // LANES * LANES + LANES] = 0.0
                remains = splat(np.exp(log - logs[t]))
                for n in range(0, d_state, LANES):
                    store(B_decayed, t * d_state + n, remains * load(B, (start + t) * d_state + n))
            for t in range(0, CHUNK, ROWS):
                seen = t // LANES * LANES + LANES
                _add_product(M, t * CHUNK, CHUNK, 1, steps, 0, d_head, seen, inside, t * d_head, d_head, d_head)
                at = (start + t) * d_state
                _add_product(C, at, d_state, 1, states, S, d_head, d_state, past, t * d_head, d_head, d_head)
            for t in range(CHUNK):
                decay = splat(np.exp(logs[t]))
                for p in range(0, d_head, LANES):
                    total = fma(decay, load(past, t * d_head + p), load(inside, t * d_head + p))
                    store(y, (start + t) * width + head * d_head + p, total)
            decay = splat(np.exp(log))
            for i in range(0, d_state * d_head, LANES):
                store(states, S + i, decay * load(states, S + i))
            for n in range(0, d_state, ROWS):
                at = S + n * d_head
                _add_product(B_decayed, n, 1, d_state, steps, 0, d_head, CHUNK, states, at, d_head, d_head)


@returns_y
def v5_products_in_chunks(x, dt, A, B, C, D, states, y):
    """The paper's own algorithm (its section 6): matrix products inside a chunk, the state passed on between chunks.

    A token costs d_head·CHUNK/2 products more and d_head·d_state fewer. But its sums depend on where the chunks begin,
    and a token that is decoded alone would add in another order than one of a prompt: not the same to the bit.
    """
    G = np.zeros((len(x), CHUNK), np.float32)
    _chunks_products(B, C, G)
    _pass_chunks(x, dt, A, B, C, D, states, G, y)


def v6_tinyserves(xBC, raw, A, D, dt_bias, states):
    """v4 for any shape, with softplus, several sequences and groups: tinyserve.tensor.mamba2.selective_scan."""
    scan, sequences = one_sequence(xBC, A, D, dt_bias)
    return selective_scan(xBC, raw, scan, states, sequences)


def one_sequence(xBC: Array, A: Array, D: Array, dt_bias: Array) -> tuple[Scan, Sequences]:
    scan = Scan(A, D, dt_bias, np.float32(0.0), np.float32(np.inf), 1)
    return scan, Sequences(np.array([0, len(xBC)]), np.array([0]))


# --- from x, dt, A, B, C, D and a state (heads, d_head, d_state) to a version's arguments, the state last -----------


def as_in_the_paper(x, dt, A, B, C, D, state):
    return x, dt, A, B, C, D, state.copy()


def transposed(x, dt, A, B, C, D, state):
    return x, dt, A, B, C, D, np.ascontiguousarray(state.transpose(0, 2, 1))


def as_layers_have_them(x, dt, A, B, C, D, state):
    """x, B and C side by side, and what softplus turns into dt."""
    raw = np.ascontiguousarray(np.log(np.expm1(dt)).T)
    states = np.ascontiguousarray(state.transpose(0, 2, 1))[None]
    return np.concatenate([x, B, C], axis=1), raw, A, D, np.zeros_like(A), states


class Version(NamedTuple):
    function: Callable[..., Array]
    pack: Callable[..., tuple[Array, ...]]
    threads: int = 1
    whole_chunks: bool = False


VERSIONS = [
    Version(v1_obvious_loop, as_in_the_paper),
    Version(v2_lanes_of_d_state, as_in_the_paper),
    Version(v3_lanes_of_d_head, transposed),
    Version(v4_rows_in_registers, transposed),
    Version(v5_products_in_chunks, transposed, whole_chunks=True),
    Version(v6_tinyserves, as_layers_have_them),
    Version(v6_tinyserves, as_layers_have_them, threads=2),
]


class Shape(NamedTuple):
    tokens: int
    heads: int
    d_head: int
    d_state: int


ODD = Shape(tokens=71, heads=3, d_head=16, d_state=48)


def check(version: Version, shape: Shape = ODD) -> None:
    """Raise AssertionError unless the version computes what tensor/reference_mamba2.py does."""
    if version.whole_chunks:
        shape = shape._replace(tokens=2 * CHUNK)
    numbers = inputs(shape)
    arguments = version.pack(*numbers)
    _jit.set_threads(version.threads)
    y = version.function(*arguments)
    S = arguments[-1].transpose(0, 2, 1) if version.pack is as_in_the_paper else arguments[-1]
    xBC, raw, A, D, dt_bias, expected_S = as_layers_have_them(*numbers)
    scan, sequences = one_sequence(xBC, A, D, dt_bias)
    expected = reference_mamba2.selective_scan(xBC, raw, scan, expected_S, sequences)
    difference = max(_workshop.error(y, expected), _workshop.error(S.reshape(expected_S.shape), expected_S))
    assert difference < 1e-5, f"{version.function.__name__} is wrong by {difference:.1e}"


def inputs(shape: Shape) -> tuple[Array, ...]:
    """x, dt, A, B, C, D and a state to begin with, of the sizes that a trained layer has."""
    tokens, heads, d_head, d_state = shape
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return generator.standard_normal(shape, dtype=np.float32)

    dt = np.exp(generator.uniform(np.log(0.001), np.log(0.5), (heads, tokens))).astype(np.float32)
    A = -generator.uniform(1, 16, heads).astype(np.float32)
    return (
        normal(tokens, heads * d_head), dt, A, normal(tokens, d_state), normal(tokens, d_state), normal(heads),
        normal(heads, d_head, d_state),
    )  # fmt: skip


def climb(shape: Shape) -> None:
    """Time every version on one shape; the state goes on from run to run, and stays of its size."""
    tokens, heads, d_head, d_state = shape
    products = 3 * tokens * heads * d_head * d_state  # a token's for one number of the state: decay, B·x, C
    title = f"{tokens} tokens, {heads} heads × {d_head}, d_state {d_state}"
    table = _workshop.Table(title, products, "% of peak")
    numbers = inputs(shape)
    for version in VERSIONS:
        arguments = version.pack(*numbers)
        call = lambda version=version, arguments=arguments: version.function(*arguments)  # noqa: E731
        seconds = _workshop.shortest([call], version.threads)
        table.row(_workshop.name(version), seconds, products / _workshop.float_peak() / version.threads)


def main() -> None:
    shape = arguments()
    for version in VERSIONS:
        check(version)  # also compiles it
    _workshop.describe_machine()
    climb(shape)


def arguments() -> Shape:
    parser = argparse.ArgumentParser(description="Time the selective scan from the obvious loop to tinyserve's kernel.")
    parser.add_argument("--tokens", type=int, default=512, help=f"a multiple of {CHUNK}")
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--d-head", type=int, default=32, help=f"a multiple of {LANES}")
    parser.add_argument("--d-state", type=int, default=128, help=f"a multiple of {LANES}")
    args = parser.parse_args()
    if args.tokens % CHUNK or args.d_head % LANES or args.d_state % LANES:
        parser.error(f"tokens must be a multiple of {CHUNK}, d_head and d_state of {LANES}")
    return Shape(args.tokens, args.heads, args.d_head, args.d_state)


if __name__ == "__main__":
    main()
