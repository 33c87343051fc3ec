"""How kernels are compiled: their decorators, one cache, one thread count.

The only file that names `numba.njit`. It knows nothing about what the kernels compute.
"""

import hashlib
import logging
import os
import pickle
import platform
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.core import bytecode, caching, compiler, event, serialize
from numba.core import config as numba_config
from numba.core.codegen import JITCodeLibrary
from numba.core.runtime.nrt import rtsys
from numba.core.types import unliteral  # type: ignore[attr-defined]

from tinyserve.tensor import cgroups

# A function's symbol has its name, its argument types and a number, which Numba counts from 1 in each process. Of two
# closures of one function, such as tiles of one row and of four, one that this process compiles and one that it loads,
# compiled by another, then had one symbol, and the linker kept either: wrong numbers, and kept (numba#10486, #5128).
bytecode.FunctionIdentity._unique_ids = iter(partial(secrets.randbits, 62), None)


def kernel(function: Callable[..., Any], inline: bool = False) -> Any:
    """Compile a kernel that other kernels call, on first use. It becomes a part of their machine code."""
    # No fast-math: a fully masked attention row is an infinity that must survive, and kernels name their own vectors,
    # order and fused operations, so that a number is the same in a tile of one row and of four.
    dispatcher = numba.njit(
        nogil=True,
        error_model="numpy",
        boundscheck=False,
        forceinline=inline,
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        pipeline_class=_LinkedCompiler,
    )(function)
    template = dispatcher.get_call_template

    def of_types(args: Any, keywords: Any) -> Any:
        """A number that is written in a call is of the type that it is in a variable: one version, not two."""
        return template([unliteral(kind) for kind in args], keywords)

    def add_overload(compiled: Any) -> None:
        dispatcher.overloads[tuple(compiled.signature.args)] = compiled

    def refuse(*args: Any, **keywords: Any) -> Any:
        raise TypeError(f"{function.__name__} is a kernel that only kernels call: it has no entry for Python")

    dispatcher.get_call_template = of_types
    # Without a wrapper there is nothing that Python could call.
    dispatcher.add_overload, dispatcher._compile_for_args = add_overload, refuse
    return dispatcher


class _LinkedLibrary(JITCodeLibrary):
    """The code of a kernel that others call: linked into theirs, and only there optimised and made machine code."""

    def _optimize_final_module(self) -> None: ...

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, name: str, env: Any) -> None: ...


class _LinkedCompiler(compiler.Compiler):
    def define_pipelines(self) -> Any:
        if self.state.library is None:
            self.state.library = _LinkedLibrary(self.state.targetctx.codegen(), "linked")
        return super().define_pipelines()


def inline_kernel(function: Callable[..., Any]) -> Any:
    """The same for one in an inner loop that takes named tuples: a call would pass each of their words."""
    return kernel(function, inline=True)


def cached_kernel(function: Callable[..., Any], allocates: bool = True) -> Any:
    """The same for one that Python calls: its machine code is kept in the cache folder.

    A kernel that does not allocate, and nor does what it calls, does not count references: one call for each array
    taken out of a tuple, between the loops.
    """
    dispatcher = numba.njit(nogil=True, error_model="numpy", boundscheck=False, _nrt=allocates)(function)
    dispatcher._cache = _KernelCache(function)  # what cache=True does, with Numba's own class
    dispatcher.compile = _interruptible(dispatcher.compile)
    return dispatcher


