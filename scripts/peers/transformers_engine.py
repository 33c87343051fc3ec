"""torch and transformers: the model's forward pass in a loop with its cache; `format` is a dtype."""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from peers import models


def prepare(model: str, format: str, workdir: Path) -> str:
    return str(models.checkpoint(model, workdir))


class Engine:
    def __init__(self, path: str, format: str, threads: int, max_length: int, sequences: int):
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, format)).eval()

    def prefill(self, prompt: list[int]) -> float:
        start = perf_counter()
        self._step(torch.tensor([prompt]), None)
        return perf_counter() - start

    def decode(self, prompt: list[int], count: int) -> float:
        tokens, cache = self._step(torch.tensor([prompt]), None)
        start = perf_counter()
        for _ in range(count):
            tokens, cache = self._step(tokens, cache)
        return perf_counter() - start

    def batch(self, prompts: list[list[int]], count: int) -> float:
        tokens, cache = torch.tensor(prompts), None
        start = perf_counter()
        for _ in range(count):
            tokens, cache = self._step(tokens, cache)
        return perf_counter() - start

    @torch.inference_mode()
    def _step(self, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """The likeliest next token of each row (rows, 1), and the cache."""
        output = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values
