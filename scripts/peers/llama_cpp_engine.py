"""llama.cpp, through the low-level API of llama-cpp-python; `format` is a GGUF type.

The real model is requantized from the file as shipped, which is measured as Q4_1; random ones start from bfloat16.
"""

import ctypes
from pathlib import Path
from time import perf_counter

import llama_cpp as api
import numpy as np

from peers import NotMeasured, models

ERROR = 4  # GGML_LOG_LEVEL_ERROR
PIECE = 2048  # tokens that are handed over at once, as llama-batched-bench does; each is computed in pieces of 512


@api.llama_log_callback
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == ERROR:
        print(text.decode(errors="replace"), end="")


api.llama_log_set(_log, ctypes.c_void_p(0))


def prepare(model: str, format: str, workdir: Path) -> str:
    if model == models.REAL:
        source = models.shipped_gguf()
        is_source = format == "Q4_1"
    else:
        from peers import gguf_file

        folder = models.checkpoint(model, workdir)
        source = models.built(models.home(model, workdir) / "bf16.gguf", lambda path: gguf_file.write(folder, path))
        is_source = format == "bf16"
    if is_source:
        return str(source)
    return str(
        models.built(models.home(model, workdir) / f"{format}.gguf", lambda path: quantize(source, path, format))
    )


def quantize(source: Path, target: Path, format: str) -> None:
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{format.upper()}", None)
    params.allow_requantize = True
    if api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise NotMeasured(f"llama_model_quantize could not make {format} of {source.name}")


class Engine:
    def __init__(self, path: str, format: str, threads: int, max_length: int, sequences: int):
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            raise NotMeasured(f"llama.cpp cannot load {Path(path).name}")
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.threads, self.max_length = threads, max_length
        self.sequences = sequences
        self.one = self._context(max_length, 1, max_length)
        self.many = self._context(max_length * sequences, sequences, PIECE) if sequences else None
        self.tokens = api.llama_batch_init(max(max_length, sequences, PIECE), 0, 1)

    def _context(self, length: int, sequences: int, piece: int) -> api.llama_context_p:
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = length, piece, sequences
        params.n_threads = params.n_threads_batch = self.threads
        context = api.llama_init_from_model(self.model, params)
        if not context:
            raise NotMeasured(f"llama.cpp has no room for {sequences} sequences in {length} tokens")
        return context

    def prefill(self, prompt: list[int]) -> float:
        self._clear(self.one)
        self._fill(prompt, range(len(prompt)), [0] * len(prompt), [len(prompt) - 1])
        start = perf_counter()
        self._step(self.one, [len(prompt) - 1])
        return perf_counter() - start

    def decode(self, prompt: list[int], count: int) -> float:
        self._clear(self.one)
        self._fill(prompt, range(len(prompt)), [0] * len(prompt), [len(prompt) - 1])
        (token,) = self._step(self.one, [len(prompt) - 1])
        start = perf_counter()
        for position in range(len(prompt), len(prompt) + count):
            self._fill([token], [position], [0], [0])
            (token,) = self._step(self.one, [0])
        return perf_counter() - start

    def batch(self, prompts: list[list[int]], count: int) -> float:
        start = perf_counter()
        for first in range(0, len(prompts), self.sequences):
            self._wave(prompts[first : first + self.sequences], count)
        return perf_counter() - start

    def _wave(self, prompts: list[list[int]], count: int) -> None:
        """Read all prompts, one after the other, then a token of each in every step."""
        self._clear(self.many)
        length, rows = len(prompts[0]), range(len(prompts))
        work = [(token, i, row) for row, prompt in enumerate(prompts) for i, token in enumerate(prompt)]
        tokens = []
        for first in range(0, len(work), PIECE):
            piece = work[first : first + PIECE]
            ends = [i for i, (_, position, _) in enumerate(piece) if position == length - 1]
            self._fill(*zip(*piece, strict=True), ends)
            tokens += self._step(self.many, ends)
        for position in range(length, length + count - 1):
            self._fill(tokens, [position] * len(prompts), rows, rows)
            tokens = self._step(self.many, rows)

    def _clear(self, context: api.llama_context_p) -> None:
        api.llama_memory_clear(api.llama_get_memory(context), True)

    def _fill(self, tokens, positions, sequences, outputs) -> None:
        batch = self.tokens
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, 0
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        for i in outputs:
            batch.logits[i] = 1

    def _step(self, context: api.llama_context_p, outputs) -> list[int]:
        """Compute the filled batch; the likeliest token after each of `outputs`."""
        if status := api.llama_decode(context, self.tokens):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = (api.llama_get_logits_ith(context, i) for i in outputs)
        return [int(np.ctypeslib.as_array(row, (self.vocab_size,)).argmax()) for row in logits]
