"""What choosing a token costs, from logits to its id: one filter after the other, and all of them together.

python scripts/bench_sampling.py --vocab 128256
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np

from tinyserve import SamplingParams
from tinyserve.sampler import Sampler
from tinyserve.scheduling.sequence import Sequence

PROMPT, ANSWER = range(64), range(100, 164)  # tokens, for penalties
ALL: dict[str, Any] = {
    "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.95, "repetition_penalty": 1.1,
    "frequency_penalty": 0.1, "presence_penalty": 0.1, "logit_bias": {5: 1.0}, "banned_token_ids": [7],
    "min_tokens": 99,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "all filters": ALL,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=40, help="all ways in turn (default: %(default)s)")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    print("| sequences | " + " | ".join(f"{name}, ms each" for name in WAYS) + " |")
    print("|---:|" + "---:|" * len(WAYS))
    for batch in arguments.batches:
        logits = (3 * random.standard_normal((batch, arguments.vocab))).astype(np.float32)
        sequences = {name: [sequence(i, options) for i in range(batch)] for name, options in WAYS.items()}
        sampler, times = Sampler(frozenset({2})), {name: list[float]() for name in WAYS}
        for _ in range(arguments.rounds):
            for name, kept in times.items():
                own = logits.copy()
                start = time.perf_counter()
                sampler.sample(sequences[name], own)
                kept.append(1e3 * (time.perf_counter() - start) / batch)
        print(f"| {batch} | " + " | ".join(f"{statistics.median(kept):.3f}" for kept in times.values()) + " |")


def sequence(number: int, options: dict[str, Any]) -> Sequence:
    """A request in the middle of its answer."""
    one = Sequence(number, list(PROMPT), SamplingParams(max_tokens=1000, **options))
    one.token_ids += ANSWER
    return one


if __name__ == "__main__":
    main()
