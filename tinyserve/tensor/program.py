"""Programs: instructions in a row, each a kernel with its arguments, recorded once and run again and again.

A kernel says what one thread of a team does. Called from Python, it runs at once, on all threads, as a program of one
instruction. Called within `capture`, it is recorded instead, so that the Python that describes a model writes its
program: what then costs a token is the kernels alone. (CUDA graphs are the same idea on a GPU.)

In a program's memory an instruction is a line of its table, (address of code, address of arguments), and its arguments
are words one after the other: an array is its address and its shape, a named tuple what is in it, a number itself.
"""

import struct
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core import types as core_types
from numba.np.numpy_support import from_dtype

from tinyserve.tensor import _jit
from tinyserve.tensor.native import arguments
from tinyserve.tensor.thread_pool import Team, pool

Array = np.ndarray

_ENTRY = (types.int64,) * 4


class Instruction:
    """A kernel whose first argument is the `Team` that it is run by. The others are contiguous arrays, numbers, and
    named tuples of such; an array may be written to, and nothing is returned.
    """

    def __init__(self, function: Callable[..., None]):
        self.__doc__, self.__name__ = function.__doc__, function.__name__
        self.function = function
        self.kernel = _jit.kernel(function)  # for other kernels
        self._entry = _entry(function, self.kernel)
        self._codes: dict[Hashable, int] = {}  # addresses of machine code, by the kinds of arguments

    def __call__(self, *values: Any) -> None:
        program = _local.program
        if program is not None:
            program.append(self, values)
            return
        program = Program()
        program.append(self, values)
        program.run()

    def code(self, kinds: tuple[Hashable, ...]) -> int:
        """The address of the machine code for arguments of these kinds, compiled or loaded the first time."""
        code = self._codes.get(kinds)
        if code is None:
            whole = core_types.Tuple([_type(kind) for kind in kinds])
            code = self._codes[kinds] = _jit.address(self._entry, (*_ENTRY, core_types.TypeRef(whole)))
        return code


def instruction(function: Callable[..., None]) -> Instruction:
    """Make an instruction of a kernel."""
    return Instruction(function)


def _template(block, thread, threads, claims, kinds):  # type: ignore[no-untyped-def]
    kernel(Team(thread, threads, claims), *arguments(block, kinds))  # type: ignore[name-defined]  # noqa: F821


def _entry(function: Callable[..., None], kernel: Any) -> Any:
    """What the thread pool calls: takes the arguments out of their words, and calls the kernel."""
    cells = "-".join(str(cell.cell_contents) for cell in function.__closure__ or ())
    source = function.__code__
    code = _template.__code__.replace(
        co_filename=source.co_filename, co_firstlineno=source.co_firstlineno, co_name=f"{function.__name__}_entry"
    )
    entry = FunctionType(code, {"kernel": kernel, "Team": Team, "arguments": arguments}, code.co_name)
    entry.__qualname__, entry.__module__ = f"{function.__qualname__}_{cells}_entry", function.__module__
    return _jit.cached_kernel(entry)


# --- arguments as words -----------------------------------------------------------------------------------------------


def describe(value: Any, words: list[int]) -> Hashable:
    """Append the words of an argument, and return its kind, which says how they are read."""
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise TypeError("an instruction takes contiguous arrays")
        words.append(value.ctypes.data)
        words.extend(value.shape)
        return value.dtype, value.ndim
    if isinstance(value, tuple):
        return type(value), *[describe(part, words) for part in value]
    if isinstance(value, float | np.floating):
        words.append(struct.unpack("I", struct.pack("f", value))[0])
        return "f"
    words.append(int(value))
    return "i"


def _type(kind: Any) -> Any:
    if kind == "i":
        return types.int64
    if kind == "f":
        return types.float32
    head, *rest = kind
    if isinstance(head, np.dtype):
        return types.Array(from_dtype(head), rest[0], "C")
    parts = [_type(part) for part in rest]
    if head is tuple:
        return core_types.Tuple(parts)
    is_uniform = all(part == parts[0] for part in parts)
    return types.NamedUniTuple(parts[0], len(parts), head) if is_uniform else types.NamedTuple(parts, head)


# --- programs ---------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """An instruction of a program, for people to read."""

    name: str
    arrays: tuple[tuple[str, tuple[int, ...], int], ...]


