"""Errors as OpenAI's clients expect them: a status, and a body that names the field at fault."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from starlette.responses import JSONResponse, Response

from tinyserve.errors import ContextLengthError, EngineDeadError, HubError, RequestError, TinyserveError, UserError

NO_ALIASES: Mapping[str, str] = MappingProxyType({})
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}


class ApiError(Exception):
    """An error response. `param` is the field at fault, `code` a word for programs, `retry_after` in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    __reduce__ = TinyserveError.__reduce__

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers: Mapping[str, str] = {}
        if self.retry_after is not None:
            headers = {"Retry-After": str(self.retry_after)}
        elif self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse(self.body, self.status, headers)


def forget_frames(error: BaseException) -> None:
    """Let go of what an error that is answered came through: frames, with a request's text and tokens in them.

    They would stay until Python looks for cycles, as an error names frames that name the error.
    """
    errors: list[BaseException | None] = [error]
    seen = set[int]()
    while errors:
        one = errors.pop()
        if one is None or id(one) in seen or isinstance(one, EngineDeadError):  # that is everybody's
            continue
        seen.add(id(one))
        errors += [one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
        one.__traceback__ = one.__cause__ = one.__context__ = None


@contextmanager
def error_context(aliases: Mapping[str, str]) -> Iterator[None]:
    """Turn errors of lower layers into ApiErrors. `aliases` has the client's field where it is not the parameter's."""
    try:
        yield
    except TinyserveError as error:
        raise as_api_error(error, aliases) from error


def as_api_error(error: BaseException, aliases: Mapping[str, str] = NO_ALIASES) -> ApiError:
    """The response to an error of the lower layers; `aliases` as in `error_context`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, HubError):
        return ApiError(503, str(error), code="model_unavailable")
    if isinstance(error, RequestError):
        param = aliases.get(error.param, error.param) if error.param is not None else None
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        return ApiError(400, str(error), param=param, code=code)
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, TinyserveError):
        return ApiError(500, str(error))
    if isinstance(error, MemoryError):
        return ApiError(503, "There is not enough memory for this now.", code="out_of_memory", retry_after=10)
    return ApiError(500, f"The server made a mistake ({type(error).__name__}); its log says more.")
