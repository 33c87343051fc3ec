"""A run's measurements as Markdown. Knows the run's JSON and nothing about engines.

A run has `measurements` of single works: engine, work, round, tokens, seconds. Round 0 warms up and is not reported.
"""

import statistics
from typing import Any

Rates = dict[int, float]  # round -> tokens a second


def markdown(run: dict[str, Any]) -> str:
    """One table a work: medians, and by how much each of tinyserve's dtypes is faster, round by round."""
    return page(run, [table(run, work) for work in run["works"]])


def page(run: dict[str, Any], tables: list[list[str]]) -> str:
    """The tables between what was measured where and what was not measured."""
    machine = f"{run['processor']} (dot products: {run['dot_product']})"
    rounds = f"medians of {run['rounds']} rounds" if run["rounds"] > 1 else "one round"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"### {run['model']}, {run['threads']} threads, {run['date']}, commit {run['commit']}",
        "",
        f"{machine}; {run['weights']}; {rounds}, engines in turn; {versions}.",
        "",
    ]
    for lines_of_table in tables:
        lines += [*lines_of_table, ""]
    lines += [f"- Not measured: {_where(note)}: {note['reason']}" for note in run["not_measured"]]
    lines += [f"- Not installed, so not measured: {peer['name']}. {peer['install']}" for peer in run["missing"]]
    return "\n".join(lines).rstrip() + "\n"


def table(run: dict[str, Any], work: str) -> list[str]:
    rates = {engine: _rates(run, work, engine) for engine in run["engines"]}
    measured = [engine for engine in rates if rates[engine]]
    firsts = [engine for engine in measured if engine.startswith("tinyserve ")] or measured[:1]
    requests = _requests(run, work)
    lines = [
        f"| {work} | tokens/s |{' requests/s |' * bool(requests)}" + "".join(f" {one} against it |" for one in firsts),
        f"|---|---:|{'---:|' * bool(requests)}" + "---|" * len(firsts),
    ]
    for engine, own in rates.items():
        rate = rounded(statistics.median(own.values())) if own else "not measured"
        if requests:
            rate += f" | {statistics.median(own.values()) * requests[engine]:.2f}" if own else " |"
        ratios = [_ratio(rates[first], own) if first != engine else "" for first in firsts]
        lines.append(f"| {engine} | {rate} |" + "".join(f" {ratio} |" for ratio in ratios))
    return lines


def _requests(run: dict[str, Any], work: str) -> dict[str, float]:
    """Of each engine, requests by tokens; none where a work has no requests."""
    measurements = [m for m in run["measurements"] if m["work"] == work and "requests" in m]
    return {m["engine"]: m["requests"] / m["tokens"] for m in measurements}


def _rates(run: dict[str, Any], work: str, engine: str) -> Rates:
    return {
        m["round"]: m["tokens"] / m["seconds"]
        for m in run["measurements"]
        if m["work"] == work and m["engine"] == engine and m["round"] > 0
    }


def rounded(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _ratio(first: Rates, other: Rates) -> str:
    """The median of the rounds' ratios and its range; rounds that only one of the two has are left out."""
    return times([first[round_] / other[round_] for round_ in first if round_ in other])


def times(ratios: list[float]) -> str:
    """The median of ratios and, of several, their range."""
    if len(ratios) < 2:
        return "".join(f"**{ratio:.2f} ×**" for ratio in ratios)
    return f"**{statistics.median(ratios):.2f} ×** ({min(ratios):.2f} to {max(ratios):.2f})"


def _where(note: dict[str, str]) -> str:
    return f"{note['engine']}, {note['work']}" if note["work"] else note["engine"]
