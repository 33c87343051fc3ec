"""Conversations to text, by the checkpoint's own chat template, run in a sandbox.

Knows roles and messages; nothing about tokens, and leaves Jinja to `template_process`. Its text already has the BOS,
if the model wants one: encode it with `Tokenizer.encode_chat`, which adds none. What a template takes (contents as text
or as parts, ids of calls) is found by trial: it renders a conversation of our own, and what comes out tells.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from random import Random, SystemRandom
from typing import Any, NamedTuple

from tinyserve.errors import RequestError, UserError
from tinyserve.text import template_process

_END = "\ufdd0end\ufdd0"  # where a message that is continued ends; no character of any text
_MOST_LEVELS = 100  # of lists and objects in one another
_TRIAL_SECONDS = 0.5  # for a few letters, several times before the first chat
_OTHER_TOOLS = frozenset({"xml_tools", "python_tools"})
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


class ContentForm(NamedTuple):
    """What of a message's content comes out of a template: of a text, of one typed part, of several."""

    text: bool
    part: bool
    parts: bool


class ChatTemplate:
    """One Jinja chat template, compiled when it is first asked for; `name` says in errors whose it is."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        self.source = source
        self.name = name
        self._special_tokens = dict(special_tokens)
        self._forms: dict[str, ContentForm] = {}
        self._is_compiled = False

    def compile(self) -> None:
        """Raise RequestError, with the line, for what is no template; a model that does not chat needs none."""
        if self._is_compiled:
            return
        try:
            template_process.check(self.source)
        except (template_process.InvalidTemplateError, template_process.LimitError) as error:
            raise self._refusal(error) from None
        self._is_compiled = True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation as the model was trained to read it.

        With `continue_final_message` the text ends where the last message's does, for the model to go on with it.
        `tools` are OpenAI's; `variables` are whatever else the template reads, such as `enable_thinking`.
        Raises RequestError for a malformed message, and when the template is broken, refuses or fails.
        """
        given = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        for name, value in given.items():
            if not isinstance(value, bool):
                raise RequestError(f"{name} is {value!r:.60}; it must be True or False.", param=name)
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "continue_final_message and add_generation_prompt are both true: the last message goes on, or a new "
                "one begins. Set add_generation_prompt to false.",
                param="continue_final_message",
            )
        self.compile()
        checked = checked_messages(messages)
        if continue_final_message and not isinstance(checked[-1]["content"], str) and not checked[-1]["content"]:
            where = f"messages[{len(checked) - 1}]"
            raise RequestError(f"{where} has no text that could be continued.", param=f"{where}.content")
        plain = [self._adapted(message) for message in checked]
        if continue_final_message:
            _mark_end(plain[-1])
        context = {
            "documents": None,
            **{name: _plain(value, name, "the template variables.") for name, value in variables.items()},
            "add_generation_prompt": add_generation_prompt,
            "tools": (shown := _plain(tools, "tools")),
        }
        if not variables.keys() & _OTHER_TOOLS:  # SmolLM3's name for tools that are called by JSON
            context["xml_tools"] = shown
        try:
            text = template_process.render(self.source, self._special_tokens | context | {"messages": plain})
        except (template_process.InvalidTemplateError, template_process.LimitError) as error:
            raise self._refusal(error) from None
        if not continue_final_message:
            return text
        end = text.rfind(_END)
        if end < 0:
            raise RequestError(
                f"The chat template of {self.name} does not show the last message as it is, so it cannot be continued: "
                "leave out continue_final_message.",
                param="continue_final_message",
            )
        return text[:end].replace(_END, "")  # a template may have shown it before

    def new_call_id(self, random: Random | None = None) -> str:
        """An id for a call of a tool that the template takes when the call is sent back, from `random` if given."""
        number = f"{(random or SystemRandom()).getrandbits(128):032x}"
        return number[:9] if self._wants_short_ids else f"call_{number[:24]}"

    # --- what this template takes

    def _adapted(self, message: dict[str, Any]) -> dict[str, Any]:
        """A checked message in the form in which this template reads it."""
        if message["role"] == "developer" and "developer" not in self.source:
            message["role"] = "system"  # OpenAI's newer name for it
        if "reasoning" in message:
            message.setdefault("reasoning_content", message["reasoning"])  # which is what templates read
        message["content"] = self._content(message["role"], message["content"])
        for holder, key in ((message, "tool_call_id"), *((call, "id") for call in message.get("tool_calls", ()))):
            if isinstance(holder.get(key), str) and self._wants_short_ids:
                holder[key] = _short_id(holder[key])
        return message

    def _content(self, role: str, content: str | list[dict[str, str]] | None) -> Any:
        """What was sent as it was sent, if the template reads that, else the other form: text or typed parts."""
        form = self._form(role)
        if isinstance(content, list) and form.parts:
            return content
        reads_text = form.text or not form.part
        if content is None:
            return self._nothing if reads_text else []
        text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        return text if reads_text else [{"type": "text", "text": text}]

    @cached_property
    def _nothing(self) -> str | None:
        """The content of a message that has calls and no words: null, if this template takes that."""
        user = {"role": "user", "content": self._content("user", "a")}
        call = {**_call_message("a" * 9), "content": None}
        text = self._trial([user, call])
        return "" if text is None or "None" in text else None

    def _form(self, role: str) -> ContentForm:
        """What a content may be in messages of this role; where none comes out, as in those of the user."""
        if role not in self._forms:
            form = self._tried_form(role)
            self._forms[role] = form if any(form) or role == "user" else self._form("user")
        return self._forms[role]

    def _tried_form(self, role: str) -> ContentForm:
        def shown(content: Any) -> str:
            user = {"role": "user", "content": "a" if role == "user" else self._content("user", "a")}
            before = {"user": [], "tool": [user, _call_message("a" * 9)]}.get(role, [user])
            message = {"role": role, "content": content, "tool_call_id": "a" * 9, "name": "f"}
            return self._trial([*before, message]) or self._trial([message, user]) or ""

        # A part has a key that no template reads: where it comes out, the list was written as it is.
        one = {"type": "text", "text": "qxone", "qxkey": "qxkey"}
        text, part, parts = shown("qxone"), shown([one]), shown([one, {"type": "text", "text": "qxtwo"}])
        return ContentForm(
            "qxone" in text,
            "qxone" in part and "qxkey" not in part,
            "qxone" in parts and "qxtwo" in parts and "qxkey" not in parts,
        )

    @cached_property
    def _wants_short_ids(self) -> bool:
        """Whether ids of calls must be nine letters and digits, as in Mistral's templates."""

        def takes(call_id: str) -> bool:
            user = {"role": "user", "content": self._content("user", "a")}
            result = {"role": "tool", "content": self._content("tool", "a"), "tool_call_id": call_id, "name": "f"}
            tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
            return self._trial([user, _call_message(call_id), result], tools=[tool]) is not None

        return not takes("call_" + "0" * 24) and takes("0" * 9)

    def _trial(self, messages: list[dict[str, Any]], tools: Any = None) -> str | None:
        """What the template writes for messages of our own; None where it takes no such conversation."""
        context = {"documents": None, "messages": messages, "tools": tools, "add_generation_prompt": False}
        try:
            return template_process.render(self.source, self._special_tokens | context, _TRIAL_SECONDS)
        except template_process.InvalidTemplateError:
            return None
        except template_process.LimitError as error:
            raise self._refusal(error) from None

    def _refusal(self, error: template_process.InvalidTemplateError | template_process.LimitError) -> RequestError:
        """A sentence about this template, and what to do without it."""
        way_out = (
            "Give another one by chat_template (--chat-template FILE), or let the model continue a text (ask --raw)."
        )
        if isinstance(error, template_process.LimitError):
            return RequestError(f"The chat template of {self.name} {error}. {way_out}", param="messages")
        where = f" at line {error.line}" if error.line else ""
        if not isinstance(error, template_process.RenderError):
            return RequestError(
                f"The chat template of {self.name} is no valid Jinja{where}: {error.reason}. {way_out}",
                param="messages",
            )
        refuses = isinstance(error, template_process.RefusedError)
        verb = "refuses these messages" if refuses else "fails"
        return RequestError(
            f"The chat template of {self.name} {verb}{where}: {error.reason}.", param="messages" if refuses else None
        )


