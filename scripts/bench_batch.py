"""A batch beside `LLM.generate` of the same prompts, in one process, in turn: what files, journals and requests cost.

    python scripts/bench_batch.py --model smollm2-135m --rows 256 --rounds 3

Both have one engine each, of the same options; times are from the first row on, without loading. The answers
must be the same.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from tinyserve import LLM, SamplingParams
from tinyserve.batch import BatchProgress, run_batch

TEXT = (
    "In the morning the ships lay still in the harbour, and the men who had come down from the hills stood on the quay "
    "and counted them. Nobody spoke."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    prompts = [f"{i}. {TEXT[i % 40 :]}" for i in range(arguments.rows)]
    params = SamplingParams(max_tokens=arguments.tokens, temperature=0, ignore_eos=True)
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = folder / "in.jsonl"
        given.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        for turn in range(arguments.rounds):
            with LLM(arguments.model, dtype=arguments.dtype, enable_prefix_caching=False) as llm:
                started = time.perf_counter()
                texts = [output.outputs[0].text for output in llm.generate(prompts, params, progress_bar=False)]
                alone = time.perf_counter() - started
            last = BatchProgress(0)

            def hear(progress: BatchProgress) -> None:
                nonlocal last
                last = progress

            output = folder / f"{turn}.jsonl"
            run_batch(
                given, output, arguments.model, params, raw=True, on_progress=hear, dtype=arguments.dtype,
                enable_prefix_caching=False,
            )  # fmt: skip
            answers = [json.loads(line)["answer"] for line in output.read_text().split("\n")[:-1]]
            assert answers == texts
            ratios.append(alone / last.seconds)
            tokens = arguments.rows * arguments.tokens
            print(
                f"generate {tokens / alone:7.0f} tokens/s   batch {tokens / last.seconds:7.0f}   {ratios[-1]:.3f}",
                flush=True,
            )
    print(f"batch / generate: {statistics.median(ratios):.3f} (median of {arguments.rounds})")


if __name__ == "__main__":
    main()
