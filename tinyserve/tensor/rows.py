"""Rows of activations: taken by their numbers, scaled, or with rows of a table added."""

import numpy as np

from tinyserve.tensor.program import empty, instruction
from tinyserve.tensor.simd import LANES, load_first, splat, store_first
from tinyserve.tensor.thread_pool import own_items

Array = np.ndarray


@instruction
def _take_rows(team, x, rows, y):
    H = x.shape[1]
    first, last = own_items(team, rows.size)
    for i in range(first, last):
        for h in range(0, H, LANES):
            store_first(y, i * H + h, load_first(x, rows[i] * H + h, H - h), H - h)


def take_rows(x: Array, rows: Array) -> Array:
    """x (tokens, columns) float32, rows (n,) int64 -> those rows of x, (n, columns)."""
    y = empty((len(rows), x.shape[1]))
    _take_rows(x, rows, y)
    return y


@instruction
def scale_rows(team, x, factor):
    """x (tokens, hidden) float32 is multiplied by a factor, in place."""
    first, last = own_items(team, (x.size + LANES - 1) // LANES)
    for i in range(first * LANES, last * LANES, LANES):
        store_first(x, i, load_first(x, i, x.size - i) * splat(factor), x.size - i)


@instruction
def add_rows(team, x, table, positions):
    """Row positions[m] of table (positions, hidden) is added to row m of x (tokens, hidden), float32, in place."""
    H = x.shape[1]
    first, last = own_items(team, x.shape[0])
    for m in range(first, last):
        for h in range(0, H, LANES):
            v = load_first(x, m * H + h, H - h) + load_first(table, positions[m] * H + h, H - h)
            store_first(x, m * H + h, v, H - h)