def read_template(given: str | PathLike[str]) -> tuple[str, str]:
    """A template that is given as a file or as text, and what to call it in errors.

    Raises UserError for a file that cannot be read, and for what is no template.
    """
    text, name = str(given), "the option chat_template"
    if not isinstance(given, str) or not re.search(r"[{}\n]", given):  # vLLM's way to tell the two
        name = str(given)
        try:
            text = Path(given).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"The chat template {name} is not UTF-8 text (at byte {error.start}).") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"The chat template {name} cannot be read: {reason}. Name a file with a Jinja template."
            ) from None
    if not text.strip():
        raise UserError(f"The chat template of {name} is empty: it would show no message to the model.")
    ChatTemplate(text, {}, name).compile()
    return text, name


def _call_message(call_id: str) -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _short_id(call_id: str) -> str:
    """An id of another model's call as nine letters and digits, the same for the same id."""
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="surrogatepass")).hexdigest()[:9]


def _mark_end(message: dict[str, Any]) -> None:
    """Put a mark behind the text of a message."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _END
    else:
        content[-1]["text"] += _END


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages as plain data; RequestError says which one is malformed, and how.

    A content is text, a list of typed parts, or None beside calls. Null is as left out, as clients send back what SDKs
    have made of an answer.
    """
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
    plain: dict[str, Any] = {key: value for key, value in _plain(message, where).items() if value is not None}
    if not plain.get("tool_calls", True):
        del plain["tool_calls"]
    plain["content"] = _checked_content(plain, message.get("content"), where)
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{where}.tool_calls")
    return plain


