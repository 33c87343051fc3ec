"""A run's measurements as Markdown. Knows the run's JSON and nothing about engines.

A run has `measurements` of single works: engine, work, round, tokens, seconds. Round 0 warms up and is not reported.
"""

import statistics
from typing import Any

Rates = dict[int, float]  # round -> tokens a second


def markdown(run: dict[str, Any]) -> str:
    """One table a work: medians, and by how much each of tinyserve's dtypes is faster, round by round."""
    machine = f"{run['processor']} (dot products: {run['dot_product']})"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"### {run['model']}, {run['threads']} threads, {run['date']}, commit {run['commit']}",
        "",
        f"{machine}; {run['weights']}; medians of {run['rounds']} rounds, engines in turn; {versions}.",
        "",
    ]
    for work in run["works"]:
        lines += [*_table(run, work), ""]
    lines += [f"- Not measured: {_where(note)}: {note['reason']}" for note in run["not_measured"]]
    lines += [f"- Not installed, so not measured: {peer['name']}. {peer['install']}" for peer in run["missing"]]
    return "\n".join(lines).rstrip() + "\n"


def _table(run: dict[str, Any], work: str) -> list[str]:
    rates = {engine: _rates(run, work, engine) for engine in run["engines"]}
    measured = [engine for engine in rates if rates[engine]]
    firsts = [engine for engine in measured if engine.startswith("tinyserve ")] or measured[:1]
    lines = [
        f"| {work} | tokens/s |" + "".join(f" {first} against it |" for first in firsts),
        "|---|---:|" + "---|" * len(firsts),
    ]
    for engine, own in rates.items():
        rate = _rounded(statistics.median(own.values())) if own else "not measured"
        ratios = [_ratio(rates[first], own) if first != engine else "" for first in firsts]
        lines.append(f"| {engine} | {rate} |" + "".join(f" {ratio} |" for ratio in ratios))
    return lines


def _rates(run: dict[str, Any], work: str, engine: str) -> Rates:
    return {
        m["round"]: m["tokens"] / m["seconds"]
        for m in run["measurements"]
        if m["work"] == work and m["engine"] == engine and m["round"] > 0
    }


def _rounded(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _ratio(first: Rates, other: Rates) -> str:
    """The median of the rounds' ratios and its range; rounds that only one of the two has are left out."""
    ratios = [first[round_] / other[round_] for round_ in first if round_ in other]
    if not ratios:
        return ""
    return f"**{statistics.median(ratios):.2f} ×** ({min(ratios):.2f} to {max(ratios):.2f})"


def _where(note: dict[str, str]) -> str:
    return f"{note['engine']}, {note['work']}" if note["work"] else note["engine"]
