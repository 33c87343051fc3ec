"""tinyserve, through its public API; `format` is a dtype.

Of the real model 4-bit dtypes take the file as shipped, whose bits they keep, and others its float32 widening: int8
would keep 4 bits as well, which is no match for 8.
"""

from pathlib import Path
from time import perf_counter

from peers import NotMeasured, models
from tinyserve import LLM, SamplingParams, TinyserveError


def prepare(model: str, format: str, workdir: Path) -> str:
    keeps_bits = model == models.REAL and format in ("int4", "w4a16", "w4a8")
    return str(models.shipped_gguf() if keeps_bits else models.checkpoint(model, workdir))


class Engine:
    def __init__(self, path: str, format: str, threads: int, max_length: int, sequences: int):
        try:
            self.llm = LLM(
                path,
                dtype=format,
                num_threads=threads,
                max_model_len=max_length,
                max_num_seqs=max(1, sequences),
                enable_prefix_caching=False,  # what is measured is computed
            )
        except TinyserveError as error:
            raise NotMeasured(str(error)) from error

    def prefill(self, prompt: list[int]) -> float:
        start = perf_counter()
        self.llm.generate([prompt], _greedy(1))
        return perf_counter() - start

    def decode(self, prompt: list[int], count: int) -> float:
        (output,) = self.llm.generate([prompt], _greedy(count + 1))
        return count / output.metrics.decode_tokens_per_second

    def batch(self, prompts: list[list[int]], count: int) -> float:
        start = perf_counter()
        self.llm.generate(prompts, _greedy(count))
        return perf_counter() - start


def _greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
