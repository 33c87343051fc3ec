"""Whatever goes wrong, as OpenAI's clients expect it: a status, and a body that names the field."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from starlette.responses import JSONResponse, Response

from tinyserve.errors import EngineDeadError, HubError, RequestError, TinyserveError, UserError

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
    """What a client is told. `param` is the field at fault, `code` a word for programs."""

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


@contextmanager
def told(fields: Container[str], aliases: Mapping[str, str]) -> Iterator[None]:
    """Have errors of the layers below name the client's field: one of `fields`, or what `aliases` say it is here."""
    try:
        yield
    except TinyserveError as error:
        raise as_api_error(error, fields, aliases) from error


def as_api_error(
    error: BaseException, fields: Container[str] = (), aliases: Mapping[str, str] = NO_ALIASES
) -> ApiError:
    """What a client is told of an error of the layers below, as `told` has it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, HubError):
        return ApiError(503, str(error), code="model_unavailable")
    if isinstance(error, RequestError | UserError):
        param = getattr(error, "param", None) or _field_in(str(error), fields)
        return ApiError(400, str(error), param=aliases.get(param, param) if param else None)
    if isinstance(error, TinyserveError):
        return ApiError(500, str(error))
    if isinstance(error, MemoryError):
        return ApiError(503, "There is not enough memory for this now.", code="out_of_memory", retry_after=10)
    return ApiError(500, f"The server made a mistake ({type(error).__name__}); its log says more.")


def _field_in(message: str, fields: Container[str]) -> str | None:
    """Sentences about a field begin with its name, which may go on: messages[0].content."""
    word = message.split(maxsplit=1)[0] if message else ""
    name = word.replace("[", ".").split(".")[0]
    return word.rstrip(":,") if name.rstrip(":,") in fields else None
