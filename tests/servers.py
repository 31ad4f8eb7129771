"""A real server on a real socket, in this process; raw requests; what a stream of events must be."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from duoserve import serving
from duoserve.api.app import make_app
from duoserve.api.host import Host
from duoserve.api.limits import Door
from duoserve.service import Limits, Service

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


class Reply(NamedTuple):
    """`chunks`: the body as it was cut by HTTP's chunked encoding; one where it was not."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's envelope, whole."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
        return error


class Running:
    """A server and who answers behind it."""

    def __init__(self, host: Host, port: int, app: Any, server: Any):
        self.host, self.port, self.app, self.server = host, port, app, server

    @property
    def service(self) -> Service:
        return self.host.model.service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 60) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def open(self, path: str, body: Any, **headers: str) -> socket.socket:
        """A connection on which a request has been sent, whole."""
        connection = self.connect()
        connection.sendall(request("POST", path, body, self.port, headers))
        return connection

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Reply:
        """One request on a connection of its own. `body` as JSON, or as the bytes it is."""
        with self.connect() as connection:
            connection.sendall(request(method or ("GET" if body is None else "POST"), path, body, self.port, headers))
            return read_reply(connection)

    def idle(self, within_s: float = 30) -> bool:
        """Wait until nothing is active or waits."""
        until = time.monotonic() + within_s
        while self.service.active or self.service.queued:
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True


@contextmanager
def running(
    engine: Any, limits: Limits | None = None, door: Door | None = None, drain_s: float = 5.0, **options: Any
) -> Iterator[Running]:
    """A server of a loaded engine. `engine` None: of a model that is still loading."""
    host = Host("demo")
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(host, door, **options)
    server = serving.make_server(app, host, drain_s)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    service = Service(engine, limits) if engine is not None else None
    if service is not None:
        host.ready(engine, service)
    try:
        yield Running(host, listener.getsockname()[1], app, server)
    finally:
        if service is not None:
            service.drain(0)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        if service is not None:
            service.close()


def request(method: str, path: str, body: Any, port: int, headers: dict[str, str] | None = None) -> bytes:
    given = {name.replace("_", "-").lower(): value for name, value in (headers or {}).items()}
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"host": f"127.0.0.1:{port}", "connection": "close"}
    if body is not None:
        sent |= {"content-type": "application/json", "content-length": str(len(data))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in (sent | given).items() if v is not None)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


def read_reply(connection: socket.socket) -> Reply:
    data = b""
    while piece := _received(connection):
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        return Reply(int(first.split()[1]), headers, list(_chunks(rest)))
    return Reply(int(first.split()[1]), headers, [rest])


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except ConnectionResetError:  # it answered before it had read all that we sent
        return b""


def _chunks(data: bytes) -> Iterator[bytes]:
    while data:
        size, _, data = data.partition(b"\r\n")
        n = int(size, 16)
        if n == 0:
            return
        yield data[:n]
        assert data[n : n + 2] == b"\r\n"
        data = data[n + 2 :]
    raise AssertionError("the stream was cut off")


def events(reply: Reply) -> list[Any]:
    """Each chunk is whole events of whole characters; the last of them [DONE]."""
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream"), reply
    found: list[Any] = []
    for chunk in reply.chunks:
        text = chunk.decode()  # a split character raises
        assert text.endswith("\n\n"), text
        for line in text.strip().split("\n"):
            if line.startswith("data: "):
                found.append(line[6:])
            else:
                assert line.startswith((":", "event: ")) or line == "", line
    assert found.pop() == "[DONE]"
    return [json.loads(line) for line in found]


def check_chat(reply: Reply, n: int = 1, usage: bool = True) -> list[str]:
    """What every client of chat streams relies on; the choices' texts."""
    chunks = events(reply)
    if usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] >= 1
        assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = []
    for index in range(n):
        mine = [c for c in choices if c["index"] == index]
        assert [c["delta"].get("role") for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] in ("stop", "length", "tool_calls")
        texts.append("".join(c["delta"].get("content") or "" for c in mine))
    assert {c["index"] for c in choices} == set(range(n))
    return texts
