"""What a caller did wrong, or what keeps us from answering, in OpenAI's envelope. Knows statuses and one-line messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from duoserve.core import Refusal

if TYPE_CHECKING:
    from duoserve.service import Busy

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """`message` is one line; `param` names the field; `retry_s` becomes Retry-After."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_s = status, message, param, code, retry_s

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.retry_s)} if self.retry_s is not None else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def of_refusal(refusal: Refusal, param: str | None = None) -> ApiError:
    """The engine's own refusals; one that names lengths has OpenAI's code, which clients look for."""
    code = "context_length_exceeded" if refusal.code == "E_CTX" else refusal.code.lower()
    return ApiError(400, str(refusal), param=param, code=code)


def of_busy(busy: Busy) -> ApiError:
    if busy.scope == "client":
        return ApiError(429, f"{busy}; wait for one of them", code="too_many_requests", retry_s=busy.retry_s)
    return ApiError(503, f"{busy}; try again in {busy.retry_s} s", code="overloaded", retry_s=busy.retry_s)


def of_failure(error: BaseException | None) -> ApiError:
    """A generation that ended without an answer: given up by the server (None), or broken."""
    if error is None:
        return ApiError(503, "the server is shutting down; ask again later", code="shutting_down", retry_s=30)
    if isinstance(error, Refusal):
        return of_refusal(error)
    if isinstance(error, TimeoutError):
        return ApiError(503, f"{error}; try again later", code="timeout", retry_s=30)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return ApiError(503, "memory ran out for this request; try again, or a shorter one", code="memory", retry_s=5)
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
    return ApiError(500, f"the answer failed ({what}); try again", code="failed")
