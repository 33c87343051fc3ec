"""A server's state: its models, health and readiness, metrics, statistics, and the description of a model."""

import asyncio
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.llm import LLM
from tinyserve.models.config import parse_config
from tinyserve.models.inspection import inspection
from tinyserve.models.lookup import load_raw_config
from tinyserve.server.errors import ApiError
from tinyserve.server.pool import ModelPool, ServedModel
from tinyserve.server.state import Json, state_of


async def models(request: Request) -> Response:
    """All models, in OpenAI's form."""
    pool = state_of(request).pool
    return Json({"object": "list", "data": [_card(pool, model) for model in pool.models.values()]})


async def model(request: Request) -> Response:
    """One model."""
    pool = state_of(request).pool
    return Json(_card(pool, pool.find(request.path_params["name"])))


def _card(pool: ModelPool, model: ServedModel) -> dict[str, Any]:
    llm = model.llm
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tinyserve",
        "root": model.source,
        "loaded": llm is not None,
        "max_model_len": llm.max_model_len if llm else None,
        "dtype": llm.dtype if llm else pool.options.dtype,
        "weights": llm.model.kept if llm else None,  # in words
        "chat": llm.chat_template is not None if llm else None,
        "sampling": _sampling(llm) if llm else None,
    }


def _sampling(llm: LLM) -> dict[str, Any]:
    """What a request gets that says nothing, and who has said it."""
    decided = llm.generation_config.defaults()
    return {**decided, "source": Path(llm.generation_config.decided_by).name if decided else "default"}


async def health(request: Request) -> Response:
    """Liveness: always 200, as guards.Unavailable has refused the request if an engine is dead."""
    return Json({"status": "ok"})


async def ready(request: Request) -> Response:
    """Readiness: 200 once the first model is in memory, 503 before."""
    state = state_of(request)
    if state.failure is not None:
        raise ApiError(503, state.failure, code="not_ready")
    if not state.is_ready:
        raise ApiError(503, f"{state.pool.default.name} is being loaded.", code="not_ready", retry_after=1)
    return Json({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(state_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def stats(request: Request) -> Response:
    """The engines' statistics as JSON, for the page."""
    loaded = [m for m in state_of(request).pool.models.values() if m.engine is not None]
    return Json({"models": {m.name: m.engine.stats()._asdict() | _cache(m) for m in loaded if m.engine is not None}})


def _cache(model: ServedModel) -> dict[str, Any]:
    plan = model.llm.cache_plan if model.llm else None
    return {"block_size": plan.block_size, "cache_bytes": plan.nbytes, "memory_bytes": model.nbytes} if plan else {}


async def inspect(request: Request) -> Response:
    """The report of `tinyserve inspect-config` on a model."""
    name = request.query_params.get("model")
    model = state_of(request).pool.find(name)
    return Json(await asyncio.to_thread(_inspection, model))


def _inspection(model: ServedModel) -> dict[str, Any]:
    ref = ModelRef.parse(model.source)
    if model.llm is not None:
        return inspection(model.llm.config, ref, str(model.llm.path or model.source))
    raw, source = load_raw_config(ref)
    return inspection(parse_config(raw, source), ref, source)


# Of other APIs, and of OpenAI's that only some models can answer: what to ask instead.
_INSTEAD = {
    "/v1/responses": "the Responses API is not built: ask /v1/chat/completions, which its clients know as well",
    "/v1/messages": "Anthropic's API is not built: ask /v1/chat/completions, as OpenAI's clients do",
    "/v1/moderations": "no model here judges texts: leave it out",
    "/v1/audio": "answers are text: ask /v1/chat/completions",
    "/v1/images": "answers are text: ask /v1/chat/completions",
    "/v1/files": "files are kept where the server was started with --batch-dir",
    "/v1/batches": "batches are answered where the server was started with --batch-dir",
    "/api": "Ollama's API is not built: ask /v1/chat/completions, as OpenAI's clients do",
    "/completion": "llama.cpp's API is not built: ask /v1/completions",
}


async def not_found(request: Request, error: Exception) -> Response:
    """404 in OpenAI's form, with what to ask instead."""
    message = f"There is no {request.method:.20} {path_of(request)}: {_instead(request, request.url.path)}."
    return ApiError(404, message, code="not_found").response()


def _instead(request: Request, path: str) -> str:
    known = {getattr(route, "path", "") for route in request.app.routes}
    if f"/v1{path}" in known:
        return f"it is at /v1{path}, so a client's base URL ends in /v1"
    if path.startswith("/v1/") and (rest := path.removeprefix("/v1")) in known:
        return f"it is at {rest}, so a client's base URL has a /v1 too many"
    for prefix, instead in _INSTEAD.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return instead
    return "docs/serving.md lists what there is"


def path_of(request: Request) -> str:
    """The path as it was sent, on one line and not longer than it is read."""
    raw: bytes = request.scope.get("raw_path") or request.url.path.encode()
    return raw[:80].decode("ascii", "backslashreplace")
