"""A client of servers that speak OpenAI's API: tinyserve's own, llama.cpp's, vLLM's.

Knows HTTP, server-sent events and OpenAI's names; nothing of models, of what parameters do, and of terminals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from ipaddress import ip_address
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tinyserve import __version__
from tinyserve.errors import ContextLengthError, TinyserveError, UserError
from tinyserve.progress import Progress, silent
from tinyserve.server.options import API_KEY_VARIABLE

if TYPE_CHECKING:
    from httpx2 import URL, Response

CONNECT_SECONDS, READ_SECONDS = 10.0, 600.0  # others than tinyserve say nothing while they read a long prompt


class Client:
    """One server, and a connection to it. Ask for `chat` or `complete`, read the answer, `close`.

    Raises UserError for what the caller can change (the URL, the key, what the request says) and TinyserveError for
    what the server or the network does; both name the server.
    """

    def __init__(
        self,
        server: str,
        api_key: str | None = None,
        *,
        connect_timeout: float = CONNECT_SECONDS,
        read_timeout: float = READ_SECONDS,
    ):
        """`server` is a URL with or without /v1, or host:port; timeouts are seconds without a byte from it."""
        import httpx2

        self._read_timeout = read_timeout
        self._key = _checked_key(api_key)
        options = connection(server, api_key)
        self.server = str(options["base_url"]).removesuffix("/v1")
        self._http = httpx2.Client(**options, timeout=httpx2.Timeout(connect_timeout, read=read_timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """The server's models, with "id" and what else it tells of each, in its order."""
        with self.request("GET", "models") as response:
            response.read()
        try:
            models = response.json()["data"]
            if not all(isinstance(model["id"], str) for model in models):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.server} has no list of models at /v1/models: is this the address of an OpenAI-compatible "
                "server?"
            ) from None
        return list(models)

    def chat(
        self, messages: SequenceOf[Mapping[str, Any]], options: Mapping[str, Any], progress: Progress | None = None
    ) -> Answer:
        """The next message of a conversation; `options` are the request's other fields, "model" among them."""
        return Answer(self, "chat/completions", {**options, "messages": list(messages)}, progress)

    def complete(self, prompt: str, options: Mapping[str, Any], progress: Progress | None = None) -> Answer:
        """The same for a text that is continued as it is."""
        return Answer(self, "completions", {**options, "prompt": prompt}, progress)

    @contextmanager
    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[Response]:
        """A response whose body is still to be read; it is closed, and so cancelled, where the block ends."""
        import httpx2

        try:
            with self._http.stream(method, path, json=body) as response:
                if not response.is_success:
                    response.read()
                    raise self._refusal(response, f"/v1/{path}")
                yield response
        except httpx2.ConnectTimeout:
            raise self._unreachable("no connection in time") from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            raise self._unreachable(str(error)) from None
        except httpx2.ReadTimeout:
            raise TinyserveError(
                f"{self.server} has sent nothing for {self._read_timeout:g} s: look whether it is still at work."
            ) from None
        except httpx2.RequestError as error:
            raise TinyserveError(
                f"The connection to {self.server} broke ({_words(error) or type(error).__name__}): "
                "is `tinyserve serve` still running there?"
            ) from None

    def _unreachable(self, why: str) -> TinyserveError:
        return TinyserveError(f"Nothing answers at {self.server} ({why}): is `tinyserve serve` running there?")

    def _refusal(self, response: Response, path: str) -> TinyserveError:
        """The error that a status other than 200 means."""
        status, reason = response.status_code, f"{response.status_code} {response.reason_phrase}".strip()
        said = _error_message(response)
        why = f": {said}" if said else "."
        if status == 401:
            if self._key:
                return UserError(f"{self.server} refuses this API key{why}")
            return UserError(f"{self.server} asks for an API key: give --api-key, or set {API_KEY_VARIABLE}.")
        if "Location" in response.headers and 300 <= status < 400:
            to = response.headers["Location"]
            return UserError(f"{self.server} sends us on to {to}: give that address, if it is the server you mean.")
        again = response.headers.get("Retry-After")
        later = f" Try again {f'in {again} s' if again.isdecimal() else f'after {again}'}." if again else ""
        if status == 429:
            return TinyserveError(f"{self.server} has too much to do{why}{later}")
        if status >= 500 or status == 408:
            return TinyserveError(f"{self.server} failed with {reason}{why}{later}")
        if said and _is_context_length(response, said):
            return ContextLengthError(f"{self.server} says: {said}", param=None)
        if said:
            return UserError(f"{self.server} says: {said}")
        return UserError(f"{self.server} answers {reason} at {path}: is it an OpenAI-compatible server?")


