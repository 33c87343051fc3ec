"""Programs: what arguments come to, when instructions run, and what memory they share and keep."""

import gc
import re
import sys
import threading
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve.tensor import _jit
from tinyserve.tensor.arena import CACHE_LINE, Arena, small_pages
from tinyserve.tensor.program import (
    Program,
    being_compiled,
    capture,
    compiling,
    empty,
    instruction,
    num_threads,
    plan,
    start_clock,
)
from tinyserve.tensor.thread_pool import own_items


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    _jit.set_threads(2)
    yield
    _jit.set_threads(None)


class Matrix(NamedTuple):
    values: np.ndarray
    scales: np.ndarray
    bits: int


class Pair(NamedTuple):
    x: np.ndarray
    y: np.ndarray


class Layer(NamedTuple):
    matrix: Matrix
    pair: Pair
    scale: float


@instruction
def scaled_sum(team, a, b, scale, out):
    """out = scale · a + b."""
    first, last = own_items(team, out.size)
    for i in range(first, last):
        out[i] = scale * a[i] + b[i]


@instruction
def record_threads(team, out):
    if team.thread == 0:
        out[0] = team.threads


def floats(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32)


# --- arguments --------------------------------------------------------------------------------------------------------


@instruction
def read_layer(team, layer, out):
    if team.thread == 0:
        matrix = layer.matrix
        out[0] = matrix.values[2, 3]
        out[1] = matrix.scales[1]
        out[2] = matrix.bits
        out[3] = layer.pair.x[0] + layer.pair.y[1]
        out[4] = layer.scale
        out[5] = matrix.values.shape[0] * 100 + matrix.values.shape[1]


def test_named_tuples_of_arrays_and_numbers() -> None:
    matrix = Matrix(np.arange(20, dtype=np.int8).reshape(4, 5), floats(2), -3)
    layer, out = Layer(matrix, Pair(floats(2, 1), floats(2, 2)), 0.1), np.zeros(6)
    expected = [13, matrix.scales[1], -3, layer.pair.x[0] + layer.pair.y[1], np.float32(0.1), 405]
    read_layer(layer, out)
    np.testing.assert_array_equal(out, expected)
    with capture(Arena()) as program:
        read_layer(layer, out)
    out[:] = 0
    program.run()
    np.testing.assert_array_equal(out, expected)


def test_a_described_program_tells_what_its_instructions_are() -> None:
    layer = Layer(Matrix(np.zeros((4, 5), np.int8), floats(2), -3), Pair(floats(2), floats(3)), 0.5)
    with capture(Arena(), described=True) as program:
        start_clock(0)
        read_layer(layer, np.zeros(6))
    assert program.descriptions is not None
    clock, read = program.descriptions
    assert (clock.name, clock.file, clock.operands) == ("start_clock", "program", {})
    assert (read.name, read.file) == ("read_layer", "test_program")
    assert {name: (operand.dtype, operand.shape, operand.nbytes) for name, operand in read.operands.items()} == {
        "layer.matrix.values": (np.int8, (4, 5), 20),
        "layer.matrix.scales": (np.float32, (2,), 8),
        "layer.pair.x": (np.float32, (2,), 8),
        "layer.pair.y": (np.float32, (3,), 12),
        "out": (np.float64, (6,), 48),
    }
    assert read.numbers == {"layer.matrix.bits": -3, "layer.scale": 0.5}
    with capture(Arena()) as program:
        read_layer(layer, np.zeros(6))
    assert program.descriptions is None


@instruction
def read_numbers(team, a, b, c, d, e, pair, out):
    if team.thread == team.threads - 1:
        out[0], out[1], out[2], out[3], out[4] = a, b, c, d, e
        out[5], out[6] = pair[0], pair[1]


def test_numbers_of_all_kinds() -> None:
    out = np.zeros(7)
    read_numbers(2**53, np.int32(-7), True, 1e-40, np.float32(-np.inf), (3, 0.5), out)
    np.testing.assert_array_equal(out, [2**53, -7, 1, np.float32(1e-40), -np.inf, 3, 0.5])
    read_numbers(-(2**53), np.int64(7), False, np.float64(3), np.float32(1.5), (4, -0.5), out)
    np.testing.assert_array_equal(out, [-(2**53), 7, 0, 3, 1.5, 4, -0.5])


@instruction
def twice(team, x, out):
    first, last = own_items(team, x.size)
    for i in range(first, last):
        out[i] = x[i] + x[i]


@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "i4", "i2", "i1", "u1", "u2", "u4"])
def test_arrays_of_all_kinds(dtype: str) -> None:
    x = np.arange(50).astype(dtype)
    out = np.zeros(50, dtype)
    twice(x, out)
    np.testing.assert_array_equal(out, 2 * x)


RECORD = np.dtype([("temperature", np.float64), ("count", np.int16), ("limit", np.float32)])


@instruction
def read_records(team, records, out):
    first, last = own_items(team, records.size)
    for i in range(first, last):
        record = records[i]
        out[i] = record.temperature * 1000 + record.count * 10 + record.limit


