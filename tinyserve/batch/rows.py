"""From a row to a request of OpenAI's API, and from its response to what is written: OpenAI's batch lines, plain rows.

Knows fields and columns; neither files nor who answers.
"""

import hashlib
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

from tinyserve.batch.shards import MAX_DEPTH, Row, is_deeper
from tinyserve.errors import UserError, did_you_mean
from tinyserve.server.client import message_in

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
# What a plain row is given, with its type in Parquet.
COLUMNS: Final[Mapping[str, str]] = {
    "answer": "string",
    "reasoning": "string",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "output_tokens": "int64",
    "error": "string",
}
_OPENAI_FIELDS = ("custom_id", "method", "url", "body")


class RowError(Exception):
    """A row that asks for nothing that can be answered; the message is for its error."""


class Request(NamedTuple):
    """What is asked: a path of the API, and a body."""

    path: str
    body: dict[str, Any]


class Outcome(NamedTuple):
    """What is written of a row, and what is counted."""

    fields: dict[str, Any]
    is_failure: bool
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How rows are asked. `body` has the fields of plain rows' requests; in OpenAI's lines each row has its own.

    `chats` says whether the model has a chat template: then a prompt is a question, unless it is `raw`.
    """

    body: Mapping[str, Any] = field(default_factory=dict)
    prompt_column: str | None = None  # "prompt", unless there are messages
    messages_column: str | None = None
    system: str | None = None
    raw: bool = False
    seed: int = 0  # of the job: each row has its own, which follows from it
    chats: bool = True


class Rows(ABC):
    """One kind of rows."""

    merges: ClassVar[bool]  # what is written has the row's own fields, too
    columns: Sequence[str] | None = None  # that are asked; None for all

    @abstractmethod
    def request(self, row: Row) -> Request:
        """What a row asks; raises RowError."""

    @abstractmethod
    def answered(self, row: Row, path: str, status: int, body: Mapping[str, Any]) -> Outcome:
        """What is written of a response."""

    @abstractmethod
    def failed(self, row: Row, message: str) -> Outcome:
        """What is written of a row that nobody was asked."""


def looks_asked(row: Row, options: RowOptions) -> bool:
    """Whether a row is one of those that others can be told by: an OpenAI's line, or one with something to ask."""
    return _is_line(row.fields) or any(
        name in row.fields for name in (options.messages_column or "messages", options.prompt_column or "prompt")
    )


def _is_line(fields: Mapping[str, Any]) -> bool:
    return "body" in fields and ("url" in fields or "custom_id" in fields)


def rows_of(first: Row, options: RowOptions, source: str) -> Rows:
    """The kind of rows that one of the first is; raises UserError where it is none, or options are for another."""
    fields = first.fields
    if first.error is not None:
        raise UserError(f"{source}, row {first.number + 1}: {first.error}")
    if _is_line(fields):
        given: dict[str, Any] = {"--prompt-column": options.prompt_column, "--messages-column": options.messages_column}
        given |= {"--system": options.system, "--raw": options.raw}
        given |= {f"--{name.replace('_', '-')}": value for name, value in options.body.items()}
        for name, value in given.items():
            if value is not None and value is not False:
                raise UserError(f"{source} has OpenAI's batch lines, whose bodies say everything: leave out {name}.")
        return OpenAIRows(options.seed)
    return PlainRows(options, _column(fields, options, source))


def _column(fields: Collection[str], options: RowOptions, source: str) -> str:
    """The column that is asked."""
    given = [name for name in (options.messages_column, options.prompt_column) if name is not None]
    if len(given) == 2:
        raise UserError("Both --messages-column and --prompt-column are given: a row has one question.")
    found = given or [name for name in ("messages", "prompt") if name in fields]
    columns = ", ".join(sorted(fields)[:20])
    if len(found) == 2:
        raise UserError(
            f"{source} has columns messages and prompt: say which with --messages-column or --prompt-column."
        )
    if not found:
        raise UserError(
            f"{source} has neither OpenAI's batch lines (custom_id, url, body) nor a column messages or prompt: name "
            f"one with --prompt-column or --messages-column; it has {columns}."
        )
    if found[0] not in fields:
        raise UserError(f"{source} has no column {found[0]!r}.{did_you_mean(found[0], fields)} It has {columns}.")
    for name in COLUMNS:
        if name in fields:
            raise UserError(f"{source} has a column {name!r}, which the answer would overwrite: rename it.")
    return found[0]


