"""Conversations to text, by the checkpoint's own chat template, run in a sandbox.

Knows roles, messages and Jinja; nothing about tokens. Its text already has the BOS, if the model wants one:
encode it with `Tokenizer.encode_chat`, which adds none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from tinyserve.errors import RequestError, UserError

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """One Jinja chat template, compiled; `name` says in errors whose it is."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        import jinja2

        self.source = source
        self.name = name
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"The chat template of {name} is no valid Jinja at line {error.lineno}: {_reason(error)}."
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation as the model was trained to read it.

        `tools` are OpenAI's; `variables` are whatever else the template reads, such as `enable_thinking`.
        Raises RequestError for a malformed message, and when the template refuses or fails.
        """
        import jinja2

        context = {
            **self._special_tokens,
            "documents": None,
            **{name: _plain(value, name, "the template variables.") for name, value in variables.items()},
            "messages": checked_messages(messages),
            "tools": _plain(tools, "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(context)
        except Exception as error:
            # A template is the checkpoint's code, and may raise anything: TemplateError itself comes from
            # raise_exception, a message of the template's author; subclasses of it are Jinja's own.
            refuses = type(error) is jinja2.TemplateError
            verb = "refuses these messages" if refuses else "fails"
            line = _line(error.__traceback__)
            where = f" at line {line}" if line else ""
            raise RequestError(
                f"The chat template of {self.name} {verb}{where}: {_reason(error)}.",
                param="messages" if refuses else None,
            ) from None


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages as plain data with text content; RequestError says which one is malformed, and how."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            f"Messages must be a list of objects with role and content, but this is {_kind(messages)}.",
            param="messages",
        )
    if not messages:
        raise RequestError("There are no messages; give at least one, with role and content.", param="messages")
    return [_checked(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"{where} must be an object with role and content, but this is {_kind(message)}.", param=where
        )
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise RequestError(f"{where} must have a role, such as system, user or assistant.", param=f"{where}.role")
    plain: dict[str, Any] = _plain(message, where)
    content = message.get("content")
    if isinstance(content, list | tuple):
        plain["content"] = "\n".join(_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is None and message.get("tool_calls"):
        plain["content"] = None
    elif not isinstance(content, str):
        raise RequestError(
            f"{where}.content must be text or a list of text parts, but this is {_kind(content)}.",
            param=f"{where}.content",
        )
    if plain.get("tool_calls"):
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{where}.tool_calls")
    return plain


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Earlier calls with their arguments as objects: OpenAI's are text, which templates would quote once more."""
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list of calls, but this is {_kind(calls)}.", param=where)
    for i, call in enumerate(calls):
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise RequestError(
                f"{where}[{i}] must be an object with a function, but this is {_kind(call)}.", param=f"{where}[{i}]"
            )
        function = call["function"]
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                function["arguments"] = json.loads(arguments)
            except ValueError:
                function["arguments"] = None
        if not isinstance(function.get("arguments", {}), dict):
            raise RequestError(
                f"{where}[{i}].function.arguments is {arguments!r:.60}; it must be a JSON object, or the text of one.",
                param=f"{where}[{i}].function.arguments",
            )
    return calls


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        raise RequestError(
            f"{where} is of type {kind!r}, but these models read only parts of type 'text'.", param=where
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.text must be text, but this is {_kind(part.get('text'))}.", param=f"{where}.text")
    return str(part["text"])


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _plain(value: Any, where: str, of: str = "") -> Any:
    """Copy as JSON types: of those the sandbox knows which methods are safe. Errors say `of` before `where`."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}", of) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", of) for i, item in enumerate(value)]
    for base in (str, int, float):  # an enum, say: only what it is as JSON
        if isinstance(value, base):
            return json.loads(json.dumps(value))
    raise RequestError(f"{of}{where} must be JSON data, but this is {_kind(value)}.", param=where)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment Hugging Face's templates are written for (transformers.utils.chat_template_utils)."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant wrote, for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models read it: Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _line(traceback: TracebackType | None) -> int | None:
    """The template's line in which an exception arose; Jinja maps tracebacks back to its source."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().rstrip(".!")
