"""The fuzzer of requests finds nothing in some hundred, and would say so if it did."""

import re
import subprocess
import sys
from typing import Any

import pytest

from scripts import SCRIPTS, load_script

SCRIPT = SCRIPTS / "fuzz" / "bodies.py"


def fuzz(count: int, *options: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv = ['bodies.py', '--count', '{count}', *{list(options)}]; {before}\n"
    code += f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def fuzzer() -> Any:
    return load_script("fuzz/bodies.py")


def test_every_request_is_answered_or_refused_with_a_sentence() -> None:
    done = fuzz(300, "--seed", "1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"^300 cases, 0 of them neither", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("import tinyserve.server.sampling as s; s.SAMPLING = None", "500: "),
        (
            "import tinyserve.llm as l; import os; l.LLM.embed = lambda *_, **__: os.abort()",
            "ended the process: SIGABRT",
        ),
    ],
)
def test_a_fault_is_told_with_what_makes_it_again(broken: str, said: str) -> None:
    done = fuzz(300, "--seed", "1", before=broken)
    assert done.returncode == 1
    assert said in done.stdout and re.search(r"again: --seed 1 --case \d+", done.stdout), done.stdout[-3000:]


def test_what_is_no_answer_is_told(fuzzer: Any) -> None:
    sent = fuzzer.Request([b"POST / HTTP/1.1\r\n\r\n", b"KeyError: mine"], True, "POST")

    def judged(status: int | None, body: bytes, kind: str = "application/json") -> str:
        return str(fuzzer.judged(sent, fuzzer.Answer(status, kind, body)))

    def error(message: str, kind: str = "invalid_request_error") -> bytes:
        return fuzzer.json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()

    assert (
        judged(200, b"{}") == judged(400, error("x is 5; it must be 4.")) == judged(400, error("KeyError: mine.")) == ""
    )
    stream = b"data: {}\n\ndata: [DONE]\n\n"
    assert judged(200, stream, "text/event-stream") == ""
    for wrong in (
        judged(None, b""),
        judged(500, error("x.")),
        judged(503, error("x.")),
        judged(302, b"", "text/plain"),
        judged(404, b"Not Found", "text/plain"),
        judged(400, b'{"detail": "x."}'),
        judged(400, error("no full stop")),
        judged(400, error("two\nlines.")),
        judged(400, error("ValueError: other.")),
        judged(400, error("<class 'int'> is wrong.")),
        judged(400, error("x.", "server_error")),
        judged(200, b"data: {}\n\n", "text/event-stream"),
        judged(200, b"data: " + error("Traceback (most recent call last).") + b"\n\n", "text/event-stream"),
    ):
        assert wrong


def test_a_case_is_made_again_by_its_number(fuzzer: Any) -> None:
    made = [[fuzzer.request(fuzzer.random.Random(f"3 {number}")) for number in range(200)] for _ in range(2)]
    assert made[0] == made[1] and len({b"".join(one.pieces) for one in made[0]}) > 150
