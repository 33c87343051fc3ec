"""Plays another system to tinyserve, in processes of its own: what Python lacks there, and what it has instead.

Each Python that `environment` is given to begins with `play`, whoever starts it. tinyserve gets modules that are as
there; everything else goes on with the system that there is. Without /proc and /sys; on Windows a file that is open is
neither removed nor replaced, and names, folders and links are as its file systems have them. Needs Linux, to ask what
is open, and knows nothing of what tinyserve does with what it finds.
"""

import builtins
import ctypes
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

MODULES = ("ctypes", "filelock", "mmap", "os", "select", "signal", "socket", "sys", "time")
ABSENT = {"win32": ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"), "darwin": ()}
FREE = 6 << 30  # bytes that Windows says are free
BREAK = getattr(signal, "SIGUSR2", None)  # what stands in for Ctrl-Break
_VARIABLE = "PLAYED_SYSTEM"
_OWN_FOLDERS = ("/proc/", "/sys/")
_BETWEEN = (__name__, "pathlib", "io", "os")
_NO_NAME = set('<>:"|?*')


def environment(system: str, folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a process on this system; a file that Python begins with is written into the folder."""
    from systems import missing_names

    (folder / "sitecustomize.py").write_text("import other_system\nother_system.play()\n")
    told = {"system": system, "missing": {name: sorted(missing_names(name, system)) for name in MODULES}}
    path = os.pathsep.join([str(folder), str(Path(__file__).parent)])
    return {**os.environ, "PYTHONPATH": path, _VARIABLE: json.dumps(told), **variables}


def play() -> None:
    """Be the system that the environment names, from now on."""
    told = json.loads(os.environ[_VARIABLE])
    system = told["system"]
    instead = _WINDOWS if system == "win32" else _MACOS
    modules = dict[str, ModuleType]()
    import_really = builtins.__import__

    def stand_in(name: str) -> ModuleType:
        if name not in modules:
            real = import_module(name)
            own = {"platform": system} if name == "sys" else instead.get(name, lambda _: {})(real)
            modules[name] = _StandIn(real, frozenset(told["missing"][name]) - own.keys(), own)
        return modules[name]

    def import_as_there(
        name: str, globals: Mapping[str, Any] | None = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> ModuleType:
        if level == 0 and _is_ours(globals):
            if name in ABSENT[system]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in MODULES:
                return stand_in(name)
        found = import_really(name, globals, locals, fromlist, level)
        if system == "win32" and (jit := sys.modules.get("tinyserve.tensor._jit")) is not None:
            _keep_kernels_apart(jit)
        return found

    builtins.__import__ = import_as_there
    sys.addaudithook(_FileSystem(is_windows=system == "win32").hear)


class _StandIn(ModuleType):
    """A module without some of its names, and with others in their place."""

    def __init__(self, real: ModuleType, missing: frozenset[str], own: Mapping[str, Any]):
        super().__init__(real.__name__)
        for name, value in (("_real", real), ("_missing", missing), ("_own", own)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self._real.__name__!r} has no attribute {name!r}")
        return self._own[name] if name in self._own else getattr(self._real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._real, name, value)


def _is_ours(names: Mapping[str, Any] | None) -> bool:
    module = names and (names.get("__package__") or names.get("__name__"))
    return str(module).partition(".")[0] == "tinyserve"


# --- what there is instead --------------------------------------------------------------------------------------------


def _windows_ctypes(real: Any) -> dict[str, Any]:
    def library(name: str | None, *arguments: Any, **options: Any) -> Any:
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        return real.CDLL(name, *arguments, **options)

    def memory_status(status: Any) -> int:
        assert ctypes.sizeof(status) == 64 and ctypes.c_uint32.from_buffer(status).value == 64
        status[2] = FREE
        return 1

    return {
        "CDLL": library,
        "windll": SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=memory_status)),
    }


def _windows_filelock(real: Any) -> dict[str, Any]:
    class Lock(real.FileLock):  # type: ignore[misc]
        """Removes its file as it is released."""

        def release(self, force: bool = False) -> None:
            super().release(force)
            with suppress(OSError):
                Path(self.lock_file).unlink()

    return {"FileLock": Lock}


def _macos_ctypes(real: Any) -> dict[str, Any]:
    class Library:
        """A C library that is not glibc."""

        def __init__(self, name: str | None):
            self._real = real.CDLL(name)

        def __getattr__(self, name: str) -> Any:
            if name in ("mallopt", "malloc_trim"):
                raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
            return getattr(self._real, name)

    return {"CDLL": Library}


_WINDOWS: dict[str, Any] = {
    "ctypes": _windows_ctypes,
    "filelock": _windows_filelock,
    "signal": lambda real: {"SIGBREAK": BREAK, "CTRL_C_EVENT": 0, "CTRL_BREAK_EVENT": 1},
    "socket": lambda real: {"SO_EXCLUSIVEADDRUSE": socket.SO_REUSEADDR},
}
_MACOS: dict[str, Any] = {"ctypes": _macos_ctypes}


def _keep_kernels_apart(jit: Any) -> None:
    """Kernels are compiled for Windows, and found here; none is kept, or said to be, where others look for them."""
    if hasattr(jit, "on_compile") and jit.compile_once.__name__ == "compile_once":  # all of the module is there
        jit.compile_once = lambda kernels, run, on_wait: run()  # before anything else is imported
        jit._KernelCache.save_overload = lambda *_: None
        import llvmlite.binding as llvm

        llvm.add_symbol("SwitchToThread", ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value)


class _FileSystem:
    """What a system refuses to do with files, told by what Python says that it is about to do."""

    def __init__(self, is_windows: bool):
        self._is_windows = is_windows

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and _is_ours(_caller()):
            self._open(*arguments)
        elif self._is_windows and event == "os.mkdir":
            self._check_name(arguments[0])
        elif self._is_windows and event == "os.remove":
            self._check_closed(*arguments)
        elif self._is_windows and event == "os.rename":
            source, target, source_folder, target_folder = arguments
            self._check_name(target)
            self._check_closed(source, source_folder)
            self._check_closed(target, target_folder)
        elif self._is_windows and event == "os.symlink":
            raise OSError(errno.EPERM, "A required privilege is not held by the client", str(arguments[0]))

    def _open(self, path: Any, mode: str | None, flags: int) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        place = os.fsdecode(path)
        if place.startswith(_OWN_FOLDERS):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
        if self._is_windows and flags & os.O_CREAT:
            self._check_name(place)
        if self._is_windows and os.path.isdir(place):  # noqa: PTH112
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), place)

    @staticmethod
    def _check_name(path: Any) -> None:
        name = os.path.basename(os.fsdecode(path))  # noqa: PTH119
        if _NO_NAME & set(name) or name.endswith((" ", ".")):
            raise OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect", name)

    @staticmethod
    def _check_closed(path: Any, folder: int = -1) -> None:
        """Neither the file, nor one in the folder, is open in this process."""
        own = "/proc/self/fd"
        base = os.readlink(f"{own}/{folder}") if folder >= 0 else str(Path.cwd())  # noqa: PTH115
        place = os.path.normpath(os.path.join(base, os.fsdecode(path)))  # noqa: PTH118
        for descriptor in os.listdir(own):  # noqa: PTH208
            with suppress(FileNotFoundError):
                is_open = os.readlink(f"{own}/{descriptor}")  # noqa: PTH115
                if is_open == place or is_open.startswith(f"{place}/"):
                    raise PermissionError(errno.EACCES, "The process cannot access the file", place)


def _caller() -> dict[str, Any] | None:
    """The names of the module that asks, behind those of the standard library's that it asks."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_globals if frame is not None else None
