"""Who comes while no more may wait: turned away at once, by the same rules as everybody, and no place is lost."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from servers import CHAT, COMPLETIONS, RESPONSES, Running, read_reply, request, running

import duoserve
from duoserve.api.limits import Door
from duoserve.api.turnstile import _is_whole
from duoserve.service import Limits

HELLO = [{"role": "user", "content": "What is Git?"}]
SHORT = {"model": "demo", "messages": HELLO, "max_tokens": 2, "temperature": 0}
LONG = SHORT | {"max_tokens": 3000, "ignore_eos": True, "stream": True}
KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with duoserve.load(None, predictor="none", sequences=2) as engine:
        yield engine


@contextmanager
def full(engine: Any, **headers: str) -> Iterator[Running]:
    """A server whose one place and whose queue of one are taken."""
    door = Door(key=KEY) if headers else None
    with running(engine, Limits(active=1, queue=1, per_client=100), door) as server:
        taken = [server.open(CHAT, LONG, **headers) for _ in range(2)]
        until(lambda: server.service.active == server.service.queued == 1 and turnstile(server).coming == 0)
        yield server
        for connection in taken:
            connection.close()
        assert server.idle() and turnstile(server).coming == 0


def turnstile(server: Running) -> Any:
    return server.app.state.turnstile


def until(what: Any, within_s: float = 20) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_server_turns_away_before_it_reads(engine: Any) -> None:
    with full(engine) as server:
        reached = watch(server)
        for path, body in ((CHAT, SHORT), (COMPLETIONS, {"colour": 1}), (RESPONSES, {}), (CHAT, b"no JSON")):
            reply = server.ask(path, body)
            assert reply.status == 503 and int(reply.headers["retry-after"]) >= 1
            assert reply.error["code"] == "overloaded" and reply.error["message"].startswith(
                "1 requests wait, at most 1"
            )
            assert reply.headers["connection"] == "close" and len(reply.headers["x-request-id"]) == 32
            assert reply.headers["x-content-type-options"] == "nosniff"
        assert reached == []
        assert server.ask("/health").status == 200 and reached == ["/health"]
        text = server.ask("/metrics").body.decode()
        assert 'duoserve_rejected_total{reason="queue"} 4.0' in text
        assert f'duoserve_requests_total{{route="{CHAT}",status="503"}} 2.0' in text


def watch(server: Running) -> list[str]:
    """The paths that the application is asked from now on."""
    found: list[str] = []
    inner = server.server.config.loaded_app

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        found.append(scope["path"])
        await inner(scope, receive, send)

    server.server.config.loaded_app = noting
    return found


def test_strangers_hear_nothing_of_a_full_queue(engine: Any) -> None:
    with full(engine, authorization=f"Bearer {KEY}") as server:
        assert server.ask(CHAT, SHORT).status == 401
        assert server.ask(CHAT, SHORT, x_api_key="wrong").status == 401
        assert server.ask(CHAT, SHORT, x_api_key=KEY).status == 503
        assert server.ask(CHAT, SHORT, x_api_key=KEY, host="evil.example").status == 403
        assert server.ask(CHAT, SHORT, x_api_key=KEY, origin="http://evil.example").status == 403
        assert server.ask(CHAT, SHORT, x_api_key=KEY, content_type="text/plain").status == 415
        assert server.ask(CHAT, SHORT, x_api_key=KEY, x_long="y" * (70 << 10)).status in (400, 431)


def test_what_does_not_come_whole_is_read_and_turned_away_all_the_same(engine: Any) -> None:
    with full(engine) as server, server.connect() as connection:
        whole = request("POST", CHAT, SHORT, server.port)
        for piece in (whole[:40], whole[40:-5], whole[-5:]):
            connection.sendall(piece)
            time.sleep(0.05)
        reply = read_reply(connection)
        assert reply.status == 503 and reply.error["code"] == "overloaded" and reply.headers["retry-after"]


def test_as_many_as_may_wait_are_answered_in_their_order_and_the_others_at_once(engine: Any) -> None:
    with running(engine, Limits(active=1, queue=5, per_client=100)) as server:
        order: list[int] = []
        submit = server.service.submit
        connections = [server.connect() for _ in range(30)]

        def noting(asked: Any, tell: Any) -> Any:
            def told(event: Any) -> None:
                if type(event).__name__ == "End":
                    order.append(asked.sampling.seed)
                tell(event)

            return submit(asked, told)

        server.service.submit = noting  # type: ignore[method-assign]
        for seed, connection in enumerate(connections):
            connection.sendall(request("POST", CHAT, SHORT | {"seed": seed}, server.port))
        statuses = [read_reply(connection).status for connection in connections]
        assert statuses.count(200) >= 6 and set(statuses) == {200, 503}
        assert order == sorted(order) and len(order) == statuses.count(200)
        assert turnstile(server).coming == 0


def test_a_request_goes_by_when_it_came_not_by_how_long_it_took_to_understand(engine: Any) -> None:
    from duoserve.service import End, Request, Service

    service, ended = Service(engine, Limits(active=1)), []
    ids = engine.encode("What is Git?")[0].tolist()

    def ask(name: str, arrived: float, client: str = "a") -> None:
        request = Request(ids, 2, client=client, arrived=arrived)
        service.submit(request, lambda event: ended.append(name) if isinstance(event, End) else None)

    with service._lock:  # nobody is admitted meanwhile
        ask("second", 2.0)
        ask("third", 3.0)
        ask("first", 1.0)
        ask("another's", 0.0, "b")
    until(lambda: len(ended) == 4)
    assert ended == ["first", "another's", "second", "third"]
    service.close()


def test_who_sends_slowly_or_leaves_keeps_no_place(engine: Any) -> None:
    with running(engine, Limits(active=1, queue=1, per_client=100)) as server:
        whole = request("POST", CHAT, SHORT, server.port)
        halves = [server.connect() for _ in range(20)]
        for connection in halves:
            connection.sendall(whole[:-1])
        time.sleep(0.05)
        assert turnstile(server).coming == 0 and server.ask(CHAT, SHORT).status == 200
        for connection in halves:
            connection.close()
        for _ in range(20):
            with server.connect() as connection:
                connection.sendall(whole)
        until(lambda: server.ask(CHAT, SHORT).status == 200)  # once all have come and gone
        for bad in (SHORT | {"n": 0}, SHORT | {"model": "x"}, b"{"):
            assert server.ask(CHAT, bad).status in (400, 404)
        assert turnstile(server).coming == 0 and server.ask(CHAT, SHORT).status == 200


def test_a_queue_of_none_still_answers_who_finds_a_free_place(engine: Any) -> None:
    with running(engine, Limits(active=1, queue=0, per_client=100)) as server:
        assert server.ask(CHAT, SHORT).status == 200
        stream = server.open(CHAT, LONG)
        until(lambda: server.service.active == 1)
        assert server.ask(CHAT, SHORT).status == 503
        stream.close()
        assert server.idle()


def test_a_connection_is_kept_between_requests_that_find_a_place(engine: Any) -> None:
    with running(engine, Limits(active=1, queue=1, per_client=100)) as server, server.connect() as connection:
        whole = request("POST", CHAT, SHORT, server.port, {"connection": "keep-alive"})
        for _ in range(3):
            connection.sendall(whole)
            assert answer(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(whole + whole)  # the second comes while the first is answered
        assert (answer(connection) + answer(connection)).count(b"HTTP/1.1 200") == 2
        assert turnstile(server).coming == 0


def answer(connection: socket.socket) -> bytes:
    """One reply of a connection that stays, by its length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(1)
    length = next(
        int(line.split(b":")[1]) for line in data.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    while length:
        data += (piece := connection.recv(length))
        length -= len(piece)
    return data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /health HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 1\r\n\r\n{}",
        b"POST /v1/chat/completions HTTP/1.1\r\nX: y\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nX: y\r\n\r\nContent-Length: 0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n{}",
        b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_only_one_small_whole_request_is_told_at_the_door(data: bytes) -> None:
    assert not _is_whole(data)
    assert _is_whole(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length:2\r\n\r\n{}")
