"""What must hold: equal answers, steady memory, and nothing that a server keeps when nobody asks it.

Knows responses, /metrics and /proc; it asks nothing.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
_VOLATILE = ("id", "created", "prompt_tokens_details", "system_fingerprint")


# --- answers ----------------------------------------------------------------------------------------------------------


def essence(response: Any) -> Any:
    """A response without what differs from one time to the next: ids, times, and how much the cache had."""
    if isinstance(response, dict):
        return {name: essence(value) for name, value in response.items() if name not in _VOLATILE}
    if isinstance(response, list):
        return [essence(one) for one in response]
    return response


def assembled(events: Iterable[dict[str, Any]]) -> Any:
    """The essence of the whole response that a stream's events amount to."""
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        if "error" in event:
            return event
        whole |= {"object": event["object"].removesuffix(".chunk"), "model": event["model"]}
        if event.get("usage"):
            whole["usage"] = event["usage"]
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], {"index": part["index"], "logprobs": None})
            _add(choice, part)
            if part["finish_reason"] is not None:
                choice |= {name: part[name] for name in ("finish_reason", "stop_reason")}
    return essence({**whole, "choices": [choices[index] for index in sorted(choices)]})


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    if "text" in part:
        choice["text"] = choice.get("text", "") + part["text"]
    else:
        message = choice.setdefault("message", {"role": "assistant", "content": "", "refusal": None})
        message["content"] += part["delta"].get("content") or ""
        for name in ("reasoning", "reasoning_content"):
            if thought := part["delta"].get(name):
                message[name] = message.get(name, "") + thought
        for call in part["delta"].get("tool_calls") or []:
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append({"type": call["type"], "function": {"name": "", "arguments": ""}})
            for name, piece in call["function"].items():
                calls[call["index"]]["function"][name] += piece or ""
    if part.get("logprobs"):
        logprobs = choice["logprobs"] = choice["logprobs"] or {}
        for name, values in part["logprobs"].items():
            logprobs[name] = None if values is None else (logprobs.get(name) or []) + values


def difference(expected: Any, got: Any, where: str = "") -> str | None:
    """Where two essences differ first, as a sentence; None if they are equal, no content being as empty content."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for name in [*expected, *(name for name in got if name not in expected)]:
            if said := difference(expected.get(name), got.get(name), f"{where}.{name}".lstrip(".")):
                return said
        return None
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        pairs = enumerate(zip(expected, got, strict=True))
        return next((said for i, pair in pairs if (said := difference(*pair, f"{where}[{i}]"))), None)
    if expected == got or (where.endswith("content") and not expected and not got):
        return None
    return f"{where} is {got!r:.200}, and was {expected!r:.200} alone"


# --- the server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """What a server holds; None where it is not known."""

    blocks: float | None = None
    running: float | None = None
    waiting: float | None = None
    descriptors: int | None = None
    threads: int | None = None
    processes: int | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.0f}" for name, value in asdict(self).items() if value is not None)


def snapshot(metrics: str, pid: int | None) -> Snapshot:
    """From the text of /metrics and, if the process is known, what the kernel says of it."""
    values = dict.fromkeys(("cache_blocks_used", "requests_running", "requests_waiting"), 0.0)
    for line in metrics.splitlines():
        name = line.partition("{")[0].removeprefix("tinyserve_")
        if name in values:
            values[name] += float(line.rpartition(" ")[2])
    held = tuple(values.values())
    if pid is None or not (PROC / str(pid)).exists():
        return Snapshot(*held)
    home = PROC / str(pid)
    return Snapshot(*held, _count(home / "fd"), _count(home / "task"), len(family(pid)))


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir())


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for one in found:
        for task in (PROC / str(one) / "task").glob("*"):
            try:
                found += map(int, (task / "children").read_text().split())
            except OSError:  # it has ended meanwhile
                continue
    return found


def resident(pid: int) -> int | None:
    """Bytes of memory that the process has; None if there is none of this number."""
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)


def held(idle: Snapshot) -> list[str]:
    """What nobody can be using, as sentences."""
    what = {"blocks": "blocks of the cache are held", "running": "answers run", "waiting": "answers wait"}
    counts = {name: getattr(idle, name) for name in what}
    return [f"{count:.0f} {what[name]}, and nobody asks." for name, count in counts.items() if count]


def lost(before: Snapshot, after: Snapshot) -> list[str]:
    """What the server has more of than before, as sentences."""
    sentences = []
    for name in ("descriptors", "threads", "processes"):
        first, last = getattr(before, name), getattr(after, name)
        if first is not None and (last is None or last > first):
            sentences.append(f"{name} are {last if last is not None else 'gone'}, and were {first} behind the warm-up.")
    return sentences


def unsteady(memory: Sequence[tuple[float, int]], tolerance: float) -> list[str]:
    """Where resident memory leaves its level at the beginning of the series, by a share above `tolerance`.

    The level is the median of the first fifth; medians of the other fifths are compared, and no single peak.
    """
    if len(memory) < 10:
        return []
    size = len(memory) // 5
    fifths = [memory[i * size : (i + 1) * size] for i in range(5)]
    level, *others = [statistics.median(size for _, size in fifth) for fifth in fifths]
    for fifth, other in zip(fifths[1:], others, strict=True):
        if abs(other / level - 1) > tolerance:
            return [
                f"Resident memory is {other / 1e6:.1f} MB between {fifth[0][0] / 60:.1f} and {fifth[-1][0] / 60:.1f} "
                f"minutes, and was {level / 1e6:.1f} MB behind the warm-up: {100 * (other / level - 1):+.1f} %."
            ]
    return []


def grown_at_rest(memory: Sequence[tuple[float, int]], tolerance: float) -> list[str]:
    """Where resident memory at rest is away from what it was first by a share above `tolerance`."""
    if not memory:
        return []
    level = memory[0][1]
    return [
        f"Resident memory at rest is {size / 1e6:.1f} MB after {at / 60:.1f} minutes, and was {level / 1e6:.1f} MB "
        f"behind the warm-up: {100 * (size / level - 1):+.1f} %."
        for at, size in memory[1:]
        if abs(size / level - 1) > tolerance
    ]
