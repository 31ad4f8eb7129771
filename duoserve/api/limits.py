"""Who may ask, and how much, decided before a handler runs. Pure ASGI, so that a client's leaving is still heard behind it.

The page of another site that a browser shows may send requests here: `Host` must be ours (a name that was made to point here
is refused) and `Origin`, where there is one, the same place. There are no CORS headers at all.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duoserve.api.errors import ApiError

if TYPE_CHECKING:
    from duoserve.api.metrics import Metrics

MAX_BODY, MAX_HEADERS = 8 << 20, 64 << 10
MAX_UNREAD = 32 << 20  # bytes beyond which a sender is cut off instead of heard out
BODY_S = 30.0  # for a body to come whole
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN = frozenset({"/health"})  # without a key; page assets beside it
SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
)


@dataclass(frozen=True)
class Door:
    """`key`: None lets everybody in. `hosts`: names that Host may have; `any_address`: or any address in figures."""

    key: str | None = None
    hosts: frozenset[str] = LOCAL
    any_address: bool = False
    open_paths: frozenset[str] = OPEN
    max_body: int = MAX_BODY
    max_headers: int = MAX_HEADERS
    body_s: float = BODY_S


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Turns requests away, names each, and hands the body on whole."""

    def __init__(self, app: ASGIApp, door: Door, metrics: Metrics):
        self._app, self._door, self._metrics = app, door, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        send = _named(send, _request_id(scope))
        try:
            self.check(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            self._metrics.reject(error.code)
            return await _closing(error)(scope, receive, send)
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)

    def check(self, scope: Scope) -> None:
        """ApiError where the head of a request is refused."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        n_bytes = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(k) + len(v) + 4 for k, v in headers)
        if n_bytes > self._door.max_headers:
            limit = self._door.max_headers
            raise ApiError(431, f"the headers have {n_bytes:,} bytes, at most {limit:,} are read", code="too_large")
        self._check_host(_all(headers, b"host"), _all(headers, b"origin"))
        if self._door.key is not None and scope["path"] not in self._door.open_paths:
            self._check_key(_all(headers, b"authorization"), _all(headers, b"x-api-key"))
        kinds = _all(headers, b"content-type")
        if scope["method"] == "POST" and (len(kinds) != 1 or not _is_json(kinds[0])):
            raise ApiError(415, "the content type is not application/json; send JSON", code="content_type")

    def _check_host(self, hosts: list[bytes], origins: list[bytes]) -> None:
        if len(hosts) != 1:
            raise ApiError(400, f"{len(hosts)} Host headers; send one", code="forbidden")
        host = hosts[0].decode("latin-1").lower()
        name = _host_name(host)
        if name is None or not (name in self._door.hosts or (self._door.any_address and _is_address(name))):
            raise ApiError(
                403,
                f"Host {host[:80]!r} is not this server; start it with --allow-host to add a name",
                code="forbidden",
            )
        for origin in origins:
            if origin.decode("latin-1").lower() not in (f"http://{host}", f"https://{host}"):
                raise ApiError(403, "Origin is another site; open the page of this server", code="forbidden")

    def _check_key(self, bearers: list[bytes], keys: list[bytes]) -> None:
        """In constant time, for each way of sending one."""
        assert self._door.key is not None
        given = [b[7:].strip() for b in bearers if b[:7].lower() == b"bearer "] + keys
        if not any(hmac.compare_digest(k, self._door.key.encode()) for k in given):
            raise ApiError(
                401,
                "the API key is missing or wrong; send `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="unauthorized",
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, None where the client left meanwhile."""
        announced = _all(scope["headers"], b"content-length")
        if announced and announced[0].isdigit() and int(announced[0][:20]) > MAX_UNREAD:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(receive), self._door.body_s)
        except TimeoutError:
            raise ApiError(408, f"the body did not come in {self._door.body_s:.0f} s", code="timeout") from None

    async def _read(self, receive: Receive) -> bytes | None:
        """A little too much is read to its end and forgotten: who is cut off while sending never sees our answer."""
        body, n_bytes = bytearray(), 0
        while n_bytes <= MAX_UNREAD:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            n_bytes += len(piece)
            if n_bytes <= self._door.max_body:
                body += piece
            if not message.get("more_body", False):
                break
        if n_bytes > self._door.max_body:
            raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._door.max_body:,} bytes; send less", code="too_large")


def door(host: str, key: str | None, names: Iterable[str] = (), assets: Iterable[str] = ()) -> Door:
    """For a server bound to `host`. Beyond loopback any address in figures is ours: it cannot be rebound."""
    own = {host.strip("[]").lower(), *(name.lower() for name in names)}
    return Door(key, LOCAL | own, not is_loopback(host), OPEN | frozenset(assets))


def _all(headers: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _is_json(content_type: bytes) -> bool:
    return content_type.split(b";")[0].strip().lower() == b"application/json"


def _host_name(host: str) -> str | None:
    """Without the port; None where it is no host."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", host)
    return found[1].strip("[]").removesuffix(".") if found else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _request_id(scope: Scope) -> bytes:
    """The caller's own, where it is a plain word. When it came is noted too."""
    given = _all(scope["headers"], b"x-request-id")
    name = given[0] if len(given) == 1 and REQUEST_ID.fullmatch(given[0]) else uuid.uuid4().hex.encode()
    scope.setdefault("state", {}).update(request_id=name.decode(), arrived=time.perf_counter())
    return name


def _named(send: Send, name: bytes) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", []), (b"x-request-id", name), *SAFE]
            message = {**message, "headers": headers}
        await send(message)

    return sending


def _closing(error: ApiError) -> Response:
    """What is left of the body is not read."""
    response = error.response()
    if error.code in ("too_large", "timeout"):
        response.headers["Connection"] = "close"
    return response


def _replayed(body: bytes, receive: Receive) -> Receive:
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
