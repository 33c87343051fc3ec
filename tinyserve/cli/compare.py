"""`tinyserve compare`: architectures side by side, from their configs.

Knows how to lay the numbers out; they are counted in tinyserve/models/config/costs.py.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.cli import _names
from tinyserve.cli._output_files import check_plot
from tinyserve.errors import UserError
from tinyserve.models.config import ModelConfig, costs, parse_config
from tinyserve.models.config.description import architecture, attention_kind
from tinyserve.models.dtypes import KV_CACHE_DTYPES, resolve_kv_cache_dtype
from tinyserve.models.lookup import load_raw_config
from tinyserve.progress import count, size

KV_TOKENS = 1000
KV_DTYPE = resolve_kv_cache_dtype("auto", "auto")


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Presets, folders, config.json or .gguf files.", metavar="MODEL", autocompletion=_names.models
        ),
    ],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table, as in the docs.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw where the parameters are, and what a context costs."),
    ] = None,
) -> None:
    """Compare architectures side by side, offline.

    Attention, position, norm, activation, block, complexity, context, cache, parameters and work, from the configs
    alone.

    \b
    Examples:
      tinyserve compare gpt2 falcon-7b llama-3.2-1b granite-350m
      tinyserve compare mistral-7b llama-7b --markdown
      tinyserve compare gpt2 llama-3.2-1b granite-350m --plot compare.png
    """
    if json_ and markdown:
        raise UserError("--json and --markdown are two forms of one answer; choose one of them.")
    if plot is not None:
        check_plot(plot)
    rows = [comparison(parse_config(*load_raw_config(ModelRef.parse(model))), model) for model in models]
    if plot is not None:
        from tinyserve.cli._compare_plot import draw

        draw(plot, rows, KV_DTYPE)
    if json_:
        print(json.dumps({"models": rows}, indent=2))
    elif markdown:
        print(_markdown(rows))
    else:
        _show(rows)


def comparison(config: ModelConfig, model: str) -> dict[str, Any]:
    """Collect one model's column, as plain data; sizes are bytes."""
    kv = {dtype: costs.kv_bytes_per_token(config, dtype) for dtype in KV_CACHE_DTYPES}
    return {
        "model": model,
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_mamba_layers": config.num_mamba_layers,
        "hidden_size": config.hidden_size,
        "attention_kind": attention_kind(config),
        **architecture(config),
        "max_position_embeddings": config.max_position_embeddings,
        "parameters": costs.parameter_count(config),
        "parameters_by_component": costs.parameters_by_component(config),
        "active_parameters": costs.active_parameter_count(config),
        "kv_bytes_per_1000_tokens": {dtype: KV_TOKENS * number for dtype, number in kv.items()},
        "kv_bytes_full_context": {dtype: config.max_position_embeddings * number for dtype, number in kv.items()},
        "state_bytes_per_sequence": costs.state_bytes_per_sequence(config),
        "flops_per_token": costs.matmul_flops_per_token(config),
        "attention_window": config.attention_window,
        "attention_flops_per_position": costs.attention_flops_per_position(config),
    }


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Write one model's column for people."""
    parameters = count(row["parameters"])
    if row["active_parameters"] < row["parameters"]:
        parameters += f" ({count(row['active_parameters'])} active)"
    state = f" + {size(row['state_bytes_per_sequence'])} state" if row["state_bytes_per_sequence"] else ""
    window = f", up to {row['attention_window']}" if row["attention_window"] else ""
    return {
        "architecture": row["model_type"],
        "layers × hidden": f"{row['num_hidden_layers']} × {row['hidden_size']}",
        "attention": row["attention"],
        "position": row["position"],
        "norm": row["norm"],
        "activation": row["activation"],
        "block": row["block"],
        "KV, 1k tokens": size(row["kv_bytes_per_1000_tokens"][KV_DTYPE]) + state,
        "KV, full": size(row["kv_bytes_full_context"][KV_DTYPE]) + state,
        "complexity": row["complexity"],
        "context": f"{row['max_position_embeddings']} tokens",
        "parameters": parameters,
        "FLOP per token": count(row["flops_per_token"]),
        "+ per position": count(row["attention_flops_per_position"]) + window,
    }


def _markdown(rows: list[dict[str, Any]]) -> str:
    """Write the table in Markdown, a column per model."""
    columns = [_cells(row) for row in rows]
    lines = ["| | " + " | ".join(row["model"] for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells[name] for cells in columns) + " |" for name in columns[0]]
    return "\n".join([*lines, "", _NOTE])


_NOTE = (
    "The cache of one sequence in bfloat16, the state in float32; full: as long as the context. A prompt of n tokens "
    "costs its complexity. FLOP of the matrix products, and of attention for each position it sees."
)


def _show(rows: list[dict[str, Any]]) -> None:
    """Print the table for people, a column per model; more models than fit go into a further table."""
    from rich.table import Table
    from rich.text import Text

    from tinyserve.cli._console import Output

    console = Output(highlight=False)
    models = [(row["model"], _cells(row)) for row in rows]
    names = max(map(len, models[0][1]))
    for part in _fitting(models, console.width - names):
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
        table.add_column("", style="dim", no_wrap=True, width=names)
        for (model, _), width in zip(part, _widths(part, console.width - names), strict=True):
            table.add_column(Text(model), header_style="bold", overflow="fold", width=width)
        for name in part[0][1]:
            table.add_row(name, *(cells[name] for _, cells in part))
        console.print(table)
        console.print()
    console.print(Text(_NOTE, style="dim"))


_GAP, _LEAST = 2, 12
_Column = tuple[str, dict[str, str]]  # a model's name, and its cells


def _fitting(models: list[_Column], width: int) -> list[list[_Column]]:
    """Share models out to tables of this width: as few tables as will do, as even as their number allows."""
    for number in range(1, len(models)):
        size, longer = divmod(len(models), number)
        starts = [i * size + min(i, longer) for i in range(number + 1)]
        tables = [models[start:end] for start, end in pairwise(starts)]
        if all(sum(_GAP + _least_width(model) for model in table) <= width for table in tables):
            return tables
    return [[model] for model in models]


def _widths(models: list[_Column], width: int) -> list[int]:
    """The columns each model gets of `width`: what its words need; of the rest, as many as can be get all they want."""
    widths = [_least_width(model) for model in models]
    wanted = [max(len(model), *map(len, cells.values())) for model, cells in models]
    rest = width - sum(_GAP + least for least in widths)
    for i in sorted(range(len(models)), key=lambda i: wanted[i] - widths[i]):
        if wanted[i] - widths[i] <= rest:
            rest, widths[i] = rest - (wanted[i] - widths[i]), wanted[i]
    widest = max(range(len(models)), key=lambda i: wanted[i] - widths[i])
    widths[widest] += max(0, min(rest, wanted[widest] - widths[widest]))
    return widths


def _least_width(model: _Column) -> int:
    """The columns that a model's longest word needs; a path may break anywhere."""
    name, cells = model
    return max(_LEAST, min(len(name), 2 * _LEAST), *(len(word) for cell in cells.values() for word in cell.split()))
