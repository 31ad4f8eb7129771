"""What is turned away before the model hears of it: limits, keys, strangers' pages, broken bodies, templates that hang."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from servers import CHAT, COMPLETIONS, RESPONSES, Running, read_reply, request, running

import duoserve
from duoserve.api.limits import MAX_BODY, MAX_HEADERS, Door, door, is_loopback
from duoserve.api.stream import EventStream
from duoserve.service import Limits

HELLO = [{"role": "user", "content": "Hi"}]
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "demo", "messages": HELLO, "max_tokens": 1},
    COMPLETIONS: {"model": "demo", "prompt": "Hi", "max_tokens": 1},
    RESPONSES: {"model": "demo", "input": "Hi", "max_output_tokens": 1},
}
HUGE = 2**63


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with duoserve.load(None, predictor="none", sequences=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: Any) -> Iterator[Running]:
    with running(engine, Limits(active=2, queue=64, per_client=64), stall_s=0.5) as server:
        yield server


def answered(server: Running) -> int:
    return sum(server.service.finished.values())


@pytest.fixture
def untouched(server: Running) -> Iterator[None]:
    """The engine was not asked, and answers afterwards."""
    before = answered(server)
    yield
    assert server.idle() and answered(server) == before
    assert server.ask(CHAT, ASKED[CHAT]).status == 200


NAN = "NAN"  # written as the bare word, which is no JSON
WRONG: list[Any] = ["1", [], {}, True]


def numbers(least: float, most: float, whole: bool) -> list[Any]:
    """Everything just outside, far outside, and of other kinds."""
    step = 1 if whole else 0.001
    return [least - step, most + step, -HUGE * 4, HUGE * 4, NAN, "1", [], {}, *([0.5 + least] if whole else [])]


NUMBERS: list[tuple[str, str, float, float, bool]] = [
    (CHAT, "n", 1, 8, True),
    (CHAT, "temperature", 0, 2, False),
    (CHAT, "top_p", 0.001, 1, False),
    (CHAT, "top_k", 0, 2**31 - 1, True),
    (CHAT, "min_p", 0, 1, False),
    (CHAT, "repetition_penalty", 0.1, 10, False),
    (CHAT, "presence_penalty", -2, 2, False),
    (CHAT, "frequency_penalty", -2, 2, False),
    (CHAT, "seed", -(2**63), 2**63 - 1, True),
    (CHAT, "max_tokens", 1, 2**31 - 1, True),
    (CHAT, "max_completion_tokens", 1, 1, True),
    (CHAT, "top_logprobs", 0, 20, True),
    (COMPLETIONS, "logprobs", 0, 20, True),
    (COMPLETIONS, "n", 1, 8, True),
    (COMPLETIONS, "max_tokens", 1, 2**31 - 1, True),
    (RESPONSES, "max_output_tokens", 1, 2**31 - 1, True),
    (RESPONSES, "temperature", 0, 2, False),
]


@pytest.mark.parametrize(("path", "name", "least", "most", "whole"), NUMBERS, ids=lambda v: str(v))
def test_numbers_out_of_range_are_refused_by_name(
    server: Running, untouched: None, path: str, name: str, least: float, most: float, whole: bool
) -> None:
    beside = {"logprobs": True} if name == "top_logprobs" else {}
    for value in numbers(least, most, whole):
        body = json.dumps(ASKED[path] | beside | {name: value}).replace(f'"{NAN}"', "NaN").encode()
        reply = server.ask(path, body)
        assert reply.status == 400, (value, reply.body)
        error = reply.error
        assert error["param"] == name or value in (NAN, HUGE * 4, -HUGE * 4) or error["code"] == "invalid_value", (
            value,
            error,
        )


@pytest.mark.parametrize(("path", "name", "least", "most", "whole"), NUMBERS, ids=lambda v: str(v))
def test_numbers_at_their_limits_are_taken(
    server: Running, path: str, name: str, least: float, most: float, whole: bool
) -> None:
    beside = {"logprobs": True} if name == "top_logprobs" else {}
    for value in (least, most):
        if name.startswith("max_") and value > 1:
            beside = {"stop": None, "logit_bias": {"0": 100}}  # ends at once: the clamp is what is tested
            beside = beside if path != RESPONSES else {}
            if path == RESPONSES:
                continue
        reply = server.ask(path, ASKED[path] | beside | {name: value})
        assert reply.status == 200, (value, reply.body)


def text(n: int) -> str:
    return "x" * n


LISTS: list[tuple[str, str, Any, Any]] = [
    # where, what, at the limit, beyond it
    (CHAT, "stop", [text(256)] * 4, [text(2)] * 5),
    (CHAT, "stop", text(256), text(257)),
    (CHAT, "stop", "a", ""),
    (CHAT, "logit_bias", {str(n): 1 for n in range(1024)}, {str(n): 1 for n in range(1025)}),
    (CHAT, "logit_bias", {"1": -100}, {"1": -101}),
    (CHAT, "logit_bias", {"4095": 1}, {"99999999": 1}),
    (CHAT, "logit_bias", {}, {"one": 1}),
    (CHAT, "logit_bias", {}, {"1": None}),
    (CHAT, "messages", HELLO, []),
    (CHAT, "messages", HELLO, HELLO * 4097),
    (CHAT, "messages", HELLO, "Hi"),
    (CHAT, "messages", HELLO, [{"role": "user"}]),
    (CHAT, "messages", HELLO, [{"role": "user", "content": 5}]),
    (CHAT, "messages", HELLO, [{"role": "user", "content": []}]),
    (CHAT, "messages", HELLO, [{"role": "robot", "content": "Hi"}]),
    (CHAT, "messages", HELLO, [{"role": "user", "content": "Hi", "colour": 1}]),
    (
        CHAT,
        "messages",
        HELLO,
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254"}}]}],
    ),
    (CHAT, "user", text(256), text(257)),
    (CHAT, "stream", False, "yes"),
    (CHAT, "stream_options", None, {"include_usage": True}),
    (COMPLETIONS, "prompt", ["Hi"] * 3, ["Hi"] * 129),
    (COMPLETIONS, "prompt", [5], []),
    (COMPLETIONS, "prompt", [[5]], [[]]),
    (COMPLETIONS, "prompt", [4095], [4096]),
    (COMPLETIONS, "prompt", [0], [-1]),
    (COMPLETIONS, "prompt", [5], [5.5]),
    (COMPLETIONS, "prompt", [5], [5, "a"]),
    (COMPLETIONS, "prompt", "a", ""),
    (COMPLETIONS, "max_tokens", 1, 0),
    (RESPONSES, "input", "Hi", []),
    (RESPONSES, "metadata", {str(n): "" for n in range(16)}, {str(n): "" for n in range(17)}),
    (RESPONSES, "metadata", {text(64): text(512)}, {text(65): ""}),
    (RESPONSES, "input", "Hi", [{"type": "item_reference", "id": "x"}]),
]


@pytest.mark.parametrize(("path", "name", "within", "beyond"), LISTS, ids=lambda v: str(v)[:30])
def test_lists_and_texts_have_bounds(server: Running, path: str, name: str, within: Any, beyond: Any) -> None:
    assert server.ask(path, ASKED[path] | {name: within}).status == 200
    before = answered(server)
    reply = server.ask(path, ASKED[path] | {name: beyond})
    assert reply.status == 400 and answered(server) == before, reply.body
    assert reply.error["message"]


UNSUPPORTED: dict[str, dict[str, Any]] = {
    CHAT: {"colour": 1, "store": True, "modalities": ["audio"], "audio": {}, "functions": [], "reasoning_effort": "low",
           "service_tier": "flex", "best_of": 1, "chat_template_kwargs": {}, "metadata": {"a": "b"}},
    COMPLETIONS: {"suffix": "x", "best_of": 2, "messages": HELLO, "use_beam_search": True},
    RESPONSES: {"store": True, "previous_response_id": "resp_1", "background": True, "include": ["x"], "n": 2,
                "conversation": "c", "truncation": "auto", "reasoning": {"effort": "low"}},
}  # fmt: skip


@pytest.mark.parametrize(("path", "name"), [(p, n) for p, names in UNSUPPORTED.items() for n in names])
def test_what_is_not_supported_is_refused_by_name(server: Running, path: str, name: str) -> None:
    reply = server.ask(path, ASKED[path] | {name: UNSUPPORTED[path][name]})
    assert reply.status == 400
    assert reply.error["param"] == name and reply.error["message"].startswith(f"{name}: ")


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[1]",
    "not UTF-8": b'{"model": "\xff"}',
    "NaN": b'{"model": "demo", "n": NaN}',
    "infinity": b'{"model": "demo", "temperature": Infinity}',
    "beyond a double": b'{"model": "demo", "temperature": 1e999}',
    "an integer of 10 000 digits": b'{"model": "demo", "n": ' + b"9" * 10_000 + b"}",
    "half a surrogate": b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "half a surrogate in a name": b'{"\\udfff": 1}',
    "half a surrogate in a token's name": b'{"model": "demo", "prompt": "a", "logit_bias": {"\\ud800": 1}}',
    "100 000 deep": b"[" * 100_000 + b"]" * 100_000,
    "100 000 deep, open": b'{"a":' * 100_000,
    "65 deep": b'{"a":' * 65 + b"1" + b"}" * 65,
    "a name twice": b'{"model": "demo", "model": "demo"}',
    "two million values": b"[" + b"1," * 2_000_000 + b"1]",
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
@pytest.mark.parametrize("what", BODIES)
def test_a_broken_body_is_a_400_and_the_server_lives(server: Running, path: str, what: str) -> None:
    before = answered(server)
    reply = server.ask(path, BODIES[what])
    assert reply.status == 400 and reply.error["code"] == "invalid_json", reply.body
    assert answered(server) == before and server.ask("/health").status == 200


def test_whole_surrogate_pairs_and_64_levels_are_fine(server: Running) -> None:
    body = b'{"model": "demo", "max_tokens": 1, "messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    assert server.ask(CHAT, body).status == 200
    deep = json.dumps(ASKED[CHAT])[:-1].encode() + b', "a":' + b'{"a":' * 63 + b"1" + b"}" * 64
    assert server.ask(CHAT, deep).error["code"] == "unsupported"  # parsed, then refused by name


def test_a_body_has_a_cap_whether_it_is_announced_or_not(server: Running, untouched: None) -> None:
    empty = len(json.dumps(ASKED[COMPLETIONS] | {"prompt": ""}))
    fits = server.ask(COMPLETIONS, ASKED[COMPLETIONS] | {"prompt": "x" * (MAX_BODY - empty)})
    assert fits.status == 400 and fits.error["code"] == "context_length_exceeded"
    over = server.ask(COMPLETIONS, ASKED[COMPLETIONS] | {"prompt": "x" * (MAX_BODY - empty + 1)})
    assert over.status == 413 and over.error["code"] == "too_large"
    head = {"content-type": "application/json"}
    with server.connect() as connection:  # far too much is refused before any of it comes
        connection.sendall(request("POST", CHAT, None, server.port, head | {"content-length": str(64 << 20)}))
        assert read_reply(connection).status == 413
    with server.connect() as connection:  # unannounced
        connection.sendall(request("POST", CHAT, None, server.port, head | {"transfer-encoding": "chunked"}))
        for _ in range(9):
            connection.sendall(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert read_reply(connection).status == 413


def test_headers_have_a_cap(server: Running) -> None:
    for n_bytes, statuses in (
        (32 << 10, (200,)),
        (MAX_HEADERS, (431, 400)),
        (70 << 10, (431, 400)),
        (512 << 10, (431, 400)),
    ):
        with server.connect() as connection:
            sent = request("GET", "/v1/models", None, server.port, {"x-long": "y" * n_bytes})
            try:
                connection.sendall(sent)
                reply = read_reply(connection)
            except (ConnectionError, ValueError, IndexError):  # cut off while we still sent
                assert n_bytes >= 512 << 10
                continue
            assert reply.status in statuses
    with server.connect() as connection:
        connection.sendall(request("GET", "/v1/models?" + "q" * MAX_HEADERS, None, server.port))
        assert read_reply(connection).status in (431, 400)
    assert server.ask("/health").status == 200


def test_only_json_is_taken_and_only_where_there_is_a_route(server: Running) -> None:
    body = json.dumps(ASKED[CHAT]).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp"):
        assert server.ask(CHAT, body, content_type=kind).error["code"] == "content_type"
    assert server.ask(CHAT, body, content_type="application/json; charset=utf-8").status == 200
    assert server.ask("/v1/nothing").status == 404 and server.ask("/v1/nothing").error["code"] == "not_found"
    assert server.ask(CHAT).status == 405 and server.ask(CHAT).headers["allow"] == "POST"
    for path in ("/docs", "/redoc", "/../etc/passwd", "/%2e%2e/etc/passwd", "//etc/passwd"):
        assert server.ask(path).status == 404


def test_an_overlong_prompt_is_refused_with_both_numbers_and_early(server: Running, untouched: None) -> None:
    ctx = server.host.model.engine.plan.ctx
    reply = server.ask(COMPLETIONS, ASKED[COMPLETIONS] | {"prompt": [5] * ctx})
    assert reply.status == 400 and f"has {ctx} tokens, the context {ctx}" in reply.error["message"]
    reply = server.ask(CHAT, ASKED[CHAT] | {"messages": [{"role": "user", "content": "a b " * (ctx // 2)}]})
    assert reply.error["code"] == "context_length_exceeded"
    reply = server.ask(CHAT, ASKED[CHAT] | {"messages": [{"role": "user", "content": "ab " * (2 << 20)}]})
    assert f"tokens, the context {ctx}" in reply.error["message"] and "at least" in reply.error["message"]


# Keys and strangers

KEY = "a-key-of-some-length"
SCRIPTS = ("answer", "app", "asides", "markdown", "picture", "server", "store", "turns")


def test_every_route_but_health_and_assets_wants_the_key(engine: Any) -> None:
    with running(engine, door=Door(key=KEY, open_paths=frozenset({"/health"}))) as server:
        paths = {route.path: min(route.methods) for route in server.app.routes}  # GET before HEAD
        assert {CHAT, COMPLETIONS, RESPONSES, "/v1/models", "/metrics", "/health", "/openapi.json"} <= set(paths)
        opened = {"/health", "/", "/icon.svg", "/style.css", *(f"/{name}.js" for name in SCRIPTS)}
        assert opened <= set(paths)
        wrong = [{}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"x_api_key": KEY[:-1]},
                 {"x_api_key": KEY + "x"}, {"authorization": f"Basic {KEY}"}, {"x_api_key": ""}]  # fmt: skip
        right = [{"authorization": f"Bearer {KEY}"}, {"x_api_key": KEY}, {"authorization": f"bearer {KEY}"}]
        for path, method in [*paths.items(), ("/nowhere", "GET"), ("/Health", "GET"), ("/health/", "GET")]:
            body = ASKED.get(path, {}) if method == "POST" else None
            if path in opened:
                assert server.ask(path).status == 200
                continue
            for headers in wrong:
                reply = server.ask(path, body, method, **headers)
                assert reply.status == 401 and reply.error["code"] == "unauthorized", path
                assert reply.headers["www-authenticate"] == "Bearer" and KEY not in reply.body.decode()
            for headers in right:
                assert server.ask(path, body, method, **headers).status != 401


HOSTS = [
    ("127.0.0.1:PORT", 200), ("localhost:PORT", 200), ("LOCALHOST", 200), ("[::1]:PORT", 200), ("localhost.", 200),
    ("evil.example", 403), ("evil.example:PORT", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403),
    ("192.168.1.5", 403), ("0.0.0.0:PORT", 403), ("127.0.0.1@evil.example", 403), ("evil.example#127.0.0.1", 403),
    ("127.0.0.1:80:80", 403), ("", 403), ("2130706433", 403), ("0x7f000001", 403), ("127.1", 403),
    ("[::ffff:127.0.0.1]", 403), ("localhost evil", 403),
]  # fmt: skip


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_only_our_own_names_are_answered(server: Running, host: str, status: int) -> None:
    reply = server.ask("/v1/models", host=host.replace("PORT", str(server.port)))
    assert reply.status == status or (status == 403 and reply.status == 400), reply


def test_a_missing_or_second_host_is_refused(server: Running) -> None:
    for head in (
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
    ):
        with server.connect() as connection:
            connection.sendall(head)
            assert read_reply(connection).status == 400


ORIGINS = [
    ("http://127.0.0.1:PORT", 200), ("http://localhost:PORT", 403), ("http://evil.example", 403), ("null", 403),
    ("http://127.0.0.1", 403), ("https://127.0.0.1:PORT", 200), ("http://127.0.0.1:PORT.evil.example", 403),
    ("file://", 403), ("http://127.0.0.1:1", 403), ("", 403),
]  # fmt: skip


@pytest.mark.parametrize(("origin", "status"), ORIGINS)
def test_a_page_of_another_site_is_refused(server: Running, origin: str, status: int) -> None:
    reply = server.ask("/v1/models", origin=origin.replace("PORT", str(server.port)))
    assert reply.status == status
    assert not any(name.startswith("access-control") for name in reply.headers)
    assert server.ask(CHAT, method="OPTIONS", origin="http://evil.example").status == 403


def test_beyond_loopback_addresses_in_figures_are_ours() -> None:
    outside = door("0.0.0.0", KEY, ["My.Box"])
    assert outside.any_address and {"my.box", "localhost"} <= outside.hosts
    assert not door("127.0.0.1", None).any_address
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "[::1]", "127.9.9.9", "localhost", "0.0.0.0", "box")] == [
        True, True, True, True, True, False, False,
    ]  # fmt: skip


def test_a_request_has_a_name(server: Running) -> None:
    assert server.ask("/health", x_request_id="mine-1.2_3").headers["x-request-id"] == "mine-1.2_3"
    names = {server.ask("/health").headers["x-request-id"] for _ in range(3)}
    assert len(names) == 3
    for strange in ("a b", "x" * 129, "<script>"):
        assert server.ask("/health", x_request_id=strange).headers["x-request-id"] != strange
    assert server.ask("/health").headers["content-security-policy"].startswith("default-src 'self'")


# Templates and clients that hang

BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% for i in range(2) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endfor %}{% endmacro %}{{ m(60) }}",
    "{% set ns = namespace(x=0) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set ns.x = ns.x + 1 %}"
    "{% endfor %}{% endfor %}",
]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{% set x = lipsum.__globals__ %}{{ x['os'].popen('touch CANARY') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(lipsum) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ range(10**9)|list }}",
]


@pytest.mark.parametrize("template", [*BOMBS, *ESCAPES], ids=lambda t: t[:40])
def test_a_hostile_template_gets_nowhere(
    server: Running, engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, template: str
) -> None:
    monkeypatch.setattr("duoserve.api.rendering.RENDER_S", 0.3)
    monkeypatch.setattr(engine.tokenizer, "chat_template", template.replace("CANARY", str(tmp_path / "canary")))
    waiting = server.open(CHAT, ASKED[CHAT])
    answered = [server.ask("/health").status for _ in range(5)]
    reply = read_reply(waiting)
    assert answered == [200] * 5 and not list(tmp_path.iterdir())
    assert reply.status == 400 and reply.error["code"] in ("e_template", "e_prompt"), reply.body


def test_a_client_that_never_reads_is_dropped(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stalled socket does to the sender: it waits, here without the megabytes that kernels take first."""
    import asyncio

    send = EventStream._pump

    async def stalled(self: EventStream, sending: Any) -> None:
        async def never(message: Any) -> None:
            if b"G" in message.get("body", b""):
                await asyncio.sleep(3600)
            await sending(message)

        await send(self, never)

    monkeypatch.setattr(EventStream, "_pump", stalled)
    body = ASKED[CHAT] | {"max_tokens": 3000, "ignore_eos": True, "stream": True, "temperature": 0}
    body["messages"] = [{"role": "user", "content": "What is Git?"}]
    connection = server.open(CHAT, body)
    assert server.idle(20)
    connection.close()


def test_slow_and_broken_senders_keep_nobody_else_waiting(server: Running) -> None:
    slow = [server.connect() for _ in range(50)]
    for n, connection in enumerate(slow):
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"[: 10 + n])
    broken = [
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/1.1\r\nA\x00B: c\r\n\r\n",
        b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ]
    for data in broken:
        with server.connect(5) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1 << 12)
            assert not answer or int(answer.split()[1]) < 500
    assert server.ask(CHAT, ASKED[CHAT]).status == 200
    for connection in slow:
        connection.close()