class Delta(NamedTuple):
    """A piece of an answer, or of what the model thought before it."""

    text: str
    reasoning: str


class Answer:
    """One answer. Iterating asks the server and gives its pieces; leaving the loop cancels the request.

    What is known of the answer grows on the way: what the server does not tell stays None.
    """

    def __init__(self, client: Client, path: str, body: Mapping[str, Any], progress: Progress | None = None):
        """`path` is under /v1, `body` the request's fields but those that make it a stream."""
        self.path = path
        self.body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self.finish_reason: str | None = None
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None  # of the prompt: the server knew them
        self.output_tokens: int | None = None
        self._client = client
        self._progress = progress or silent
        self._started = perf_counter()
        self._first: float | None = None
        self._last: float | None = None

    def __iter__(self) -> Iterator[Delta]:
        self._started = perf_counter()
        server = self._client.server
        with self._client.request("POST", self.path, self.body) as response:
            kind = response.headers.get("Content-Type", "")
            if not kind.startswith("text/event-stream"):
                raise UserError(
                    f"{server} answers with {kind or 'something'}, and no stream: is it an OpenAI-compatible server?"
                )
            for field, value in events(lines(response.iter_bytes())):
                if field == "comment":
                    self._report_progress(value)
                elif value == "[DONE]":
                    return
                elif any(piece := self._take(value)):
                    yield piece
        if self.finish_reason is None:
            raise TinyserveError(f"{server} ended the answer without a reason: it broke off. Is the server still up?")

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from the request to the first text, by this machine's clock: the network's time is in it."""
        return None if self._first is None else self._first - self._started

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first, by the time from the first text to the last."""
        if self._first is None or self._last is None or (self.output_tokens or 0) < 2 or self._last == self._first:
            return None
        assert self.output_tokens is not None
        return (self.output_tokens - 1) / (self._last - self._first)

    def _report_progress(self, comment: str) -> None:
        """A line that is no data: tinyserve tells in it what the answer waits for; others keep the line open."""
        if match := re.fullmatch(r"(prefill|load|download \S+)(?: .*)? (\d+)/(\d+)", comment):
            self._progress(match[1], int(match[2]), int(match[3]))

    def _take(self, data: str) -> Delta:
        """Take in one chunk; what is in it."""
        server = self._client.server
        try:
            chunk = json.loads(data)
            if (error := chunk.get("error")) is not None:
                raise TinyserveError(f"{server} broke the answer off: {_sentence(message_in(error))}")
            if usage := chunk.get("usage"):
                self._count(usage)
            text = reasoning = ""
            for choice in chunk.get("choices") or ():
                delta = choice["delta"] if "delta" in choice else {"content": choice["text"]}
                text += delta.get("content") or ""
                reasoning += delta.get("reasoning") or delta.get("reasoning_content") or ""
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TinyserveError(
                f"{server} sent what is no part of an answer ({_words(data, 60)!r}): is it an OpenAI-compatible server?"
            ) from None
        if text or reasoning:
            self._last = perf_counter()
            self._first = self._first or self._last
        return Delta(text, reasoning)

    def _count(self, usage: Mapping[str, Any]) -> None:
        self.prompt_tokens, self.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


# --- server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) ------------------------------


def lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The lines of a stream of bytes, wherever the network has cut it.

    They end with LF, CRLF or CR and nothing else: JSON may hold the other ends of lines that Unicode knows.
    """
    rest = b""
    for chunk in chunks:
        *whole, rest = re.split(rb"\r\n|\n|\r(?!\Z)", rest + chunk)  # a CR at the very end may be half of a CRLF
        for line in whole:
            yield line.decode(errors="replace")
    if rest.endswith(b"\r"):
        yield rest[:-1].decode(errors="replace")


def events(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """("data", text) for each event, ("comment", text) for each comment; an event that was cut off is none."""
    data: list[str] = []
    for line in lines:
        if line.startswith(":"):
            yield "comment", line[1:].strip()
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and data:
            yield "data", "\n".join(data)
            data = []


# --- addresses and keys -----------------------------------------------------------------------------------------------


def parse_url(server: str) -> URL:
    """The URL that the paths of the API follow, from what a user writes; raises UserError for what is no address."""
    import httpx2

    example = "give something like http://127.0.0.1:8000"
    text = server.strip()
    try:
        url = httpx2.URL(text if "://" in text else f"http://{text}")
        port = url.port
    except httpx2.InvalidURL as error:
        raise UserError(f"{server!r:.200} is no server's address ({_words(error).rstrip('.')}): {example}.") from None
    if url.userinfo:
        raise UserError("The server's address has a user or a password in it: give the key with --api-key instead.")
    if url.scheme not in ("http", "https"):
        raise UserError(f"{server!r:.200} begins with {url.scheme}://, and the API is spoken over http:// or https://.")
    if not re.fullmatch(r"[\w.-]*[^\W\d][\w.-]*|[\d.]+\.[\d.]+|[0-9a-fA-F:.]+:[0-9a-fA-F:.]*", url.host):
        raise UserError(f"{server!r:.200} names no host: {example}.")
    if port is not None and not 0 < port < 65536:
        raise UserError(f"{server!r:.200} has port {port}; ports go from 1 to 65535.")
    if url.query or url.fragment:
        raise UserError(f"{server!r:.200} goes on after the path, with ? or #: {example}.")
    path = url.path.rstrip("/")
    if re.search(r"/v1/.", path):
        raise UserError(f"{server!r:.200} is the address of one function of the API: end it at /v1.")
    return url.copy_with(path=path if path.endswith("/v1") else f"{path}/v1", query=None, fragment=None)


def connection(server: str, api_key: str | None) -> dict[str, Any]:
    """How a client of httpx2 reaches a server, in its own parameters; the paths of the API follow the base URL.

    Raises UserError for what is no address, and no key.
    """
    url, key = parse_url(server), _checked_key(api_key)
    local = reaches_this_machine(url.host)
    return {
        "base_url": url,
        "headers": {"User-Agent": f"tinyserve/{__version__}"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        "follow_redirects": False,  # the key is for this server
        "trust_env": not local,  # no proxy leads to this machine itself
        "verify": not (local and url.scheme == "http"),  # certificates that nobody asks for take 0.1 s to read
    }


def reaches_this_machine(host: str) -> bool:
    """Whether a client that connects to this host reaches this machine: 0.0.0.0, too, is a way to write it."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _checked_key(key: str | None) -> str | None:
    """A key that a header can carry; the error does not repeat it."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("The API key has characters that no HTTP header carries: look for a line break or a quote.")
    return key or None


# --- requests --------------------------------------------------------------------------------------------------------


def request_fields(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters by name, but those that are None, as the fields of a request: OpenAI's names, else vLLM's."""
    fields = {name: value for name, value in sampling.items() if value is not None}
    structure = fields.pop("structured_outputs", None)
    if structure is not None and structure.json is not None:
        schema = {"name": "answer", "schema": json.loads(structure.json), "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif structure is not None:
        fields["structured_outputs"] = {structure.kind: getattr(structure, structure.kind)}
    return fields


# --- what servers say when something is wrong -------------------------------------------------------------------------


def _error_message(response: Response) -> str:
    """The sentence in an error's body, by OpenAI's form or one of those that others have; empty where there is none."""
    try:
        body = response.json()
    except ValueError:
        return ""
    return _sentence(message_in(body.get("error") or body)) if isinstance(body, dict) else ""


def _is_context_length(response: Response, said: str) -> bool:
    """Whether a request was too long: by OpenAI's and tinyserve's code, by llama.cpp's type, by vLLM's words."""
    error = response.json().get("error")
    words = {error.get("code"), error.get("type")} if isinstance(error, dict) else set()
    known = {"context_length_exceeded", "exceed_context_size_error"}
    return not known.isdisjoint(words) or "maximum context length" in said


def message_in(error: Any) -> str:
    """What an error object of OpenAI's form, or of others', says; a text is what it is."""
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("detail") or ""
    return error if isinstance(error, str) else json.dumps(error)


def _sentence(text: str) -> str:
    """One line that ends as a sentence does."""
    text = _words(text, 500)
    return text if not text or text[-1] in ".!?…" else f"{text}."


def _words(text: object, limit: int = 200) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= limit else f"{text[:limit]}…"