class OpenAIRows(Rows):
    """OpenAI's batch lines: custom_id, method, url and body."""

    merges = False

    def __init__(self, seed: int, endpoint: str | None = None, priority: int = 0):
        """`endpoint` is the one url of all rows, where there is one; `priority` that of a row that has none."""
        self._seed, self._endpoint, self._priority = seed, endpoint, priority

    def request(self, row: Row) -> Request:
        _check(row)
        fields = row.fields
        for name in fields:
            if name not in _OPENAI_FIELDS:
                raise RowError(
                    f"There is no field {name!r:.80} in a batch line.{did_you_mean(name, _OPENAI_FIELDS, 0.6)}"
                )
        if not isinstance(fields.get("custom_id"), str):
            raise RowError(f"custom_id is {fields.get('custom_id')!r:.80}; it must be a text that tells the row apart.")
        if fields.get("method", "POST") != "POST":
            raise RowError(f"method is {fields['method']!r:.80}; it must be POST.")
        path, body = fields.get("url"), fields.get("body")
        if path not in (CHAT, COMPLETIONS, EMBEDDINGS):
            raise RowError(f"url is {path!r:.80}; it must be {CHAT}, {COMPLETIONS} or {EMBEDDINGS}.")
        if path != (self._endpoint or path):
            raise RowError(f"url is {path!r}, and the batch's endpoint {self._endpoint!r}: they must be the same.")
        if not isinstance(body, dict):
            raise RowError(f"body is {body!r:.80}; it must be an object.")
        if body.get("stream"):
            raise RowError("stream is true, and the answers of a batch come whole: leave it out.")
        if path == EMBEDDINGS:
            return Request(path, body)
        first = {"priority": self._priority} if self._priority else {}
        return Request(path, {**first, **body, "seed": _seed(body, self._seed, row)})

    def answered(self, row: Row, path: str, status: int, body: Mapping[str, Any]) -> Outcome:
        response = {"status_code": status, "request_id": body.get("id") or f"req-{uuid.uuid4().hex}", "body": body}
        is_failure = status != 200 or not ("choices" in body or "data" in body)
        return Outcome(self._line(row, response, None), is_failure, *_usage(body))

    def failed(self, row: Row, message: str) -> Outcome:
        return Outcome(self._line(row, None, {"code": "invalid_row", "message": message}), True)

    @staticmethod
    def _line(row: Row, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
        name = row.fields.get("custom_id")
        return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": name, "response": response, "error": error}


class PlainRows(Rows):
    """Rows with a prompt or a conversation in one column; whatever else they have is written again."""

    merges = True

    def __init__(self, options: RowOptions, column: str):
        self.column, self.columns = column, [column]
        self._options = options
        self._is_prompt = options.messages_column is None and (options.prompt_column is not None or column == "prompt")

    def request(self, row: Row) -> Request:
        _check(row)
        given, options = row.fields.get(self.column), self._options
        for name in COLUMNS:
            if name in row.fields:
                raise RowError(f"The row has a field {name!r} of its own, which is overwritten: rename it.")
        if given is None:
            raise RowError(f"The column {self.column!r} is empty.")
        body = {**options.body, "seed": _seed(options.body, options.seed, row)}
        if self._is_prompt:
            if not isinstance(given, str):
                raise RowError(f"The column {self.column!r} is {given!r:.60}; it must be a text.")
            if options.raw or not options.chats:
                return Request(COMPLETIONS, {**body, "prompt": given})
            given = [{"role": "user", "content": given}]
        elif isinstance(given, str):  # a conversation as JSON, which is how CSV's children keep it
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                raise RowError(f"The column {self.column!r} is {given!r:.60}; it must be a list of messages.") from None
        if not isinstance(given, list) or is_deeper(given, MAX_DEPTH):
            raise RowError(f"The column {self.column!r} is {str(given)[:60]!r}; it must be a list of messages.")
        if options.system is not None:
            given = [{"role": "system", "content": options.system}, *given]
        return Request(CHAT, {**body, "messages": given})

    def answered(self, row: Row, path: str, status: int, body: Mapping[str, Any]) -> Outcome:
        if status != 200:
            return self.failed(row, message_in(body.get("error") or body) or f"The answer has status {status}.")
        try:
            choice = body["choices"][0]
            message = choice.get("message") or {"content": choice["text"]}
            content, reasoning = message["content"], message.get("reasoning") or message.get("reasoning_content")
        except (KeyError, IndexError, TypeError, AttributeError):
            return self.failed(row, f"The answer is none: {str(body)[:200]}")
        prompt_tokens, output_tokens = _usage(body)
        texts = (_text(content) or "", _text(reasoning or None), _text(choice.get("finish_reason")))
        values = (*texts, prompt_tokens, output_tokens, None)
        return Outcome(dict(zip(COLUMNS, values, strict=True)), False, prompt_tokens, output_tokens)

    def failed(self, row: Row, message: str) -> Outcome:
        return Outcome({**dict.fromkeys(COLUMNS), "error": _text(message)}, True)


def _text(value: Any) -> str | None:
    """A text as Parquet can have it, whatever a server sends for one."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode(errors="replace").decode()


def _check(row: Row) -> None:
    if row.error is not None:
        raise RowError(row.error)


def _seed(body: Mapping[str, Any], job_seed: int, row: Row) -> int:
    """The row's own seed, else one that follows from the job's and its number: computed again, it draws the same."""
    given = body.get("seed")
    if given is not None and given != -1:  # which is vLLM's for none
        return given  # type: ignore[no-any-return]  # whatever it is, the API judges it
    digest = hashlib.blake2b(f"{job_seed} {row.number}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") >> 3  # 53 bits, which every JSON keeps


def _usage(body: Mapping[str, Any]) -> tuple[int, int]:
    usage = body.get("usage")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else [0, 0]
    prompt_tokens, output_tokens = (one if type(one) is int and 0 <= one < 1 << 53 else 0 for one in counts)
    return prompt_tokens, output_tokens
