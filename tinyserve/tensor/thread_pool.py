"""The threads that run programs: one region that they share, a barrier, and work that the fastest takes.

Knows no kernel: a program is a table of code and argument blocks (program.py writes it). Every thread walks the whole
table; behind each instruction the threads meet. Whoever waits looks some thousand times and then sleeps, so that a
neighbour on the same processor is not held up, and nor is the thread that is waited for.
"""

import atexit
import ctypes
import os
from threading import Lock, RLock, Thread
from typing import NamedTuple

from tinyserve.tensor import _jit
from tinyserve.tensor._jit import MAX_THREADS, cached_kernel, kernel, usable_cores
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

SPLIT = (
    4  # a thread takes this part of what is left of its share at a time: much at first, and the last ones one by one
)
LOOKS = 4000  # before a waiting thread sleeps: some 50 to 100 µs, more than a balanced instruction leaves to wait for
FEW_LOOKS = 100  # where looking has been in vain: the thread that is waited for may need this very processor
YIELDS = 10  # where there are more threads than processors: a thread that waits gives its processor away, then sleeps

# Where things are in the memory that the threads share, in words; what is written often has a cache line of its own.
LINE = 8
ARRIVALS = 0  # at barriers, ever counted up
CODE, COUNT, THREADS, TARGET, NUM_LOOKS, NUM_YIELDS, TIMES = range(LINE, LINE + 7)  # the program that runs
ASLEEP = 2 * LINE  # for each thread: whether it has to be woken
LOCKS = ASLEEP + MAX_THREADS  # for each thread: the address of the lock that it sleeps at
TICKETS = LOCKS + MAX_THREADS  # for each thread: how many programs it has been called to
PATIENCE = TICKETS + 1  # beside it: how often the thread looks before it sleeps
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
        claims = team.claims + 8 * LINE * owner
        left = end - begin - load_word(claims)
        if left > 0:
            step = max(1, left // SPLIT)
            first = begin + fetch_add(claims, step)
            if first < end:
                return first, min(first + step, end)
    return count, count


@kernel
def from_the_end(team, count, item):
    """The item that is as far from the end of its owner's share as this one is from its beginning."""
    owner = item * team.threads // count
    while (owner + 1) * count // team.threads <= item:
        owner += 1
    return owner * count // team.threads + (owner + 1) * count // team.threads - 1 - item


@kernel
def own_items(team, count):
    """This thread's equal share of items, (first, last), where they are too little work to be worth an exchange."""
    return team.thread * count // team.threads, (team.thread + 1) * count // team.threads


# --- waiting and waking -----------------------------------------------------------------------------------------------

# Whoever waits says that it sleeps and then looks; whoever has something for it counts up and then looks whether it
# sleeps. All four are in one order for all threads (seq_cst), so that one of the two sees the other. Who changes
# `asleep` from 1 to 0 decides: a waker releases the lock once for it, and the sleeper acquires it once, before it can
# sleep again. What is waited for only counts up: whoever is woken for an earlier reason looks, and sleeps again.


@kernel
def _wait(words, thread, index, value):
    """Until words[index] has reached a value."""
    address, asleep = words + 8 * index, words + 8 * (ASLEEP + thread)
    patience = words + 8 * (PATIENCE + LINE * thread)
    looks = load_word(patience)
    for _ in range(min(looks, load_word(words + 8 * NUM_LOOKS))):
        if load_word(address) >= value:
            if looks < LOOKS:
                store_word(patience, min(LOOKS, 4 * looks))
            return
        pause()
    if index == ARRIVALS:  # how long nobody asks for a program says nothing
        store_word(patience, max(FEW_LOOKS, looks // 2))
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
        if times != 0:
            store_word(times + 8 * i, ticks())  # by every thread: what stays is the last one's
        if threads > 1:
            arrivals += threads
            if fetch_add(words + 8 * ARRIVALS, 1) + 1 == arrivals:
                for other in range(threads):
                    _wake(words, other)
            else:
                _wait(words, thread, ARRIVALS, arrivals)


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


_API = ctypes.pythonapi
_API.PyMem_RawCalloc.restype = _API.PyThread_allocate_lock.restype = ctypes.c_void_p
_API.PyMem_RawCalloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
_API.PyThread_acquire_lock.argtypes = [ctypes.c_void_p, ctypes.c_int]


class ThreadPool:
    """Threads that sleep until there is a program; the caller is one of them. One caller at a time."""

    def __init__(self) -> None:
        # Never freed: threads may look at it until the process has ended.
        room = _API.PyMem_RawCalloc(SIZE + LINE, 8)
        self._words: int = room + -room % (8 * LINE)
        self._threads: list[Thread] = []
        self.can_grow = True
        self._add_lock(0)
        self._cores = usable_cores()

    def run(self, table: int, count: int, threads: int, times: int = 0) -> None:
        """Run the table of a program, of `count` instructions, on this many threads.

        Where there are `times`, the address of so many words, the processor's clock behind each instruction goes there.
        """
        if not count:
            return  # no barrier: a thread would read what the next program is
        if not self.can_grow:
            threads = 1
        if threads > len(self._threads) + 1:
            self._grow(threads)
        looks, yields = (LOOKS, 0) if threads <= self._cores else (1, YIELDS)
        _run(self._words, table, count, threads, looks, yields, times)

    def _add_lock(self, thread: int) -> None:
        lock = _API.PyThread_allocate_lock()
        _API.PyThread_acquire_lock(lock, 1)  # whoever takes it again sleeps until it is released
        words = (ctypes.c_int64 * SIZE).from_address(self._words)
        words[LOCKS + thread], words[ASLEEP + thread] = lock, 0
        words[TICKETS + LINE * thread], words[PATIENCE + LINE * thread] = 0, LOOKS

    def _grow(self, threads: int) -> None:
        try:
            for thread in range(len(self._threads) + 1, threads):
                self._add_lock(thread)
                worker = Thread(target=_serve, args=(self._words, thread), name=f"tinyserve-{thread}", daemon=True)
                self._threads.append(worker)
                worker.start()
        except BaseException:  # by Ctrl-C, too: no program may wait for a thread that never began
            self.close()
            raise

    def close(self) -> None:
        """End the threads; a program needs new ones."""
        threads, self._threads = self._threads, []
        if threads:
            _stop(self._words, len(threads) + 1)
        for thread in threads:
            if thread.ident is not None:
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
    return _pool


@atexit.register
def _close() -> None:
    """At the end of the process: threads must not run code that is being unloaded. A long program is not waited for."""
    if _pool is not None and _jit.one_caller.acquire(timeout=1.0):
        try:
            _pool.close()
            _pool.can_grow = False  # daemons may still run programs, where no thread can begin any more
        finally:
            _jit.one_caller.release()


def _forget() -> None:
    """In the child of a fork there are no threads but the one that forked."""
    global _pool, _making
    _pool, _making, _jit.one_caller = None, Lock(), RLock()  # whoever held them is gone


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
