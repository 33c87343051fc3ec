"""`tinyserve bench`: prefill and decode speed of a model on this machine.

Knows how to print; the measuring is in tinyserve/bench.py.
"""

import json
import sys
from typing import Annotated

import typer

from tinyserve import presets
from tinyserve.cli._options import Dtype, Model, Threads
from tinyserve.errors import UserError


def bench(
    model: Model = presets.DEFAULT,
    prefill: Annotated[
        list[int] | None,
        typer.Option(metavar="TOKENS", help="Prompt length; can be given several times.  [default: 128 and 512]"),
    ] = None,
    decode: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Tokens to decode, one sequence.")] = 128,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, metavar="NUMBER", help="Counted runs of each.")
    ] = 5,
    dtype: Dtype = "auto",
    threads: Threads = None,
    load_format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="auto reads the weights, dummy makes synthetic ones.  [default: dummy for presets not downloaded]",
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Measure prefill and decode speed on this machine.

    Prints the mean ± standard deviation of the counted runs. Presets are not downloaded: one that is not on this
    disk gets synthetic weights, which are as fast.

    \b
    Examples:
      tinyserve bench smollm2-135m
      tinyserve bench gpt2 --prefill 512 --dtype float32 --json
    """
    from tinyserve import bench as measure
    from tinyserve import hub
    from tinyserve.cli._answer import load
    from tinyserve.tensor._jit import cpu_name

    if load_format is None:
        load_format = "dummy" if presets.find(model) and not hub.is_cached(model) else "auto"
    llm, line = load(model, dtype, threads, load_format=load_format)
    if wrong := [length for length in prefill or () if not 1 <= length < llm.max_model_len]:
        raise UserError(
            f"--prefill is {wrong[0]}; it must be 1 to {llm.max_model_len - 1}, since the context of {llm.name} holds "
            f"{llm.max_model_len} tokens and one is for the answer."
        )

    def show(work: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[2Kmeasuring {work}", end="", file=sys.stderr, flush=True)

    results = list(measure.run(llm, prefill or [128, 512], decode, repetitions, show))
    if sys.stderr.isatty():
        print("\r\x1b[2K", end="", file=sys.stderr)
    if json_:
        rows = [{**vars(r), "mean": r.mean, "median": r.median, "deviation": r.deviation} for r in results]
        machine = {"processor": cpu_name(), "threads": llm.num_threads}
        report = {
            "model": llm.name,
            "dtype": llm.dtype,
            "weights": load_format,
            "weight_bytes": llm.model.nbytes,
        }
        print(json.dumps({**report, **machine, "load_seconds": line.seconds, "results": rows}))
        return
    weights = "synthetic weights" if load_format == "dummy" else f"{llm.model.nbytes / 1e6:.0f} MB of weights"
    print(f"{llm.name} in {llm.dtype}, {weights}; {llm.num_threads} threads of {cpu_name()}")
    print(f"{'work':<8}{'tokens':>8}{'tokens/s':>18}")
    for r in results:
        print(f"{r.work:<8}{r.tokens:>8}{f'{r.mean:.1f} ± {r.deviation:.1f}':>18}")
