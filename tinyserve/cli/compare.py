"""`tinyserve compare`: architectures side by side, from their configs.

Knows how to lay the numbers out; they are counted in tinyserve/shapes.py.
"""

import json
from typing import Annotated, Any

import typer

from tinyserve import shapes
from tinyserve.cli._model_config import architecture, attention_kind, count, load_raw_config, size
from tinyserve.config import ModelConfig, parse_config
from tinyserve.errors import UserError

KV_TOKENS = 1000


def compare(
    models: Annotated[
        list[str],
        typer.Argument(help="Presets, folders, config.json or .gguf files.", metavar="MODEL"),
    ],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table, as in the docs.")] = False,
) -> None:
    """Compare architectures side by side, offline.

    Attention, position, norm, block, parameters, cache and work, from the configs alone.

    \b
    Examples:
      tinyserve compare gpt2 falcon-7b llama-3.2-1b granite-350m
      tinyserve compare mistral-7b llama-7b --markdown
    """
    if json_ and markdown:
        raise UserError("--json and --markdown are two forms of one answer; choose one of them.")
    rows = [comparison(parse_config(*load_raw_config(model)), model) for model in models]
    if json_:
        print(json.dumps({"models": rows}, indent=2))
    elif markdown:
        print(_markdown(rows))
    else:
        _show(rows)


def comparison(config: ModelConfig, model: str) -> dict[str, Any]:
    """Collect one model's column, as plain data; sizes are bytes."""
    kv = shapes.kv_bytes_per_token(config, "float32")
    return {
        "model": model,
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_mamba_layers": config.num_mamba_layers,
        "hidden_size": config.hidden_size,
        "attention_kind": attention_kind(config),
        **architecture(config),
        "max_position_embeddings": config.max_position_embeddings,
        "parameters": shapes.parameter_count(config),
        "active_parameters": shapes.active_parameter_count(config),
        "kv_bytes_per_1000_tokens": KV_TOKENS * kv,
        "state_bytes_per_sequence": shapes.state_bytes_per_sequence(config),
        "flops_per_token": shapes.matmul_flops_per_token(config),
        "attention_flops_per_position": shapes.attention_flops_per_position(config),
    }


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Write one model's column for people."""
    parameters = count(row["parameters"])
    if row["active_parameters"] < row["parameters"]:
        parameters += f" ({count(row['active_parameters'])} active)"
    return {
        "architecture": row["model_type"],
        "layers × hidden": f"{row['num_hidden_layers']} × {row['hidden_size']}",
        "attention": row["attention"],
        "position": row["position"],
        "norm": row["norm"],
        "activation": row["activation"],
        "block": row["block"],
        "context": str(row["max_position_embeddings"]),
        "parameters": parameters,
        "KV, 1k tokens": size(row["kv_bytes_per_1000_tokens"]),
        "state": size(row["state_bytes_per_sequence"]) if row["state_bytes_per_sequence"] else "–",
        "FLOP per token": _work(row),
    }


def _work(row: dict[str, Any]) -> str:
    """Write the cost of one token: what the weights take, and what each earlier position adds."""
    return f"{count(row['flops_per_token'])} + {count(row['attention_flops_per_position'])} × context"


def _markdown(rows: list[dict[str, Any]]) -> str:
    """Write the table in Markdown, a column per model."""
    columns = [_cells(row) for row in rows]
    lines = ["| | " + " | ".join(row["model"] for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells[name] for cells in columns) + " |" for name in columns[0]]
    return "\n".join(lines)


def _show(rows: list[dict[str, Any]]) -> None:
    """Print the table for people, a column per model; more models than fit go into a further table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    per_table = max(1, (console.width - 18) // 20)
    for start in range(0, len(rows), per_table):
        part = rows[start : start + per_table]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("", style="dim", no_wrap=True)
        for row in part:
            table.add_column(Text(row["model"]), header_style="bold", overflow="fold")
        columns = [_cells(row) for row in part]
        for name in columns[0]:
            table.add_row(name, *(cells[name] for cells in columns))
        console.print(table)
        console.print()
    console.print(Text("KV cache and state in float32, for one sequence.", style="dim"))
