"""CTranslate2; `format` is a compute type."""

import json
from pathlib import Path
from time import perf_counter

import ctranslate2

from peers import NotMeasured, models


def prepare(model: str, format: str, workdir: Path) -> str:
    folder = models.checkpoint(model, workdir)

    def convert(target: Path) -> None:
        try:
            ctranslate2.converters.TransformersConverter(str(folder)).convert(str(target), quantization=format)
        except (ValueError, NotImplementedError) as error:
            reason = str(error).partition(" (supported")[0]
            raise NotMeasured(f"CTranslate2 cannot convert it: {reason}") from error

    return str(models.built(models.home(model, workdir) / f"ctranslate2-{format}", convert))


class Engine:
    def __init__(self, path: str, format: str, threads: int, max_length: int, sequences: int):
        self.generator = ctranslate2.Generator(path, compute_type=format, intra_threads=threads, inter_threads=1)
        self.vocabulary = json.loads((Path(path) / "vocabulary.json").read_text(encoding="utf-8"))

    def prefill(self, prompt: list[int]) -> float:
        start, times = self._generate([prompt], 1)
        return times[-1] - start

    def decode(self, prompt: list[int], count: int) -> float:
        _, times = self._generate([prompt], count + 1)
        return times[-1] - times[0]

    def batch(self, prompts: list[list[int]], count: int) -> float:
        start, times = self._generate(prompts, count)
        return times[-1] - start

    def _generate(self, prompts: list[list[int]], count: int) -> tuple[float, list[float]]:
        """When it began, and when each token came. A prompt is read at once, for its last logits alone."""
        tokens = [[self.vocabulary[token] for token in prompt] for prompt in prompts]
        times: list[float] = []
        start = perf_counter()
        results = self.generator.generate_batch(
            tokens,
            max_length=count,
            min_length=count,
            include_prompt_in_result=False,
            callback=lambda _: times.append(perf_counter()),
        )
        if [len(result.sequences_ids[0]) for result in results] != [count] * len(prompts):
            raise NotMeasured(f"it gave {[len(result.sequences_ids[0]) for result in results]} tokens, not {count}")
        return start, times
