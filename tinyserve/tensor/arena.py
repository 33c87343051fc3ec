"""Memory that vectors are read from: aligned arrays, and the arena that captured programs share.

Knows shapes and bytes, not what computes them.
"""

import math
import mmap
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

Array = np.ndarray
Shape = tuple[int, ...]

CACHE_LINE = 64  # bytes


def aligned(shape: Shape, dtype: Any, make: Callable[..., Array] = np.empty) -> Array:
    """An array that begins where a cache line does, as NumPy's do not, so that a vector lies in one; `make` is np.empty
    or np.zeros.
    """
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    room = make(nbytes + CACHE_LINE, np.uint8)
    first = -room.ctypes.data % CACHE_LINE
    return room[first : first + nbytes].view(kind).reshape(shape)


def small_pages(shape: Shape, dtype: Any) -> Array:
    """Zeros that take memory as they are touched, 4 KB at a time.

    NumPy asks for pages of 2 MB where an array is large: a cache's first token would take one for each of its arrays,
    which are cleared first. Raises MemoryError.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if sys.platform != "linux" or not nbytes:  # elsewhere NumPy's zeros take small ones
        return aligned(shape, dtype, np.zeros)
    try:
        room = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(str(error)) from None
    with suppress(OSError):  # a kernel without large pages
        room.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(room, dtype).reshape(shape)


class _Memory:
    """Bytes of a slab as an array of this shape, which refers to the slab as long as there is a view of it."""

    def __init__(self, slab: Array, start: int, shape: Shape, kind: np.dtype[Any]):
        self._slab = slab
        address = slab.ctypes.data + start
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": kind.str, "version": 3}


def _references(arrays: Sequence[Any]) -> list[int]:
    """How often each is referred to, by this list and this function among others."""
    return [sys.getrefcount(array) for array in arrays]


_UNUSED = _references([object()])[0]  # of what is in the list alone


class Arena:
    """Memory for what a program computes on its way, shared by programs that never run at the same time.

    An array is the model's until nothing refers to it any more; then the next one of its shape is the same array.
    Instructions run in the order in which they were recorded, so whoever comes later may write there.
    """

    SLAB = 1 << 20  # bytes, at least

    def __init__(self) -> None:
        self._slabs: list[Array] = []
        self._arrays: dict[tuple[Shape, Any], list[Array]] = {}
        self._ids: set[int] = set()
        self._slab = self._start = 0  # where there is room for the next array
        self.constants: dict[int, Any] = {}  # what programs know of a model's constants, by id

    @property
    def nbytes(self) -> int:
        """Bytes that it has taken."""
        return sum(len(slab) for slab in self._slabs)

    def begin(self) -> None:
        """Everything is free: a program is captured."""
        self.end()
        self._slab = self._start = 0

    def end(self) -> None:
        """Forget the program's arrays, which are memory again when whoever has them lets go."""
        self._arrays, self._ids = {}, set()

    def empty(self, shape: Shape, dtype: Any) -> Array:
        """An array in the arena, with whatever is there."""
        arrays = self._arrays.setdefault((shape, dtype), [])
        for array, references in zip(arrays, _references(arrays), strict=True):
            if references == _UNUSED:
                return array
        array = self._new(shape, np.dtype(dtype))
        arrays.append(array)
        self._ids.add(id(array))
        return array

    def made(self, array: Array) -> bool:
        """Whether this is an array of the program that is being captured."""
        return id(array) in self._ids

    def owns(self, array: Array) -> bool:
        """Whether it is one, or a view of one."""
        owner: Any = array
        while isinstance(owner, np.ndarray):
            if self.made(owner):
                return True
            owner = owner.base
        return False

    def _new(self, shape: Shape, kind: np.dtype[Any]) -> Array:
        nbytes = -(-math.prod(shape) * kind.itemsize // CACHE_LINE) * CACHE_LINE
        while self._slab < len(self._slabs) and self._start + nbytes > len(self._slabs[self._slab]):
            self._slab, self._start = self._slab + 1, 0
        if self._slab == len(self._slabs):
            # As much again as there is: ever larger programs need few slabs.
            self._slabs.append(aligned((max(self.SLAB, nbytes, self.nbytes),), np.uint8))
        memory = _Memory(self._slabs[self._slab], self._start, shape, kind)
        self._start += nbytes
        return np.asarray(memory)
