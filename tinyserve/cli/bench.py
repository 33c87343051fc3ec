"""`tinyserve bench`: how fast a model is on this machine, beside what the machine can do.

Knows how to print; the measuring is in tinyserve/evaluation/bench.py.
"""

import csv
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from tinyserve.checkpoints import presets
from tinyserve.cli._options import Dtype, Model, Threads, fields_of, with_options
from tinyserve.errors import UserError
from tinyserve.evaluation import bench as measure
from tinyserve.progress import size

if TYPE_CHECKING:
    from tinyserve.evaluation.bench import Limits, Measurement, Plan, Work

STDOUT = Path("-")


@dataclass(frozen=True)
class Works:
    """What is measured: sizes that the table of works is made of."""

    prefill: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="TOKENS", help="Prompt length; can be given several times.  [default: 128, 512 and 2048]"
        ),
    ] = None
    depth: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            metavar="TOKENS",
            help="Tokens that come before those decoded; can be given several times.  [default: 0, 512 and 4096]",
        ),
    ] = None
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=measure.MOST_SEQUENCES,
            metavar="NUMBER",
            help="Sequences that decode at once; can be given several times.  [default: 1, 8 and 32]",
        ),
    ] = None
    decode: Annotated[
        int, typer.Option(min=2, metavar="TOKENS", help="Tokens that a repetition decodes for each sequence.")
    ] = measure.DECODE
    repetitions: Annotated[
        int | None,
        typer.Option(
            "--repetitions", "-r", min=1, metavar="NUMBER", help="Counted runs of each.  [default: 5; 3 with --quick]"
        ),
    ] = None
    quick: Annotated[
        bool, typer.Option("--quick", help="A short version: prefill of 512 tokens; decode at depth 0, batch 1.")
    ] = False

    def wanted(self) -> "list[Work]":
        """Every work, with the defaults for what is not said."""
        return measure.works(
            self.prefill or (measure.QUICK_PREFILL if self.quick else measure.PREFILL),
            self.depth or (measure.QUICK_DEPTHS if self.quick else measure.DEPTHS),
            self.batch or (measure.QUICK_BATCHES if self.quick else measure.BATCHES),
            self.decode,
        )

    def counted(self) -> int:
        """How often each is run and counted."""
        return self.repetitions or (measure.QUICK_REPETITIONS if self.quick else measure.REPETITIONS)


@dataclass(frozen=True)
class Outputs:
    """Where the figures go."""

    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False
    csv_: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write a line for each measurement; - prints them, and no table."),
    ] = None
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the table, with the limits.")] = None

    def check(self) -> None:
        """Raise UserError, before anything is measured, for what could not be written after."""
        if self.json_ and self.csv_ == STDOUT:
            raise UserError("--json and --csv - both print to standard output: give --csv a file.")
        for option, path in (("--csv", self.csv_), ("--plot", self.plot)):
            if path is not None and path != STDOUT:
                _check_writable(option, path)
        if self.plot is not None:
            _check_plot(self.plot)


@with_options(works=fields_of(Works), outputs=fields_of(Outputs))
def bench(
    model: Model = presets.DEFAULT,
    *,
    works: Works,
    dtype: Dtype = "auto",
    threads: Threads = None,
    load_format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="auto reads the weights, dummy makes synthetic ones.  [default: dummy for presets not downloaded]",
        ),
    ] = None,
    outputs: Outputs,
) -> None:
    """Measure prefill and decode speed on this machine.

    Prints the mean ± standard deviation of the counted runs, the median time to the first token, and how much memory
    a second is read and how many operations are done, with their share of what this machine was measured to read and
    multiply. Weights that a cache holds are read faster than memory. What the model's context or memory does not hold
    is skipped, and said. Presets are not downloaded: one that is not on this disk gets synthetic weights, which are
    as fast.

    \b
    Examples:
      tinyserve bench smollm2-135m --quick
      tinyserve bench llama-7b --dtype int4 --prefill 512 --depth 0 --depth 2048 --batch 1
      tinyserve bench gpt2 --csv gpt2.csv --plot gpt2.png
    """
    outputs.check()
    from tinyserve.checkpoints import hub
    from tinyserve.checkpoints.model_ref import ModelRef
    from tinyserve.cli._load import load
    from tinyserve.loading import open_model
    from tinyserve.models.cache_plan import available_memory
    from tinyserve.models.dtypes import resolve_dtype

    if load_format is None:
        ref = ModelRef.parse(model)
        load_format = "dummy" if ref.preset and not hub.is_cached(ref) else "auto"
    kept_as, repetitions = resolve_dtype(dtype), works.counted()
    files = open_model(model, load_format)
    synthetic = files.path is None
    plan = measure.plan(files.config, kept_as, works.wanted(), repetitions, available_memory(), synthetic=synthetic)
    _check_asked_for(plan, works.prefill or (), works.depth or ())
    llm, line = load(model, dtype, threads, load_format=load_format, **plan.options)
    line.show("measuring what this machine can do")
    limits = measure.measure_limits(llm)
    results = list(measure.run(llm, plan.works, repetitions, line))
    line.clear()
    recipe = {
        "model": llm.name,
        "dtype": llm.dtype,
        "weights": load_format,
        "weight_bytes": llm.model.nbytes,
        "threads": llm.num_threads,
        **measure.machine(llm.dtype),
        "bandwidth": limits.bandwidth,
        "peak": limits.operations,
    }
    rows = [result.row(limits) for result in results]
    if outputs.csv_ is not None:
        _write_csv(outputs.csv_, recipe, rows)
    if outputs.plot is not None:
        from tinyserve.cli._plot import draw

        draw(outputs.plot, _heading(recipe), results, limits)
    if outputs.json_:
        skipped = [{**_named(skip.work), "reason": skip.reason} for skip in plan.skipped]
        report = {**recipe, "load_seconds": line.seconds, "repetitions": repetitions}
        print(json.dumps({**report, "results": rows, "skipped": skipped}))
        return
    if outputs.csv_ != STDOUT:
        print(_heading(recipe))
        _print_table(results, limits)
    for skip in plan.skipped:
        print(f"skipped: {skip.reason}", file=sys.stderr if outputs.csv_ == STDOUT else sys.stdout)


