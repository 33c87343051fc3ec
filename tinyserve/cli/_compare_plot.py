"""Architectures as a picture: where their parameters are, and what a context costs in memory and in work.

Knows matplotlib, which is an extra; the numbers are those of the table.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from tinyserve.cli._plot import COLORS, style
from tinyserve.models.config.shapes import COMPONENTS

_MORE_COLORS = ("#d4a72c", "#4c9f9a", "#a9744f", "#5b5b8f")
_LENGTHS = [2**i for i in range(4, 18)]  # tokens of a context


def draw(path: Path, rows: Sequence[dict[str, Any]], kv_dtype: str) -> None:
    """Write a PNG of three panels, from the rows of `comparison`; the cache is kept in `kv_dtype`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    parameters, cache, work = figure.subplots(1, 3)
    _parameters(parameters, rows)
    for row, color in zip(rows, cycle(COLORS), strict=False):
        lengths = [length for length in _LENGTHS if length <= row["max_position_embeddings"]]
        seen = [min(length, row["attention_window"] or length) for length in lengths]
        a_token = row["kv_bytes_per_1000_tokens"][kv_dtype] / 1000
        cache.plot(
            lengths, [(row["state_bytes_per_sequence"] + a_token * n) / 1e6 for n in seen], color=color, marker=".",
            label=row["model"],
        )  # fmt: skip
        flops = [row["flops_per_token"] + row["attention_flops_per_position"] * n for n in seen]
        work.plot(lengths, [flop / 1e9 for flop in flops], color=color, marker=".", label=row["model"])
    for axes in (cache, work):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    style(cache, "Cache", "tokens of the context", f"MB a sequence, {kv_dtype}")
    style(work, "Work", "tokens of the context", "GFLOP for the next token")
    cache.legend(frameon=False, fontsize=8, loc="upper left")
    work.get_legend().remove()  # the colours are those of the cache
    figure.savefig(path, format="png")


def _parameters(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """The share of each component, a bar for each model."""
    names = [row["model"] for row in rows]
    below = [0.0] * len(rows)
    shown = [name for name in COMPONENTS if any(name in row["parameters_by_component"] for row in rows)]
    for component, color in zip(shown, (*COLORS, *_MORE_COLORS), strict=False):
        shares = [100 * row["parameters_by_component"].get(component, 0) / row["parameters"] for row in rows]
        axes.bar(names, shares, bottom=below, color=color, label=component, width=0.6)
        below = [one + share for one, share in zip(below, shares, strict=True)]
    style(axes, "Parameters", "", "% of all")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.tick_params(axis="x", labelrotation=20)