@pytest.mark.parametrize("align", [False, True])
def test_arrays_of_records(align: bool) -> None:
    records = np.zeros(9, np.dtype(RECORD.descr, align=align))
    records["temperature"], records["count"], records["limit"] = np.arange(9), np.arange(9) - 4, 0.5
    out = np.zeros(9)
    read_records(records, out)
    np.testing.assert_array_equal(out, np.arange(9) * 1000 + (np.arange(9) - 4) * 10 + 0.5)


def test_arrays_without_items() -> None:
    twice(np.empty(0, np.float32), np.empty(0, np.float32))


def test_an_array_that_is_not_contiguous_is_refused() -> None:
    x, out = floats(20), floats(10)
    with pytest.raises(TypeError, match=r"takes contiguous arrays, not \(10,\) with strides \(8,\)"):
        twice(x[::2], out)
    with pytest.raises(TypeError, match="contiguous"):
        read_layer(Layer(Matrix(np.zeros((5, 4), np.int8).T, x, 1), Pair(x, x), 1.0), np.zeros(6))
    with capture(Arena()) as program:
        twice(x[:10], out)
        with pytest.raises(TypeError, match="contiguous"):
            twice(out, x[::2])
        scaled_sum(out, out, 2.0, x[10:])
    assert len(program) == 2  # what was refused has left no trace
    program.run()
    np.testing.assert_array_equal(x[10:], 6 * x[:10])


# --- when instructions run --------------------------------------------------------------------------------------------


def test_a_program_is_run_again_on_what_its_arrays_hold_then() -> None:
    a, b, out = floats(1000), floats(1000, 1), np.zeros(1000, np.float32)
    with capture(Arena()) as program:
        scaled_sum(a, b, 1.0, out)
        scaled_sum(out, out, 1.0, out)
    assert not out.any()  # nothing has run yet
    for seed in range(10):
        a[:] = floats(1000, seed)
        program.run()
        np.testing.assert_array_equal(out, 2 * (a + b))


@instruction
def not_compiled_yet(team, out):
    if team.thread == 0:
        out[0] = 7


def test_what_is_planned_is_neither_compiled_nor_run() -> None:
    a, out = floats(10), np.zeros(1)
    twice(a, a.copy())
    with plan() as planned:
        twice(a, a)
        not_compiled_yet(out)
        with capture(Arena()):
            not_compiled_yet(out)
            not_compiled_yet(np.zeros(1, np.float32))
    assert out[0] == 0 and {one.instruction for one in planned} == {not_compiled_yet} and len(planned) == 2
    assert not being_compiled()
    with compiling(planned):
        assert being_compiled() is planned and not any(one.is_compiled for one in planned)
        not_compiled_yet(out)
        assert out[0] == 7 and sum(one.is_compiled for one in planned) == 1
    assert not being_compiled()


def test_what_is_called_outside_of_a_capture_runs_at_once() -> None:
    a, out = floats(10), np.zeros(10, np.float32)
    twice(a, out)
    np.testing.assert_array_equal(out, 2 * a)


def test_only_the_python_thread_that_captures_records() -> None:
    a, out = floats(10), np.zeros(10, np.float32)
    with capture(Arena()) as program:
        other = threading.Thread(target=lambda: twice(a, out))
        other.start()
        other.join()
        assert len(program) == 0
        np.testing.assert_array_equal(out, 2 * a)


def test_after_an_error_in_a_capture_instructions_run_again() -> None:
    a, out = floats(10), np.zeros(10, np.float32)
    with pytest.raises(ZeroDivisionError), capture(Arena()):
        twice(a, out)
        raise ZeroDivisionError
    twice(out, out)
    assert not out.any()
    twice(a, out)
    np.testing.assert_array_equal(out, 2 * a)


def test_what_is_added_to_a_program_that_has_run_is_run() -> None:
    x, program = np.ones(10, np.float32), Program()
    program.run()
    for length in range(1, 4):
        program.append(twice, (x, x))
        x[:] = 1
        program.run()
        np.testing.assert_array_equal(x, 2.0**length)


def test_a_program_keeps_the_number_of_threads_that_it_was_recorded_for() -> None:
    """Its kernels have scratch memory for so many."""
    recorded, now = np.zeros(1, np.int64), np.zeros(1, np.int64)
    _jit.set_threads(3)
    with capture(Arena()) as program:
        assert num_threads() == 3
        record_threads(recorded)
    _jit.set_threads(1)
    program.run()
    record_threads(now)
    assert (recorded[0], now[0]) == (3, 1)


def test_the_clock_behind_each_instruction() -> None:
    x, times = np.ones(1000, np.float32), np.zeros(20, np.int64)
    with capture(Arena()) as program:
        for _ in range(20):
            twice(x, x)
    program.run(times.ctypes.data)
    assert (times > 0).all() and (np.diff(times) >= 0).all()


