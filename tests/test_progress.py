"""How far a prompt has been read is told in the stream of who asks for it, and to nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from servers import CHAT, COMPLETIONS, Reply, Running, check_chat, events, running

import duoserve
from duoserve import repl
from duoserve.api import progress
from duoserve.remote import Server
from duoserve.service import Limits

LONG = [{"role": "user", "content": "What is a word? " * 120}]
ASKED = {"model": "demo", "messages": LONG, "max_tokens": 4, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with duoserve.load(None, predictor="none", sequences=2) as engine, running(engine, Limits(active=2)) as server:
        yield server


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.002)


def without_progress(reply: Reply) -> Reply:
    return reply._replace(chunks=[chunk for chunk in reply.chunks if b"prompt_progress" not in chunk])


@pytest.mark.parametrize("n", [1, 2])
def test_the_reading_of_a_prompt_is_told_before_its_answer(server: Running, n: int) -> None:
    asked = ASKED | {"n": n, "stream_options": {"include_usage": True}}
    reply = server.ask(CHAT, asked | {"return_progress": True})
    chunks = events(reply)
    at = [i for i, chunk in enumerate(chunks) if "prompt_progress" in chunk]
    texts = [i for i, chunk in enumerate(chunks) if any(c["delta"].get("content") for c in chunk["choices"])]
    assert at and texts and at[-1] < texts[0]
    told = [chunks[i]["prompt_progress"] for i in at]
    assert {t["total"] for t in told} == {n * chunks[-1]["usage"]["prompt_tokens"]}
    processed = [t["processed"] for t in told]
    assert processed == sorted(set(processed)) and 0 < processed[-1] <= told[0]["total"]
    assert all(chunks[i]["choices"] == [] and chunks[i]["id"] == chunks[0]["id"] for i in at)
    assert check_chat(without_progress(reply), n) == check_chat(server.ask(CHAT, asked), n)


def test_who_did_not_ask_hears_nothing_of_it(server: Running) -> None:
    for more in ({}, {"return_progress": False}):
        reply = server.ask(CHAT, ASKED | more)
        assert b"prompt_progress" not in reply.body and check_chat(reply, usage=False)


def test_it_is_for_streams_and_a_yes_or_no(server: Running) -> None:
    whole = {key: value for key, value in ASKED.items() if key != "stream"}
    assert "is for stream: true" in server.ask(CHAT, whole | {"return_progress": True}).error["message"]
    for wrong in (1, "yes", None, []):
        assert server.ask(CHAT, ASKED | {"return_progress": wrong}).error["param"] == "return_progress"
    asked = {"model": "demo", "prompt": "a", "stream": True, "return_progress": True}
    assert server.ask(COMPLETIONS, asked).error["code"] == "unsupported"


def test_a_strict_client_that_asks_survives_it(server: Running) -> None:
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True, timeout=60
    )
    chunks = list(client.chat.completions.create(**ASKED, extra_body={"return_progress": True}))
    assert any("prompt_progress" in (chunk.model_extra or {}) for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_who_leaves_while_the_prompt_is_read_gives_the_place_back(server: Running) -> None:
    connection = server.open(CHAT, ASKED | {"return_progress": True, "max_tokens": 3000, "ignore_eos": True})
    while b"prompt_progress" not in connection.recv(1 << 14):
        pass
    connection.close()
    assert server.idle(10)


def test_an_answer_that_fails_ends_with_its_error(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **more: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(server.host.model.engine.runtime, "run", failing, raising=False)
    reply = server.ask(CHAT, ASKED | {"return_progress": True})
    assert b"the disk is gone" in reply.chunks[-1] and b"[DONE]" not in reply.body


def test_a_chat_with_a_server_shows_how_far(server: Running, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    show = repl._Progress("token")
    told: list[tuple[int, int]] = []

    def hear(done: int, total: int) -> None:
        told.append((done, total))
        show.layer(done, total)

    answer = Server(server.url).generate(LONG, on_text=show.text, on_layer=hear, max_new_tokens=2, do_sample=False)
    assert told and {total for _, total in told} == {answer.prompt_tokens}
    out, err = capfd.readouterr()
    assert f"\rreading the prompt: token {told[-1][0] + 1} of {answer.prompt_tokens}" in err
    assert err.endswith("\r") and out == answer.text
