"""What answers `ask` and `chat`: a model in this process, or one behind a server, with one interface.

Knows how each is reached and which statistics it has; reading prompts and printing answers is done elsewhere.
"""

import os
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tinyserve.checkpoints import presets
from tinyserve.errors import UserError
from tinyserve.progress import LoadProgress
from tinyserve.server.options import API_KEY_VARIABLE

if TYPE_CHECKING:
    from tinyserve.llm import StreamChunk
    from tinyserve.server.client import Answer
    from tinyserve.text.chat import ChatPrompt

Prompt = str | list[dict[str, str]]  # a text to continue, or a conversation to answer


class Piece(NamedTuple):
    """What comes of an answer: its text, or what the model thinks before it."""

    text: str
    reasoning: str = ""


class Completion(Protocol):
    """One answer, and how it came about."""

    @property
    def prompt_tokens(self) -> int | None:
        """Known before the answer if the prompt is counted here."""

    def stream(self) -> Generator[Piece, None, None]:
        """Its pieces as they come; closing the generator cancels it."""

    def explain(self, prompt_is: str) -> str:
        """Lines for --verbose: each parameter, and where its value comes from."""

    def statistics(self) -> dict[str, Any]:
        """For after the end: the same keys for every backend, None where one does not know."""


class Backend(Protocol):
    """One model that answers. `line` shows on a terminal what it is doing."""

    name: str
    introduction: str
    line: LoadProgress
    chats: bool  # it has a chat template, else it only continues texts
    max_model_len: int | None

    def complete(self, prompt: Prompt, sampling: Mapping[str, Any], max_tokens: int) -> Completion:
        """Prepare an answer; in `sampling` None is for the default, which for max_tokens is `max_tokens`."""


def find_backend(
    model: str | None,
    *,
    dtype: str,
    threads: int | None,
    chat_template: str | None,
    server: str | None,
    api_key: str | None,
    reasoning_effort: str | None = None,
    pipeline_parallel_size: int = 1,
) -> Backend:
    """The model, by default the preset; with a server, the server's model of this name, by default its first."""
    if server is None:
        if api_key is not None:
            raise UserError("--api-key is for a server, and none is given: add --server URL.")
        return LocalBackend(
            model or presets.DEFAULT, dtype, threads, chat_template, reasoning_effort, pipeline_parallel_size
        )
    decided = {
        "--dtype": dtype != "auto",
        "--threads": threads is not None,
        "--pipeline-parallel-size": pipeline_parallel_size > 1,
        "--chat-template": chat_template is not None,
    }
    for option, said in decided.items():
        if said:
            raise UserError(f"{option} is the server's to decide: leave it out, or leave out --server.")
    return RemoteBackend(server, api_key or os.environ.get(API_KEY_VARIABLE), model, reasoning_effort)


# --- a model in this process ------------------------------------------------------------------------------------------


class LocalBackend:
    """A model that is loaded here."""

    def __init__(
        self,
        model: str,
        dtype: str,
        threads: int | None,
        chat_template: str | None = None,
        reasoning_effort: str | None = None,
        pipeline_parallel_size: int = 1,
    ):
        from tinyserve.cli._load import load

        options = {"chat_template": chat_template, "pipeline_parallel_size": pipeline_parallel_size}
        self.llm, self.line = load(model, dtype, threads, max_num_seqs=1, **options)
        self.name = self.llm.name
        self.introduction = f"{self.name}, loaded in {self.line.seconds:.1f} s."
        self.chats = self.llm.chat_template is not None
        self.variables: dict[str, Any] = {"reasoning_effort": reasoning_effort} if reasoning_effort is not None else {}
        self.max_model_len: int | None = self.llm.max_model_len

    def complete(self, prompt: Prompt, sampling: Mapping[str, Any], max_tokens: int) -> Completion:
        return LocalCompletion(self, prompt, sampling, max_tokens)


