"""What each engine's rounding costs, beside float32 on the same weights: tinyserve's dtypes and llama.cpp's formats.

    python scripts/accuracy_peers.py --dtypes int8 w8a8 int4 w4a8 --formats Q8_0 Q4_1 Q4_0 [--append docs/benchmarks.md]

The model is the real one, SmolLM2-135M, whose file has Q4_1: int8 and w8a8 start from its float32 widening, as Q8_0
does; int4, w4a8 and Q4_1 take the file's own bits. KL is the mean of KL(float32 ‖ other) in nats a token.
"""

import argparse
import sys
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from peers import llama_cpp_engine, models, tinyserve_engine  # noqa: E402

from tinyserve import LLM  # noqa: E402
from tinyserve.evaluation.perplexity import cross_entropy, kl_divergence, top1_agreement  # noqa: E402

TEXT = ROOT / "tests" / "data" / "english.txt"
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="*", default=["int8", "w8a8", "int4", "w4a8"])
    parser.add_argument("--formats", nargs="*", default=["Q8_0", "Q4_1", "Q4_0"])
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--workdir", type=Path, required=True, help="where the models are built, as in bench_peers.py")
    parser.add_argument("--append", type=Path, help="a Markdown file to append the table to")
    arguments = parser.parse_args()
    reference = LLM(str(models.shipped_gguf()), dtype="float32", max_num_seqs=1, max_model_len=WINDOW + 1)
    ids = reference.tokenizer.encode(arguments.text.read_text(encoding="utf-8"))
    windows = [ids[i : i + WINDOW + 1] for i in range(0, len(ids) - 1, WINDOW)]
    exact = [reference.logits(window[:-1]) for window in windows]
    rows = [row("float32", windows, exact, exact)]
    for dtype in arguments.dtypes:
        llm = LLM(
            tinyserve_engine.prepare(models.REAL, dtype, arguments.workdir), dtype=dtype, max_model_len=WINDOW + 1,
            max_num_seqs=1,
        )  # fmt: skip
        rows.append(row(f"tinyserve {dtype}", windows, exact, [llm.logits(window[:-1]) for window in windows]))
    rows += [
        row(f"llama.cpp {name}", windows, exact, llama_cpp_logits(name, windows, arguments.workdir))
        for name in arguments.formats
    ]
    table = "\n".join(
        [
            f"### Rounding, SmolLM2-135M-Instruct, {date.today()}",
            "",
            f"{len(ids) - 1} tokens of {arguments.text.name}, windows of {WINDOW}.",
            "",
            "| engine | perplexity | KL, nats | top-1 equal |",
            "|---|---:|---:|---:|",
            *rows,
        ]
    )
    print(table)
    if arguments.append:
        with arguments.append.open("a", encoding="utf-8") as file:
            file.write("\n" + table + "\n")


def row(name: str, windows: list[list[int]], exact: list[np.ndarray], logits: list[np.ndarray]) -> str:
    weights = [len(window) - 1 for window in windows]

    def mean(values: list[float]) -> float:
        return float(np.average(values, weights=weights))

    pairs = list(zip(exact, logits, strict=True))
    perplexity = np.exp(mean([cross_entropy(b, w[1:]) for b, w in zip(logits, windows, strict=True)]))
    if name == "float32":
        return f"| {name} | {perplexity:.3f} | | |"
    kl, top1 = mean([kl_divergence(a, b) for a, b in pairs]), mean([top1_agreement(a, b) for a, b in pairs])
    print(f"{name}: perplexity {perplexity:.3f}, KL {kl:.5f}, top-1 {top1:.2%}", file=sys.stderr)
    return f"| {name} | {perplexity:.3f} | {kl:.5f} | {top1:.2%} |"


def llama_cpp_logits(name: str, windows: list[list[int]], workdir: Path) -> list[np.ndarray]:
    from llama_cpp import Llama

    path = llama_cpp_engine.prepare(models.REAL, name, workdir)
    llm = Llama(path, n_ctx=WINDOW + 1, n_batch=WINDOW, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False)
    logits = []
    for window in windows:
        llm.reset()
        llm.eval(window[:-1])
        logits.append(np.array(llm.scores[: len(window) - 1], np.float32))
    return logits


if __name__ == "__main__":
    main()
