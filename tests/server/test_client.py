"""The client of OpenAI's API: streams however the network cuts them, and every way in which a server can fail."""

import json
import os
import re
import socket
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import fake_openai
import openai
import pytest
from fake_openai import DONE, FakeOpenAI, Scripted, answer, delta, die, wait_for_the_client_to_leave
from hypothesis import example, given
from hypothesis import strategies as st

from tinyserve.errors import TinyserveError, UserError
from tinyserve.server.client import Answer, Client, events, lines, parse_url, reaches_this_machine

pytestmark = pytest.mark.fast

HELLO = [{"role": "user", "content": "Hello"}]
PIECES = ("Größe ", "日本", "🙂", " end\u2028of\x85lines\x0b", "\r\n", '"data: x"')


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


@pytest.fixture
def client(server: FakeOpenAI) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def texts(reply: Answer) -> list[str]:
    return [piece.text for piece in reply]


def ask(client: Client) -> str:
    return "".join(texts(client.chat(HELLO, {"model": "fake-1b"})))


# --- streams --------------------------------------------------------------------------------------------------------


@example("a\r\nb\r", [2])
@given(st.text(st.sampled_from("aä🙂:\r\n\u2028\x85 d"), max_size=30), st.lists(st.integers(0, 100), max_size=8))
def test_lines_do_not_depend_on_where_the_network_cuts(text: str, cuts: list[int]) -> None:
    data = text.encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[begin:end] for begin, end in pairwise(places)]
    expected = re.split("\r\n|\r|\n", text)[:-1]  # what no end of line follows is no line yet
    assert list(lines(pieces)) == list(lines([data])) == expected


def test_events_and_comments() -> None:
    stream = [
        ": hello", "", "data: one", "", "event: x", "id: 7", "data:two", "data: lines", "", "", ":", "data: cut off",
    ]  # fmt: skip
    assert list(events(stream)) == [("comment", "hello"), ("data", "one"), ("data", "two\nlines"), ("comment", "")]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 100_000])
def test_an_answer_however_it_is_cut(server: FakeOpenAI, client: Client, size: int, ends: str) -> None:
    """A byte a packet splits every character and every CRLF; all in one packet has every event in it."""
    whole = b": waiting\n\n".join(answer(*PIECES, prompt=9, cached=4)).replace(b"\n", ends.encode())
    server.says(*(whole[i : i + size] for i in range(0, len(whole), size)))
    reply = client.chat(HELLO, {"model": "fake-1b"})
    assert texts(reply) == list(PIECES)
    assert (reply.finish_reason, reply.prompt_tokens, reply.output_tokens) == ("stop", 9, len(PIECES))
    assert reply.cached_tokens == 4


def test_openai_own_client_reads_the_same(server: FakeOpenAI, client: Client) -> None:
    whole = b"".join(answer(*PIECES))
    for _ in range(2):
        server.says(*(whole[i : i + 5] for i in range(0, len(whole), 5)))
    theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").chat.completions.create(
        model="fake-1b", messages=HELLO, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in theirs if chunk.choices)
    assert text == ask(client) == "".join(PIECES)


def test_what_is_asked(server: FakeOpenAI) -> None:
    server.says(*answer("Hi"))
    server.says(fake_openai.text("Hi"), fake_openai.text("", "length"), DONE)
    with Client(server.url + "/v1/", " secret\n") as client:
        assert texts(client.chat(HELLO, {"model": "m", "top_k": 3})) == ["Hi"]
        reply = client.complete("Once", {"model": "m"})
        assert texts(reply) == ["Hi"]
    assert (reply.finish_reason, reply.prompt_tokens, reply.output_tokens) == ("length", None, None)
    assert reply.decode_tokens_per_second is None
    chat, complete = server.posted
    stream = {"stream": True, "stream_options": {"include_usage": True}, "model": "m"}
    assert (chat.path, chat.body) == ("/v1/chat/completions", stream | {"messages": HELLO, "top_k": 3})
    assert (complete.path, complete.body) == ("/v1/completions", stream | {"prompt": "Once"})
    assert chat.headers["Authorization"] == "Bearer secret"
    assert chat.headers["User-Agent"].startswith("tinyserve/")


