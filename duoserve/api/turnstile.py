"""Who asks while no more may wait is turned away before anything is done for them: some 50 µs each, where reading and
routing a request takes 2 ms, and five hundred come at once. Knows uvicorn's protocol on h11; knows nothing of models.

    bytes -> Entrance -> no place: 503, and the connection ends
                      -> a place: in line, of which one a turn of the event loop goes on -> h11 -> app -> `passed`
                      -> no small whole request of a guest -> h11 -> app, which says what there is to say

A request takes its place when it has arrived whole, so that who sends slowly keeps nobody out, and hands it back when it is
in the service's queue, which counts it from there, or over.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from duoserve.api.errors import ApiError, of_busy
from duoserve.api.host import Host
from duoserve.api.limits import SAFE, Guard
from duoserve.api.metrics import Metrics

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
STARTS = tuple(f"POST {path} HTTP/1.1\r\n".encode() for path in PATHS)
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,10})[ \t]*\r\n", re.IGNORECASE)
SAFE_LINES = "".join(f"{name.decode()}: {value.decode()}\r\n" for name, value in SAFE)
IDLE: dict[Any, Any] = {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE}


class Turnstile:
    """Counts requests between their arrival and the queue, and knows what one more would hear. All on the event loop."""

    def __init__(self, host: Host, guard: Guard, metrics: Metrics):
        self._host, self._guard, self._metrics = host, guard, metrics
        self._line: deque[tuple[Entrance, bytes]] = deque()
        self._count = {path.encode(): metrics.requests.labels(path, "503") for path in PATHS}
        self.coming = 0

    def take(self, guest: Entrance, data: bytes) -> None:
        """A place for a whole request, in line."""
        self.coming += 1
        self._line.append((guest, data))
        if len(self._line) == 1:
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        """One a turn: whoever can be turned away at once does not wait for all the others."""
        guest, data = self._line[0]
        try:
            if not guest.go_on(data):
                self.coming -= 1
        finally:
            self._line.popleft()
            if self._line:
                asyncio.get_running_loop().call_soon(self._next)

    def refusal(self, data: bytes) -> bytes | None:
        """The whole answer to a request that cannot wait now; None where there is room, or the guard says something else."""
        model = self._host.loaded
        busy = model.service.busy(coming=self.coming) if model is not None and not self._host.draining else None
        if busy is None:
            return None
        start, *lines = data[: data.index(b"\r\n\r\n")].split(b"\r\n")
        path = start.split(b" ")[1]
        if not self._is_guest(path, lines):
            return None
        self._count[path].inc()
        self._metrics.reject("overloaded")
        return _answer(of_busy(busy))

    def _is_guest(self, path: bytes, lines: list[bytes]) -> bool:
        """Strangers hear what they always hear, and nothing of our queue."""
        fields = [line.partition(b":") for line in lines]
        headers = [(name.lower(), value.strip()) for name, _, value in fields]
        scope = {"method": "POST", "path": path.decode(), "raw_path": path, "query_string": b"", "headers": headers}
        try:
            self._guard.check(scope)
        except ApiError:
            return False
        return True


class Entrance(H11Protocol):
    """A connection. The subclass of a server knows its turnstile."""

    turnstile: Turnstile
    _held: bytes | None = None  # what has come behind a request that is in line

    def data_received(self, data: bytes) -> None:
        if self._held is not None:
            self._held += data
        elif not (_is_whole(data) and self._between()):
            super().data_received(data)
        elif (answer := self.turnstile.refusal(data)) is not None:
            self.transport.write(answer)
            self.transport.close()
        else:
            self._held = b""
            self.turnstile.take(self, data)

    def go_on(self, data: bytes) -> bool:
        """False where nothing came of the request."""
        behind, self._held = self._held or b"", None
        before = self.scope
        if not self.transport.is_closing():
            super().data_received(data + behind)
        begun = self.scope is not before and not self.transport.is_closing()
        if begun:
            self.scope["state"]["turnstile"] = self.turnstile
        return begun

    def on_response_complete(self) -> None:
        passed(self.scope)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.scope is not None:
            passed(self.scope)
        super().connection_lost(exc)

    def _between(self) -> bool:
        """Nothing of a request has come, and none is being answered."""
        return self.conn.states == IDLE and not self.conn.trailing_data[0]


def entrance(turnstile: Turnstile) -> type[Entrance]:
    """The protocol of a server's connections."""
    return type("Entrance", (Entrance,), {"turnstile": turnstile})


def passed(scope: Mapping[str, Any]) -> None:
    """The request is in the queue, or over. Called at both, counts once."""
    turnstile = scope.get("state", {}).pop("turnstile", None)
    if turnstile is not None:
        turnstile.coming -= 1


def _is_whole(data: bytes) -> bool:
    """One request for the model, its head and all of its body, and nothing else."""
    if not data.startswith(STARTS):
        return False
    end = data.find(b"\r\n\r\n")
    announced = LENGTH.search(data, 0, end + 2)
    return announced is not None and int(announced[1]) == len(data) - end - 4


def _answer(error: ApiError) -> bytes:
    body = json.dumps(error.body, separators=(",", ":"))
    return f"""\
HTTP/1.1 503 Service Unavailable\r
content-type: application/json\r
content-length: {len(body)}\r
retry-after: {error.retry_s}\r
connection: close\r
x-request-id: {uuid.uuid4().hex}\r
{SAFE_LINES}\r
{body}""".encode()