# --- memory -----------------------------------------------------------------------------------------------------------


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_outside_of_a_capture_empty_is_numpys() -> None:
    x = empty((3, 4), np.int16)
    assert (x.shape, x.dtype) == ((3, 4), np.int16) and x.flags.owndata


def test_small_pages() -> None:
    """Zeros to write to, of which a system with large pages makes none."""
    array = small_pages((3, 1 << 20), np.uint32)
    assert array.shape == (3, 1 << 20) and not array.any() and address(array) % 64 == 0
    array[:] = 7
    assert small_pages((0, 4), np.float32).shape == (0, 4)
    with pytest.raises(MemoryError):
        small_pages((1 << 62,), np.int8)
    if sys.platform == "linux":
        assert "nh" in flags_of_region(address(array))


def flags_of_region(place: int) -> list[str]:
    """What Linux knows of the memory at an address."""
    is_it = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_it = int(bounds[1], 16) <= place < int(bounds[2], 16)
        elif is_it and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such address")


def test_memory_that_was_let_go_of_is_used_again() -> None:
    arena = Arena()
    with capture(arena):
        a, b = empty((10, 100)), empty((10, 100))
        first = address(a)
        assert address(b) != first
        part = a[3:5].reshape(-1)
        del a
        assert address(empty((10, 100))) != first  # a part of it is still held
        del part
        assert address(empty((10, 100))) == first
    with capture(arena):
        assert address(empty(1000)) == first  # another program, from the beginning
    assert arena.nbytes == Arena.SLAB


def test_memory_does_not_grow_with_programs() -> None:
    """Of the largest there is twice as much at most, and what slabs of growing sizes leave unused."""
    arena = Arena()
    for number in range(300):
        with capture(arena):
            held = [empty((number * 37 % 300 + 1, 1000)) for _ in range(5)]
            assert len({address(array) for array in held}) == 5
    largest = 5 * 300 * 1000 * 4
    assert arena.nbytes <= 4 * largest


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300_000), st.sampled_from(["u1", "f4"])), max_size=60))
def test_memory_that_is_held_is_nobody_elses(steps: list[tuple[int, int, str]]) -> None:
    """Ten places hold an array or none; a step puts a new one of some size into one of them."""
    arena, living, array = Arena(), {}, None
    with capture(arena):
        for number, (place, size, dtype) in enumerate(steps):
            living.pop(place, None)
            array = empty(size, dtype)
            assert array.shape == (size,) and array.dtype == dtype and address(array) % CACHE_LINE == 0
            array[:] = number
            living[place] = number, array
        for number, array in living.values():
            assert (array == number % 256 if array.dtype == np.uint8 else array == number).all()
        spans = sorted((address(array), address(array) + array.nbytes) for _, array in living.values())
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_a_chain_of_layers_runs_in_the_memory_of_two() -> None:
    arena, weights = Arena(), [floats(100_000, seed) for seed in range(30)]
    x = floats(100_000, 99)
    with capture(arena) as program:
        y = x
        for w in weights:
            product = empty(y.size)
            scaled_sum(y, w, 0.5, product)
            y = product
    assert arena.nbytes == Arena.SLAB  # of 30 times 0.4 MB
    for seed in (99, 100):
        x[:] = floats(100_000, seed)
        program.run()
        expected = x
        for w in weights:
            expected = np.float32(0.5) * expected + w
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


def test_a_programs_weights_stay_while_it_lives() -> None:
    w, x, out = floats(50_000), floats(50_000, 1), np.zeros(50_000, np.float32)
    expected = 2 * x + w
    with capture(Arena()) as program:
        scaled_sum(x, Pair(w, w).y, 2.0, out)
        read_layer(Layer(Matrix(np.zeros((4, 5), np.int8), w[5:], 1), Pair(w, w), 1.0), np.zeros(6))
    alive = weakref.ref(w)
    del w
    gc.collect()
    assert alive() is not None
    program.run()
    np.testing.assert_array_equal(out, expected)
    del program
    gc.collect()
    assert alive() is None


def test_an_array_may_outlive_its_arena() -> None:
    with capture(Arena()) as program:
        x = empty(250_000)
    x[:] = 7
    del program
    gc.collect()
    others = [np.zeros(250_016, np.float32) for _ in range(20)]
    assert (x == 7).all() and len(others) == 20


def test_arrays_that_end_while_memory_is_taken() -> None:
    """The garbage collector may run anywhere: here it runs at every step of `empty`."""
    arena, before = Arena(), gc.get_threshold()
    with capture(arena):
        held = [empty(16) for _ in range(100)]
        taken = arena.nbytes
        gc.set_threshold(1, 1, 1)
        try:
            for number in range(2000):
                cycle = [empty(16 * (number % 7))]
                cycle.append(cycle)  # type: ignore[arg-type]
                del cycle
        finally:
            gc.set_threshold(*before)
        assert min(np.diff(sorted(address(array) for array in held))) >= 64
        assert arena.nbytes == taken
