"""What bench_engine.py measured, as Markdown. Knows the run's JSON and nothing about engines."""

import statistics
from collections.abc import Iterable
from typing import Any

from peers import report

Row = dict[str, Any]


def markdown(run: dict[str, Any]) -> str:
    tables = [report.table(run, work) for work in run["works"]]
    tables += [_search(family) for family in run["search"]]
    if shares := _shares(run):
        tables.append([f"Of that time in the model: {'; '.join(shares)}."])
    for name, table in (("prefix", _prefix), ("overhead", _overhead), ("gaps", _gaps)):
        if name in run:
            rows = [row for row in run[name]["measurements"] if row["round"] > 0]
            tables.append(table(run[name], rows))
    return report.page(run, tables)


def _search(family: list[Row]) -> list[str]:
    names = [row["engine"].partition(", ") for row in family]
    header = f"| {names[0][0]}, one run each |" + "".join(f" {at_once} |" for _, _, at_once in names)
    rates = (report.rounded(row["tokens"] / row["seconds"]) for row in family)
    return [header, "|---|" + "---:|" * len(family), "| tokens/s |" + "".join(f" {rate} |" for rate in rates)]


def _shares(run: dict[str, Any]) -> list[str]:
    shares: dict[str, list[float]] = {}
    for row in run["measurements"]:
        if row["round"] > 0 and "in_model" in row:
            shares.setdefault(row["engine"], []).append(row["in_model"] / row["seconds"])
    return [f"{name} {100 * _median(own):.1f} %" for name, own in shares.items()]


def _prefix(work: dict[str, Any], rows: list[Row]) -> list[str]:
    """A row for each way; the ratios are of medians, the first wave's and the uncached second's by the cached one's."""
    lines = [
        f"| {work['label']}: time to first token, s | first wave, median | slowest | second wave, median | slowest "
        "| second wave shorter than the first |",
        "|---|---:|---:|---:|---:|---|",
    ]
    seconds = {
        caching: [[wave["seconds"] for wave in row["waves"]] for row in rows if row["caching"] == caching]
        for caching in ("with", "without")
    }
    for caching, rounds in seconds.items():
        columns = []
        for i in range(2):
            columns += [_median(statistics.median(waves[i]) for waves in rounds)]
            columns += [_median(max(waves[i]) for waves in rounds)]
        ratios = [statistics.median(first) / statistics.median(second) for first, second in rounds]
        figures = "".join(f" {figure:.2f} |" for figure in columns)
        lines.append(f"| {caching} prefix caching |{figures} {report.times(ratios)} |")
    pairs = list(zip(seconds["with"], seconds["without"], strict=True))
    medians = [statistics.median(without[1]) / statistics.median(cached[1]) for cached, without in pairs]
    slowest = [max(without[1]) / max(cached[1]) for cached, without in pairs]
    lines += [
        "",
        f"The second wave's time to first token is {report.times(medians)} shorter than without prefix caching; its "
        f"slowest {report.times(slowest)}.",
    ]
    return lines


def _overhead(work: dict[str, Any], rows: list[Row]) -> list[str]:
    lines = [f"| {work['label']}, ms | whole | in the model | added | added, of a median step |", "|---|" + "---:|" * 4]
    for sampling in ("greedy", "sampled"):
        own = [row for row in rows if row["sampling"] == sampling]
        whole, in_model = (_median(statistics.fmean(row[key]) for row in own) for key in ("whole", "in_model"))
        differences = [_differences(row) for row in own]
        added = _median(statistics.fmean(of_round) for of_round in differences)
        typical = _median(statistics.median(of_round) for of_round in differences)
        figures = "".join(f" {1000 * figure:.2f} |" for figure in (whole, in_model, added, typical))
        lines.append(f"| {sampling} |{figures}")
    return lines


def _differences(row: Row) -> list[float]:
    return [whole - in_model for whole, in_model in zip(row["whole"], row["in_model"], strict=True)]


def _gaps(work: dict[str, Any], rows: list[Row]) -> list[str]:
    """Ratios are of the slowest gap by a chunk's time, in the same round."""
    before = _median(statistics.median(row["before"]) for row in rows)
    gap, slowest_gap = (_median(of(row["during"]) for row in rows) for of in (statistics.median, max))
    chunk, slowest_chunk = (_median(of(row["chunks"]) for row in rows) for of in (statistics.median, max))
    to_median = report.times([max(row["during"]) / statistics.median(row["chunks"]) for row in rows])
    to_slowest = report.times([max(row["during"]) / max(row["chunks"]) for row in rows])
    return [
        f"| {work['label']}, s | median | slowest | slowest gap against it, median | slowest |",
        "|---|---:|---:|---|---|",
        f"| gap between tokens of a stream, before | {before:.3f} | | | |",
        f"| gap between tokens of a stream, meanwhile | {gap:.3f} | {slowest_gap:.3f} | | |",
        f"| a chunk of {work['chunk']} tokens, the prompt alone | {chunk:.3f} | {slowest_chunk:.3f} | {to_median} "
        f"| {to_slowest} |",
    ]


def _median(figures: Iterable[float]) -> float:
    return statistics.median(figures)