class LocalCompletion:
    """An answer by the engine."""

    def __init__(self, backend: LocalBackend, prompt: Prompt, sampling: Mapping[str, Any], max_tokens: int):
        from tinyserve.cli._sampling import decide

        self._backend, llm = backend, backend.llm
        self._prompt: str | ChatPrompt
        if isinstance(prompt, str):
            self._prompt = prompt
            self._decoding = decide(llm, sampling, prompt, max_tokens)
        else:
            self._prompt = llm.chat_request(prompt, **backend.variables).prompt
            self._decoding = decide(llm, sampling, self._prompt.token_ids, max_tokens)
        self._token_ids: list[int] = []
        self._end: StreamChunk | None = None

    @property
    def prompt_tokens(self) -> int | None:
        return self._decoding.prompt_tokens

    def stream(self) -> Generator[Piece, None, None]:
        for chunk in self._backend.llm.stream(self._prompt, self._decoding.params):
            self._token_ids += chunk.token_ids
            self._end = chunk
            yield Piece(chunk.text, chunk.reasoning)

    def explain(self, prompt_is: str) -> str:
        from tinyserve.cli._sampling import explain

        return explain(self._backend.llm, self._decoding, prompt_is)

    def statistics(self) -> dict[str, Any]:
        assert self._end is not None  # a stream ends with a chunk that says why
        metrics, llm = self._end.metrics, self._backend.llm
        return {
            "token_ids": self._token_ids,
            "model": llm.name,
            "load_seconds": self._backend.line.seconds,
            "prompt_tokens": metrics.prompt_tokens,
            "cached_tokens": metrics.cached_tokens,
            "prefill_tokens_per_second": metrics.prefill_tokens_per_second,
            "time_to_first_token_seconds": metrics.time_to_first_token,
            "output_tokens": metrics.output_tokens,
            "decode_tokens_per_second": metrics.decode_tokens_per_second,
            "finish_reason": self._end.finish_reason,
            "dtype": llm.dtype,
            "threads": llm.num_threads,
        }


# --- a model behind a server ------------------------------------------------------------------------------------------


class RemoteBackend:
    """A model of a server that speaks OpenAI's API."""

    def __init__(self, server: str, api_key: str | None, model: str | None, reasoning_effort: str | None = None):
        from tinyserve.server.client import Client

        self.client = Client(server, api_key)
        self.line = LoadProgress(model or server)
        self.line.wait(f"asking {self.client.server}")
        try:
            models = {entry["id"]: entry for entry in self.client.models()}
        finally:
            self.line.clear()
        if model is None and not models:
            raise UserError(f"{self.client.server} lists no model: name the one you mean.")
        self.name = self.line.model = model or next(iter(models))
        about = models.get(self.name, {})  # a server may know more names than it lists
        self.introduction = f"{self.name} at {self.client.server}."
        self.chats = about.get("chat") is not False
        self.max_model_len: int | None = about.get("max_model_len")
        self.dtype: str | None = about.get("dtype")
        self.variables: dict[str, Any] = {"reasoning_effort": reasoning_effort} if reasoning_effort is not None else {}

    def complete(self, prompt: Prompt, sampling: Mapping[str, Any], max_tokens: int) -> Completion:
        return RemoteCompletion(self, prompt, sampling, max_tokens)


class RemoteCompletion:
    """An answer by a server, whose defaults decide what is not given, but for max_tokens."""

    def __init__(self, backend: RemoteBackend, prompt: Prompt, sampling: Mapping[str, Any], max_tokens: int):
        from tinyserve.server.client import request_fields

        self._backend, client = backend, backend.client
        self._options, self._limit = request_fields(sampling), max_tokens
        if not isinstance(prompt, str):
            self._options |= backend.variables
        # A server's own limit may be the context: minutes of text.
        fields = {"model": backend.name, "max_tokens": max_tokens, **self._options}
        self._answer: Answer = (
            client.complete(prompt, fields, backend.line)
            if isinstance(prompt, str)
            else client.chat(prompt, fields, backend.line)
        )

    @property
    def prompt_tokens(self) -> int | None:
        return self._answer.prompt_tokens

    def stream(self) -> Generator[Piece, None, None]:
        self._backend.line.wait(f"waiting for {self._backend.client.server}")
        yield from (Piece(*delta) for delta in self._answer)

    def explain(self, prompt_is: str) -> str:
        lines = [("asked", f"{self._backend.client.server}/v1/{self._answer.path}"), ("model", self._backend.name)]
        lines += [(name, f"{value}  [--{name.replace('_', '-')}]") for name, value in self._options.items()]
        if "max_tokens" not in self._options:
            lines += [("max_tokens", f"{self._limit}  [the command's own]")]
        lines += [("prompt", prompt_is), ("all else", "as the server has it")]
        return "\n".join(f"{name:<12} {words}" for name, words in lines)

    def statistics(self) -> dict[str, Any]:
        answer = self._answer
        return {
            "token_ids": None,
            "model": self._backend.name,
            "load_seconds": None,
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": answer.cached_tokens,
            "prefill_tokens_per_second": None,
            "time_to_first_token_seconds": answer.time_to_first_token,
            "output_tokens": answer.output_tokens,
            "decode_tokens_per_second": answer.decode_tokens_per_second,
            "finish_reason": answer.finish_reason,
            "dtype": self._backend.dtype,
            "threads": None,
        }
