"""How time and memory grow with the prompt: one prefill of each length, in a process of its own.

    python scripts/long_prefill.py --plot docs/images/long-prefill.png

By default granite-350m's shape with synthetic weights, at 4, 8, 16 and 32 thousand tokens. Prints a table of seconds,
tokens a second and memory: what the process holds besides mapped files when the weights are loaded, and at the most
while it reads the prompt. Prefills as the engine does, max_num_batched_tokens at a time, with room for one sequence.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from time import perf_counter

LENGTHS = (4096, 8192, 16384, 32768)
INK, QUIET, COLORS = "#222222", "#666666", ("#2b6cb0", "#c05621")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="granite-350m", help="a preset; its context bounds the lengths")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # what each process is started with
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, options.dtype, options.one)))
        return
    results = []
    print("| tokens | seconds | tokens/s | loaded, MB | most, MB |\n|---:|---:|---:|---:|---:|")
    for length in options.lengths:
        command = [sys.executable, __file__, "--model", options.model, "--dtype", options.dtype, "--one", str(length)]
        # Arrays in pages of their own go back to the system when they are freed, and do not hide what grows.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr.strip().rsplit("\n", 1)[-1])
        one = json.loads(done.stdout)
        results.append(one)
        rate = length / one["seconds"]
        print(f"| {length} | {one['seconds']:.1f} | {rate:.0f} | {one['loaded']:.0f} | {one['most']:.0f} |", flush=True)
    if options.plot:
        draw(results, f"{options.model}, {options.dtype}, one prefill", options.plot)


def measure(model: str, dtype: str, length: int) -> dict[str, float]:
    """Seconds of one prefill of `length` tokens, and the process's memory in MB before and at the most."""
    from tinyserve import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, load_format="dummy", max_num_seqs=1, max_model_len=length)
    tokens = [(17 * i) % (llm.config.vocab_size - 1) for i in range(length - 1)]
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    llm.generate([tokens[:600]], params)  # compiles what is not in the cache
    loaded = anonymous_memory()
    most, ended = [loaded], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            most[0] = max(most[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = perf_counter()
    llm.generate([tokens], params)
    seconds = perf_counter() - began
    ended.set()
    watcher.join()
    return {"tokens": length, "seconds": seconds, "loaded": loaded, "most": most[0]}


def anonymous_memory() -> float:
    """MB that this process has written to; pages of mapped files can be dropped, and do not count."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("RssAnon:"))


def draw(results: list[dict[str, float]], heading: str, path: Path) -> None:
    """Seconds and memory over the number of tokens, each beside the line through its first point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=9, color=QUIET, x=0.01, ha="left")
    tokens = [one["tokens"] for one in results]
    smallest = min(one["loaded"] for one in results)
    panels = (
        ("Time", "seconds", [one["seconds"] for one in results], 0.0, "proportional to the first"),
        ("Memory", "MB", [one["most"] for one in results], smallest, "weights and state"),
    )
    for i, (title, unit, values, base, reference) in enumerate(panels):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.plot(tokens, values, "o-", color=COLORS[i], label="measured")
        # Time against proportional growth; memory against what does not grow.
        line = [values[0] * n / tokens[0] for n in tokens] if base == 0 else [base] * len(tokens)
        axes.plot(tokens, line, "--", color=QUIET, linewidth=1, label=reference)
        for n, value in zip(tokens, values, strict=True):
            axes.annotate(f"{value:.0f}", (n, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
        axes.set_xlabel("tokens of the prompt", color=QUIET)
        axes.set_ylabel(unit, color=QUIET)
        axes.set_xticks(tokens, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in tokens])
        axes.set_xlim(left=0)
        axes.set_ylim(0, max(values) * 1.18)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, format="png")


if __name__ == "__main__":
    main()
