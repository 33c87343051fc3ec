"""`tinyserve inspect-config`: what a config implies for layers, parameters, memory and speed.

Knows how to lay the numbers out; they are collected in tinyserve/models/inspection.py.
"""

import json
from typing import Annotated, Any

import typer

from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.cli import _names
from tinyserve.models.config import MAMBA, parse_config
from tinyserve.models.inspection import DEFAULT_BANDWIDTH, DEFAULT_CONTEXT, inspection
from tinyserve.models.lookup import load_raw_config
from tinyserve.pipeline.partition import described
from tinyserve.progress import count, size

LAYERS_PER_ROW = 40


def inspect_config(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A preset, a folder with a config.json, a config.json or a .gguf file.",
            autocompletion=_names.models,
        ),
    ],
    bandwidth: Annotated[
        float,
        typer.Option(
            min=0.001, metavar="NUMBER", help="Memory bandwidth of the roofline, in GB/s. The default is an assumption."
        ),
    ] = DEFAULT_BANDWIDTH,
    context: Annotated[
        int,
        typer.Option(min=0, metavar="NUMBER", help="Tokens already in the cache when the roofline's token is decoded."),
    ] = DEFAULT_CONTEXT,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    pipeline_parallel_size: Annotated[
        int,
        typer.Option(
            "--pipeline-parallel-size",
            min=1,
            metavar="NUMBER",
            help="Also what each of so many slices holds, and what crosses the network between them.",
        ),
    ] = 1,
) -> None:
    """Show what a config implies, offline.

    Layer map, parameters by component, memory by dtype, cache, state and roofline; no weights are read.

    \b
    Examples:
      tinyserve inspect-config granite-350m
      tinyserve inspect-config ./my-model --bandwidth 80
      tinyserve inspect-config falcon-7b --json
      tinyserve inspect-config llama-3.1-8b --pipeline-parallel-size 2
    """
    ref = ModelRef.parse(model)
    raw, source = load_raw_config(ref)
    config = parse_config(raw, source)
    report = inspection(config, ref, source, bandwidth, context)
    if pipeline_parallel_size > 1:
        report["pipeline"] = described(config, pipeline_parallel_size, list(report["weight_bytes"]))
    if json_:
        print(json.dumps(report, indent=2))
    else:
        _show(report)


def layer_map(layer_types: list[str], per_row: int = LAYERS_PER_ROW) -> list[str]:
    """Draw a letter per layer, A for attention and M for Mamba, in rows numbered by their first layer."""
    letters = "".join("M" if kind == MAMBA else "A" for kind in layer_types)
    rows = []
    for start in range(0, len(letters), per_row):
        row = letters[start : start + per_row]
        rows.append(f"{start:>4}  " + " ".join(row[i : i + 10] for i in range(0, len(row), 10)))
    return rows


def _show(report: dict[str, Any]) -> None:
    """Print the report for people; nothing in it needs more than 80 columns."""
    from rich.text import Text

    from tinyserve.cli._console import Output

    console = Output(highlight=False)
    title = Text(report["model"], style="bold")
    if report["repo"]:
        revision = report["revision"]
        title.append(f"  {report['repo']}@{revision if revision == 'main' else revision[:7]}", style="dim")
    else:
        title.append(f"  {report['source']}", style="dim")
    console.print(title)
    if report["license"]:
        console.print(Text(f"Licence: {report['license']}.", style="dim"))
    if report["unverified"]:
        console.print(
            Text(
                f"Unverified: {', '.join(report['unverified'])}; the downloaded model decides.",
                style="yellow",
            )
        )
    console.print()
    _show_architecture(console, report)
    _show_layers(console, report)
    _show_parameters(console, report)
    _show_memory(console, report)
    _show_cache(console, report)
    if "pipeline" in report:
        _show_slices(console, report["pipeline"])


