"""`tinyserve bench`: how fast a model is on this machine, beside what the machine can do.

Knows how to print; the measuring is in tinyserve/evaluation/bench.py, what of it there is time for in bench_budget.py.
"""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from tinyserve.checkpoints import presets
from tinyserve.cli._options import Dtype, Model, PipelineParallelSize, Threads, fields_of, with_options
from tinyserve.cli._output_files import check_plot, check_writable
from tinyserve.errors import UserError
from tinyserve.evaluation import bench as measure
from tinyserve.evaluation import bench_budget
from tinyserve.pipeline.partition import network_bytes
from tinyserve.progress import Progress, size

if TYPE_CHECKING:
    from tinyserve.evaluation.bench import Limits, Measurement, Plan, Work
    from tinyserve.llm import LLM
    from tinyserve.pipeline.sliced import Slices
    from tinyserve.progress import LoadProgress

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
        int | None,
        typer.Option(
            min=2,
            metavar="TOKENS",
            help="Tokens that a repetition decodes for each sequence.  [default: 32, or fewer on a slow machine]",
        ),
    ] = None
    repetitions: Annotated[
        int | None,
        typer.Option(
            "--repetitions",
            "-r",
            min=1,
            metavar="NUMBER",
            help="Counted runs of each.  [default: up to 5, or 3 with --quick]",
        ),
    ] = None
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A short version: prefill of 512 tokens; decode at depth 0, batch 1; in about 20 seconds."
        ),
    ] = False
    budget: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="SECONDS", help="About how long measuring takes.  [default: 90, or 20 with --quick]"
        ),
    ] = None
    full: Annotated[bool, typer.Option("--full", help="Measure everything, however long it takes.")] = False

    def check(self) -> None:
        """Raise UserError for options that contradict each other."""
        if self.full and self.budget is not None:
            raise UserError("--full takes as long as it takes, and --budget says how long: give one of them.")

    def wanted(self) -> "list[Work]":
        """Every work, with the defaults for what is not said."""
        return measure.works(
            self.prefill or (measure.QUICK_PREFILL if self.quick else measure.PREFILL),
            self.depth or (measure.QUICK_DEPTHS if self.quick else measure.DEPTHS),
            self.batch or (measure.QUICK_BATCHES if self.quick else measure.BATCHES),
            self.decode or measure.DECODE,
        )

    def named(self) -> "list[Work]":
        """The works whose sizes were said; of sizes that were not, the first default goes with those."""
        decodes = self.depth or self.batch
        return measure.works(
            self.prefill or (),
            self.depth or (measure.DEPTHS[:1] if decodes else ()),
            self.batch or measure.BATCHES[:1],
            self.decode or measure.DECODE,
        )

    def counted(self) -> int:
        """How often each is run and counted, if there is time."""
        return self.repetitions or (measure.QUICK_REPETITIONS if self.quick else measure.REPETITIONS)

    def wish(self, fitting: "list[Work]") -> bench_budget.Wish:
        """Of the works that fit, what is to be measured in any case, and which numbers must stay as they are."""
        return bench_budget.Wish(
            fitting,
            self.counted(),
            self.named(),
            fixed_repetitions=self.repetitions is not None,
            fixed_decode=self.decode is not None,
        )

    def seconds(self) -> int | None:
        """How long measuring may take; None is for ever."""
        if self.full:
            return None
        return self.budget or (bench_budget.QUICK_BUDGET if self.quick else bench_budget.BUDGET)


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
        if self.csv_ is not None and self.csv_ != STDOUT:
            check_writable("--csv", self.csv_)
        if self.plot is not None:
            check_plot(self.plot)

    def shows_table(self) -> bool:
        """Whether people read what is printed."""
        return not self.json_ and self.csv_ != STDOUT

    def write(self, title: str, recipe: dict[str, Any], results: "list[Measurement]", limits: "Limits") -> None:
        """Write the files; `title` stands above the plot."""
        if self.csv_ is not None:
            _write_csv(self.csv_, recipe, [result.row(limits) for result in results])
        if self.plot is not None:
            from tinyserve.cli._plot import draw

            draw(self.plot, f"{title}\n{measured_here(recipe)}", results, limits)


