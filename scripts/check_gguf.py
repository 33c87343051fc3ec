"""Compare float32 logits with llama.cpp's on one GGUF file each, for tiny random models of every architecture.

    python scripts/check_gguf.py                  # every model of the table below
    python scripts/check_gguf.py gpt2 falcon-7b

The files are those of the tests: tests/support/checkpoints.py names and turns tensors as llama.cpp's converter does.
What it got wrong the tests would expect; llama.cpp would not. Exit code 1 if any difference is too large. Needs
llama-cpp-python (the extra `peers`).
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import checkpoints  # noqa: E402
import chosen  # noqa: E402

from tinyserve import LLM  # noqa: E402
from tinyserve.models import falcon  # noqa: E402
from tinyserve.tensor.matmul import GELU_TANH  # noqa: E402

# The largest difference that is rounding, as a share of the largest logit. llama.cpp looks GELU up in a table of
# float16, which is no more exact than that; SiLU it computes.
TABLE, ROUNDING = 2e-3, 2e-5
MODELS = {
    "gpt2": TABLE,
    "falcon-7b": TABLE,
    "falcon-40b": TABLE,
    "falcon-11b": TABLE,
    "llama": ROUNDING,
    "llama-grouped": ROUNDING,
    "llama-head-dim": ROUNDING,
    "llama-linear": ROUNDING,
    "llama-biases": ROUNDING,
    "qwen2": ROUNDING,
    "qwen2-tied": ROUNDING,
    "qwen3": ROUNDING,
    "qwen3-head-dim": ROUNDING,
    "granite": ROUNDING,
    "granite-grouped": ROUNDING,
    "granite-moe": ROUNDING,
    "granite-hybrid": ROUNDING,
    "granite-hybrid-moe": ROUNDING,
}
TOKENS = 100


@contextmanager
def gelu_of_llama_cpp() -> Iterator[None]:
    """Falcon was trained with the exact GELU, and llama.cpp has its approximation by tanh for every model."""
    exact, falcon.GELU = falcon.GELU, GELU_TANH
    try:
        yield
    finally:
        falcon.GELU = exact


@llama_cpp.llama_log_callback
def _silence(*_: Any) -> None:
    pass


def logits_of_llama_cpp(path: Path, ids: list[int]) -> np.ndarray:
    """(tokens, vocab), of one prefill with a cache in float32."""
    llama_cpp.llama_log_set(_silence, None)
    model = llama_cpp.Llama(
        str(path), n_ctx=128, n_batch=128, n_threads=1, logits_all=True, flash_attn=False, type_k=0, type_v=0,
        verbose=False,
    )  # fmt: skip
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float32)


def compare(name: str, raw: Mapping[str, Any]) -> tuple[float, float, float]:
    """Differences as shares of the largest logit, with llama.cpp's GELU and with ours; and how many choices agree."""
    ids = checkpoints.token_ids(TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        path = checkpoints.write_model_gguf(Path(scratch) / f"{name}.gguf", raw)
        expected = logits_of_llama_cpp(path, ids)
        ours = LLM(path, dtype="float32").logits(ids)
        with gelu_of_llama_cpp():
            approximate = LLM(path, dtype="float32").logits(ids)
    agree = float((approximate.argmax(axis=1) == expected.argmax(axis=1)).mean())
    return checkpoints.error(approximate, expected), checkpoints.error(ours, expected), agree


def main() -> None:
    names = chosen.names("Compare logits of GGUF files with llama.cpp's.", "models", MODELS)
    failed = False
    print(f"{'model':20} {'difference':>10} {'own GELU':>10} {'same choice':>11}")
    for name in names:
        difference, own, agree = compare(name, checkpoints.CONFIGS[name])
        verdict = "ok" if difference <= MODELS[name] else f"more than {MODELS[name]:g}"
        failed |= verdict != "ok"
        print(f"{name:20} {difference:10.1e} {own:10.1e} {agree:11.0%}  {verdict}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
