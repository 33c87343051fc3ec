"""A server's threads share heaps, and what is free in them goes back to the system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

is_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks glibc and /proc")

COUNT = """
import ctypes, re, sys, threading
from tinyserve.server.heaps import keep_heaps_small
if sys.argv[1] == "shared":
    keep_heaps_small()
done, held = threading.Barrier(17), threading.Barrier(17)
def hold():
    memory = [bytes(2000) for _ in range(50)]
    done.wait(), held.wait()
for _ in range(16):
    threading.Thread(target=hold).start()
done.wait()
libc = ctypes.CDLL(None)
libc.fopen.restype, libc.fclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
held.wait()
print(len(re.findall("<heap nr", open(sys.argv[2]).read())))
"""
TRIMMED = """
import sys, time
from tinyserve.server import heaps
heaps.TRIM_SECONDS = 0.05
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
if sys.argv[1] == "trimmed":
    heaps.keep_heaps_small()
pieces = [bytes(50_000) for _ in range(4000)]  # 200 MB, in pieces that are too small to be mapped
kept = pieces[::40]  # holes between what is still used
most = resident()
del pieces
end = time.monotonic() + (60 if sys.argv[1] == "trimmed" else 1)
while resident() > most - 150_000_000 and time.monotonic() < end:
    time.sleep(0.01)
print((most - resident()) >> 20)
"""

COLLECTED = """
import gc, sys, time, weakref
from tinyserve.server import heaps
heaps.TRIM_SECONDS = 0.05
class Node:
    pass
def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)
gc.set_threshold(100_000)
if sys.argv[1] == "collected":
    heaps.keep_heaps_small()
loaded = Node()
loaded.itself, held = loaded, weakref.ref(loaded)
heaps.keep_loaded()
gone = [cycle() for _ in range(8)]
end = time.monotonic() + (60 if sys.argv[1] == "collected" else 1)
while any(one() for one in gone) and time.monotonic() < end:
    time.sleep(0.01)
print(sum(one() is None for one in gone))
del loaded
heaps.collect_unloaded()
assert held() is None
"""


def run(program: str, *arguments: str) -> int:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@is_linux
def test_threads_share_heaps(tmp_path: Path) -> None:
    assert run(COUNT, "shared", str(tmp_path / "shared")) <= 2 < run(COUNT, "apart", str(tmp_path / "apart"))


@is_linux
def test_what_is_free_goes_back() -> None:
    assert run(TRIMMED, "trimmed") > 120 > run(TRIMMED, "untrimmed")


def test_cycles_are_collected_and_models_with_them() -> None:
    assert run(COLLECTED, "collected") == 8
    assert run(COLLECTED, "not") == 0
