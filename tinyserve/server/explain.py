"""POST /explain: what led to the next token of a text or of an answer, as numbers or as a page of its own."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from tinyserve.explain import Explanation
from tinyserve.explain.page import page, shown
from tinyserve.llm import LLM
from tinyserve.server.access_log import count_tokens
from tinyserve.server.chat import template_options
from tinyserve.server.errors import ApiError
from tinyserve.server.protocol import ExplainBody
from tinyserve.server.sampling import explain_params
from tinyserve.server.state import Json, read, state_of


async def explain(request: Request) -> Response:
    """The residual stream, the logit lens and the heads of one forward pass."""
    body = await read(request, ExplainBody)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "explain takes a prompt or messages: give one of the two.", param="prompt")
    state = state_of(request)
    async with state.engine(state.pool.find(body.model), body) as engine, state.explaining:
        told = await asyncio.to_thread(_explained, engine.llm, body)
        count_tokens(len(told.prompt_token_ids), 0)
        if body.format == "html":
            made = {"html": await asyncio.to_thread(page, told)}
        else:
            made = await asyncio.to_thread(shown, told)
    return Json({"object": "explanation", **made})


def _explained(llm: LLM, body: ExplainBody) -> Explanation:
    if llm.tokenizer is None:
        raise ApiError(400, f"{llm.name} has synthetic weights and no tokenizer.", code="unsupported")
    if body.messages is None:
        ids = llm.tokenizer.encode_prompt(body.prompt or "", body.add_special_tokens is not False, llm.max_model_len)
    else:
        ids = llm.chat_prompt(body.messages, **template_options(body))
    if body.answer:
        ids += llm.tokenizer.encode(body.answer, add_special_tokens=False)
    return llm.explain(ids, explain_params(body, llm))
