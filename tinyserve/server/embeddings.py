"""POST /v1/embeddings: the mean of a text's last hidden states."""

import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from tinyserve.server.access_log import count_tokens
from tinyserve.server.completions import prompts_of
from tinyserve.server.errors import ApiError
from tinyserve.server.protocol import EmbeddingBody
from tinyserve.server.state import Json, cancel_on_disconnect, read, state_of


async def embeddings(request: Request) -> Response:
    """Mean-pooled hidden states of a language model, which was not trained for search."""
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
        count_tokens(tokens, 0)
        counts = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": model.name, "usage": counts}

    return Json(await cancel_on_disconnect(request, work()))


def _encoded(embedding: np.ndarray, encoding: str) -> Any:
    """Numbers, or the bytes of little-endian float32, which OpenAI's own client asks for."""
    if encoding == "base64":
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    return embedding.tolist()
