"""What clients send, under OpenAI's names and vLLM's; null is as left out. A wrong type is an error, as is a field that
nobody knows.

A field of those APIs that is not built is passed over where an answer is as good without it, and said (IGNORED), and
refused where it is not (UNBUILT). What the layers below check with sentences of their own (messages, tools, biases,
schemas) is only passed on.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tinyserve.errors import did_you_mean
from tinyserve.sampling_params import SamplingParams
from tinyserve.server.errors import ApiError

B = TypeVar("B", bound="Body")

_LONGEST_NAME = 120  # characters of a field in an error: the client's own may be of any length


# Without these an answer is as good: the values that ask for nothing, and need not be named.
IGNORED: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    # vLLM's
    "ec_transfer_params": (),
    "guided_decoding_backend": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),  # of beam search, which is refused
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "request_id": (),
    "return_mm_kwargs": (True,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "truncation_side": (),  # of truncate_prompt_tokens, which is refused
    # llama.cpp's and Ollama's
    "cache_prompt": (True,),
    "id_slot": (-1,),
    "keep_alive": (),
    "timings_per_token": (False,),
    # Anthropic's
    "anthropic_beta": (),
    "anthropic_version": (),
    "betas": (),
    "inference_geo": (),
}
# With these it would be another one: what to do instead. Those that are off (OFF) ask for nothing.
UNBUILT: Mapping[str, str] = {
    "audio": "answers are text: leave it out",
    "cache_salt": "all prompts share a cache: leave it out, or run a server for yourself",
    "chat_template": "the server's templates are its own (--chat-template): leave it out",
    "container": "there are no containers: leave it out",
    "documents": "write the documents into a message",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "logits_processors": "use logit_bias, bad_words or structured_outputs",
    "logprob_token_ids": "ask for the likeliest tokens' logprobs",
    "mcp_servers": "call the servers yourself, as tools",
    "moderation": "judge texts yourself: leave it out",
    "prompt_embeds": "send the prompt as text or token ids",
    "repetition_detection": "use repetition_penalty, or stop",
    "return_prompt_text": "ask /apply-template",
    "return_token_ids": "ask for logprobs, or /tokenize the answer",
    "return_tokens_as_token_ids": "ask for logprobs, or /tokenize the answer",
    "suffix": "these models only go on with a text: leave it out",
    "structural_tag": "use structured_outputs",
    "truncate_prompt_tokens": "shorten the prompt: /tokenize counts",
    "use_beam_search": "use LLM.beam_search in Python: leave it out",
    "vllm_xargs": "there are no extensions: leave it out",
    "watermarking": "texts bear no mark: leave it out",
    "web_search_options": "search yourself, as a tool",
}
OFF: tuple[Any, ...] = (None, False, "", [])  # and not {}, which is a web search with all its defaults


class Body(BaseModel):
    """A JSON object of which every field is known."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ignored: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    unbuilt: ClassVar[Mapping[str, str]] = {}

    model: str | None = None


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's padding against eavesdroppers, which a stream here does not have


# The fields that SamplingParams has under the same name; None is not said.
SAMPLING = {name: row.http for name, row in SamplingParams.rows.items() if row.http is not None}
_FIELDS: dict[str, Any] = {name: (kind | None, None) for name, kind in SAMPLING.items()}
_Sampling: Any = create_model("_Sampling", __base__=Body, **_FIELDS)


class Decoding(_Sampling):  # type: ignore[misc]  # which fields it has, the table says
    """What chat and completions share: how tokens are chosen, and how the answer is sent."""

    ignored: ClassVar[Mapping[str, tuple[Any, ...]]] = IGNORED
    unbuilt: ClassVar[Mapping[str, str]] = UNBUILT

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

    unbuilt: ClassVar[Mapping[str, str]] = {**UNBUILT, "echo": "the last message is yours already: leave it out"}

    messages: Any
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionBody(Decoding):
    """POST /v1/completions."""

    ignored = {**IGNORED, "include_reasoning": (True,), "reasoning_effort": ()}  # noqa: RUF012  # nothing is thought

    prompt: Any
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)


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
    add_special_tokens: bool | None = None  # of a prompt they are, of a chat its template's
    add_generation_prompt: bool = True
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
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
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ExplainBody(Decoding):
    """POST /explain: a prompt or the messages of a chat, and of the answer what is before the token to explain."""

    prompt: str | None = None
    messages: Any = None
    answer: str = ""
    format: Literal["json", "html"] = "json"
    tools: Any = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def parse(kind: type[B], data: bytes, strict: bool = False) -> tuple[B, list[str]]:
    """The body of a request, and the names of fields that were passed over, of which `strict` allows none.

    Raises ApiError 400 that names the first field at fault.
    """
    try:
        fields = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is no JSON: {error}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    ignored = list[str]()
    for name in [name for name in fields if name not in kind.model_fields]:  # in their order: the first is named
        if (fields[name] is None and name in kind.ignored) or (fields[name] in OFF and name in kind.unbuilt):
            continue
        if name in kind.unbuilt:
            raise ApiError(400, f"{name} is not built: {kind.unbuilt[name]}.", param=name, code="unsupported_field")
        if name not in kind.ignored or (strict and fields[name] not in kind.ignored[name]):
            hint = did_you_mean(name, kind.model_fields, 0.6) if name not in kind.ignored else ""
            raise ApiError(400, f"There is no field {name[:80]!r}.{hint}", param=name[:80], code="unknown_field")
        if fields[name] not in kind.ignored[name]:
            ignored.append(name)
    try:
        known = {name: fields[name] for name in kind.model_fields if fields.get(name) is not None}
        return kind.model_validate(known), sorted(ignored)
    except ValidationError as error:
        raise _as_api_error(error) from None


def _as_api_error(error: ValidationError) -> ApiError:
    # Of a union every member complains; an unknown field is the plainest complaint.
    details = error.errors(include_url=False, include_context=False)
    first = min(details, key=lambda detail: (detail["type"] != "extra_forbidden", -len(detail["loc"])))
    where = _where(first["loc"])
    match first["type"]:
        case "extra_forbidden":
            return ApiError(400, f"There is no field {where!r}.", param=where, code="unknown_field")
        case "missing":
            return ApiError(400, f"The field {where!r} is missing.", param=where, code="missing_field")
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
    return text[:_LONGEST_NAME]


def _lower(message: str) -> str:
    """Pydantic's sentence, to go on with."""
    return message[:1].lower() + message[1:].rstrip(".")
