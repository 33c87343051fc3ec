"""No template takes more time, memory or text than there is for one, and what is honest fits in well."""

import sys
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
from refusals import refused

from tinyserve.errors import RequestError
from tinyserve.text import template_process
from tinyserve.text.chat_template import ChatTemplate
from tinyserve.text.limited_process import LIMITS_MEMORY

pytestmark = pytest.mark.fast

HI = [{"role": "user", "content": "Hi"}]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
GATHERED = "{% set n = namespace(s='') %}{% for m in messages %}{% set n.s = n.s + m.content %}{% endfor %}{{ n.s }}"
HOUR = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes of half a second, for templates that take all the time there is."""
    if sys.platform == "win32":
        pytest.skip("without a clock of the processor each takes the 20 s that it is waited for")
    monkeypatch.setattr(template_process, "MAX_SECONDS", 0.5)
    template_process.close()
    yield
    template_process.close()


def render(source: str, messages: Any = HI, **variables: Any) -> str:
    return ChatTemplate(source, {}, "org/model").render(messages, **variables)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 2**100000000000 }}",
        "{{ 9**(9**9) }}",
        "{% if 0 %}{{ (7**(7**9)) % 10 }}{% endif %}",
        HOUR,
        "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
        "{% for i in range(9999) %}{{ ((i ~ ' ') * 99999) | wordcount }}{% endfor %}",
        "{% set s = 'ab' * 20000 %}{{ (s * 200).replace('b', s) }}{{ (s * 200).split('a') | unique | list }}" + HOUR,
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for a in [1] recursive %}{% for i in range(99999) %}{{ i }}{% endfor %}{{ loop([1]) }}{% endfor %}",
        "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    ],
)
def test_a_template_that_does_not_end_is_refused(source: str, hurried: None) -> None:
    start = monotonic()
    with pytest.raises(RequestError, match=r"^The chat template of org/model takes (longer|more)") as refusal:
        render(source)
    assert refusal.value.param == "messages" and "--chat-template FILE" in str(refusal.value)
    assert monotonic() - start < 8
    assert render(CHATML) == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ([0] * 500000000) | length }}",
        "{{ 'x'.ljust(2000000000) | length }}",
        "{{ 'x' | center(2000000000) | length }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ '{:2000000000}'.format(1) }}",
        "{{ 'x' | indent(2000000000, true) }}",
        "{{ '\t'.expandtabs(2000000000) }}",
        "{{ ('x' * 99999).replace('x', 'x' * 99999) }}",
        "{{ ('x' * 99999).join(['a'] * 99999) }}",
        "{{ [1] | batch(900000000, 'x') | list }}",
        "{{ [1] | slice(900000000) | list }}",
        "{% set n = namespace(s='x' * 1000) %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='x' * 1000) %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s=[1]) %}{% for i in range(40) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
        "{% set s %}{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}",
        "{{ {'a': 'x' * 500000000} | tojson(indent=2) }}",
        "{{ strftime_now('%Y' * 300000000) }}",
    ],
)
@pytest.mark.skipif(not LIMITS_MEMORY, reason="the system limits none")
def test_a_template_that_wants_all_memory_is_refused(source: str) -> None:
    with pytest.raises(RequestError, match=r"^The chat template of org/model (takes|fails|writes)") as refusal:
        render(source)
    assert len(str(refusal.value)) < 2000
    assert render(CHATML) == "<|im_start|>user\nHi<|im_end|>\n"


def test_a_text_has_a_most_of_characters() -> None:
    with refused("messages", "The chat template of org/model writes more than 16000000 characters."):
        render("{% for i in range(99999) %}{{ '0123456789' * 100 }}{% endfor %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "-" * 50_000 + "1 }}",
        "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
        "{{ 'x'" + " | trim" * 50_000 + " }}",
        "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set n = namespace(s=[1]) %}{% for i in range(90000) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s }}",
    ],
)
def test_a_stack_that_overflows_is_not_ours(source: str) -> None:
    with pytest.raises(RequestError, match=r"^The chat template of org/model "):
        render(source)
    assert render(CHATML) == "<|im_start|>user\nHi<|im_end|>\n"


def test_what_only_a_conversation_sets_off_is_refused_too(hurried: None) -> None:
    template = ChatTemplate("{% if messages[0].content == 'go' %}" + HOUR + "{% endif %}ok", {}, "org/model")
    with refused("messages", "The chat template of org/model takes longer than 0.5 s"):
        template.render([{"role": "user", "content": "go"}])
    assert template.render(HI) == "ok"


def test_a_template_that_is_given_is_compiled_within_limits() -> None:
    with pytest.raises(RequestError, match="takes longer than 2 s"):
        ChatTemplate("{{ 2**100000000000 }}", {}, "org/model").compile()


@pytest.mark.parametrize("source", [CHATML, GATHERED], ids=["written", "gathered"])
def test_thousands_of_messages_and_megabytes_are_rendered(source: str) -> None:
    many = [{"role": ("user", "assistant")[i % 2], "content": f"{i} é 👍 " * 20} for i in range(5000)]
    assert "4999 é 👍 " in render(source, many)
    long = [{"role": "user", "content": "a <b> 👍" * 150_000 + "."}]
    assert len(render(source, long)) >= 150_000 * 7


def test_any_text_comes_out_as_it_went_in() -> None:
    text = "\x00 \r\n \u2028 \ud800 \ud83d\ude00 😀 \ufdd0"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text
    assert render("{{ a | tojson }}", a=[float("inf"), -0.0, 10**30]) == "[Infinity, -0.0, 1" + "0" * 30 + "]"


def test_several_threads_render_at_a_time() -> None:
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(render(CHATML, [{"role": "user", "content": str(i)}])))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == sorted(f"<|im_start|>user\n{i}<|im_end|>\n" for i in range(12))


def test_a_process_that_was_ended_meanwhile_is_replaced() -> None:
    assert render("a") == "a"
    for process in list(template_process._processes._idle.queue):
        process.kill()
        process.wait()
    assert render("b") == "b"