def _checked_content(message: Mapping[str, Any], content: Any, where: str) -> str | list[dict[str, str]] | None:
    where += ".content"
    if isinstance(content, str):
        return str(content)
    if isinstance(content, list | tuple):
        parts = [{"type": "text", "text": _text(part, f"{where}[{i}]")} for i, part in enumerate(content)]
        return parts or ""
    if content is None and "tool_calls" in message:
        return None
    if content is None and message["role"] in ("assistant", "tool", "function"):
        return ""
    raise RequestError(f"{where} must be text or a list of text parts, but this is {_kind(content)}.", param=where)


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Earlier calls with their arguments as objects: OpenAI's are text, which templates would quote once more."""
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list of calls, but this is {_kind(calls)}.", param=where)
    for i, call in enumerate(calls):
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise RequestError(
                f"{where}[{i}] must be an object with a function, but this is {_kind(call)}.", param=f"{where}[{i}]"
            )
        call["function"]["arguments"] = _arguments(
            call["function"].get("arguments"), f"{where}[{i}].function.arguments"
        )
    return [{key: value for key, value in call.items() if value is not None} for call in calls]


def _arguments(given: Any, where: str) -> dict[str, Any]:
    """The arguments of a call; a function without parameters may have none, or empty text, or null."""
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError):
            arguments = given
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise RequestError(f"{where} is {given!r:.60}; it must be a JSON object, or the text of one.", param=where)
    return arguments


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        raise RequestError(
            f"{where} is of type {kind!r:.60}, but these models read only parts of type 'text'.", param=where
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.text must be text, but this is {_kind(part.get('text'))}.", param=f"{where}.text")
    return str(part["text"])


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _plain(value: Any, where: str, of: str = "", depth: int = 0) -> Any:
    """Copy as JSON types: of those the sandbox knows which methods are safe. Errors say `of` before `where`."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > _MOST_LEVELS:
        raise RequestError(f"{of}{where:.60} is nested more than {_MOST_LEVELS} levels deep.", param=where[:60])
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}", of, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", of, depth + 1) for i, item in enumerate(value)]
    for base in (str, int, float):  # an enum, say: only what it is as JSON
        if isinstance(value, base):
            return json.loads(json.dumps(value))
    raise RequestError(f"{of}{where} must be JSON data, but this is {_kind(value)}.", param=where)