class Program:
    """Instructions that run one after the other, each by all threads."""

    def __init__(self, arena: "Arena | None" = None):
        self.arena = arena
        self._codes: list[int] = []
        self._starts: list[int] = []
        self._words: list[int] = []
        self._kept: list[Any] = []  # what the addresses belong to
        self._blocks: Array | None = None
        self._table: Array | None = None

    def __len__(self) -> int:
        return len(self._codes)

    def append(self, instruction: Instruction, values: tuple[Any, ...]) -> None:
        """Record an instruction with its arguments."""
        self._starts.append(len(self._words))
        kinds = tuple([describe(value, self._words) for value in values])
        self._codes.append(instruction.code(kinds))
        self._keep(values)

    def run(self, times: int = 0) -> None:
        """Run all instructions on the threads of `set_threads`; `times` as `ThreadPool.run` takes it."""
        if self._table is None:
            self._blocks = np.array(self._words, np.int64)
            self._table = np.empty((len(self._codes), 2), np.int64)
            self._table[:, 0] = self._codes
            self._table[:, 1] = self._blocks.ctypes.data + 8 * np.array(self._starts, np.int64)
        with _jit.one_caller:
            pool().run(self._table.ctypes.data, len(self._table), _jit.get_threads(), times)

    def _keep(self, values: tuple[Any, ...]) -> None:
        """Keep arrays alive, but for those of the arena, whose memory serves others when the model has let go."""
        for value in values:
            if isinstance(value, tuple):
                self._keep(value)
            elif isinstance(value, np.ndarray):
                owner = value
                while isinstance(owner.base, np.ndarray):
                    owner = owner.base
                if not isinstance(owner.base, _Region):
                    self._kept.append(owner)


class _Local(threading.local):
    program: Program | None = None


_local = _Local()


@contextmanager
def capture(arena: "Arena") -> Iterator[Program]:
    """Within, instructions that this thread calls are recorded, and `empty` takes its memory from the arena."""
    program = Program(arena)
    arena.begin()
    _local.program = program
    try:
        yield program
    finally:
        _local.program = None


def num_threads() -> int:
    """How many threads run what this thread calls or records: kernels have scratch memory for each."""
    return _jit.get_threads()


# --- memory -----------------------------------------------------------------------------------------------------------


def empty(shape: int | tuple[int, ...], dtype: Any = np.float32) -> Array:
    """An array whose contents instructions will write: while a program is captured, from its arena."""
    program = _local.program
    if program is None or program.arena is None:
        return np.empty(shape, dtype)
    return program.arena.empty(shape, dtype)


class _Region:
    """A part of the arena; free again when no array is left that is made of it."""

    def __init__(self, plan: "_Plan", slab: int, start: int, nbytes: int, address: int):
        self._plan, self._place = plan, (slab, start, start + nbytes)
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        self._plan.free(*self._place)


class _Plan:
    """Which parts of an arena's slabs are free at this point of the program that is being captured."""

    def __init__(self, sizes: list[int]):
        self._free = [[(0, size)] for size in sizes]  # of each slab, in order

    def take(self, nbytes: int) -> tuple[int, int] | None:
        """The smallest free part of so many bytes, as its slab and where it begins."""
        fits = [
            (end - start, slab, start)
            for slab, parts in enumerate(self._free)
            for start, end in parts
            if end - start >= nbytes
        ]
        if not fits:
            return None
        _, slab, start = min(fits)
        parts = self._free[slab]
        i = next(i for i, part in enumerate(parts) if part[0] == start)
        end = parts[i][1]
        parts[i : i + 1] = [(start + nbytes, end)] if start + nbytes < end else []
        return slab, start

    def add(self, size: int) -> None:
        self._free.append([(0, size)])

    def free(self, slab: int, start: int, end: int) -> None:
        parts = sorted([*self._free[slab], (start, end)])
        merged: list[tuple[int, int]] = []
        for part in parts:
            if merged and merged[-1][1] == part[0]:
                merged[-1] = merged[-1][0], part[1]
            else:
                merged.append(part)
        self._free[slab] = merged


class Arena:
    """Memory for what a program computes on its way, shared by programs that never run at the same time.

    An array's place is taken when the model makes it and free when the model lets go of it: instructions run in the
    order in which they were recorded, so whoever comes later may write there.
    """

    SLAB = 1 << 20  # bytes, at least
    ALIGNMENT = 64

    def __init__(self) -> None:
        self._slabs: list[Array] = []
        self._plan = _Plan([])

    @property
    def nbytes(self) -> int:
        """Bytes that it has taken."""
        return sum(len(slab) for slab in self._slabs)

    def begin(self) -> None:
        """Everything is free: another program is captured."""
        self._plan = _Plan([len(slab) for slab in self._slabs])

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An array in the arena."""
        kind = np.dtype(dtype)
        shape = shape if isinstance(shape, tuple) else (shape,)
        count = int(np.prod(shape, dtype=np.int64))
        nbytes = max(1, -(-count * kind.itemsize // self.ALIGNMENT)) * self.ALIGNMENT
        place = self._plan.take(nbytes)
        if place is None:
            size = max(self.SLAB, nbytes)
            room = np.empty(size + self.ALIGNMENT, np.uint8)
            first = -room.ctypes.data % self.ALIGNMENT
            self._slabs.append(room[first : first + size])
            self._plan.add(size)
            place = self._plan.take(nbytes)
            assert place is not None
        slab, start = place
        region = _Region(self._plan, slab, start, nbytes, self._slabs[slab].ctypes.data + start)
        return np.asarray(region)[: count * kind.itemsize].view(kind).reshape(shape)