def _table(*columns: str, title: str) -> Any:
    """Make a plain table: names to the left, numbers to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", header_style="dim")
    return table


def _show_architecture(console: Any, report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("architecture", report["model_type"])
    for name, words in report["architecture"].items():
        table.add_row(name, words)
    for name, words in report["sizes"].items():
        table.add_row(name, words)
    tied = "tied" if report["tie_word_embeddings"] else "untied"
    table.add_row("vocabulary", f"{report['vocab_size']}, {tied} head")
    table.add_row("context", f"{report['max_position_embeddings']} tokens")
    console.print(table)
    console.print()


def _show_layers(console: Any, report: dict[str, Any]) -> None:
    from rich.text import Text

    layers = report["layer_types"]
    mamba = layers.count(MAMBA)
    kinds = [f"A attention ×{len(layers) - mamba}"] * (mamba < len(layers)) + [f"M Mamba2 ×{mamba}"] * (mamba > 0)
    console.print(Text("Layers", style="bold").append(f"  {', '.join(kinds)}", style="not bold dim"))
    for row in layer_map(layers):
        text = Text(row)
        text.highlight_regex("A", "bold cyan")
        text.highlight_regex("M", "magenta")
        console.print(text)
    console.print()


def _show_parameters(console: Any, report: dict[str, Any]) -> None:
    total = report["parameters"]
    table = _table("", "count", "share", "", title="Parameters")
    table.columns[3].justify = "left"
    for component, number in report["parameters_by_component"].items():
        bar = "█" * round(24 * number / total)
        table.add_row(component, count(number), f"{number / total:.1%}", bar)
    table.add_row("total", count(total), "", "", style="bold")
    if report["active_parameters"] < total:
        table.add_row("active per token", count(report["active_parameters"]), "", "")
    console.print(table)
    console.print()


def _show_memory(console: Any, report: dict[str, Any]) -> None:
    from rich.text import Text

    roofline = report["roofline"]
    table = _table("dtype", "weights", "read per token", "at most", title="Memory and roofline")
    for dtype, number in report["weight_bytes"].items():
        speed = f"{roofline['tokens_per_second'][dtype]:.1f} tokens/s"
        table.add_row(dtype, size(number), size(roofline["bytes_per_token"][dtype]), speed)
    console.print(table)
    console.print(
        Text(
            f"One sequence with {roofline['context']} tokens in its cache (bfloat16, but float32 with float32), "
            f"memory read at {roofline['bandwidth_gb_per_s']:g} GB/s "
            f"(--bandwidth; {DEFAULT_BANDWIDTH:g} is an assumption).",
            style="dim",
        )
    )
    console.print()


def _show_slices(console: Any, pipeline: dict[str, Any], dtype: str = "int8") -> None:
    from rich.text import Text

    slices, count = pipeline["slices"][dtype], pipeline["pipeline_parallel_size"]
    has_states = any(each["state_bytes_per_sequence"] for each in slices)
    console.print()
    columns = ("slice", "layers", "weights", "cache per token", *["state"] * has_states)
    table = _table(*columns, title=f"{count} slices in {dtype}")
    for i, each in enumerate(slices):
        cells = [str(i + 1), f"{each['first_layer']} to {each['last_layer']}", size(each["weight_bytes"])]
        cells.append(size(each["kv_bytes_per_token"]))
        table.add_row(*cells, *[size(each["state_bytes_per_sequence"])] * has_states)
    console.print(table)
    console.print(
        Text(
            f"{size(pipeline['network_bytes_per_token'])} cross the network for each token. The last slice is the "
            "process that is asked; tables of the first and the last are counted, a tied one twice.",
            style="dim",
        )
    )


def _show_cache(console: Any, report: dict[str, Any]) -> None:
    full = report["max_position_embeddings"]
    table = _table("KV cache", "per token", f"{full} tokens", title="Cache of one sequence")
    for dtype, number in report["kv_bytes_per_token"].items():
        table.add_row(dtype, size(number), size(report["kv_bytes_full_context"][dtype]))
    if report["state_bytes_per_sequence"]:
        table.add_row("Mamba2 state", "", size(report["state_bytes_per_sequence"]))
    console.print(table)
