"""`tinyserve list`: the models on this disk, or every preset. It knows only the hub's cache and the presets."""

from typing import Annotated, Any

import typer


def list_models(
    presets: Annotated[
        bool, typer.Option("--presets", help="Every model tinyserve knows by name; gated ones need a token.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for scripts.")] = False,
) -> None:
    """List the models on this disk: name, size and path.

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
        return
    _print_table(rows)
    if not presets and all(row["source"] == "package" for row in rows):
        print("No model is downloaded yet: `tinyserve pull smollm2-135m`, or `tinyserve list --presets`.")


def _cached_rows() -> list[dict[str, Any]]:
    from tinyserve.checkpoints.hub import cached, packaged

    return [
        {
            "name": m.name,
            "bytes": m.bytes,
            "path": str(m.path),
            "repo": m.repo,
            "revision": m.revision,
            "source": m.source,
        }
        for m in (*cached(), *packaged())
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
            "downloaded": is_cached(ModelRef.of_preset(p)),
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
            where = f"{row['repo']}{' (gated)' * row['gated']}" if row["repo"] else "(comes with tinyserve)"
            table.append((row["name"], "yes" if row["downloaded"] else "-", where))
    first, second = (max(len(line[column]) for line in table) for column in (0, 1))
    for name, middle, last in table:
        print(f"{name:<{first}}  {middle:>{second}}  {last}")
