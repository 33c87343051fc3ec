"""How fast a model is here: prefill by length and decode by depth, repeated, as plain numbers.

Knows the Python API only; what a peer does on the same file is measured by scripts/bench_peers.py.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from tinyserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tinyserve.llm import LLM


@dataclass(frozen=True)
class Measurement:
    """One kind of work, repeated: tokens a second of each repetition."""

    work: str  # "prefill" or "decode"
    tokens: int  # prompt tokens, or decoded tokens
    depth: int  # tokens already in the cache
    rates: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def run(
    llm: "LLM",
    prefill: list[int],
    decode: int,
    repetitions: int,
    progress: Callable[[str], None] = lambda work: None,
) -> Iterator[Measurement]:
    """Measure prefill of each length, then decoding `decode` tokens after a prompt of one; yields as it goes.

    Lengths beyond the model's context are left out. The first repetition of each is thrown away.
    """
    for length in prefill:
        if length >= llm.max_model_len:
            continue
        progress(f"prefill {length}")
        rates = [_prefill(llm, length, i) for i in range(repetitions + 1)][1:]
        yield Measurement("prefill", length, 0, rates)
    decode = min(decode, llm.max_model_len - 2)
    progress(f"decode {decode}")
    rates = [_decode(llm, decode) for _ in range(repetitions + 1)][1:]
    yield Measurement("decode", decode, 1, rates)


def _prefill(llm: "LLM", length: int, seed: int) -> float:
    """Prompt tokens a second, up to the first token."""
    prompt = [(7919 * (i + seed)) % llm.config.vocab_size for i in range(length)]
    start = perf_counter()
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    return length / (perf_counter() - start)


def _decode(llm: "LLM", count: int) -> float:
    """Tokens a second after the first."""
    (output,) = llm.generate([[1]], SamplingParams(temperature=0, max_tokens=count + 1, ignore_eos=True))
    return output.metrics.decode_tokens_per_second or 0.0