@with_options(works=fields_of(Works), outputs=fields_of(Outputs))
def bench(
    model: Model = presets.DEFAULT,
    *,
    works: Works,
    dtype: Dtype = "auto",
    threads: Threads = None,
    pipeline_parallel_size: PipelineParallelSize = 1,
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

    Prints a row for each work as soon as it is measured: the mean ± standard deviation of the counted runs, the median
    time to the first token, and how much memory a second is read and how many operations are done, with their share of
    what this machine was measured to read and multiply. Weights that a cache holds are read faster than memory. What
    the model's context or memory does not hold is skipped, and said. Presets are not downloaded: one that is not on
    this disk gets synthetic weights, which are as fast.

    Once the model is loaded it takes about 90 seconds, on any machine: after a first look at the model's speed, a
    prefill and a decode come first, then whatever is cheapest, in as many runs as there is time for; prompts and
    answers are shorter where nothing else fits. What is left out is said. Lengths and batches that are given, like
    --decode and --repetitions, are measured as they are. --full measures everything, 5 times.

    \b
    Examples:
      tinyserve bench falcon-7b
      tinyserve bench smollm2-135m --quick
      tinyserve bench smollm2-135m --full --json
      tinyserve bench llama-7b --dtype int4 --prefill 512 --depth 0 --depth 2048 --batch 1
      tinyserve bench gpt2 --csv gpt2.csv --plot gpt2.png
    """
    outputs.check()
    works.check()
    from tinyserve.cli._load import default_load_format, load
    from tinyserve.loading import open_model
    from tinyserve.models.dtypes import resolve_dtype
    from tinyserve.tensor.cgroups import available_memory

    load_format = load_format or default_load_format(model)
    kept_as, repetitions = resolve_dtype(dtype), works.counted()
    files = open_model(model, load_format)
    synthetic = files.path is None
    memory = available_memory() * pipeline_parallel_size  # of as many machines as this one
    plan = measure.plan(files.config, kept_as, works.wanted(), repetitions, memory, synthetic=synthetic)
    _check_asked_for(plan, works.prefill or (), works.depth or ())
    options = {"load_format": load_format, "pipeline_parallel_size": pipeline_parallel_size, **plan.options}
    llm, line = load(model, dtype, threads, **options)
    recipe = {
        "model": llm.name,
        "dtype": llm.dtype,
        "weights": load_format,
        "weight_bytes": llm.model.nbytes,
        "threads": llm.num_threads,
        "slices": pipeline_parallel_size,
        **measure.machine(llm.dtype),
    }
    show = print if outputs.shows_table() else _say_nothing
    title = heading(recipe, llm.model.kept)
    show(title, flush=True)
    line.show("measuring what this machine can do")
    limits = measure.measure_limits(llm)
    line.clear()
    recipe |= {"bandwidth": limits.bandwidth, "peak": limits.operations}
    show(measured_here(recipe), _TITLES, sep="\n", flush=True)
    measured = _measure(llm, plan.works, works, line, lambda result: show(_row(result, limits), flush=True))
    outputs.write(title, recipe, measured.results, limits)
    left_out = measure.left_out(plan.works, [result.work for result in measured.results])
    if outputs.json_:
        report = {
            **recipe,
            "load_seconds": line.seconds,
            "network_bytes": llm.slices.num_bytes if llm.slices else 0,
            "steps": llm.engine.totals["steps"],
            "repetitions": repetitions,
            "budget_seconds": works.seconds(),
            "full_seconds": measured.full_seconds,
            "interrupted": measured.interruption is not None,
            "results": [result.row(limits) for result in measured.results],
            "left_out": [_named(work) for work in left_out],
            "skipped": [{**_named(skip.work), "reason": skip.reason} for skip in plan.skipped],
        }
        print(json.dumps(report))
    else:
        show(_LEGEND)
        notes = [f"skipped: {skip.reason}" for skip in plan.skipped]
        if llm.slices is not None:
            notes.append(_crossed(llm, llm.slices))
        if left_out:
            notes.append(_left_out(left_out, measured.full_seconds))
        for note in notes:
            print(note, file=sys.stderr if outputs.csv_ == STDOUT else sys.stdout)
    if measured.interruption is not None:
        raise measured.interruption


def _crossed(llm: "LLM", slices: "Slices") -> str:
    """What went from one process to another, where the model is cut."""
    ranges = ", ".join(f"{layers.start} to {layers.stop - 1}" for layers in slices.layers)
    steps = llm.engine.totals["steps"]
    each = f"{size(slices.num_bytes / max(1, steps))} a step"
    return (
        f"slices: layers {ranges}; {size(network_bytes(llm.config, len(slices.layers)))} cross the network for a "
        f"token; in {steps} steps {size(slices.num_bytes)}, {each}"
    )


@dataclass
class _Measured:
    """What has been measured: all that was to be, or what came before Ctrl-C."""

    results: "list[Measurement]" = field(default_factory=list)
    full_seconds: float | None = None  # what --full would take, where that was not asked for
    interruption: KeyboardInterrupt | None = None


def _measure(
    llm: "LLM", fitting: "list[Work]", asked: Works, line: "LoadProgress", show: "Callable[[Measurement], None]"
) -> _Measured:
    """Measure what was asked for and fits, or what of it there is time for; `show` is given each as it comes.

    Raises KeyboardInterrupt only where there is nothing to show for it.
    """
    measured, seconds, planner = _Measured(), asked.seconds(), None
    try:
        if seconds is None:
            running = measure.run(llm, fitting, asked.counted(), line)
        else:
            begun = perf_counter()
            told = _with_bar(line, begun, seconds)
            told("a first look at the model's speed", 0, 1)
            planner = bench_budget.first_look(llm, asked.wish(fitting))
            running = bench_budget.run(llm, planner, begun + seconds, told)
        for result in running:
            measured.results.append(result)
            measured.full_seconds = planner.full_seconds() if planner else None
            line.clear()
            show(result)
    except KeyboardInterrupt as interruption:
        if not measured.results:
            raise
        measured.interruption = interruption
    line.clear()
    measured.results.sort(key=lambda result: result.work.place)
    return measured


def _with_bar(progress: Progress, begun: float, seconds: int) -> Progress:
    """What is told, with a bar of the time that has gone: a short one, for 80 columns must hold both."""

    def told(what: str, done: int, total: int) -> None:
        elapsed = perf_counter() - begun
        full = min(_BAR, int(_BAR * elapsed / seconds))
        progress(f"{what} |{'█' * full}{' ' * (_BAR - full)}| {elapsed:.0f} of {seconds} s", done, total)

    return told


_BAR = 8  # columns


def _say_nothing(*_: str, **__: Any) -> None:
    """In the place of print, where the table is not wanted."""


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


def heading(recipe: dict[str, Any], kept: str) -> str:
    """What is measured, and with what; `kept` is what is in memory, as the model says it."""
    synthetic = " of synthetic weights" * (recipe["weights"] == "dummy")
    threads = f"{recipe['threads']} thread{'s' * (recipe['threads'] != 1)}"
    return (
        f"{recipe['model']} in {kept}{synthetic}; {threads} of {recipe['processor']}, dot product "
        f"{recipe['dot_product']}"
    )


def measured_here(recipe: dict[str, Any]) -> str:
    """What the percentages are of."""
    return (
        f"measured here: reads {recipe['bandwidth'] / 1e9:.1f} GB/s, multiplies and adds "
        f"{recipe['peak'] / 1e12:.3g} TOPS in {recipe['dtype']}"
    )


def _columns(*cells: str) -> str:
    """A line of the table, which fits into 80 columns: no width has to be known before all rows are."""
    return f"{cells[0]:<7}" + "".join(f" {cell:>{width - 1}}" for cell, width in zip(cells[1:], _WIDTHS, strict=True))


_WIDTHS = (7, 6, 6, 5, 14, 7, 8, 6, 4, 6, 4)
_TITLES = _columns("work", "tokens", "depth", "batch", "runs", "tokens/s", "each", "first", "GB/s", "%", "GOPS", "%")


# Lines of 80 columns, too.
_LEGEND = """\
tokens/s: mean of the runs ± standard deviation; each: of one of the sequences
first: median time to the first token
GB/s: weights and cache read; %: of what this machine was measured to read
GOPS: 10⁹ products and sums a second; %: of what it was measured to do"""


def _row(result: "Measurement", limits: "Limits") -> str:
    """A measurement as a line under _TITLES."""
    work, first, decodes = result.work, result.time_to_first_token, result.work.kind == "decode"
    deviation = f" ± {short(result.deviation, result.mean)}" if len(result.seconds) > 1 else ""
    return _columns(
        work.kind,
        str(work.tokens),
        str(work.depth) if decodes else "",
        str(work.batch) if decodes else "",
        str(len(result.seconds)),
        f"{short(result.mean)}{deviation}",
        short(result.mean / work.batch) if decodes else "",
        "" if first is None else _seconds(first),
        short(result.bytes_per_second / 1e9),
        f"{100 * result.bytes_per_second / limits.bandwidth:.0f}",
        short(result.operations_per_second / 1e9),
        f"{100 * result.operations_per_second / limits.operations:.0f}",
    )


def _left_out(works: "list[Work]", full_seconds: float | None) -> str:
    """What there was no time for, and how to have it."""
    prompts = [str(work.tokens) for work in works if work.kind == "prefill"]
    batches: dict[int, list[str]] = {}
    for work in works:
        if work.kind == "decode":
            batches.setdefault(work.depth, []).append(str(work.batch))
    parts = [f"prefill of {_and(prompts)} tokens"] * bool(prompts)
    parts += [f"decode at depth {depth}, batch {_and(numbers)}" for depth, numbers in batches.items()]
    # Where it is not known what --full takes, that was it, and Ctrl-C its end.
    way_out = "" if full_seconds is None else f": --full measures everything, in about {_minutes(full_seconds)}"
    return f"left out: {'; '.join(parts)}{way_out}"


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _minutes(seconds: float) -> str:
    """A rough time in words."""
    for unit, step in (("hour", 3600), ("minute", 60), ("second", 1)):
        if seconds >= 1.5 * step or step == 1:
            number = round(seconds / step)
            return f"{number} {unit}{'s' * (number != 1)}"
    raise AssertionError


def short(number: float, beside: float | None = None) -> str:
    """A number in three digits or more, thousands from 100,000 on; as the one it stands beside."""
    scale = number if beside is None else beside
    if scale >= 100_000:
        return f"{number / 1e3:.0f}k"
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
