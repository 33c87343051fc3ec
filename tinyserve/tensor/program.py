"""Programs: instructions in a row, each a kernel with its arguments, recorded once and run again and again.

A kernel says what one thread of a team does. Called from Python, it runs at once, on all threads, as a program of one
instruction. Called within `capture`, it is recorded instead, so that the Python that describes a model writes its
program: what then costs a token is the kernels alone. (CUDA graphs are the same idea on a GPU.)

In a program's memory an instruction is a line of its table, (address of code, address of arguments), and its arguments
are words one after the other: an array is its address and its shape, a named tuple what is in it, a number itself.
"""

import inspect
import math
import struct
import threading
from array import array
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numba import types
from numba.np.numpy_support import from_dtype

from tinyserve.tensor import _jit
from tinyserve.tensor.arena import Arena
from tinyserve.tensor.native import arguments
from tinyserve.tensor.thread_pool import Team, pool

Array = np.ndarray
T = TypeVar("T")

_ENTRY = (types.int64,) * 4


class Instruction:
    """A kernel whose first argument is the `Team` that it is run by. The others are contiguous arrays, numbers, and
    named tuples of such; an array may be written to, and nothing is returned.
    """

    def __init__(self, function: Callable[..., None], allocates: bool):
        self.__doc__, self.__name__ = function.__doc__, function.__name__
        self.function = function
        self.kernel = _jit.kernel(function)  # for other kernels
        self._entry = _entry(function, self.kernel, allocates)
        self._codes: dict[Hashable, int] = {}  # addresses of machine code, by the kinds of arguments

    def __call__(self, *values: Any) -> None:
        program = _local.program
        if program is not None:
            program.append(self, values)
            return
        program = Program()
        program.append(self, values)
        if _local.planned is None:
            program.run()

    def code(self, kinds: tuple[Hashable, ...]) -> int:
        """The address of the machine code for arguments of these kinds, compiled or loaded the first time."""
        code = self._codes.get(kinds)
        if code is None:
            if _local.planned is not None:
                _local.planned.add(Planned(self, kinds))
                return 0
            whole = types.Tuple([_type(kind) for kind in kinds])
            code = self._codes[kinds] = _jit.address(self._entry, (*_ENTRY, types.TypeRef(whole)))
        return code


class Planned(NamedTuple):
    """An instruction for arguments of some kinds, which has no machine code yet."""

    instruction: Instruction
    kinds: tuple[Hashable, ...]

    @property
    def is_compiled(self) -> bool:
        return self.kinds in self.instruction._codes


def instruction(function: Callable[..., None]) -> Instruction:
    """Make an instruction of a kernel."""
    return Instruction(function, allocates=False)


def allocating_instruction(function: Callable[..., None]) -> Instruction:
    """The same for a kernel that makes arrays of sizes which only it knows."""
    return Instruction(function, allocates=True)


def _template(block, thread, threads, claims, kinds):  # type: ignore[no-untyped-def]
    kernel(Team(thread, threads, claims), *arguments(block, kinds))  # type: ignore[name-defined]  # noqa: F821


def _entry(function: Callable[..., None], kernel: Any, allocates: bool) -> Any:
    """What the thread pool calls: takes the arguments out of their words, and calls the kernel."""
    cells = "-".join(str(cell.cell_contents) for cell in function.__closure__ or ())
    source = function.__code__
    code = _template.__code__.replace(
        co_filename=source.co_filename, co_firstlineno=source.co_firstlineno, co_name=f"{function.__name__}_entry"
    )
    entry = FunctionType(code, {"kernel": kernel, "Team": Team, "arguments": arguments}, code.co_name)
    entry.__qualname__, entry.__module__ = f"{function.__qualname__}_{cells}_entry", function.__module__
    return _jit.cached_kernel(entry, allocates)


# --- arguments as words -----------------------------------------------------------------------------------------------


_CONSTANTS: set[type] = set()


def constant(kind: type[T]) -> type[T]:
    """Mark a kind of named tuple that a model makes once and keeps: one is described once, for all programs."""
    _CONSTANTS.add(kind)
    return kind


class Described(NamedTuple):
    """An argument as words, and its kind, which says how they are read."""

    kind: Hashable
    words: list[int]
    value: Any = None  # kept alive


def describe_array(array: Array) -> tuple[Hashable, list[int]]:
    """The kind and the words of a contiguous array; raises TypeError for any other."""
    if not array.flags.c_contiguous:
        raise TypeError(f"an instruction takes contiguous arrays, not {array.shape} with strides {array.strides}")
    return (array.dtype, array.ndim), [array.ctypes.data, *array.shape]


def _number(value: Any) -> tuple[Hashable, int]:
    if isinstance(value, float | np.floating):
        return "f", struct.unpack("I", struct.pack("f", value))[0]
    return "i", int(value)


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
        return types.Tuple(parts)
    is_uniform = all(part == parts[0] for part in parts)
    return types.NamedUniTuple(parts[0], len(parts), head) if is_uniform else types.NamedTuple(parts, head)


# --- programs ---------------------------------------------------------------------------------------------------------