def _check_writable(option: str, path: Path) -> None:
    """Raise UserError, before anything is measured, for a file that could not be written after."""
    if path.is_dir():
        raise UserError(f"{option} is {path}, which is a folder: give the name of a file.")
    if not path.parent.is_dir():
        raise UserError(f"{option} is {path}, whose folder does not exist: make it, or give another one.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} is {path}, which cannot be written: give another file.")


def _check_plot(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot is {path}; it writes PNG files: give a name that ends with .png.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'tinyserve[plot]'.")


def _check_asked_for(plan: "Plan", prefill: Sequence[int], depths: Sequence[int]) -> None:
    """Raise UserError where nothing is left to measure, or what was named on the command line is beyond the context."""
    for skip in plan.skipped:
        asked = skip.work.tokens in prefill if skip.work.kind == "prefill" else skip.work.depth in depths
        same = [work for work in plan.works if (work.kind, work.depth) == (skip.work.kind, skip.work.depth)]
        if skip.by_context and asked and not (same and skip.work.kind == "decode"):
            raise UserError(f"{skip.reason}: give a smaller --{'prefill' if skip.work.kind == 'prefill' else 'depth'}.")
    if not plan.works:
        raise UserError(f"Nothing is left to measure: {plan.skipped[0].reason}.")


def _named(work: "Work") -> dict[str, Any]:
    return {"work": work.kind, "tokens": work.tokens, "depth": work.depth, "batch": work.batch}


def _heading(recipe: dict[str, Any]) -> str:
    """What was measured, and with what."""
    weights = f"{size(recipe['weight_bytes'])} of {'synthetic ' * (recipe['weights'] == 'dummy')}weights"
    threads = f"{recipe['threads']} thread{'s' * (recipe['threads'] != 1)}"
    return (
        f"{recipe['model']} in {recipe['dtype']}, {weights}; {threads} of {recipe['processor']}, dot product "
        f"{recipe['dot_product']}\n"
        f"measured here: reads {recipe['bandwidth'] / 1e9:.1f} GB/s, multiplies and adds "
        f"{recipe['peak'] / 1e12:.3g} TOPS in {recipe['dtype']}"
    )


def _print_table(results: "Sequence[Measurement]", limits: "Limits") -> None:
    from rich.table import Table

    from tinyserve.cli._console import Output

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("work", no_wrap=True)
    shares = f"% of {_short(limits.bandwidth / 1e9)}", f"% of {_short(limits.operations / 1e9)}"
    for title in ("tokens", "depth", "batch", "tokens/s", "each", "first", "GB/s", shares[0], "GOPS", shares[1]):
        table.add_column(title, justify="right", no_wrap=True)
    for i, result in enumerate(results):
        work, first, decodes = result.work, result.time_to_first_token, result.work.kind == "decode"
        table.add_row(
            work.kind,
            str(work.tokens),
            str(work.depth) if decodes else "",
            str(work.batch) if decodes else "",
            f"{_short(result.mean)} ± {_short(result.deviation, result.mean)}",
            _short(result.mean / work.batch) if decodes else "",
            "" if first is None else _seconds(first),
            _short(result.bytes_per_second / 1e9),
            f"{100 * result.bytes_per_second / limits.bandwidth:.0f}",
            _short(result.operations_per_second / 1e9),
            f"{100 * result.operations_per_second / limits.operations:.0f}",
            end_section=i + 1 < len(results) and work.kind != results[i + 1].work.kind,
        )
    # A file or a pipe has no width that anything would have to fit into.
    Output(width=None if sys.stdout.isatty() else 120).print(table)


def _short(number: float, beside: float | None = None) -> str:
    """A number in three digits or more; with as many decimals as the one it stands beside."""
    scale = number if beside is None else beside
    return f"{number:.{0 if scale >= 100 else 1 if scale >= 10 else 2}f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _write_csv(path: Path, recipe: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A line for each row, with the recipe before it; lists are left to --json."""
    if path == STDOUT:
        _csv_lines(sys.stdout, recipe, rows)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        _csv_lines(file, recipe, rows)


def _csv_lines(file: TextIO, recipe: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    lines = [{**recipe, **{key: value for key, value in row.items() if not isinstance(value, list)}} for row in rows]
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
