"""Server-sent events, and waiting for work only as long as somebody waits for us. Knows ASGI; knows nothing of models.

What is sent is one whole event at a time. A client that reads nothing for 30 s is dropped; one that leaves ends the
generator, whose `finally` cancels what it stood for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from duoserve.api.errors import ApiError

STALL_S = 30.0
PING = b": still here\n\n"
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def event(value: BaseModel | dict[str, Any], name: str | None = None) -> bytes:
    """One event; JSON has no line breaks of its own."""
    text = (
        value.model_dump_json(exclude_unset=True, by_alias=True) if isinstance(value, BaseModel) else json.dumps(value)
    )
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text.encode() + b"\n\n"


def error_event(error: ApiError) -> bytes:
    return event(error.body)


class EventStream(Response):
    """Sends what an async generator yields. `over` is called whatever happens, even before the generator began."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], over: Callable[[], None], stall_s: float = STALL_S):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._over, self._stall_s = events, over, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pump.cancel()
            gone.cancel()
            self._over()
            results = await asyncio.gather(pump, gone, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], TimeoutError | OSError):
            raise results[0]

    async def _pump(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for body in events:
                message = {"type": "http.response.body", "body": body, "more_body": True}
                await asyncio.wait_for(send(message), self._stall_s)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's result; None, and the work cancelled, once the client has left."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
