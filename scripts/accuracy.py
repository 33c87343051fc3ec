"""What each dtype costs in accuracy, beside float32 on the same weights and the same text.

    python scripts/accuracy.py
    python scripts/accuracy.py --model gpt2 --text FILE --dtypes int8 bfloat16 --json

A text is cut into windows; each token is predicted from what stands before it in its window. KL is the mean of
KL(float32 ‖ dtype) in nats a token, top-1 the share of tokens where both find the same one likeliest. The figures
depend on the model's file and on the text, and, beyond the fifth digit, on the processor; speed plays no part.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tinyserve import LLM, TinyserveError, __version__  # noqa: E402
from tinyserve.errors import UserError  # noqa: E402
from tinyserve.evaluate import compare  # noqa: E402

TEXT = ROOT / "tests" / "data" / "english.txt"


def main() -> None:
    args = arguments()
    try:
        report = measure(args.model, args.text, args.dtypes, args.window, args.threads)
    except TinyserveError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(report, indent=2) if args.json else table(report))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perplexity and KL divergence of each dtype against float32.")
    parser.add_argument("--model", default="smollm2-135m", help="a preset, a repo id, a folder or a .gguf file")
    parser.add_argument("--text", type=Path, default=TEXT, help="a text file in UTF-8; default: tests/data/english.txt")
    parser.add_argument("--dtypes", nargs="+", default=["int8", "bfloat16"], metavar="DTYPE")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are read at once (default: 1024)")
    parser.add_argument("--threads", type=int, help="default: the cores this process may use")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args()


def measure(model: str, text: Path, dtypes: list[str], window: int, threads: int | None) -> dict[str, Any]:
    """The recipe, and one result for each dtype; two models are in memory at a time."""
    content = read(text)
    reference = load(model, "float32", threads)
    if reference.tokenizer is None:
        raise UserError(f"{reference.name} has no tokenizer to read a text with.")
    token_ids = reference.tokenizer.encode(content)
    results = []
    for dtype in dtypes:
        comparison = compare(reference, load(model, dtype, threads), token_ids, window)
        results.append({"dtype": dtype, **asdict(comparison), "perplexity_change": comparison.perplexity_change})
    return {
        "tinyserve": __version__,
        "model": model,
        "weights": reference.path.name if reference.path else None,
        "text": text.name,
        "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "window": min(window, reference.max_model_len),
        "results": results,
    }


def read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{text} cannot be read as UTF-8 text: {error}.") from error


def load(model: str, dtype: str, threads: int | None) -> LLM:
    return LLM(model, dtype=dtype, max_num_seqs=1, num_threads=threads)


def table(report: dict[str, Any]) -> str:
    """For people: the recipe in two lines, then a row a dtype."""
    first = report["results"][0]
    lines = [
        f"tinyserve {report['tinyserve']}, {report['model']} ({report['weights']}), windows of {report['window']}",
        f"{report['text']}: {first['tokens']} tokens predicted, sha256 {report['text_sha256'][:16]}",
        "",
        "| dtype | perplexity | change | KL, nats | top-1 equal |",
        "|---|---:|---:|---:|---:|",
        f"| float32 | {first['perplexity_reference']:.3f} | | | |",
    ]
    lines += [
        f"| {row['dtype']} | {row['perplexity']:.3f} | {row['perplexity_change']:+.2%} "
        f"| {row['kl']:.5f} | {row['top1']:.2%} |"
        for row in report["results"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
