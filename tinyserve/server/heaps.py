"""The memory that a server's process keeps beside what it uses, where the C library is glibc.

Knows malloc's options; nothing of requests. What a step of the engine computes lies in memory that is planned.
"""

import ctypes
import threading
from contextlib import suppress

_M_ARENA_MAX = -8  # of glibc's malloc.h
_ARENAS = 2
TRIM_SECONDS = 5.0


def keep_heaps_small() -> None:
    """Have all threads of this process allocate from two heaps, whose free pages go back to the system now and then.

    By default each of some eighteen threads gets a heap of its own, which keeps the most that it ever held: with mixed
    requests hundreds of megabytes within minutes. Does nothing where there is another C library, or another system.
    """
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, _ARENAS)
        trim = libc.malloc_trim
        threading.Thread(
            target=_trim_forever, args=(trim, threading.Event()), name="tinyserve-heaps", daemon=True
        ).start()


def _trim_forever(trim: "ctypes._NamedFuncPointer", never: threading.Event) -> None:
    while not never.wait(TRIM_SECONDS):
        trim(0)
