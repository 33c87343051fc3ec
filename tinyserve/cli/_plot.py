"""Measurements as a picture: prefill by length, decode by depth and batch, each beside what the machine allows.

Knows matplotlib, which is an extra; nothing here measures or prints.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyserve.evaluation.bench import Limits, Measurement

COLORS = ("#1f6f8b", "#e07a3f", "#6a8d3a", "#8b5fa8", "#c44e52", "#8c8c8c")
INK, QUIET = "#222222", "#777777"


def draw(path: Path, heading: str, results: "Sequence[Measurement]", limits: "Limits") -> None:
    """Write a PNG of two panels; where there is nothing of a kind, its panel is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    prefill = [result for result in results if result.work.kind == "prefill"]
    decode = [result for result in results if result.work.kind == "decode"]
    panels = [(panel, some) for panel, some in ((_prefill, prefill), (_decode, decode)) if some]
    figure = Figure(figsize=(5.8 * len(panels), 4.6), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=8, color=QUIET, x=0.01, ha="left")
    for i, (panel, some) in enumerate(panels):
        panel(figure.add_subplot(1, len(panels), i + 1), some, limits)
    figure.savefig(path, format="png")


def _prefill(axes: Any, results: "Sequence[Measurement]", limits: "Limits") -> None:
    places = range(len(results))
    _bars(axes, places, results, 0.5, COLORS[0])
    _limits(axes, places, results, 0.5, limits)
    axes.set_xticks(places, [str(result.work.tokens) for result in results])
    _finish(axes, "Prefill", "tokens of the prompt", "tokens/s", len(results))


def _decode(axes: Any, results: "Sequence[Measurement]", limits: "Limits") -> None:
    depths = list(dict.fromkeys(result.work.depth for result in results))
    batches = list(dict.fromkeys(result.work.batch for result in results))
    pitch = 0.8 / max(2, len(batches))
    for i, batch in enumerate(batches):
        some = [result for result in results if result.work.batch == batch]
        places = [depths.index(result.work.depth) + (i - (len(batches) - 1) / 2) * pitch for result in some]
        _bars(axes, places, some, 0.9 * pitch, COLORS[i % len(COLORS)], f"batch {batch}")
        _limits(axes, places, some, 0.9 * pitch, limits, labelled=i == 0)
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    _finish(axes, "Decode", "tokens before those decoded", "tokens/s of all sequences", len(depths))


def _bars(
    axes: Any, places: Sequence[float], results: "Sequence[Measurement]", width: float, color: str, label: str = ""
) -> None:
    """Rates with their deviation, and the number above."""
    means, deviations = [result.mean for result in results], [result.deviation for result in results]
    style = {"ecolor": INK, "capsize": 2, "elinewidth": 1}
    axes.bar(places, means, width, yerr=deviations, color=color, label=label or None, error_kw=style)
    for place, mean, deviation in zip(places, means, deviations, strict=True):
        axes.annotate(
            f"{mean:.{0 if mean >= 10 else 1}f}", (place, mean + deviation), (0, 4), textcoords="offset points",
            ha="center", fontsize=8, color=INK, zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
        )  # fmt: skip


def _limits(
    axes: Any,
    places: Sequence[float],
    results: "Sequence[Measurement]",
    width: float,
    limits: "Limits",
    labelled: bool = True,
) -> None:
    """A dashed line over each bar, where memory or arithmetic would stop it."""
    attainable = [result.attainable(limits) for result in results]
    first, last = [place - width / 2 for place in places], [place + width / 2 for place in places]
    label = "measured limit" if labelled else None
    axes.hlines(attainable, first, last, colors=INK, linestyles=(0, (3, 1.5)), linewidth=1.2, label=label)


def _finish(axes: Any, title: str, across: str, up: str, groups: int) -> None:
    axes.set_xlim((-0.6, groups - 0.4) if groups > 1 else (-1, 1))
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)
    style(axes, title, across, up)


def style(axes: Any, title: str, across: str, up: str) -> None:
    """Titles, a quiet frame, and a legend above the panel, where it covers nothing."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel(across, color=QUIET)
    axes.set_ylabel(up, color=QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(
        frameon=False, fontsize=8, labelcolor=INK, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5,
        borderaxespad=0.2, columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip
