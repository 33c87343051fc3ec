"""`tinyserve trace`: where the time of one step goes, instruction by instruction.

Knows how to print; the measuring is in tinyserve/evaluation/trace.py.
"""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tinyserve.checkpoints import presets
from tinyserve.cli._options import Dtype, Model, Threads
from tinyserve.evaluation import trace as measure
from tinyserve.models.dtypes import KV_CACHE_DTYPES

if TYPE_CHECKING:
    from tinyserve.evaluation.trace import Cost, Folded, Trace


def trace(
    model: Model = presets.DEFAULT,
    *,
    dtype: Dtype = "auto",
    depth: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="TOKENS",
            help=f"Tokens that are in the cache before.  [default: {measure.DEPTH}; 0 with --prefill]",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=measure.MOST_TOKENS, metavar="NUMBER", help="Sequences in the step.")
    ] = 1,
    prefill: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Read so many tokens of each prompt, in place of decoding one."),
    ] = None,
    threads: Threads = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help=f"{', '.join(KV_CACHE_DTYPES)} or auto.")
    ] = "auto",
    all_: Annotated[bool, typer.Option("--all", help="Print every instruction, and no layers as one.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show where the time of one step goes, kernel by kernel.

    A step is a program: kernels with their arguments, one after the other. For each it prints the file and the kernel,
    its shape, the median time, the share of the step, the bytes of weights, cache and activations that it touches, and
    how near to this machine's limits it comes; then the totals by file. Layers that are alike are shown once, with how
    many they are, and the mean of their times. What the engine does around a step is no part of it. Presets are not
    downloaded: one that is not on this disk gets synthetic weights, which are as fast.

    \b
    Examples:
      tinyserve trace smollm2-135m
      tinyserve trace granite-350m --dtype int4 --depth 4096
      tinyserve trace gpt2 --prefill 512 --all
    """
    from tinyserve.cli._load import default_load_format, load
    from tinyserve.cli.bench import heading, measured_here
    from tinyserve.evaluation.bench import machine
    from tinyserve.loading import open_model
    from tinyserve.models.dtypes import resolve_dtype, resolve_kv_cache_dtype
    from tinyserve.tensor.cgroups import available_memory

    shape = measure.StepShape(prefill or 1, (0 if prefill else measure.DEPTH) if depth is None else depth, batch)
    load_format, kept_as = default_load_format(model), resolve_dtype(dtype)
    cached_as = resolve_kv_cache_dtype(kv_cache_dtype, kept_as)
    files = open_model(model, load_format)
    shape.check(files.config, kept_as, cached_as, available_memory(), synthetic=files.path is None)
    llm, line = load(
        model, dtype, threads, load_format=load_format, kv_cache_dtype=kv_cache_dtype, max_num_seqs=1,
        max_model_len=max(2, shape.length), enable_prefix_caching=False,
    )  # fmt: skip
    line.show(f"measuring {shape}")
    traced = measure.trace(llm, shape)
    line.clear()
    recipe = {
        "model": llm.name,
        "dtype": llm.dtype,
        "kv_cache_dtype": llm.kv_cache_dtype,
        "weights": load_format,
        "weight_bytes": llm.model.nbytes,
        "threads": llm.num_threads,
        **machine(llm.dtype),
    }
    if json_:
        print(json.dumps({**recipe, **traced.report()}))
        return
    peak = traced.peaks.get(llm.dtype) or max(traced.peaks.values())
    recipe |= {"bandwidth": traced.bandwidth, "peak": peak}
    print(heading(recipe, llm.model.kept), measured_here(recipe), sep="\n")
    print(f"{shape}, keys and values in {llm.kv_cache_dtype}; median of {traced.runs} runs\n")
    _print_tables(traced, all_)


def _print_tables(traced: "Trace", everything: bool) -> None:
    from rich.table import Table

    from tinyserve.cli._console import Output

    figures = ("µs", "step", "MB", "GB/s", "limit") + ("GOPS", "peak") * _many(traced)

    def table(*names: str, count: str = "×") -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for name in names:
            made.add_column(name, no_wrap=name != "shape")
        for name in (count, *figures):
            made.add_column(name, justify="right", no_wrap=True)
        return made

    instructions = table("file", "kernel", "shape", count="layer" if everything else "×")
    for section in _sections(traced, everything):
        if instructions.rows:
            instructions.add_row()
        for folded in section:
            row, mean = folded.first, folded.cost.seconds / len(folded.rows)
            many = str(len(folded.rows)) if not everything else "" if row.layer is None else str(row.layer)
            figures_of = _figures(traced, folded.cost, mean)
            instructions.add_row(row.kind, row.kernel.lstrip("_"), row.shape, many, *figures_of)
    totals = table("all of")
    for kind, rows in traced.kinds().items():
        cost = measure.Cost.total(row.cost for row in rows)
        totals.add_row(kind, str(len(rows)), *_figures(traced, cost, cost.seconds))
    totals.add_row("the step", str(len(traced.rows)), *_figures(traced, traced.cost, traced.cost.seconds), style="bold")
    # A file or a pipe has no width that anything would have to fit into.
    output = Output(width=None if sys.stdout.isatty() else 120)
    output.print(instructions)
    output.print()
    output.print(totals)
    notes = ["limit: share of the bytes a second; above 100% the processor's caches held what was read."]
    if _many(traced):
        notes.append("peak: share of the operations a second that numbers of these bits can have.")
    notes.append("What the engine adds to a step, such as scheduling and sampling that is not greedy, is not here.")
    output.print("", *notes, sep="\n", style="dim", highlight=False)


def _sections(traced: "Trace", everything: bool) -> "Sequence[Sequence[Folded]]":
    if not everything:
        return traced.folded()
    return [[measure.Folded([row], row.cost) for row in traced.rows]]


def _many(traced: "Trace") -> bool:
    """Whether a product has several rows, so that memory alone is not its limit."""
    return traced.shape.tokens * traced.shape.batch > 1


def _figures(traced: "Trace", cost: "Cost", seconds: float) -> list[str]:
    """Of some instructions: the microseconds of one, its share of the step, and so on."""
    from tinyserve.cli.bench import short

    cells = [
        short(1e6 * seconds),
        f"{100 * cost.seconds / traced.cost.seconds:.1f}%",
        short(cost.bytes / 1e6 * seconds / cost.seconds),
        short(cost.bytes_per_second / 1e9),
        f"{100 * cost.bytes_per_second / traced.bandwidth:.0f}%",
    ]
    if _many(traced):
        operations = [short(cost.operations_per_second / 1e9), f"{100 * cost.share_of_peak:.0f}%"]
        cells += operations if cost.operations else ["", ""]
    return cells
