"""Texts without answers: embeddings, token ids and back, and what a conversation looks like to the model."""

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from tinyserve.llm import LLM
from tinyserve.server.completions import prompts_of
from tinyserve.server.errors import ApiError
from tinyserve.server.protocol import DetokenizeBody, EmbeddingBody, TemplateBody, TokenizeBody
from tinyserve.server.state import Json, read, state_of, unless_gone
from tinyserve.text.tokenizer import Tokenizer


async def embeddings(request: Request) -> Response:
    """Mean-pooled hidden states: what a language model has in mind, not what one trained for search would say."""
    body = await read(request, EmbeddingBody)
    if body.dimensions is not None:
        raise ApiError(
            400, "dimensions is given, and hidden states cannot be shortened: leave it out.", param="dimensions"
        )
    texts = prompts_of(body.input, "input")
    state = state_of(request)
    model = state.pool.find(body.model)

    async def work() -> dict[str, Any]:
        async with state.engine(model, body) as engine:
            outputs = await engine.embed(texts)
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(output.embedding, body.encoding_format)}
            for i, output in enumerate(outputs)
        ]
        tokens = sum(len(output.prompt_token_ids) for output in outputs)
        counts = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": model.name, "usage": counts}

    return Json(await unless_gone(request, work()))


def _encoded(embedding: np.ndarray, encoding: str) -> Any:
    """Numbers, or the bytes of little-endian float32, which OpenAI's own client asks for."""
    if encoding == "base64":
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    return embedding.tolist()


async def tokenize(request: Request) -> Response:
    """The ids of a prompt, or of a conversation as the model's template writes it."""
    body = await read(request, TokenizeBody)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "tokenize takes a prompt or messages: give one of the two.", param="prompt")
    state = state_of(request)
    async with state.engine(state.pool.find(body.model), body) as engine:
        llm, tokenizer = engine.llm, _tokenizer(engine.llm)
        if body.prompt is not None:
            ids = await asyncio.to_thread(tokenizer.encode, body.prompt, body.add_special_tokens)
        else:
            ids = await asyncio.to_thread(
                llm.chat_prompt, body.messages, tools=body.tools, add_generation_prompt=body.add_generation_prompt
            )
        names = [tokenizer.decode([i], skip_special_tokens=False, continuation=True) for i in ids]
        result = {"count": len(ids), "max_model_len": llm.max_model_len, "tokens": ids}
        return Json(result | ({"token_strs": names} if body.return_token_strs else {}))


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
        return Json({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)})


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
        ids = await asyncio.to_thread(
            engine.llm.chat_prompt,
            body.messages,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            **(body.chat_template_kwargs or {}),
        )
        return Json({"prompt": _tokenizer(engine.llm).decode(ids, skip_special_tokens=False)})


def _tokenizer(llm: LLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise ApiError(400, f"{llm.name} has synthetic weights and no tokenizer.", code="unsupported")
    return llm.tokenizer