def test_without_a_key_none_is_sent(server: FakeOpenAI, client: Client) -> None:
    server.says(*answer("Hi"))
    ask(client)
    assert "Authorization" not in server.posted[0].headers


def test_models(server: FakeOpenAI, client: Client) -> None:
    server.models = [{"id": "a", "chat": False}, {"id": "b", "max_model_len": 7}]
    assert client.models() == server.models


def test_thinking_is_apart_under_either_name(server: FakeOpenAI, client: Client) -> None:
    deltas = [
        {"role": "assistant", "content": ""}, {"reasoning": "Hm"}, {"reasoning_content": "."},
        {"reasoning": "!", "reasoning_content": "!"}, {"content": "Yes"}, {"reasoning": None, "content": "."},
    ]  # fmt: skip
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    server.says(*(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks), b"data: [DONE]\n\n")
    pieces = list(client.chat(HELLO, {"model": "m"}))
    assert "".join(piece.reasoning for piece in pieces) == "Hm.!"
    assert "".join(piece.text for piece in pieces) == "Yes." and not any(piece.text for piece in pieces[:3])


def test_times_are_of_the_text(server: FakeOpenAI, client: Client) -> None:
    server.says(*answer("a", "b", "c"))
    reply = client.chat(HELLO, {"model": "m"})
    assert (reply.time_to_first_token, reply.decode_tokens_per_second) == (None, None)
    assert texts(reply) == ["a", "b", "c"]
    assert reply._first is not None and reply._last is not None
    assert reply.time_to_first_token == reply._first - reply._started > 0
    assert reply.decode_tokens_per_second == pytest.approx(2 / (reply._last - reply._first))
    server.says(*answer("one"))
    single = client.chat(HELLO, {"model": "m"})
    assert texts(single) == ["one"]
    assert single.decode_tokens_per_second is None


def test_comments_that_tell_how_far_it_is(server: FakeOpenAI, client: Client) -> None:
    said: list[tuple[str, int, int]] = []
    comments = b": load a b-135m 40/100\n\n: prefill 512/4096\n\n: waiting\n\n: prefill x/9\n\n:\n\n: OPENROUTER\n\n"
    server.says(comments, *answer("Hi"))
    reply = client.chat(HELLO, {"model": "m"}, progress=lambda *news: said.append(news))
    assert texts(reply) == ["Hi"]
    assert said == [("load", 40, 100), ("prefill", 512, 4096)]


def test_leaving_the_loop_cancels(server: FakeOpenAI, client: Client) -> None:
    server.says(delta("a"), wait_for_the_client_to_leave)
    pieces = iter(client.chat(HELLO, {"model": "m"}))
    assert next(pieces).text == "a"
    assert not server.closed.is_set()
    pieces.close()  # type: ignore[attr-defined]
    assert server.closed.wait(60)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "t", "param": None, "code": None}}).encode()


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "says"),
    [
        (400, {}, error("max_tokens is 0"), UserError, "SERVER says: max_tokens is 0."),
        (400, {}, error("Two\n lines?"), UserError, "SERVER says: Two lines?"),
        (404, {}, error("There is no model 'x'."), UserError, "SERVER says: There is no model 'x'."),
        (404, {}, b'{"detail": "Not Found"}', UserError, "SERVER says: Not Found."),
        (404, {}, b"<html>", UserError, "SERVER answers 404 Not Found at /v1/chat/completions: is it an OpenAI-"),
        (405, {}, b"[]", UserError, "SERVER answers 405 Method Not Allowed at /v1/chat/completions"),
        (422, {}, b'{"detail": [{"loc": "x"}]}', UserError, 'SERVER says: [{"loc": "x"}].'),
        (413, {}, b'{"error": "too long"}', UserError, "SERVER says: too long."),
        (401, {}, error("no"), UserError, "SERVER asks for an API key: give --api-key, or set TINYSERVE_API_KEY."),
        (429, {"Retry_After": "7"}, error("Busy"), TinyserveError, "SERVER has too much to do: Busy. Try again in 7 s"),
        (429, {}, b"", TinyserveError, "SERVER has too much to do."),
        (429, {"Retry_After": "Tue, 1 Jan 2030 00:00:00 GMT"}, b"", TinyserveError, "do. Try again after Tue, 1 Jan"),
        (503, {"Retry_After": "2"}, error("Loading"), TinyserveError, "SERVER failed with 503 Service Unavailable: "),
        (500, {}, b"oh", TinyserveError, "SERVER failed with 500 Internal Server Error."),
        (302, {"Location": "http://b/v1"}, b"", UserError, "SERVER sends us on to http://b/v1: give that address"),
    ],
)  # fmt: skip
def test_refusals(
    server: FakeOpenAI, client: Client, status: int, headers: dict[str, str], body: bytes, kind: type, says: str
) -> None:
    server.says(body, status=status, **headers)
    with pytest.raises(TinyserveError) as caught:
        ask(client)
    assert type(caught.value) is kind
    assert says.replace("SERVER", server.url) in str(caught.value)
    assert str(caught.value)[-1] in ".?!"


