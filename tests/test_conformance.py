"""What the suites of llama.cpp and vLLM ask of a server of this kind, in our words, beyond what other files ask already."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from servers import CHAT, COMPLETIONS, RESPONSES, Running, check_chat, events, running

import duoserve
from duoserve.service import Limits

HELLO = [{"role": "user", "content": "What is Git?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with duoserve.load(None, predictor="none", sequences=2) as engine, running(engine, Limits(active=2)) as server:
        yield server


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": HELLO, "max_tokens": 6, "temperature": 0} | more


MESSAGES: list[Any] = [
    None,
    5,
    "Hi",
    {},
    {"role": "user", "content": "Hi"},
    [None],
    [5],
    ["Hi"],
    [[]],
    [{}],
    [{"content": "Hi"}],
    [{"role": None, "content": "Hi"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": {}}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
]


@pytest.mark.parametrize("messages", MESSAGES, ids=lambda m: json.dumps(m)[:50])
def test_messages_that_are_none_are_refused_where_they_are(server: Running, messages: Any) -> None:
    for streamed in (False, True):
        reply = server.ask(CHAT, chat(messages=messages, stream=streamed))
        assert reply.status == 400 and reply.headers["content-type"] == "application/json"
        assert reply.error["param"].startswith("messages") and reply.error["type"] == "invalid_request_error"


def test_what_cannot_be_streamed_is_no_stream(server: Running) -> None:
    ctx = server.host.model.engine.plan.ctx
    for path, asked in (
        (COMPLETIONS, {"model": "demo", "prompt": [5] * (ctx + 1)}),
        (CHAT, chat(messages=[{"role": "user", "content": "a b " * ctx}])),
        (RESPONSES, {"model": "demo", "input": "a b " * ctx}),
    ):
        reply = server.ask(path, asked | {"stream": True})
        assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"
        assert f"the context {ctx}" in reply.error["message"]


def test_an_answer_stops_where_the_context_ends_and_says_length(server: Running) -> None:
    ctx = server.host.model.engine.plan.ctx
    asked = {"model": "demo", "prompt": [5] * (ctx - 3), "max_tokens": 1000, "ignore_eos": True}
    reply = server.ask(COMPLETIONS, asked).json
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"] == {"prompt_tokens": ctx - 3, "completion_tokens": 3, "total_tokens": ctx}


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}], ids=str)
def test_usage_comes_only_to_who_asked(server: Running, options: Any) -> None:
    assert check_chat(server.ask(CHAT, chat(stream=True, stream_options=options)), usage=False)
    asked = {"model": "demo", "prompt": "Git", "max_tokens": 2, "stream": True, "stream_options": options}
    assert all("usage" not in chunk for chunk in events(server.ask(COMPLETIONS, asked)))


def test_streamed_logprobs_are_the_logprobs(server: Running) -> None:
    asked = chat(logprobs=True, top_logprobs=2)
    whole = server.ask(CHAT, asked).json["choices"][0]["logprobs"]["content"]
    chunks = [c for chunk in events(server.ask(CHAT, asked | {"stream": True})) for c in chunk["choices"]]
    streamed = [token for c in chunks for token in (c.get("logprobs") or {"content": []})["content"]]
    assert streamed == whole and len(whole) == 6
    asked = {"model": "demo", "prompt": "Git is", "max_tokens": 6, "temperature": 0, "logprobs": 2, "echo": True}
    whole = server.ask(COMPLETIONS, asked).json["choices"][0]["logprobs"]
    joined: dict[str, list[Any]] = {name: [] for name in whole}
    for chunk in events(server.ask(COMPLETIONS, asked | {"stream": True})):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            joined[name] += values
    assert joined == whole


@pytest.mark.parametrize(
    ("schema", "said"),
    [({"const": "42"}, '"42"'), ({"enum": [7]}, "7"), ({"const": True}, "true")],
    ids=str,
)
def test_what_only_one_answer_fits_is_that_answer(server: Running, schema: Any, said: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for streamed in (False, True):
        reply = server.ask(CHAT, chat(response_format=form, max_tokens=40, temperature=1, stream=streamed))
        text = check_chat(reply, usage=False)[0] if streamed else reply.json["choices"][0]["message"]["content"]
        assert json.loads(text) == json.loads(said)


FORMS: list[Any] = ["json_object", {}, {"type": 5}, {"type": "json_schema", "json_schema": 5}, {"type": "json_schema", "json_schema": {"schema": {}}}]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("form", FORMS, ids=lambda f: json.dumps(f)[:50])
def test_a_form_that_is_none_is_refused_by_name(server: Running, form: Any) -> None:
    reply = server.ask(CHAT, chat(response_format=form))
    assert reply.status == 400 and reply.error["param"].startswith("response_format")


def test_more_logprobs_than_there_are_do_not_hurt_the_next(server: Running) -> None:
    before = server.ask(CHAT, chat()).json["choices"]
    assert server.ask(CHAT, chat(logprobs=True, top_logprobs=21)).error["param"] == "top_logprobs"
    assert server.ask(COMPLETIONS, {"model": "demo", "prompt": "a", "logprobs": 21}).error["param"] == "logprobs"
    assert server.ask(CHAT, chat()).json["choices"] == before
