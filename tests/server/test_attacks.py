"""What strangers send does not keep others from their tokens: a stream beside each kind of attack goes on.

Waits are counted in the server's own seconds of the processor, as others are at work on this machine: while the loop or
the interpreter's lock is held for a second, the server works for one. A single try may be unlucky, all are not.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import checkpoints
import pytest
from attacks import Attack, attacks, longest_wait, processor_clock

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks another process's clock of the processor")

MOST = 0.3  # seconds
TRIES = 3
TOKENS = 3000
# As `tinyserve serve` is run; a grammar that never ends is given up sooner.
SERVER = """
import sys
from tinyserve.text import grammar_probe
grammar_probe.MAX_SECONDS = 1.0
{before}
sys.argv = ["tinyserve", "serve", {model!r}, "--port", "0", "--threads", "1", "--kv-cache-memory", "0.1"]
from tinyserve.__main__ import main
main()
"""
# What a server must not do: work in its loop, and work elsewhere with the interpreter's lock held.
IN_THE_LOOP = """
import time
from tinyserve.server import protocol, state
parse = state.parse
def slow(kind, data, strict=False):
    if b"attack" in data:  # in the loop, as it is short
        end = time.thread_time() + 0.8
        while time.thread_time() < end:
            pass
    return parse(kind, data, strict)
state.parse = slow
"""
WITH_THE_LOCK = """
import re
from tinyserve.text.tokenizer import Tokenizer
encode_prompt = Tokenizer.encode_prompt
def slow(self, text, *rest):
    if "attack" in text:
        re.fullmatch("(a+)+b", "a" * 25)
    return encode_prompt(self, text, *rest)
Tokenizer.encode_prompt = slow
"""


@contextmanager
def serving(folder: Path, before: str = "") -> Iterator[tuple[int, Callable[[], float]]]:
    """The port of a server in a process of its own, and that process's clock."""
    raw = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": TOKENS + 100}
    model = folder / "tiny"
    if not model.exists():
        checkpoints.write_folder(model, raw)
    code = SERVER.format(before=before, model=str(model))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        found = next(filter(None, (re.search(r"^http://127\.0\.0\.1:(\d+) ", line) for line in lines)))
        # What it says from now on is not read, and must not fill the pipe.
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield int(found[1]), processor_clock(process.pid)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    drain.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Callable[[], float]]]:
    with serving(tmp_path_factory.mktemp("attacks")) as one:
        yield one


def wait_beside(server: tuple[int, Callable[[], float]], attack: Attack) -> float:
    """The shortest, of some tries, of the longest waits that an attack adds."""
    port, clock = server
    least = float("inf")
    for _ in range(TRIES):
        idle, beside = longest_wait(port, attack, clock, TOKENS)
        least = min(least, beside - idle)
        if least < MOST:
            break
    return least


@pytest.mark.parametrize("name", attacks())
def test_a_stream_goes_on_beside(server: tuple[int, Callable[[], float]], name: str) -> None:
    assert wait_beside(server, attacks()[name]) < MOST


@pytest.mark.parametrize("before", [IN_THE_LOOP, WITH_THE_LOCK], ids=["in the loop", "with the lock"])
def test_what_holds_up_a_server_would_be_seen(tmp_path: Path, before: str) -> None:
    with serving(tmp_path, before) as server:
        assert wait_beside(server, Attack([("/tokenize", {"prompt": "the attack"})])) > MOST
        assert wait_beside(server, Attack([("/tokenize", {"prompt": "the cat"})])) < MOST
