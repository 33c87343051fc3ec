"""The threads that run programs: one region that they share, a barrier, and work that the fastest takes.

Knows no kernel: a program is a table of code and argument blocks (program.py writes it). Every thread walks the whole
table; behind each instruction the threads meet. Whoever waits looks some thousand times and then sleeps, so that a
neighbour on the same processor is not held up, and nor is the thread that is waited for.
"""

import atexit
import ctypes
import os
from threading import Lock, Thread
from typing import NamedTuple

import numpy as np

from tinyserve.tensor._jit import cached_kernel, kernel, usable_cores
from tinyserve.tensor.native import (
    acquire_lock,
    call,
    exchange,
    fetch_add,
    load_word,
    pause,
    release_lock,
    store_word,
    ticks,
    yield_processor,
)

MAX_THREADS = 256
SPLIT = 8  # a thread takes so many parts of its share one after the other, that others may help with the last ones
LOOKS = 4000  # before a waiting thread sleeps: some 50 µs, more than a balanced instruction leaves to wait for
YIELDS = 200  # where there are more threads than processors: a thread that waits gives its processor away at once

# Where things are in the memory that the threads share, in words; what is written often has a cache line of its own.
LINE = 8
ARRIVALS = 0  # at barriers, ever counted up
CODE, COUNT, THREADS, TARGET, NUM_LOOKS, NUM_YIELDS, TIMES = range(LINE, LINE + 7)  # the program that runs
ASLEEP = 2 * LINE  # for each thread: whether it has to be woken
LOCKS = ASLEEP + MAX_THREADS  # for each thread: the address of the lock that it sleeps at
TICKETS = LOCKS + MAX_THREADS  # for each thread: how many programs it has been called to
CLAIMS = TICKETS + LINE * MAX_THREADS  # for each thread, twice: how much of its share has been taken
SIZE = CLAIMS + 2 * LINE * MAX_THREADS


class Team(NamedTuple):
    """Who runs a kernel: thread `thread` of `threads`; `claims` is the address of what each has taken of its share."""

    thread: int
    threads: int
    claims: int


# --- how a kernel shares out its work ---------------------------------------------------------------------------------


