"""What would end a server, or keep it for minutes, ends the process in which grammars are tried."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tinyserve.text import grammar_probe, limited_process
from tinyserve.text.grammar_probe import GrammarProbe, Vocabulary
from tinyserve.text.limited_process import CancelledError

LETTERS = Vocabulary([bytes([i]) for i in range(256)] + [b"<end>"], [256], [256])


@pytest.fixture(scope="module")
def probe() -> Iterator[GrammarProbe]:
    probe = GrammarProbe(LETTERS)
    yield probe
    probe.close()


def of_schema(schema: Any) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema)))


def of_lark(text: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_lark(text))


def chain(links: int) -> dict[str, Any]:
    """Definitions that refer to each other in a row."""
    defs = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(links)}
    return {"$defs": {**defs, f"d{links}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def rules(links: int) -> str:
    return "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1}' for i in range(links)) + f'\nr{links}: "y"'


def patterns(count: int) -> dict[str, Any]:
    """Each doubles the states of an automaton, or nearly so."""
    return {"allOf": [{"type": "string", "pattern": f"a{{{i}}}.*"} for i in range(count)]}


def choice(count: int) -> str:
    return of_lark("start: " + " | ".join(json.dumps(f"word {i:06}") for i in range(count)))


def test_what_compiles_is_said_to_and_what_does_not_why(probe: GrammarProbe) -> None:
    assert probe.check(of_schema({"type": "object", "properties": {"a": {"type": "integer"}}})) is None
    assert probe.check(of_schema(chain(20))) is None
    assert "unclosed group" in str(probe.check(of_lark("start: /(a/")))
    assert probe.check(of_lark('start: "a"')) is None


@pytest.mark.parametrize("source", [of_schema(chain(4000)), of_lark(rules(4000)), of_lark("start: " + "(" * 20_000)])
def test_a_stack_that_overflows_is_the_probes(probe: GrammarProbe, source: str) -> None:
    assert probe.check(source)
    assert probe.check(of_lark('start: "a"')) is None


@pytest.mark.skipif(not limited_process.LIMITS_MEMORY, reason="the system limits none")
def test_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_probe, "MAX_SECONDS", 60.0)
    monkeypatch.setattr(grammar_probe, "MAX_WAIT", 120.0)  # on a busy machine, where the others come first
    monkeypatch.setattr(grammar_probe, "MAX_MEMORY", 700 << 20)
    probe = GrammarProbe(LETTERS)
    reason = probe.check(of_schema(patterns(50)))
    assert reason and "memory" in reason
    assert probe.check(of_lark('start: "a"')) is None
    probe.close()


@pytest.mark.parametrize("source", [of_schema(patterns(50)), choice(40_000)])
def test_time_is_limited(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(grammar_probe, "MAX_SECONDS", 1.0)
    monkeypatch.setattr(grammar_probe, "MAX_WAIT", 5.0)  # on a busy machine, where a second of the processor is long
    probe = GrammarProbe(LETTERS)
    start = time.monotonic()
    assert "longer than 1 s" in str(probe.check(source))
    assert time.monotonic() - start < 10
    probe.close()


def test_bytes_are_limited(probe: GrammarProbe) -> None:
    reason = probe.check(of_lark("start: " + json.dumps("a" * grammar_probe.MAX_BYTES)))
    assert reason and str(grammar_probe.MAX_BYTES) in reason


def test_who_leaves_ends_the_work(probe: GrammarProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(
        limited_process, "_end", lambda process, end=limited_process._end: ended.append(end(process) or 1)
    )
    left = threading.Event()
    threading.Timer(0.2, left.set).start()
    with pytest.raises(CancelledError):
        probe.check(of_schema(patterns(50)), left.is_set)
    assert ended == [1]


def test_several_are_tried_at_a_time_and_one_process_is_kept(probe: GrammarProbe) -> None:
    def ask(i: int) -> None:
        assert probe.check(of_lark(f'start: "{i}"')) is None

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert probe._processes._idle.qsize() == 1
    (process,) = probe._processes._idle.queue
    ask(7)
    assert list(probe._processes._idle.queue) == [process]


def test_a_process_that_was_ended_meanwhile_is_started_again(probe: GrammarProbe) -> None:
    assert probe.check(of_lark('start: "a"')) is None
    (process,) = probe._processes._idle.queue
    process.kill()
    process.wait()
    assert probe.check(of_lark('start: "b"')) is None
