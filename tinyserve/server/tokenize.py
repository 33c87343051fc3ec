"""What a tokenizer and a chat template do, over HTTP: token ids of a text and back, a conversation as one text."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from tinyserve.llm import LLM
from tinyserve.server.chat import template_options
from tinyserve.server.errors import ApiError
from tinyserve.server.protocol import DetokenizeBody, TemplateBody, TokenizeBody
from tinyserve.server.state import Json, read, state_of
from tinyserve.text.tokenizer import Tokenizer

MOST_CHARACTERS = 1 << 20  # of a text: more would hold up everybody else


async def tokenize(request: Request) -> Response:
    """The ids of a prompt, or of a conversation as the model's template writes it."""
    body = await read(request, TokenizeBody)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "tokenize takes a prompt or messages: give one of the two.", param="prompt")
    state = state_of(request)
    async with state.engine(state.pool.find(body.model), body) as engine:
        llm, tokenizer = engine.llm, _tokenizer(engine.llm)
        if body.prompt is not None:
            if len(body.prompt) > MOST_CHARACTERS:
                words = f"The prompt has {len(body.prompt)} characters, and {MOST_CHARACTERS} are read at a time."
                raise ApiError(400, f"{words} Send it in parts.", param="prompt")
            add = body.add_special_tokens is not False
            ids = await asyncio.to_thread(tokenizer.encode_prompt, body.prompt, add)
        else:
            add = body.add_special_tokens is True
            ids = await asyncio.to_thread(
                llm.chat_prompt, body.messages, add_special_tokens=add, **template_options(body)
            )
        result = {"count": len(ids), "max_model_len": llm.max_model_len, "tokens": ids}
        if body.return_token_strs:
            result["token_strs"] = await asyncio.to_thread(_spelled, tokenizer, ids)
        return Json(result)


async def detokenize(request: Request) -> Response:
    """The text of ids."""
    body = await read(request, DetokenizeBody)
    state = state_of(request)
    async with state.engine(state.pool.find(body.model), body) as engine:
        size = engine.llm.config.vocab_size
        for i, token in enumerate(body.tokens):
            if not 0 <= token < size:
                raise ApiError(
                    400, f"tokens[{i}] is {token}, and the vocabulary ends at {size - 1}.", param=f"tokens[{i}]"
                )
        tokenizer = _tokenizer(engine.llm)
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, body.skip_special_tokens)
        return Json({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """What a client needs to tokenize as the model does, by vLLM's names: its special tokens and its chat template."""
    state = state_of(request)
    async with state.engine(state.pool.find(request.query_params.get("model"))) as engine:
        tokenizer = _tokenizer(engine.llm)
        special = {name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")}
        template = engine.llm.chat_template.source if engine.llm.chat_template is not None else None
        return Json({**special, "chat_template": template, "model_max_length": engine.llm.max_model_len})


async def apply_template(request: Request) -> Response:
    """The text that a conversation becomes."""
    body = await read(request, TemplateBody)
    state = state_of(request)
    async with state.engine(state.pool.find(body.model), body) as engine:
        text = await asyncio.to_thread(engine.llm.chat_text, body.messages, **template_options(body))
        return Json({"prompt": text})


def _spelled(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([i], skip_special_tokens=False, continuation=True) for i in ids]


def _tokenizer(llm: LLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise ApiError(400, f"{llm.name} has synthetic weights and no tokenizer.", code="unsupported")
    return llm.tokenizer
