"""What HTTP clients hear of an error, without a server: its status, and the field under the client's own name."""

from typing import Any

import pytest

from tinyserve.errors import EngineDeadError, HubError, RequestError, TinyserveError, UserError
from tinyserve.server.aliases import aliases_of
from tinyserve.server.errors import ApiError, as_api_error, error_context
from tinyserve.server.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TemplateBody,
    TokenizeBody,
)

MESSAGES = [{"role": "user", "content": "a"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("body", "param", "field"),
    [
        (ChatBody(messages=MESSAGES), "prompt", "messages"),
        (ChatBody(messages=MESSAGES), "messages[0].content", "messages[0].content"),
        (ChatBody(messages=MESSAGES), "max_tokens", "max_tokens"),
        (ChatBody(messages=MESSAGES, max_completion_tokens=0), "max_tokens", "max_completion_tokens"),
        (ChatBody(messages=MESSAGES, guided_regex="("), "structured_outputs", "guided_regex"),
        (ChatBody(messages=MESSAGES, tools=TOOLS, tool_choice="required"), "structured_outputs", "tool_choice"),
        (ChatBody(messages=MESSAGES, tools=TOOLS, guided_regex="("), "structured_outputs", "guided_regex"),
        (CompletionBody(prompt="a"), "prompt", "prompt"),
        (CompletionBody(prompt="a", response_format={}), "structured_outputs", "response_format"),
        (CompletionBody(prompt="a", structured_outputs={}), "structured_outputs", "structured_outputs"),
        (EmbeddingBody(input="a"), "prompt", "input"),
        (TokenizeBody(prompt="a"), "prompt", "prompt"),
        (TokenizeBody(messages=MESSAGES), "prompt", "messages"),
        (TemplateBody(messages=MESSAGES), "prompt", "messages"),
        (DetokenizeBody(tokens=[]), "temperature", "temperature"),
        (ChatBody(messages=MESSAGES), None, None),
    ],
)
def test_the_field_has_the_clients_name(body: Body, param: str | None, field: str | None) -> None:
    with pytest.raises(ApiError) as caught, error_context(aliases_of(body)):
        raise RequestError("prompt is a word that says nothing about the field.", param=param)
    assert (caught.value.status, caught.value.param) == (400, field)
    assert caught.value.body["error"] == {
        "message": "prompt is a word that says nothing about the field.",
        "type": "invalid_request_error",
        "param": field,
        "code": None,
    }


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UserError("messages is the first word."), 400, None),
        (EngineDeadError("Closed."), 503, "engine_dead"),
        (HubError("No network."), 503, "model_unavailable"),
        (TinyserveError("Damaged weights."), 500, None),
        (MemoryError(), 503, "out_of_memory"),
        (ZeroDivisionError("a secret"), 500, None),
        (ApiError(429, "Later.", code="queue_full", retry_after=3), 429, "queue_full"),
    ],
)
def test_every_error_has_a_status(error: Exception, status: int, code: str | None) -> None:
    got = as_api_error(error)
    expected: dict[str, Any] = {"status": status, "code": code, "param": None}
    assert {name: getattr(got, name) for name in expected} == expected
    assert "secret" not in got.message
