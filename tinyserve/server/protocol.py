"""What clients send, under OpenAI's names and vLLM's. An unknown field is an error, as is a wrong type.

What the layers below check with sentences of their own (messages, tools, biases, schemas) is only passed on.
"""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tinyserve.errors import did_you_mean
from tinyserve.sampling_params import SamplingParams
from tinyserve.server.errors import ApiError

B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """A JSON object of which every field is known."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against eavesdroppers, which a stream here does not have


# The fields that SamplingParams has under the same name; None is not said.
SAMPLING = {name: row.http for name, row in SamplingParams.rows.items() if row.http is not None}
_FIELDS: dict[str, Any] = {name: (kind | None, None) for name, kind in SAMPLING.items()}
_Sampling: Any = create_model("_Sampling", __base__=Body, **_FIELDS)


class Decoding(_Sampling):  # type: ignore[misc]  # which fields it has, the table says
    """What chat and completions share: how tokens are chosen, and how the answer is sent."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    # vLLM's
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int = 0
    # Accepted, because clients send them and nothing here depends on them.
    user: str | None = None
    metadata: dict[str, Any] | None = None


class ChatBody(Decoding):
    """POST /v1/chat/completions."""

    messages: Any
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionBody(Decoding):
    """POST /v1/completions."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: str | None = None


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or the messages of a chat."""

    prompt: str | None = None
    messages: Any = None
    tools: Any = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[int]
    skip_special_tokens: bool = False


class TemplateBody(Body):
    """POST /apply-template."""

    messages: Any
    tools: Any = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


def parse(kind: type[B], data: bytes) -> B:
    """The body of a request; raises ApiError 400 that names the first field at fault."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _as_api_error(kind, error) from None


def _as_api_error(kind: type[Body], error: ValidationError) -> ApiError:
    # Of a union every member complains; an unknown field is the plainest complaint.
    details = error.errors(include_url=False, include_context=False)
    first = min(details, key=lambda detail: (detail["type"] != "extra_forbidden", -len(detail["loc"])))
    where = _where(first["loc"])
    match first["type"]:
        case "json_invalid":
            return ApiError(
                400, f"The body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}.", code="invalid_json"
            )
        case "extra_forbidden":
            hint = did_you_mean(where, kind.model_fields, 0.6) if len(first["loc"]) == 1 else ""
            return ApiError(400, f"There is no field {where!r}.{hint}", param=where, code="unknown_field")
        case "missing":
            return ApiError(400, f"The field {where!r} is missing.", param=where, code="missing_field")
        case _ if not where:
            return ApiError(400, "The body must be a JSON object.", code="invalid_json")
    given = f"{first['input']!r:.80}"
    return ApiError(400, f"{where} is {given}: {_lower(first['msg'])}.", param=where, code="invalid_value")


def _where(loc: tuple[int | str, ...]) -> str:
    """messages[0].role; members of a union, which pydantic names as well, are left out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not text or (part != "str" and "[" not in part):
            text += f".{part}" if text else part
    return text


def _lower(message: str) -> str:
    """Pydantic's sentence, to go on with."""
    return message[:1].lower() + message[1:].rstrip(".")
