"""The application: routes, what they take and give back. Computes nothing, and imports no torch: it answers /health while
that is still being read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from duoserve.api.errors import ApiError, of_refusal
from duoserve.api.host import Host
from duoserve.api.limits import Door, Guard
from duoserve.api.live import snapshot
from duoserve.api.metrics import Counted, Metrics
from duoserve.api.page import add_page
from duoserve.api.responses_input import ResponsesRequest
from duoserve.api.schema import ChatRequest, CompletionRequest, Strict, read
from duoserve.api.stream import STALL_S
from duoserve.api.turnstile import Turnstile
from duoserve.core import Refusal
from duoserve.version import __version__

if TYPE_CHECKING:
    from duoserve.api.handlers import Handlers

ENVELOPE = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "additionalProperties": False,
        }
    },
}
REFUSALS = {
    400: "something in the request cannot be",
    401: "the API key is missing or wrong",
    403: "another host or page",
    404: "no such route or model",
    405: "another method",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "not JSON",
    429: "too many requests of one client",
    431: "the headers are too large",
    500: "the answer failed",
    503: "loading, busy or shutting down",
}
LARGE = 64 << 10  # bytes of a body that are parsed off the event loop
T = TypeVar("T", bound=Strict)


class Api:
    """The handlers of one host."""

    def __init__(self, host: Host, stall_s: float = STALL_S):
        self.host, self.metrics, self._stall_s = host, Metrics(host), stall_s
        self._handlers: Handlers | None = None

    @property
    def handlers(self) -> Handlers:
        """ApiError 503 while there is no model."""
        model = self.host.model
        if self._handlers is None:
            from duoserve.api.handlers import Handlers
            from duoserve.api.kit import Kit

            self._handlers = Handlers(Kit(self.host, model, self.metrics), self._stall_s)
        return self._handlers

    async def chat(self, request: Request) -> Response:
        handlers = self.handlers
        return await handlers.chat(request, await self._read(request, ChatRequest))

    async def completions(self, request: Request) -> Response:
        handlers = self.handlers
        return await handlers.completions(request, await self._read(request, CompletionRequest))

    async def responses(self, request: Request) -> Response:
        handlers = self.handlers
        return await handlers.responses(request, await self._read(request, ResponsesRequest))

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, name: str) -> Response:
        self.host.check_name(name)
        return JSONResponse(self._model())

    async def health(self) -> Response:
        found = self.host.health()
        return JSONResponse(found, 200 if found["ready"] else 503)

    async def expert_cache(self) -> Response:
        model = self.host.model
        return JSONResponse(await asyncio.to_thread(snapshot, model.engine, model.service))

    async def figures(self) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _model(self) -> dict[str, Any]:
        return {"id": self.host.name, "object": "model", "created": self.host.created, "owned_by": "duoserve"}

    async def _read(self, request: Request, kind: type[T]) -> T:
        body = await request.body()
        return read(body, kind) if len(body) < LARGE else await asyncio.to_thread(read, body, kind)


def make_app(host: Host, door: Door | None = None, *, stall_s: float = STALL_S) -> FastAPI:
    """The ASGI application of one host. Handlers answer 503 until `host.ready` was called; /health answers at once."""
    api = Api(host, stall_s)
    app = FastAPI(title="DuoServe", version=__version__, docs_url=None, redoc_url=None)
    app.state.api = api
    for path, handler, kind in (
        ("/v1/chat/completions", api.chat, ChatRequest),
        ("/v1/completions", api.completions, CompletionRequest),
        ("/v1/responses", api.responses, ResponsesRequest),
    ):
        _post(app, path, handler, kind)
    not_ready: dict[int | str, dict[str, Any]] = {503: {"description": "loading or shutting down, with how far"}}
    for path, get, kinds, more in (
        ("/v1/models", api.models, JSONResponse, {}),
        ("/v1/models/{name:path}", api.one_model, JSONResponse, {}),
        ("/health", api.health, JSONResponse, not_ready),
        ("/metrics", api.figures, PlainTextResponse, {}),
        ("/v1/expert-cache", api.expert_cache, JSONResponse, {}),
    ):
        app.add_api_route(
            path,
            get,
            methods=["GET"],
            response_class=kinds,
            response_model=None,
            responses={**_refusals(*REFUSALS), **more},
        )
    _errors(app, api.metrics)
    door = door or Door()
    door = replace(door, open_paths=door.open_paths | add_page(app))
    routes = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    app.add_middleware(Guard, door=door, metrics=api.metrics)
    app.state.turnstile = Turnstile(host, Guard(app, door, api.metrics), api.metrics)
    app.add_middleware(Counted, metrics=api.metrics, routes=routes)
    return app


def _post(
    app: FastAPI, path: str, handler: Callable[[Request], Coroutine[Any, Any, Response]], kind: type[Strict]
) -> None:
    """Bodies are parsed by `schema`, within its bounds; FastAPI is told what they look like."""
    schema = kind.model_json_schema(ref_template=f"#/components/schemas/{kind.__name__}/$defs/{{model}}")
    body = {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}
    app.add_api_route(
        path,
        handler,
        methods=["POST"],
        openapi_extra={"requestBody": body},
        response_model=None,
        response_class=JSONResponse,
        responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}, **_refusals(*REFUSALS)},
    )


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": ENVELOPE}}
    return {status: {"description": REFUSALS[status], "content": content} for status in statuses}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """References resolved in place: our models do not recurse."""
    parts = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(parts[value["$ref"].rsplit("/", 1)[1]])
            return {k: resolve(v) for k, v in value.items() if k != "discriminator"}
        return [resolve(v) for v in value] if isinstance(value, list) else value

    found: dict[str, Any] = resolve(schema)
    return found


def _errors(app: FastAPI, metrics: Metrics) -> None:
    """Everything that is refused leaves in one shape."""

    def refused(error: ApiError) -> Response:
        metrics.reject(error.code)
        return error.response()

    async def of_api(request: Request, error: Any) -> Response:
        return refused(error)

    async def of_engine(request: Request, error: Any) -> Response:
        return refused(of_refusal(error))

    async def of_http(request: Request, error: Any) -> Response:
        known = {404: "there is no such route; see /openapi.json", 405: "this route takes another method"}
        message = known.get(error.status_code, str(error.detail)[:200])
        response = refused(ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None))
        response.headers.update(error.headers or {})
        return response

    async def unexpected(request: Request, error: Any) -> Response:
        return refused(ApiError(500, f"{type(error).__name__} in the server; see its log", code="internal"))

    app.add_exception_handler(ApiError, of_api)
    app.add_exception_handler(Refusal, of_engine)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, unexpected)