def _interruptible(compile: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Have the main thread only wait for what is compiled or loaded, which is where Ctrl-C reaches it at once.

    Within, it would be raised in one of LLVM's callbacks, or in a finalizer, which are lost on Python.
    """

    def compile_elsewhere(types: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return compile(types)
        work = _Compilation(compile, types)
        try:
            work.start()
            while not work.done.acquire(timeout=0.1):  # a signal may have come to another thread, and wake none
                ...
        except RuntimeError:  # no thread can be started
            return compile(types)
        except BaseException:
            work.is_abandoned = True
            raise
        error, result = work.error, work.result
        del work
        try:
            if error is not None:
                raise error
        finally:
            del error  # which has this frame
        return result

    return compile_elsewhere


class _Compilation(threading.Thread):
    """Compiles a kernel. Abandoned, it ends before the next of Numba's passes, and what follows waits for that."""

    # No daemon: a process that ends meanwhile would take LLVM's tables away from under it.
    def __init__(self, compile: Callable[[Any], Any], types: Any):
        super().__init__(name="tinyserve-compile", daemon=False)
        self._compile, self._types = compile, types
        self.done = threading.Lock()  # the one thing to wait for that an exception cannot leave half done
        self.done.acquire()
        self.is_abandoned = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._compile(self._types)
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()


class _AbandonedError(BaseException):
    """Nobody waits for this kernel; no Exception, for Numba takes those for the kernel's."""


class _PassListener(event.Listener):
    def on_start(self, happened: Any) -> None:
        _end_if_abandoned()

    def on_end(self, happened: Any) -> None: ...


def _end_if_abandoned() -> None:
    thread = threading.current_thread()
    if isinstance(thread, _Compilation) and thread.is_abandoned:
        raise _AbandonedError


event.register("numba:run_pass", _PassListener())


def is_compiling() -> bool:
    """Whether a kernel is still compiled that the main thread waits for, or has waited for until it was interrupted."""
    return any(isinstance(thread, _Compilation) for thread in threading.enumerate())


def address(dispatcher: Any, types: tuple[Any, ...]) -> int:
    """Where the machine code of a kernel for these types is, as a C function of them; compiled or loaded if need be."""
    dispatcher.compile(types)
    compiled = dispatcher.overloads[types]
    found: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)
    return found


class _KernelCache(caching.Cache):
    """Machine code on disk, in a file for each kernel and its argument types, behind a checksum of it.

    What cannot be read, whole and as it was written, is compiled again; what cannot be written is not kept, and that is
    said once. Numba's own cache has an index, which two processes write, and ends a program for a damaged file; and it
    loads all that its compiler needs before the first kernel, 0.3 s of it.
    """

    def __init__(self, function: Callable[..., Any]):
        self._py_func = function

    @property
    def cache_path(self) -> str:
        return str(cache_folder())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load machine code for these argument types, or None: then Numba prepares its compiler, and compiles."""
        rtsys.initialize(target_context)  # the allocator that machine code refers to
        with suppress(Exception):  # of a file, or of what pickle and LLVM make of it
            data = self._path(sig, target_context.codegen()).read_bytes()
            if hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
                loaded = compiler.CompileResult._rebuild(target_context, *pickle.loads(data[_DIGEST:]))
                return loaded if tuple(loaded.signature.args) == tuple(sig) else None
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep machine code for these argument types; whoever reads meanwhile finds all of it, or none."""
        if data.library.has_dynamic_globals:  # addresses of this process
            return
        path, code = self._path(sig, data.codegen), serialize.dumps(data._reduce())
        part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        try:
            part.write_bytes(hashlib.sha256(code).digest() + code)
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            _tell_that_nothing_is_kept(error.strerror or str(error))

    def flush(self) -> None: ...

    def _path(self, sig: Any, codegen: Any) -> Path:
        key = hashlib.sha256(f"{self._py_func.__qualname__} {self._index_key(sig, codegen)!r}".encode())
        return cache_folder() / f"{self._py_func.__name__}-{key.hexdigest()[:24]}.kernel"


_DIGEST = hashlib.sha256().digest_size


@cache
def _tell_that_nothing_is_kept(reason: str) -> None:
    logging.getLogger("tinyserve").warning(
        "Compiled kernels cannot be kept in %s (%s), and each process compiles them again: let TINYSERVE_CACHE name a "
        "folder that can be written to.",
        cache_folder(),
        reason,
    )


@cache
def cache_folder() -> Path:
    """Where compiled kernels live: a folder named by everything that machine code depends on.

    Numba's own cache does not see that an intrinsic changed in another module, so the sources are part of the name.
    `TINYSERVE_CACHE` moves it. It may be complete and only to be read, as in an image; or not be there at all, where
    nothing can be written.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    key = hashlib.sha256()
    for source in sources:
        key.update(source.read_bytes())
    forced = [os.environ.get(name) for name in ("TINYSERVE_DOT_PRODUCT", "TINYSERVE_BFLOAT16")]
    processor = f"{cpu_name()} {cpu_features()} {forced}"
    # Numba finds machine code by the path of its source: another installation's is of no use.
    key.update(f"{Path(__file__).parent} {numba.__version__} {platform.python_version()} {processor}".encode())
    folder = _user_cache() / f"kernels-{key.hexdigest()[:16]}"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder  # none that is shared stands in: it holds code, and who can write to it decides what runs


def _user_cache() -> Path:
    if folder := os.environ.get("TINYSERVE_CACHE"):
        return Path(folder).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("tinyserve", appauthor=False)


def cpu_name() -> str:
    """The processor that machine code is made for, in LLVM's words."""
    return numba_config.CPU_NAME or str(llvm.get_host_cpu_name())


