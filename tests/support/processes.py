"""What /proc tells of processes that others started: who descends from whom, and who listens where."""

import ipaddress
import time
from collections.abc import Collection
from pathlib import Path

LISTENING = "0A"


def descendants(pid: int) -> set[int]:
    """All processes below this one that have not ended."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (parent := _parent(folder)) is not None:
            children.setdefault(parent, []).append(int(folder.name))
    found: set[int] = set()
    new = [pid]
    while new:
        new = [child for one in new for child in children.get(one, []) if child not in found]
        found.update(new)
    return found


def alive(pids: Collection[int]) -> set[int]:
    """Those that run: a zombie does not."""
    return {pid for pid in pids if _parent(Path(f"/proc/{pid}")) is not None}


def wait_until_gone(pids: Collection[int], seconds: float) -> set[int]:
    """Those that are left after so many seconds, or none as soon as all have ended."""
    end = time.monotonic() + seconds
    while (left := alive(pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def listeners(pids: Collection[int]) -> dict[tuple[str, int], int]:
    """Address and port of each socket that listens -> the process that holds it."""
    holders: dict[str, int] = {}
    for pid in pids:
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                target = str(link.readlink())
                if target.startswith("socket:["):
                    holders[target[8:-1]] = pid
        except OSError:
            continue
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in holders:
                address, port = fields[1].split(":")
                found[_address(address), int(port, 16)] = holders[fields[9]]
    return found


def _parent(folder: Path) -> int | None:
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[1])


def _address(hexadecimal: str) -> str:
    """The kernel writes 32-bit words in the machine's order."""
    words = [bytes.fromhex(hexadecimal[i : i + 8])[::-1] for i in range(0, len(hexadecimal), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)
