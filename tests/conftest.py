"""What several test files share: tiny models in every dtype, the default model for real, and the tiers of tests.

`--fast` runs the files that are marked `fast`: they need no kernels, and none may import Numba. Markers by what a test
asks for: `real_model` (the default model), `browser`, `oracle` (another implementation).
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from oracles import Oracle, import_oracle

if TYPE_CHECKING:
    from command_line import Children
    from playwright.sync_api import Browser

    from tinyserve import LLM, RequestOutput

DTYPES = ("float32", "bfloat16", "int8")
SLOW = {"smollm2": "real_model", "browser": "browser", "oracle": "oracle"}  # fixtures, and the markers they bring

# A shell starts what it runs in the background with Ctrl-C ignored, and every process inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

Answer = tuple[list[int], list[Mapping[int, float]]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only files marked fast, which need no kernels: half a minute")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    if config.getoption("--fast") and is_test and "pytest.mark.fast" not in collection_path.read_text(encoding="utf-8"):
        return True  # before it is imported
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in SLOW.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(SLOW[fixture])
    if config.getoption("--fast"):
        slow = [item for item in items if any(item.get_closest_marker(marker) for marker in SLOW.values())]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def answers(outputs: "list[RequestOutput]") -> list[Answer]:
    """Tokens and log-probabilities of every answer: those of the likeliest tokens differ where a bit of logits does."""
    return [(answer.token_ids, answer.logprobs or []) for output in outputs for answer in output.outputs]


def cache_bytes(llm: "LLM", blocks: int, states: int) -> int:
    """kv_cache_memory for this many blocks and states, and the state that `logits` has."""
    return blocks * llm.cache_plan.block_nbytes + (states + 1) * llm.cache_plan.state_nbytes


@pytest.fixture(scope="session", autouse=True)
def no_numba(request: pytest.FixtureRequest) -> Iterator[None]:
    """An error of the last test, which each process of several tells of."""
    yield
    assert not (request.config.getoption("--fast") and "numba" in sys.modules), "a file marked fast imports Numba"


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `chat` keeps of what is typed stays out of the user's own history."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def start() -> "Iterator[Children]":
    """Starts commands as processes, which are ended whatever becomes of the test."""
    from command_line import Children

    with Children() as children:
        yield children


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """Imports what a test compares with; in CI one that is missing is a failure."""
    return import_oracle


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A real browser; a failure where there is none."""
    from browser import NoBrowserError, launched

    try:
        with launched() as one:
            yield one
    except NoBrowserError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each test that uses this runs on one thread and on two."""
    from tinyserve.tensor import _jit

    _jit.set_threads(request.param)
    yield request.param
    _jit.set_threads(None)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a config in `checkpoints.CONFIGS`, written once, without torch."""
    import checkpoints

    root = tmp_path_factory.mktemp("checkpoints")

    def write(name: str) -> Path:
        if not (root / name).exists():
            checkpoints.write_folder(root / name, checkpoints.CONFIGS[name])
        return root / name

    return write


@pytest.fixture(scope="session")
def llm_of(folder_of: Callable[[str], Path]) -> "Callable[[str, str], LLM]":
    """A model of such a folder in a dtype, with one thread and a cache of 48 blocks, loaded once."""
    from tinyserve import LLM

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
    from tinyserve.checkpoints import hub

    return Path(os.environ.get("TINYSERVE_TEST_GGUF") or hub.resolve("smollm2-135m"))


def settle(llm: "LLM") -> None:
    """Wait until the engine has done what it was told: what was cancelled is gone."""
    llm.thread.call(lambda: None)
