"""`tinyserve bench`: prefill and decode speed of a model on this machine.

Knows how to print; the measuring is in tinyserve/bench.py.
"""

import json
import platform
import sys
from typing import Annotated

import typer

from tinyserve import presets


def bench(
    model: Annotated[str, typer.Argument(help="A preset, a repo id, a folder or a .gguf file.")] = presets.DEFAULT,
    prefill: Annotated[list[int] | None, typer.Option(help="Prompt length; can be given several times.")] = None,
    decode: Annotated[int, typer.Option(min=2, help="Tokens to decode, one sequence.")] = 128,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Counted runs of each.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or int8 (the default).")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads; by default the cores this process may use.")] = None,
    load_format: Annotated[
        str | None,
        typer.Option(help="auto, or dummy for synthetic weights; default: dummy for presets not downloaded."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Measure prefill and decode speed, mean ± standard deviation.

    Nothing is downloaded: a preset that is not on this disk gets synthetic weights, which are as fast.

    \b
    Examples:
      tinyserve bench smollm2-135m
      tinyserve bench gpt2 --prefill 512 --dtype float32 --json
    """
    from tinyserve import bench as measure
    from tinyserve import hub
    from tinyserve.cli._answer import load

    if load_format is None:
        load_format = "dummy" if presets.find(model) and not hub.is_cached(model) else "auto"
    llm, seconds = load(model, dtype, threads, load_format=load_format)

    def show(work: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[2Kmeasuring {work}", end="", file=sys.stderr, flush=True)

    results = list(measure.run(llm, prefill or [128, 512], decode, repetitions, show))
    if sys.stderr.isatty():
        print("\r\x1b[2K", end="", file=sys.stderr)
    if json_:
        rows = [{**vars(r), "mean": r.mean, "median": r.median, "deviation": r.deviation} for r in results]
        machine = {"processor": platform.processor() or platform.machine(), "threads": llm.num_threads}
        report = {
            "model": llm.name,
            "dtype": llm.dtype,
            "weights": load_format,
            "weight_bytes": llm.model.nbytes,
        }
        print(json.dumps({**report, **machine, "load_seconds": seconds, "results": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    weights = "synthetic weights" if load_format == "dummy" else f"{llm.model.nbytes / 1e6:.0f} MB of weights"
    table = Table(title=f"{llm.name}, {llm.dtype}, {llm.num_threads} threads, {weights}")
    for heading in ("work", "tokens", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "work" else "right")
    for r in results:
        table.add_row(r.work, str(r.tokens), f"{r.mean:.1f} ± {r.deviation:.1f}")
    Console().print(table)