def test_a_key_that_is_refused_is_not_repeated(server: FakeOpenAI) -> None:
    server.says(error("Incorrect key"), status=401)
    with Client(server.url, "secret") as client, pytest.raises(UserError, match="refuses this API key: Inc") as caught:
        ask(client)
    assert "secret" not in str(caught.value)
    for key in ("secret\nX: y", "“secret”"):
        with pytest.raises(UserError, match="characters that no HTTP header carries") as caught:
            Client(server.url, key)
        assert "secret" not in str(caught.value)


def test_a_key_goes_to_no_other_server(server: FakeOpenAI) -> None:
    with FakeOpenAI() as other, Client(server.url, "secret") as client:
        server.says(status=307, Location=f"{other.url}/v1/chat/completions")
        with pytest.raises(UserError, match=f"sends us on to {other.url}"):
            ask(client)
        assert other.asked == []


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_no_stream(server: FakeOpenAI, client: Client, kind: str) -> None:
    server.script.append(Scripted([b"<html>"], headers={"Content-Type": kind}))
    with pytest.raises(UserError, match=f"answers with {kind}, and no stream: is it an OpenAI-compatible server"):
        ask(client)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"data": [{}]}', b'{"data": [{"id": 3}]}', b"\xff"])
def test_no_list_of_models(server: FakeOpenAI, client: Client, body: bytes) -> None:
    server.models_script = Scripted([body])
    with pytest.raises(UserError, match=f"{server.url} has no list of models at /v1/models"):
        client.models()


@pytest.mark.parametrize(
    "data", ['{"choices": [', "[]", "3", '{"choices": [3]}', '{"choices": [{"delta": "x"}]}', '{"usage": 7}', "\ufffd"]
)
def test_malformed_chunks(server: FakeOpenAI, client: Client, data: str) -> None:
    server.says(delta("a"), f"data: {data}\n\n".encode(), DONE)
    pieces = iter(client.chat(HELLO, {"model": "m"}))
    assert next(pieces).text == "a"
    with pytest.raises(TinyserveError, match=r"sent what is no part of an answer .* OpenAI-compatible") as caught:
        next(pieces)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("said", [{"message": "The weights are damaged", "code": 500}, "The weights are damaged"])
def test_an_error_in_mid_stream(server: FakeOpenAI, client: Client, said: Any) -> None:
    server.says(delta("a"), fake_openai.event({"error": said}), DONE)
    pieces = iter(client.chat(HELLO, {"model": "m"}))
    assert next(pieces).text == "a"
    with pytest.raises(
        TinyserveError, match=f"{server.url} broke the answer off: The weights are damaged\\."
    ) as caught:
        next(pieces)
    assert caught.value.exit_code == 1