@cache
def cpu_features() -> str:
    """Its features as LLVM writes them: "+avx512vnni,-amx-int8,..."."""
    if numba_config.CPU_FEATURES is not None:
        return str(numba_config.CPU_FEATURES)
    with suppress(RuntimeError):  # of a system whose processors LLVM does not ask
        if told := str(llvm.get_host_cpu_features().flatten()):
            return told
    # Of Apple's processors LLVM knows the name, which is enough to compile: all that run macOS have these.
    return "+neon,+dotprod" if sys.platform == "darwin" and platform.machine() == "arm64" else ""


def has_feature(*names: str) -> bool:
    """Whether the processor has all of these features."""
    features = set(cpu_features().split(","))
    return all(f"+{name}" in features for name in names)


def runs(name: str, code: str, environment: dict[str, str]) -> bool:
    """Whether this Python code ends well in a process of its own; remembered beside the kernels, for it takes a second.

    An instruction that a processor does not have, or that its operating system forbids, ends a process.
    """
    known = cache_folder() / f"{name}.runs"
    with suppress(OSError):
        return known.read_text("ascii") == "yes"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True)
    with suppress(OSError):
        known.write_text("yes" if done.returncode == 0 else "no", "ascii")
    return done.returncode == 0


def usable_cores() -> int:
    """Cores this process may really use: affinity and the container's quota, rounded down, at least one.

    More threads than that are slower: at every barrier some wait for one that has no core.
    """
    return max(1, int(min(cores(), cgroups.processor_quota())))


def cores() -> int:
    """Cores this process may be on, whatever its quota."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


MAX_THREADS = 256  # that a pool has room for


def compile_once(kernels: str, run: Callable[[], None], on_wait: Callable[[], None]) -> None:
    """Run what compiles a set of kernels, the first time on a machine: of two processes one compiles, the other waits.

    `kernels` is the name of the set; `on_wait` is called when another process has the lock.
    """
    from filelock import FileLock, Timeout

    ready = cache_folder() / f"{kernels}.ready"
    if ready.exists():
        return None
    lock = FileLock(cache_folder() / "compiling.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        lock.acquire()
    except OSError:  # nothing can be written there: who runs kernels compiles them
        return run()
    try:
        run()
        with suppress(OSError):
            ready.touch()
    finally:
        lock.release()


class _Threads(threading.local):
    count: int | None = None


_threads = _Threads()
one_caller = threading.RLock()  # who calls kernels: the threads beside it serve one at a time


def set_threads(threads: int | None) -> int:
    """Use this many threads in kernels this thread calls, by default the usable cores; returns the number in force."""
    _threads.count = max(1, min(threads if threads is not None else usable_cores(), MAX_THREADS))
    return _threads.count


def get_threads() -> int:
    """How many threads are used in kernels that this thread calls."""
    return _threads.count or set_threads(None)


class one_at_a_time:
    """Within, own this process's kernels, with this many threads."""

    def __init__(self, threads: int):
        self._threads, self._lock = threads, one_caller

    def __enter__(self) -> None:
        self._lock.acquire()
        set_threads(self._threads)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _CompileListener(event.Listener):
    # At module level: a class made in a function is a reference cycle, and would keep the reporter's model alive.
    def __init__(self, report: Callable[[str], None]):
        self.report = report

    def on_start(self, happened: Any) -> None:
        _end_if_abandoned()  # and say nothing more
        self.report(happened.data["dispatcher"].py_func.__name__)

    def on_end(self, happened: Any) -> None: ...


@contextmanager
def on_compile(report: Callable[[str], None]) -> Iterator[None]:
    """While inside, call `report` with a kernel's name whenever one is about to be compiled (not when it is cached)."""
    listener = _CompileListener(report)
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)
