"""The memory that a process which answers for hours keeps beside what it uses, where the C library is glibc.

Knows malloc's options; nothing of requests. What a step of the engine computes lies in memory that is planned.
"""

import ctypes
import gc
import threading
from collections.abc import Callable
from contextlib import suppress

_M_ARENA_MAX = -8  # of glibc's malloc.h
_ARENAS = 2
TRIM_SECONDS = 5.0

_is_kept = threading.Event()


def keep_heaps_small() -> None:
    """Have the memory that requests leave behind collected now and then, and what is free given back to the system.

    Answers that are cut off leave cycles, which Python by itself looks for after so many new objects, however large
    they are. By default each of some eighteen threads gets a heap of its own, which keeps the most that it ever held:
    with mixed requests hundreds of megabytes within minutes; all share two. Where there is another C library, or
    another system, the heaps stay as they are.
    """
    trim = None
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, _ARENAS)
        trim = libc.malloc_trim
    _is_kept.set()
    threading.Thread(target=_tidy_forever, args=(trim, threading.Event()), name="tinyserve-heaps", daemon=True).start()


def keep_loaded() -> None:
    """What this process has by now is there to stay, as a model that was loaded: it is not looked through any more.

    To look through all modules and vocabularies takes a tenth of a second, in which no answer goes on. Does nothing in
    a process whose heaps are not kept small: it is not ours.
    """
    if _is_kept.is_set():
        gc.collect()
        gc.freeze()


def collect_unloaded() -> None:
    """Collect what has been a model; what is loaded in its place is there to stay again."""
    if _is_kept.is_set():
        gc.unfreeze()
    gc.collect()


def _tidy_forever(trim: "ctypes._NamedFuncPointer | None", never: threading.Event) -> None:
    tidy: Callable[[], object] = keep_loaded  # the modules, by then
    while not never.wait(TRIM_SECONDS):
        tidy()
        tidy = gc.collect
        if trim is not None:
            trim(0)
