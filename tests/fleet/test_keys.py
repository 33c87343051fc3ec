"""Whose a request is, whether its stream can be spliced, and what is written into it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyserve.fleet.keys import Asked, read_request

pytestmark = pytest.mark.fast

CHAT = "/v1/chat/completions"
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


def read(path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any) -> Asked:
    return read_request(path, headers or {}, json.dumps(fields).encode())


def test_turns_of_one_chat_have_one_key_and_other_chats_another() -> None:
    first = read(messages=[SYSTEM, USER])
    later = read(messages=[SYSTEM, USER, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And?"}])
    other = read(messages=[SYSTEM, {"role": "user", "content": "Good morning"}])
    assert first.key == later.key is not None
    assert len({first.key, other.key, read(messages=[USER]).key, read(model="m", messages=[SYSTEM, USER]).key}) == 4
    assert read(messages=[SYSTEM]).key is None and read("/v1/completions", prompt="a").key is None


def test_what_a_client_says_comes_before() -> None:
    said = {"user": "u", "prompt_cache_key": "c", "messages": [USER]}
    assert read(headers={"x-session-id": "s"}, **said).key == "s"
    assert read(**said).key == "prompt_cache_key:c"
    assert read(user="u", messages=[USER]).key == "user:u"
    assert read(user=3, messages=[USER]).key == read(messages=[USER]).key


@pytest.mark.parametrize(
    ("path", "fields", "spliceable"),
    [
        (CHAT, {"stream": True}, True),
        (CHAT, {"stream": True, "n": 1, "best_of": None}, True),
        (CHAT, {"stream": True, "n": 2}, False),
        (CHAT, {"stream": True, "best_of": 2}, False),
        (CHAT, {}, False),
        (CHAT, {"stream": "true"}, False),
        ("/v1/completions", {"stream": True, "prompt": "a"}, True),
        ("/v1/completions", {"stream": True, "prompt": [1, 2, 3]}, True),
        ("/v1/completions", {"stream": True, "prompt": ["a"]}, True),
        ("/v1/completions", {"stream": True, "prompt": ["a", "b"]}, False),
        ("/v1/completions", {"stream": True, "prompt": [[1], [2]]}, False),
        ("/v1/embeddings", {"stream": True}, False),
    ],
)
def test_streams_of_one_answer_can_be_spliced(path: str, fields: dict[str, Any], spliceable: bool) -> None:
    asked = read(path, **fields)
    assert asked.is_spliceable is spliceable
    assert (b'"seed"' in asked.body) is spliceable
    assert (asked.answer is not None) is (path != "/v1/embeddings")


@pytest.mark.parametrize("given_", [{}, {"seed": None}, {"seed": 7}, {"seed": 0}])
def test_a_stream_has_a_seed_and_keeps_its_own(given_: dict[str, Any]) -> None:
    fields = {"stream": True, "messages": [USER], "temperature": 1.5, **given_}
    body = json.loads(read(**fields).body)
    if given_.get("seed") is not None:
        assert body == fields
    else:
        assert isinstance(body["seed"], int) and {**body, "seed": None} == {**fields, "seed": None}
        assert json.loads(read(**fields).body)["seed"] != body["seed"] or body["seed"] == 0


@given(JSON, st.sampled_from([CHAT, "/v1/completions", "/tokenize"]))
def test_whatever_comes_is_read_or_passed_on_as_it_is(body: Any, path: str) -> None:
    data = json.dumps(body).encode()
    asked = read_request(path, {}, data)
    assert asked.is_spliceable or asked.body == data


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_what_is_no_object_goes_as_it_is(body: bytes) -> None:
    assert read_request(CHAT, {}, body) == Asked(None, False, body, None)