@kernel
def next_items(team, count):
    """The next items of `count` for this thread, (first, last): of its own share, then of others'; at the end none.

    An instruction can share out one set of items.
    """
    for i in range(team.threads):
        owner = (team.thread + i) % team.threads
        begin, end = owner * count // team.threads, (owner + 1) * count // team.threads
        claims, step = team.claims + 8 * LINE * owner, max(1, (end - begin) // SPLIT)
        if i == 0 or load_word(claims) < end - begin:
            first = begin + fetch_add(claims, step)
            if first < end:
                return first, min(first + step, end)
    return count, count


@kernel
def own_items(team, count):
    """This thread's equal share of items, (first, last), where they are too little work to be worth an exchange."""
    return team.thread * count // team.threads, (team.thread + 1) * count // team.threads


# --- waiting and waking -----------------------------------------------------------------------------------------------


@kernel
def _wait(words, thread, index, value):
    """Until words[index] has reached a value."""
    address, asleep = words + 8 * index, words + 8 * (ASLEEP + thread)
    for _ in range(load_word(words + 8 * NUM_LOOKS)):
        if load_word(address) >= value:
            return
        pause()
    for _ in range(load_word(words + 8 * NUM_YIELDS)):
        if load_word(address) >= value:
            return
        yield_processor()
    while True:
        exchange(asleep, 1)
        if load_word(address) >= value:
            if exchange(asleep, 0) == 0:  # someone is about to wake this thread: the lock must be as it was
                acquire_lock(load_word(words + 8 * (LOCKS + thread)))
            return
        acquire_lock(load_word(words + 8 * (LOCKS + thread)))
        if load_word(address) >= value:
            return


@kernel
def _wake(words, thread):
    asleep = words + 8 * (ASLEEP + thread)
    if load_word(asleep) != 0 and exchange(asleep, 0) == 1:
        release_lock(load_word(words + 8 * (LOCKS + thread)))


# --- the region -------------------------------------------------------------------------------------------------------


@kernel
def _walk(words, thread):
    """Run this thread's part of every instruction."""
    table, count = load_word(words + 8 * CODE), load_word(words + 8 * COUNT)
    threads, arrivals = load_word(words + 8 * THREADS), load_word(words + 8 * TARGET)
    times = load_word(words + 8 * TIMES)
    for i in range(count):
        claims, others = words + 8 * CLAIMS, words + 8 * (CLAIMS + LINE * MAX_THREADS)
        if i % 2 == 1:
            claims, others = others, claims
        store_word(others + 8 * LINE * thread, 0)  # nobody uses these before the next instruction
        call(load_word(table + 16 * i), load_word(table + 16 * i + 8), thread, threads, claims)
        if threads > 1:
            arrivals += threads
            if fetch_add(words + 8 * ARRIVALS, 1) + 1 == arrivals:
                for other in range(threads):
                    _wake(words, other)
            else:
                _wait(words, thread, ARRIVALS, arrivals)
        if times != 0 and thread == 0:
            store_word(times + 8 * i, ticks())


@cached_kernel
def _run(words, table, count, threads, looks, yields, times):
    """Call so many threads to a program, and walk it as one of them."""
    store_word(words + 8 * CODE, table)
    store_word(words + 8 * COUNT, count)
    store_word(words + 8 * THREADS, threads)
    store_word(words + 8 * TARGET, load_word(words + 8 * ARRIVALS))
    store_word(words + 8 * NUM_LOOKS, looks)
    store_word(words + 8 * NUM_YIELDS, yields)
    store_word(words + 8 * TIMES, times)
    for thread in range(threads):
        store_word(words + 8 * (CLAIMS + LINE * thread), 0)
    for thread in range(1, threads):
        fetch_add(words + 8 * (TICKETS + LINE * thread), 1)
        _wake(words, thread)
    _walk(words, 0)


@cached_kernel
def _serve(words, thread):
    """The life of a thread: wait to be called, walk the program."""
    called = 0
    while True:
        called += 1
        _wait(words, thread, TICKETS + LINE * thread, called)
        if load_word(words + 8 * THREADS) == 0:
            return
        _walk(words, thread)


class ThreadPool:
    """Threads that sleep until there is a program; the caller is one of them. One caller at a time."""

    def __init__(self) -> None:
        room = np.zeros(SIZE + LINE, np.int64)
        self._room, self._words = room, room.ctypes.data + -room.ctypes.data % (8 * LINE)
        self._threads: list[Thread] = []
        self._add_lock(0)
        self._cores = usable_cores()

    def run(self, table: int, count: int, threads: int, times: int = 0) -> None:
        """Run the table of a program, of `count` instructions, on this many threads.

        Where there are `times`, the address of so many words, the processor's clock behind each instruction goes there.
        """
        if threads > len(self._threads) + 1:
            self._grow(threads)
        looks, yields = (LOOKS, 0) if threads <= self._cores else (1, YIELDS)
        _run(self._words, table, count, threads, looks, yields, times)

    def _add_lock(self, thread: int) -> None:
        api = ctypes.pythonapi
        api.PyThread_allocate_lock.restype = ctypes.c_void_p
        api.PyThread_acquire_lock.argtypes = [ctypes.c_void_p, ctypes.c_int]
        lock = api.PyThread_allocate_lock()
        api.PyThread_acquire_lock(lock, 1)  # whoever takes it again sleeps until it is released
        words = np.frombuffer((ctypes.c_int64 * SIZE).from_address(self._words), np.int64)
        words[LOCKS + thread], words[TICKETS + LINE * thread] = lock, 0

    def _grow(self, threads: int) -> None:
        for thread in range(len(self._threads) + 1, threads):
            self._add_lock(thread)
            worker = Thread(target=_serve, args=(self._words, thread), name=f"tinyserve-{thread}", daemon=True)
            self._threads.append(worker)
            worker.start()

    def close(self) -> None:
        """End the threads."""
        threads, self._threads = self._threads, []
        if threads:
            _stop(self._words, len(threads) + 1)
        for thread in threads:
            thread.join(1.0)


@cached_kernel
def _stop(words, threads):
    store_word(words + 8 * THREADS, 0)
    for thread in range(1, threads):
        fetch_add(words + 8 * (TICKETS + LINE * thread), 1)
        _wake(words, thread)


_pool: ThreadPool | None = None
_making = Lock()


def pool() -> ThreadPool:
    """The process's threads."""
    global _pool
    if _pool is None:
        with _making:
            if _pool is None:
                _pool = ThreadPool()
                atexit.register(_pool.close)
    return _pool


def _forget() -> None:
    """In the child of a fork there are no threads but the one that forked."""
    global _pool, _making
    _pool, _making = None, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
