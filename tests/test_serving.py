"""`duoserve serve` as a process of its own: alive while it loads, drained when told to end; and `duoserve chat --url`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import CHAT, Running, read_reply, running

import duoserve
from duoserve import cli
from duoserve.core import Refusal
from duoserve.remote import RemoteConversation, Server
from duoserve.service import Limits

ROOT = Path(__file__).parent.parent
LONG = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is Git?"}],
    "max_tokens": 3000,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with duoserve.load(None, predictor="none", sequences=2) as engine:
        yield engine


class Process(Running):
    """A server in a process."""

    def __init__(self, process: subprocess.Popen[str], port: int):
        super().__init__(None, port, None, None)  # type: ignore[arg-type]
        self.process = process


@contextmanager
def serving(*options: str) -> Iterator[Process]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "duoserve.cli", "serve", "--port", "0", "--predictor", "none", *options]
    with subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            first = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", first)
            assert found, first + process.stderr.read()
            yield Process(process, int(found[1]))
        finally:
            process.kill()


def answered(server: Process, path: str = "/health") -> Any:
    """Its first answer: the port is bound before anything listens on it."""
    until = time.monotonic() + 60
    while True:
        try:
            return server.ask(path)
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_a_process_is_alive_while_it_loads_and_drains_when_told_to_end() -> None:
    with serving("--drain", "1", "--parallel", "1") as server:
        health = answered(server)
        assert health.status == 503 and health.json["status"] == "loading" and health.json["progress"]["seconds"] < 30
        assert server.ask(CHAT, LONG).error["code"] == "loading"
        seen = {"loading"}
        while server.ask("/health").status != 200:
            seen.add(server.ask("/health").json["status"])
            time.sleep(0.1)
        assert seen <= {"loading", "ready"}
        stream, whole = server.open(CHAT, LONG | {"stream": True}), server.open(CHAT, LONG)  # one runs, one waits
        while b"content" not in stream.recv(1 << 14):
            pass
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        left = b""
        while piece := stream.recv(1 << 16):
            left += piece
        assert b'"code": "shutting_down"' in left and b"[DONE]" not in left and left.endswith(b"0\r\n\r\n")
        reply = read_reply(whole)
        assert reply.status == 503 and reply.error["code"] == "shutting_down" and reply.headers["retry-after"]
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 1 + 5 + 10  # the drain, its bound, and a busy machine


def test_a_process_ends_at_once_while_it_loads() -> None:
    with serving() as server:
        answered(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--host", "0.0.0.0"), "0 keys are asked for"),
        (("--host", "::"), "0 keys are asked for"),
        (("--api-key", "short"), "5 characters"),
        (("--budget", "six"), "E_SIZE"),
        (("--parallel", "0"), "E_USAGE"),
        (("--queue", "-1"), "E_USAGE"),
        (("--port", "70000"), "E_USAGE"),
    ],
)
def test_what_cannot_be_served_is_one_line(options: tuple[str, ...], says: str, capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["duoserve", "serve", *options])
    with pytest.raises(SystemExit) as left:
        cli.main()
    err = capfd.readouterr().err
    assert left.value.code == 2 and says in err and err.count("\n") == 1


def test_answers_under_way_end_when_there_is_time(engine: Any) -> None:
    with running(engine, Limits(active=1), drain_s=60) as server:
        stream, kept = server.open(CHAT, LONG | {"max_tokens": 30, "stream": True}), server.connect()
        while b"content" not in stream.recv(1 << 14):
            pass
        server.server.should_exit = True
        assert kept.recv(1) == b""  # idle connections are closed
        left = b""
        while piece := stream.recv(1 << 16):
            left += piece
        assert b'"finish_reason":"length"' in left and b"[DONE]" in left


# chat --url


def test_chat_talks_to_a_server(engine: Any, capfd: Any, monkeypatch: Any) -> None:
    with duoserve.load(None, predictor="none", sequences=2) as engine, running(engine, Limits(active=2)) as server:
        want = server.ask(CHAT, LONG | {"max_tokens": 8, "temperature": 0, "ignore_eos": False}).json
        said = want["choices"][0]["message"]["content"]
        ask = ["chat", "--url", server.url, "--temperature", "0", "--max-new-tokens", "8"]
        assert run(monkeypatch, *ask, "-p", "What is Git?", "--json") == 0
        out, err = capfd.readouterr()
        figures = json.loads(out.splitlines()[-1])
        assert out.startswith(said + "\n") and figures["text"] == said and figures["new_tokens"] == 8
        lines = iter(["What is Git?", "/stats", "/set seed 4", "/retry", "/clear", "/quit"])
        monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
        assert run(monkeypatch, *ask) == 0
        out, err = capfd.readouterr()
        assert out.count(said) == 2 and f"its figures at {server.url}/metrics" in out
        assert f"demo at {server.url}" in err
        for options, says in (
            (("--budget", "1GiB"), "--budget is the server's"),
            (("other",), "serves demo, not other"),
        ):
            assert run(monkeypatch, "chat", *options, "--url", server.url, "-p", "Hi") in (2, 3)
            assert says in capfd.readouterr().err
        assert run(monkeypatch, *ask, "-p", "word " * 5000) == 3
        assert "the server says: E_CTX" in capfd.readouterr().err


def run(monkeypatch: Any, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["duoserve", *args])
    return cli._guarded()


@contextmanager
def saying(*replies: bytes) -> Iterator[str]:
    """The address of one that says these things, whatever it is asked, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for reply in replies:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: " + reply)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(20)


def of(kind: str, body: bytes) -> bytes:
    return b"%b\r\ncontent-length: %d\r\n\r\n" % (kind.encode(), len(body)) + body


def test_what_serves_no_models_is_told_in_one_line() -> None:
    for reply in (of("text/html", b"<html>"), of("application/json", b"[7]"), of("application/json", b'{"data": []}')):
        with saying(reply) as url, pytest.raises(Refusal, match=r"E_URL: .* serves 0 models by OpenAI's API; check"):
            Server(url)


def test_a_server_that_dies_in_an_answer_is_told_in_one_line() -> None:
    """What came is not taken for an answer, and the chat goes on without it."""
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    said = {**chunk, "choices": [{"index": 0, "delta": {"content": "Git is"}, "finish_reason": None}]}
    models = b'{"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "x"}]}'
    stream = b"data: " + json.dumps(said).encode() + b"\n\n"
    begun = b"text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % len(stream) + stream + b"\r\n"
    with saying(of("application/json", models), begun) as url:
        chat, heard = RemoteConversation(Server(url)), list[str]()
        with pytest.raises(Refusal, match=r"E_URL: the answer of http://.* broke off; see that it runs"):
            chat.say("What is Git?", on_text=heard.append)
    assert heard == ["Git is"] and chat.messages == []
