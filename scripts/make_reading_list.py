"""Write the list of the files to read first into README.md, between the comments that name it.

    python scripts/make_reading_list.py            # writes README.md
    python scripts/make_reading_list.py --check    # exits with 1 when README.md is stale

Each has its number of lines, and the first sentence of its docstring.
"""

import ast
import re
from pathlib import Path

from make_cli_docs import escape, keep_current

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "README.md"
GENERATED = re.compile(r"(<!-- evening -->\n).*?(<!-- end -->)", re.DOTALL)
# From a prompt down to the numbers and up again; the first is where a stranger begins.
FILES = (
    "llm.py",
    "text/request.py",
    "engine.py",
    "scheduling/scheduler.py",
    "scheduling/sequence.py",
    "scheduling/block_manager.py",
    "model_runner.py",
    "models/batch.py",
    "models/llama.py",
    "models/layers.py",
    "models/kv_cache.py",
    "tensor/reference.py",
    "sampler.py",
)


def page(text: str) -> str:
    """The page with the list as it is today."""
    rows = [(file, *read(ROOT / "tinyserve" / file)) for file in FILES]
    lines = [f"| [{file}](tinyserve/{file}) | {length} | {escape(about)} |\n" for file, length, about in rows]
    total = sum(length for _, length, _ in rows)
    table = "".join(["| file | lines | |\n|---|--:|---|\n", *lines, f"| | {total} | |\n"])
    return GENERATED.sub(lambda part: part[1] + table + part[2], text)


def read(path: Path) -> tuple[int, str]:
    """How many lines a file has, and the first sentence of its docstring."""
    text = path.read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(text)) or ""
    return len(text.splitlines()), re.split(r"(?<=\.)\s", " ".join(about.split("\n\n")[0].split()))[0]


def main() -> int:
    return keep_current(PAGE, page(PAGE.read_text(encoding="utf-8")), Path(__file__).name, __doc__.splitlines()[0])


if __name__ == "__main__":
    raise SystemExit(main())