class Operand(NamedTuple):
    """An array that an instruction is given, by its parameter's name: "w.stream" is in the named tuple `w`."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Description(NamedTuple):
    """An instruction of a program, for people to read."""

    name: str  # the kernel's
    file: str  # that defines the kernel, without its suffix
    operands: dict[str, Operand]
    numbers: dict[str, float]

    @classmethod
    def of(cls, instruction: Instruction, values: tuple[Any, ...]) -> "Description":
        """What an instruction is with these arguments."""
        operands, numbers = dict[str, Operand](), dict[str, float]()

        def add(name: str, value: Any) -> None:
            if isinstance(value, np.ndarray):
                operands[name] = Operand(name, value.dtype, value.shape)
            elif isinstance(value, tuple):
                for field, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
                    add(f"{name}.{field}", part)
            else:
                numbers[name] = float(value) if isinstance(value, float | np.floating) else int(value)

        _, *names = inspect.signature(instruction.function).parameters  # the first is the team
        for name, value in zip(names, values, strict=True):
            add(name, value)
        return cls(instruction.__name__, instruction.function.__module__.rpartition(".")[2], operands, numbers)


class Program:
    """Instructions that run one after the other, each by all threads: as many as are set when the program is made."""

    def __init__(self, arena: Arena | None = None, described: bool = False):
        self.arena = arena
        self.descriptions: list[Description] | None = [] if described else None
        self.threads = num_threads()  # kernels have recorded scratch memory for so many
        self._codes, self._starts, self._words = array("q"), array("q"), array("q")
        # What has been described, by id: arrays, kept alive with the program, and a model's constants, with the arena.
        self._arrays: dict[int, Described] = {}
        self._constants: dict[int, Described] = {} if arena is None else arena.constants
        self._table: Array | None = None

    def __len__(self) -> int:
        return len(self._codes)

    def append(self, instruction: Instruction, values: tuple[Any, ...]) -> None:
        """Record an instruction with its arguments."""
        words: list[int] = []
        kinds = tuple([self._describe(value, words) for value in values])
        code = instruction.code(kinds)  # what is refused, here or above, leaves no trace
        self._starts.append(len(self._words))
        self._words.extend(words)
        self._codes.append(code)
        self._table = None
        if self.descriptions is not None:
            self.descriptions.append(Description.of(instruction, values))

    def _describe(self, value: Any, words: list[int]) -> Hashable:
        """Append the words of an argument, and return its kind."""
        if not isinstance(value, np.ndarray | tuple):
            kind, word = _number(value)
            words.append(word)
            return kind
        found = self._arrays.get(id(value)) or self._constants.get(id(value))
        if found is None:
            found = self._array(value) if isinstance(value, np.ndarray) else self._tuple(value)
        words += found.words
        return found.kind

    def _array(self, array: Array) -> Described:
        kind, words = describe_array(array)
        if self.arena is None or not self.arena.owns(array):
            found = self._arrays[id(array)] = Described(kind, words, array)
            return found
        # The memory of the arena's serves others when the model has let go of it; a view may be gone at once.
        found = Described(kind, words)
        if self.arena.made(array):
            self._arrays[id(array)] = found
        return found

    def _tuple(self, value: tuple[Any, ...]) -> Described:
        words: list[int] = []
        found = Described((type(value), *[self._describe(part, words) for part in value]), words, value)
        if type(value) in _CONSTANTS:
            self._constants[id(value)] = found
        return found

    def finish(self) -> None:
        """Nothing more is recorded: the arena's arrays are no longer this program's."""
        if self.arena is not None:
            self.arena.end()
        self._arrays = {i: found for i, found in self._arrays.items() if found.value is not None}

    def run(self, times: int = 0) -> None:
        """Run all instructions; `times` as `ThreadPool.run` takes it."""
        with _jit.one_caller:
            if self._table is None:
                self._table = np.empty((len(self._codes), 2), np.int64)
                self._table[:, 0] = self._codes
                self._table[:, 1] = self._words.buffer_info()[0] + 8 * np.array(self._starts, np.int64)
            pool().run(self._table.ctypes.data, len(self._table), self.threads, times)


class _Local(threading.local):
    program: Program | None = None
    planned: set[Planned] | None = None


_local = _Local()


@contextmanager
def plan() -> Iterator[set[Planned]]:
    """Within, what this thread records or calls is noted, and neither compiled nor run: what it would compile."""
    _local.planned = set()
    try:
        yield _local.planned
    finally:
        _local.planned = None


_compiling: Collection[Planned] = ()


@contextmanager
def compiling(planned: Collection[Planned]) -> Iterator[None]:
    """Within, these are compiled, whoever asks how far that is."""
    global _compiling  # of the process, as compiling is: whoever else compiles waits
    _compiling = planned
    try:
        yield
    finally:
        _compiling = ()


def being_compiled() -> Collection[Planned]:
    """What was planned, the same object as long as it is compiled; empty where nothing was planned."""
    return _compiling


@contextmanager
def capture(arena: Arena, described: bool = False) -> Iterator[Program]:
    """Within, instructions that this thread calls are recorded, and `empty` takes its memory from the arena.

    A program that is `described` keeps what each instruction is and what it is given, beside what it needs to run.
    """
    program = Program(arena, described)
    arena.begin()
    _local.program = program
    try:
        yield program
    finally:
        _local.program = None
        program.finish()


@instruction
def start_clock(team, number):  # type: ignore[no-untyped-def]
    """Do nothing: in the `times` of a program, the end of this is the beginning of what follows."""


def num_threads() -> int:
    """How many threads run what this thread calls or records: kernels have scratch memory for each."""
    return _jit.get_threads()


# --- memory -----------------------------------------------------------------------------------------------------------


def empty(shape: int | tuple[int, ...], dtype: Any = np.float32) -> Array:
    """An array whose contents instructions will write: while a program is captured, from its arena."""
    program = _local.program
    if program is None or program.arena is None:
        return np.empty(shape, dtype)
    return program.arena.empty(shape if isinstance(shape, tuple) else (shape,), dtype)