def test_a_server_that_dies(server: FakeOpenAI, client: Client) -> None:
    server.says(delta("a"), die)
    pieces = iter(client.chat(HELLO, {"model": "m"}))
    assert next(pieces).text == "a"
    with pytest.raises(
        TinyserveError, match=rf"The connection to {server.url} broke \(.+\): is `tinyserve serve` still"
    ):
        next(pieces)


def test_a_stream_that_just_ends(server: FakeOpenAI, client: Client) -> None:
    server.says(delta("a"), delta("b"), b"data: {")
    with pytest.raises(TinyserveError, match="ended the answer without a reason"):
        ask(client)
    server.says(delta("a"), delta(None, "stop"))  # a server that does without [DONE]
    assert ask(client) == "a"


def test_nobody_there() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with Client(url) as client, pytest.raises(TinyserveError, match="Nothing answers at ") as caught:
            client.models()
    assert str(caught.value).startswith(f"Nothing answers at {url} (")
    assert "Connection refused" in str(caught.value)
    assert str(caught.value).endswith("is `tinyserve serve` running there?")
    assert caught.value.exit_code == 1


def test_a_host_that_nobody_knows() -> None:
    with Client("nobody.invalid:8000") as client, pytest.raises(TinyserveError, match=r"Nothing answers at http://nob"):
        client.models()


def test_a_server_that_falls_silent(server: FakeOpenAI) -> None:
    server.says(delta("a"), wait_for_the_client_to_leave)
    with (
        Client(server.url, read_timeout=0.2) as client,
        pytest.raises(TinyserveError, match=r"has sent nothing for 0\.2"),
    ):
        ask(client)
    assert server.closed.wait(60)


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        (" localhost:8000\n", "http://localhost:8000/v1"),
        ("my_host.local:1/v1", "http://my_host.local:1/v1"),
        ("[::1]:8000", "http://[::1]:8000/v1"),
        ("localhost", "http://localhost/v1"),
        ("https://api.example.com", "https://api.example.com/v1"),
        ("https://example.com/api/v1", "https://example.com/api/v1"),
        ("https://example.com/llm", "https://example.com/llm/v1"),
    ],
)
def test_urls(written: str, meant: str) -> None:
    assert str(parse_url(written)) == meant
    with Client(written) as client:
        assert client.server + "/v1" == meant


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("", "names no host"), ("8000", "names no host"), (":8000", "names no host"), ("http://", "names no host"),
        ("a b", "names no host"), ("/v1", "names no host"), ("http://-", "names no host"), ("a,b", "names no host"),
        ("http://h:x", "no server's address"), ("h\ti", "no server's address"), ("http://[::1", "address"),
        ("http://h:0", "port 0"), ("http://h:99999", "port 99999"), ("ftp://h", "begins with ftp://"),
        ("http://h/v1?key=1", "with ? or #"), ("http://h/v1/chat/completions", "end it at /v1"),
        ("http://me:secret@h/v1", "give the key with --api-key"),
    ],
)  # fmt: skip
def test_nonsense_is_no_url(written: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_url(written)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


def test_loopback() -> None:
    for host in ("localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "0.0.0.0"):
        assert reaches_this_machine(host), host
    for host in ("example.com", "10.0.0.1", "localhost.example.com", "::2"):
        assert not reaches_this_machine(host), host


def test_proxies_are_for_others(server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with FakeOpenAI(models=["through the proxy"]) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        with Client(server.url) as client:
            assert [model["id"] for model in client.models()] == ["fake-1b"]
        assert proxy.asked == []
        with Client("http://elsewhere.invalid:8000") as client:
            assert [model["id"] for model in client.models()] == ["through the proxy"]
        assert proxy.asked[0].path == "http://elsewhere.invalid:8000/v1/models"


def test_an_answer_is_asked_for_when_it_is_read(server: FakeOpenAI, client: Client) -> None:
    reply = client.chat(HELLO, {"model": "m"})
    assert isinstance(reply, Answer)
    assert server.asked == []
