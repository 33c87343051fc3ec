"""`tinyserve list`: the models on this disk, or every preset. It knows only the hub's cache and the presets."""

from typing import Annotated, Any

import typer


def list_models(
    presets: Annotated[
        bool, typer.Option("--presets", help="Every model tinyserve knows by name; gated ones need a token.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for scripts.")] = False,
) -> None:
    """List the downloaded models: name, size and path.

    \b
    Examples:
      tinyserve list
      tinyserve list --presets
      tinyserve list --json
    """
    rows = _preset_rows() if presets else _cached_rows()
    if as_json:
        import json

        print(json.dumps(rows, indent=2))
    elif rows:
        _print_table(rows)
    else:
        print("No model is downloaded yet: `tinyserve pull smollm2-135m`, or `tinyserve list --presets`.")


def _cached_rows() -> list[dict[str, Any]]:
    from tinyserve.checkpoints.hub import cached

    return [
        {
            "name": m.name,
            "bytes": m.bytes,
            "path": str(m.path),
            "repo": m.repo,
            "revision": m.revision,
            "source": m.source,
        }
        for m in cached()
    ]


def _preset_rows() -> list[dict[str, Any]]:
    from tinyserve.checkpoints import presets
    from tinyserve.checkpoints.hub import is_cached
    from tinyserve.checkpoints.model_ref import ModelRef

    return [
        {
            "name": p.name,
            "repo": p.repo,
            "revision": p.revision,
            "gated": p.gated,
            "downloaded": is_cached(ModelRef(p.name, preset=p, repo=p.repo)),
        }
        for p in map(presets.get, presets.names())
    ]


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Columns by their widest cell; a path is never cut, so that it can be copied."""
    from tinyserve.progress import size

    if "bytes" in rows[0]:
        table = [("name", "size", "where")] + [(r["name"], size(r["bytes"]), r["path"]) for r in rows]
    else:
        table = [("name", "downloaded", "repository")]
        for row in rows:
            gated = " (gated)" if row["gated"] else ""
            table.append((row["name"], "yes" if row["downloaded"] else "-", row["repo"] + gated))
    first, second = (max(len(line[column]) for line in table) for column in (0, 1))
    for name, middle, last in table:
        print(f"{name:<{first}}  {middle:>{second}}  {last}")
