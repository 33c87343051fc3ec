"""From a request's fields to SamplingParams. What a request does not say, the model's makers have said, or vLLM."""

import json
from collections.abc import Mapping
from typing import Any

from tinyserve.errors import RequestError
from tinyserve.llm import LLM
from tinyserve.sampling_params import SamplingParams, StructuredOutputs
from tinyserve.server.errors import ApiError
from tinyserve.server.protocol import SAMPLING, ChatBody, CompletionBody, Decoding, ExplainBody

_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


def chat_params(body: ChatBody, llm: LLM) -> SamplingParams:
    """How a chat is decoded: without a limit, an answer may fill the context."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(
            400,
            f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}: give one.",
            param="max_tokens",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    extra: dict[str, Any] = {"logprobs": body.top_logprobs or 0} if body.logprobs else {}
    return _params(body, llm, extra, limit, default=llm.max_model_len)


def completion_params(body: CompletionBody, llm: LLM) -> SamplingParams:
    """How a completion is decoded; with `echo`, a prompt's own log-probabilities are asked for as an answer's are."""
    extra: dict[str, Any] = {} if body.logprobs is None else {"logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        extra["prompt_logprobs"] = body.logprobs
    # A text that is only to be scored is continued by a token that is not sent.
    limit = 1 if body.max_tokens == 0 and body.echo else body.max_tokens
    return _params(body, llm, extra, limit, default=SamplingParams.rows["max_tokens"].default)


def explain_params(body: ExplainBody, llm: LLM) -> SamplingParams:
    """How the token that is explained would be drawn."""
    return _params(body, llm, {}, 1, default=1)


def _params(body: Decoding, llm: LLM, extra: dict[str, Any], limit: int | None, default: int) -> SamplingParams:
    options = llm.generation_config.defaults()
    options.setdefault("max_tokens", default)
    options |= {name: value for name in SAMPLING if (value := getattr(body, name)) is not None} | extra
    if limit is not None:
        options["max_tokens"] = limit
    elif options.get("min_tokens", 0) > options["max_tokens"]:
        options["max_tokens"] = options["min_tokens"]
    if (structure := _structure(body)) is not None:
        options["structured_outputs"] = structure
    if "seed" in options:
        options["seed"] = _seed(options["seed"])
    return SamplingParams(**options)


def _seed(seed: int) -> int | None:
    """Any 64-bit integer is a seed over HTTP; -1 is what clients send where nobody gave one."""
    if not -(2**63) <= seed < 2**64:
        raise ApiError(400, f"seed is {seed!r:.60}; it must be an integer of 64 bits.", param="seed")
    return None if seed == -1 else seed % 2**64


def _structure(body: Decoding) -> StructuredOutputs | None:
    """What an answer must look like, whichever of three ways it is said in."""
    given: dict[str, StructuredOutputs] = {}
    if body.structured_outputs is not None:
        given["structured_outputs"] = _named("structured_outputs", body.structured_outputs)
    for field, kind in _GUIDED.items():
        if (value := getattr(body, field)) is not None:
            given[field] = _named(field, {kind: value})
    if body.response_format is not None and (structure := _response_format(body.response_format)) is not None:
        given["response_format"] = structure
    if len(given) > 1:
        raise ApiError(400, f"{' and '.join(given)} are given: an answer has one structure.", param=list(given)[1])
    return next(iter(given.values()), None)


def structure_field(body: Decoding) -> str:
    """The field that says what an answer must look like, for errors that are found when it is compiled."""
    fields = ("structured_outputs", *_GUIDED, "response_format")
    return next((field for field in fields if getattr(body, field) is not None), "structured_outputs")


def _response_format(format: Mapping[str, Any]) -> StructuredOutputs | None:
    """OpenAI's: text, json_object, or json_schema with a schema inside."""
    match {name: value for name, value in format.items() if value is not None}:
        case {"type": "text", **rest} if not rest:
            return None
        case {"type": "json_object", **rest} if not rest:
            return StructuredOutputs(json_object=True)
        case {"type": "json_schema", "json_schema": {"schema": schema, **rest}, **outer} if not outer:
            if unknown := rest.keys() - {"name", "description", "strict"}:
                name = f"response_format.json_schema.{min(map(str, unknown))[:80]}"
                raise ApiError(400, f"There is no field {name!r}.", param=name, code="unknown_field")
            return _named("response_format.json_schema.schema", {"json": schema})
    raise ApiError(
        400,
        f"response_format is {json.dumps(format)[:80]}; it must have type text, json_object, or json_schema with a "
        "json_schema that has a schema.",
        param="response_format",
    )


def _named(field: str, options: Mapping[str, Any]) -> StructuredOutputs:
    """The structure, or an error that names the field it came from."""
    try:
        return StructuredOutputs(**options)
    except RequestError as error:
        raise ApiError(400, f"{field}: {error}", param=field) from None
