"""OpenVINO GenAI with weights that optimum-intel's export rounded to 8 bits; other settings are its defaults."""

import subprocess
import sys
from pathlib import Path
from time import perf_counter

import numpy as np

from peers import NotMeasured, models


def prepare(model: str, format: str, workdir: Path) -> str:
    folder = models.checkpoint(model, workdir)

    def export(target: Path) -> None:
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        command += ["--model", str(folder), "--task", "text-generation-with-past", "--weight-format", format]
        done = subprocess.run([*command, str(target)], stderr=subprocess.PIPE, text=True)
        print(done.stderr)
        if done.returncode:
            hint = " (pip uninstall torchvision)" if "torchvision" in done.stderr else ""
            raise NotMeasured(f"optimum-cli failed: {done.stderr.strip().splitlines()[-1]}{hint}")

    return str(models.built(models.home(model, workdir) / f"openvino-{format}", export))


class Engine:
    def __init__(self, path: str, format: str, threads: int, max_length: int, sequences: int):
        import openvino_genai

        self.pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)

    def prefill(self, prompt: list[int]) -> float:
        return self._generate([prompt], 1)[0]

    def decode(self, prompt: list[int], count: int) -> float:
        _, metrics = self._generate([prompt], count + 1)
        return metrics.get_tpot().mean / 1000 * count  # milliseconds for each token after the first

    def batch(self, prompts: list[list[int]], count: int) -> float:
        return self._generate(prompts, count)[0]

    def _generate(self, prompts: list[list[int]], count: int):
        import openvino
        import openvino_genai

        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        start = perf_counter()
        results = self.pipeline.generate(inputs, max_new_tokens=count, ignore_eos=True, do_sample=False)
        seconds = perf_counter() - start
        if [len(tokens) for tokens in results.tokens] != [count] * len(prompts):
            raise NotMeasured(f"it gave {[len(tokens) for tokens in results.tokens]} tokens, not {count} each")
        return seconds, results.perf_metrics
