"""The engines that the benchmarks compare: which there are, what they need, and what every one can be asked.

One file an engine, imported only in a process of its own; `models` builds the files they read.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol


class NotMeasured(Exception):
    """An engine cannot do this work, or not with this model; the message says why."""


class Engine(Protocol):
    """A loaded model. Every answer is in seconds, and every prompt a list of token ids that was not seen before."""

    def __init__(self, path: str, format: str, threads: int, max_length: int, sequences: int): ...

    def prefill(self, prompt: list[int]) -> float:
        """Read a prompt, up to the logits of its last token."""

    def decode(self, prompt: list[int], count: int) -> float:
        """Greedily choose `count` tokens, one after the other, after the first that follows the prompt."""

    def batch(self, prompts: list[list[int]], count: int) -> float:
        """Greedily choose `count` tokens after each of the prompts, which are all of a length, `sequences` at once."""


@dataclass(frozen=True)
class Peer:
    """An engine: its module here, what that imports, the formats it is measured in, and how to install it."""

    name: str
    module: str
    needs: Sequence[str]
    formats: Sequence[str]
    install: str
    packages: Sequence[str]  # whose versions are reported

    def missing(self) -> list[str]:
        return [name for name in self.needs if not _is_installed(name)]

    def load(self) -> ModuleType:
        """A module with `prepare(model, format, workdir) -> path` and a class `Engine`."""
        return importlib.import_module(f"peers.{self.module}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be part of
        return False


TORCH = "'torch==2.13.0' 'transformers>=5'"
PEERS = {
    peer.name: peer
    for peer in (
        Peer("tinyserve", "tinyserve_engine", (), ("int8",), "", ("numba",)),
        Peer(
            "llama.cpp", "llama_cpp_engine", ("llama_cpp",), ("Q8_0", "Q4_0", "Q4_1", "bf16"),
            "pip install llama-cpp-python", ("llama-cpp-python",),
        ),
        Peer(
            "openvino", "openvino_engine", ("openvino_genai", "optimum.intel"), ("int8",),
            f"pip install {TORCH} 'optimum-intel[openvino]' openvino-genai && pip uninstall torchvision",
            ("openvino-genai", "optimum-intel"),
        ),
        Peer(
            "ctranslate2", "ctranslate2_engine", ("ctranslate2", "torch", "transformers"), ("int8",),
            f"pip install {TORCH} ctranslate2", ("ctranslate2",),
        ),
        Peer(
            "transformers", "transformers_engine", ("torch", "transformers"), ("float32", "bfloat16"),
            f"pip install {TORCH} accelerate", ("transformers", "torch"),
        ),
    )
}  # fmt: skip
