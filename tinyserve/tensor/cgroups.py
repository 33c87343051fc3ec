"""What is left to this process, of processors and of memory: by its control group, and by all above it.

Linux alone has control groups. In version 2 (docs.kernel.org/admin-guide/cgroup-v2.html) a process is in one, in
version 1 in one for each controller; limits hold for all groups below. Other systems tell of memory alone.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

MOUNT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def processor_quota() -> float:
    """Cores that may be used at a time; infinite where nothing limits them."""
    quota = float("inf")
    for group in _groups("cpu"):
        try:
            if (group / "cpu.max").is_file():
                most, period = (group / "cpu.max").read_text("ascii").split()
            else:
                files = (group / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
                most, period = (file.read_text("ascii").strip() for file in files)
            if most != "max" and int(most) > 0:
                quota = min(quota, int(most) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return quota


def memory_left() -> float:
    """Bytes that may still be taken; infinite where nothing limits them."""
    left = float("inf")
    for group in _groups("memory"):
        version_2 = (group / "memory.max").is_file()
        limit, used = ("max", "current") if version_2 else ("limit_in_bytes", "usage_in_bytes")
        try:
            most, taken = (int((group / f"memory.{name}").read_text("ascii")) for name in (limit, used))
            # Files that were read count as used, the model's own among them; they go when memory is needed.
            counts = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
            cached = counts.get("inactive_file" if version_2 else "total_inactive_file", counts.get("inactive_file", 0))
            left = min(left, most - taken + int(cached))
        except (OSError, ValueError):
            continue
    return left


def available_memory() -> int:
    """Bytes that can still be used: what the system has free, or the container's limit leaves."""
    if sys.platform == "win32":
        # MEMORYSTATUSEX: its own size in the lower half of the first word, what is free in the third.
        status = (ctypes.c_uint64 * 8)(64)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[2]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # macOS, where what is free is mostly a cache: half of all there is
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(0, int(min(free, memory_left())))


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's group and of those above it, up to what is mounted; of version 2, then of 1."""
    try:
        lines = OWN.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    places = {(MOUNT, "/"), (MOUNT / controller, "/")}  # what a container sees of itself, whatever it is called
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if ".." in path.split("/"):  # outside of what this process may see
            continue
        if number == "0" and not controllers:
            places |= {(MOUNT, path), (MOUNT / "unified", path)}
        elif controller in controllers.split(","):
            places |= {(MOUNT / controllers, path), (MOUNT / controller, path)}
    seen = set[Path]()
    for mount, path in sorted(places):
        folder = mount / path.strip("/")
        for group in (folder, *folder.parents):
            if group not in seen and group.is_relative_to(mount) and group.is_dir():
                seen.add(group)
                yield group
