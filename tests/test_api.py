"""OpenAI's API as unmodified clients see it, over a real socket: types, streams, errors, places given back."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from servers import CHAT, COMPLETIONS, RESPONSES, Reply, Running, check_chat, events, running

import duoserve
from duoserve.service import Limits

HELLO = [{"role": "user", "content": "What is Git?"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with duoserve.load(None, predictor="none", sequences=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: Any) -> Iterator[Running]:
    with running(engine, Limits(active=4, queue=64, per_client=64)) as server:
        yield server
        assert server.idle()
    engine.runtime.cache.check()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True, timeout=60
    )


def texts(reply: Reply) -> list[str]:
    return [choice["message"]["content"] for choice in reply.json["choices"]]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": HELLO, "max_tokens": 5, "temperature": 0} | more


# Unmodified clients

CHATS: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": None, "max_completion_tokens": 3},
    {"temperature": None},
    {"temperature": 1.5, "seed": 3},
    {"top_p": 0.5, "temperature": 1},
    {"n": 2, "temperature": 1, "seed": 5},
    {"stop": "is"},
    {"stop": ["zz", "distributed", "\n"]},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 5},
    {"logprobs": True, "top_logprobs": 0},
    {"logit_bias": {"77": 100}},
    {"presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"seed": -1, "temperature": 1},
    {"user": "somebody"},
    {"response_format": {"type": "text"}},
    {"store": False, "service_tier": "auto", "parallel_tool_calls": True, "modalities": ["text"]},
    {"messages": [{"role": "system", "content": "Be brief."}, *HELLO]},
    {"messages": [{"role": "developer", "content": "Be brief."}, *HELLO]},
    {"messages": [*HELLO, {"role": "assistant", "content": "A tool."}, {"role": "user", "content": "Of whom?"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "is ls?"}]}]},
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("more", CHATS, ids=lambda m: json.dumps(m)[:60])
def test_the_openai_client_reads_chat_strictly(client: openai.OpenAI, more: dict[str, Any], streamed: bool) -> None:
    if not streamed:
        found = client.chat.completions.create(**chat(**more))
        assert [c.index for c in found.choices] == list(range(more.get("n", 1)))
        assert found.usage is not None and 1 <= found.usage.completion_tokens <= 10
        return
    chunks = list(client.chat.completions.create(**chat(**more), stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage is not None and chunks[-1].choices == []


TEXTS: list[dict[str, Any]] = [
    {},
    {"prompt": ["Git is", "ls is", "An index is"]},
    {"prompt": [5, 6, 7]},
    {"prompt": [[5, 6, 7], [8]]},
    {"echo": True},
    {"echo": True, "max_tokens": 0},
    {"n": 3, "temperature": 1, "seed": 1},
    {"logprobs": 2},
    {"stop": [" a"]},
    {"best_of": 1},
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("more", TEXTS, ids=lambda m: json.dumps(m)[:60])
def test_the_openai_client_reads_completions_strictly(
    client: openai.OpenAI, more: dict[str, Any], streamed: bool
) -> None:
    asked = {"model": "demo", "prompt": "Git is", "max_tokens": 4, "temperature": 0} | more
    if not streamed:
        found = client.completions.create(**asked)
        prompts = asked["prompt"] if isinstance(asked["prompt"], list) and asked["prompt"][0] != 5 else [0]
        assert len(found.choices) == len(prompts) * more.get("n", 1)
        return
    # OpenAI's own streams say finish_reason null until the end, which its types do not know: not in strict mode
    loose = openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0)
    chunks = list(loose.completions.create(**asked, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_the_openai_client_reads_responses_strictly(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_output_tokens": 16, "temperature": 0}
    inputs: list[Any] = [
        "What is Git?",
        HELLO,
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is Git?"}]}],
    ]
    said = {client.responses.create(**asked, input=text).output_text for text in inputs}
    assert len(said) == 1 and all(said)
    first = client.responses.create(**asked, input=HELLO, instructions="Be brief.", metadata={"a": "b"}, store=False)
    assert first.metadata == {"a": "b"} and first.instructions == "Be brief."
    again = [*HELLO, *[item.to_dict() for item in first.output], {"role": "user", "content": "And then?"}]
    assert client.responses.create(**asked, input=again).output_text  # type: ignore[arg-type]
    with client.responses.stream(**asked, input=HELLO) as stream:
        found = list(stream)
    kinds = [event.type for event in found]
    assert "".join(event.delta for event in found if event.type == "response.output_text.delta") in said
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_the_openai_client_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "duoserve"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_what_the_client_is_refused_it_can_name(client: openai.OpenAI, server: Running) -> None:
    ctx = server.host.model.engine.plan.ctx
    with pytest.raises(openai.BadRequestError, match=rf"has {ctx} tokens, the context {ctx}") as refused:
        client.completions.create(model="demo", prompt=[5] * ctx, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served; ask for 'demo'") as missing:
        client.chat.completions.create(**chat(model="gpt"))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="suffix: this field is not supported"):
        client.completions.create(model="demo", prompt="a", suffix="b")
    with pytest.raises(openai.BadRequestError, match="answers the call '1', which nobody waits for"):
        client.chat.completions.create(**chat(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]))


# Streams

GREEDY, SEEDED = {"temperature": 0}, {"temperature": 1.5, "seed": 11}


@pytest.mark.parametrize("how", [GREEDY, SEEDED, SEEDED | {"n": 2}], ids=["greedy", "seeded", "two choices"])
def test_a_streamed_text_is_the_text(server: Running, how: dict[str, Any]) -> None:
    asked = chat(max_tokens=16, **how)
    whole = [c["message"]["content"] for c in server.ask(CHAT, asked).json["choices"]]
    reply = server.ask(CHAT, asked | {"stream": True})
    assert check_chat(reply, how.get("n", 1), usage=False) == whole and whole[0]
    asked = {"model": "demo", "prompt": ["Git is", "An"], "max_tokens": 8, "echo": True} | how
    whole = [c["text"] for c in server.ask(COMPLETIONS, asked).json["choices"]]
    streamed = [""] * len(whole)
    for choice in itertools.chain(*(e["choices"] for e in events(server.ask(COMPLETIONS, asked | {"stream": True})))):
        streamed[choice["index"]] += choice["text"]
    assert streamed == whole


def test_two_seeds_differ_and_choices_do(server: Running) -> None:
    asked = [chat(temperature=1.5, seed=seed, n=2, max_tokens=12) for seed in (1, 1, 2)]
    found = [texts(server.ask(CHAT, body)) for body in asked]
    assert found[0] == found[1] != found[2] and found[0][0] != found[0][1]


def test_a_stop_string_is_not_told_streamed_or_whole(server: Running) -> None:
    text = server.ask(CHAT, chat(max_tokens=24)).json["choices"][0]["message"]["content"]
    stop = text[9:15]
    for streamed in (False, True):
        reply = server.ask(CHAT, chat(max_tokens=24, stop=[stop], stream=streamed))
        found = check_chat(reply, usage=False)[0] if streamed else reply.json["choices"][0]["message"]["content"]
        assert found == text[: text.index(stop)]


def streams(server: Running, count: int) -> int:
    """Of all kinds; each held to what `check_chat` says. How many characters had several bytes."""

    def one(seed: int) -> int:
        n = 1 + (seed % 10 == 0)
        asked = chat(temperature=2, seed=seed, n=n, max_tokens=2 + seed % 2, logprobs=seed % 3 == 0, stream=True)
        asked["messages"] = [{"role": "user", "content": f"Say {'é' * (seed % 3)} {seed}"}]
        usage = seed % 2 == 0
        if usage:
            asked["stream_options"] = {"include_usage": True}
        return sum(not text.isascii() for text in check_chat(server.ask(CHAT, asked), n, usage))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return sum(pool.map(one, range(count)))


def test_every_stream_is_as_clients_expect(server: Running) -> None:
    assert streams(server, 100) > 0


@pytest.mark.slow
def test_every_one_of_a_thousand_streams_is_as_clients_expect(server: Running) -> None:
    assert streams(server, 1000) > 0


def test_responses_stream_numbers_its_events_and_says_what_they_make(server: Running) -> None:
    reply = server.ask(RESPONSES, {"model": "demo", "input": "What is Git?", "max_output_tokens": 8, "stream": True})
    lines = [line.decode() for chunk in reply.chunks for line in chunk.splitlines() if line.startswith(b"data: ")]
    found = [json.loads(line[6:]) for line in lines]
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    text = "".join(e["delta"] for e in found if e["type"] == "response.output_text.delta")
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == text
    assert found[-1]["response"]["usage"]["output_tokens"] <= 8


# Logprobs


def test_echoed_logprobs_are_what_lm_eval_counts(server: Running, engine: Any) -> None:
    import torch

    ids = engine.encode("Git is a version control system")[0]
    asked = {"model": "demo", "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    found = server.ask(COMPLETIONS, asked).json["choices"][0]["logprobs"]
    with torch.inference_mode():
        want = engine.model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for at, (own, top) in enumerate(zip(found["token_logprobs"][1:-1], found["top_logprobs"][1:-1], strict=True)):
        assert own == pytest.approx(float(want[at, ids[at + 1]]), abs=1e-4)
        assert max(top.values()) == pytest.approx(float(want[at].max()), abs=1e-4)
    assert len(found["tokens"]) == len(ids) + 1 == len(found["text_offset"])


def test_a_chat_s_logprobs_spell_its_text(server: Running) -> None:
    asked = chat(max_tokens=20, temperature=2, seed=4, logprobs=True, top_logprobs=3, ignore_eos=True)
    choice = server.ask(CHAT, asked).json["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 20 and all(len(token["top_logprobs"]) == 3 for token in content)
    spelled = bytes(b for token in content for b in token["bytes"]).decode(errors="replace")
    assert spelled.replace("<|endoftext|>", "") == choice["message"]["content"]


# Places


def long(**more: Any) -> dict[str, Any]:
    return chat(max_tokens=3000, ignore_eos=True, **more)


def until(what: Any, within_s: float = 20) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_who_leaves_gives_the_place_back(server: Running, streamed: bool) -> None:
    connection = server.open(CHAT, long(stream=streamed))
    until(lambda: server.service.active == 1)
    if streamed:
        connection.recv(1 << 12)
    connection.close()
    assert server.idle(10)


def test_who_leaves_while_waiting_or_reading_the_prompt_gives_the_place_back(server: Running) -> None:
    prompt = [{"role": "user", "content": "word " * 600}]
    connections = [server.open(CHAT, long(stream=n % 2 == 0, messages=prompt)) for n in range(8)]
    until(lambda: server.service.active == 4 and server.service.queued == 4)
    for connection in connections:
        connection.close()
    assert server.idle(20)


def test_many_at_once_are_each_answered_as_alone(server: Running) -> None:
    questions = [f"What is {what}?" for what in ("Git", "ls", "Perl", "an index", "a shell", "Python")]

    def answer(question: str) -> str:
        asked = chat(messages=[{"role": "user", "content": question}], max_tokens=8)
        return server.ask(CHAT, asked).json["choices"][0]["message"]["content"]

    alone = [answer(question) for question in questions]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(answer, questions)) == alone


def test_a_full_queue_says_when_to_come_back(engine: Any) -> None:
    with running(engine, Limits(active=1, queue=1, per_client=2)) as server:
        busy = [server.open(CHAT, long(stream=True, user="a"))]
        until(lambda: server.service.active == 1)
        busy.append(server.open(CHAT, long(stream=True, user="a")))
        until(lambda: server.service.queued == 1)
        for user, status in (("a", 503), ("b", 503)):
            reply = server.ask(CHAT, chat(user=user))
            assert (
                reply.status == status
                and int(reply.headers["retry-after"]) >= 1
                and reply.error["code"] == "overloaded"
            )
        busy.pop().close()
        until(lambda: server.service.queued == 0)
        assert b'duoserve_rejected_total{reason="queue"} 2.0' in server.ask("/metrics").body
        busy.pop().close()
        assert server.idle()
    with running(engine, Limits(active=2, queue=8, per_client=1)) as server:
        busy = [server.open(CHAT, long(stream=True))]
        until(lambda: server.service.active == 1)
        reply = server.ask(CHAT, chat())
        assert reply.status == 429 and reply.error["code"] == "too_many_requests" and "retry-after" in reply.headers
        assert server.ask(CHAT, chat(user="another")).status == 200
        many = server.ask(COMPLETIONS, {"model": "demo", "prompt": ["a", "b", "c"], "max_tokens": 1, "user": "third"})
        assert len(many.json["choices"]) == 3  # more than may run at once: one after the other
        busy.pop().close()


def test_a_failing_disk_is_an_error_event_and_the_server_lives(server: Running, engine: Any) -> None:
    meet, broken = engine.runtime.run, threading.Event()

    def failing(*args: Any, **more: Any) -> Any:
        if broken.is_set():
            raise OSError("the disk is gone")
        return meet(*args, **more)

    engine.runtime.run = failing
    try:
        broken.set()
        assert server.ask(CHAT, chat()).error["message"].startswith("the answer failed (OSError: the disk is gone)")
        reply = server.ask(CHAT, chat(stream=True))
        assert reply.status == 200 and b"[DONE]" not in reply.body
        last = json.loads(reply.chunks[-1].removeprefix(b"data: "))
        assert last["error"]["code"] == "failed"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="the disk is gone"):
            list(client.chat.completions.create(**chat(), stream=True))
        broken.clear()
        assert server.ask(CHAT, chat()).status == 200
    finally:
        del engine.runtime.run


def test_an_answer_that_takes_too_long_is_an_error(engine: Any) -> None:
    with running(engine, Limits(active=1, generation_s=0.3)) as server:
        reply = server.ask(CHAT, long())
        assert reply.status == 503 and reply.error["code"] == "timeout" and "longer than 0 s" in reply.error["message"]
        assert b'"code": "timeout"' in server.ask(CHAT, long(stream=True)).chunks[-1]


def test_who_waits_too_long_is_told(engine: Any) -> None:
    with running(engine, Limits(active=1, queue_s=0.2)) as server:
        first = server.open(CHAT, long(stream=True))
        until(lambda: server.service.active == 1)
        reply = server.ask(CHAT, chat())
        assert reply.status == 503 and "waited 0 s for a place" in reply.error["message"]
        first.close()


def test_nothing_between_us_and_a_client_that_leaves(server: Running) -> None:
    """BaseHTTPMiddleware hides that a client left; httptools takes headers of any length."""
    from starlette.middleware.base import BaseHTTPMiddleware
    from uvicorn.protocols.http.h11_impl import H11Protocol

    assert not any(issubclass(m.cls, BaseHTTPMiddleware) for m in server.app.user_middleware)
    config = server.server.config
    config = server.server.config
    assert issubclass(config.http_protocol_class, H11Protocol) and config.h11_max_incomplete_event_size == 64 << 10
    assert config.timeout_graceful_shutdown is not None and config.limit_concurrency is None


# Health and figures


def test_a_server_that_loads_says_so(tmp_path: Any) -> None:
    with running(None) as server:
        server.host.progress(5, 20, "converting")
        health = server.ask("/health")
        assert health.status == 503 and health.json["status"] == "loading" and health.json["live"] is True
        assert health.json["progress"]["share"] == 0.25 and health.json["progress"]["what"] == "converting"
        reply = server.ask(CHAT, chat())
        assert reply.status == 503 and reply.error["code"] == "loading" and reply.headers["retry-after"] == "5"
        assert server.ask("/v1/models").json["data"][0]["id"] == "demo"
        assert b"duoserve_ready 0.0" in server.ask("/metrics").body


def test_health_and_figures_of_a_server_that_answers(server: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    assert server.ask("/health").json == {"live": True, "ready": True, "status": "ready", "model": "demo"}
    server.ask(CHAT, chat())
    server.ask("/nowhere/at/all")
    text = server.ask("/metrics").body.decode()
    found = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    for name in (
        "running",
        "queued",
        "experts_total",
        "expert_bytes_total",
        "resident_memory_bytes",
        "predictor_in_use",
    ):
        assert f"duoserve_{name}" in found
    for name in ("time_to_first_token", "inter_token", "queue_wait"):
        assert found[f"duoserve_{name}_seconds_count"] >= 1
    assert 'route="other",status="404"' in text and "nowhere" not in text


# Forms of answers


def test_an_answer_follows_a_schema(server: Running, client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    named = {"name": "n", "schema": schema, "strict": True}
    for streamed in (False, True):
        asked = chat(max_tokens=60, temperature=1, seed=3, n=2, stream=streamed)
        reply = server.ask(CHAT, asked | {"response_format": {"type": "json_schema", "json_schema": named}})
        for text in check_chat(reply, 2, usage=False) if streamed else texts(reply):
            found = json.loads(text)
            assert set(found) == {"ok", "kind"} and found["kind"] in ("a", "b")
    made = client.responses.create(
        model="demo",
        input="What?",
        max_output_tokens=300,
        temperature=0,
        text={"format": {"type": "json_schema", **named}},
    )
    assert set(json.loads(made.output_text)) == {"ok", "kind"}
    for bad in ({"type": "json_schema", "json_schema": {"name": "n"}}, {"type": "xml"}, {"type": "json_schema"}):
        assert server.ask(CHAT, chat(response_format=bad)).status == 400


def test_a_forced_call_is_a_call_whole_and_streamed(
    server: Running, client: openai.OpenAI, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_tools import HERMES_TEMPLATE, TOOLS

    assert "no place for tools" in server.ask(CHAT, chat(tools=TOOLS)).error["message"]
    monkeypatch.setattr(engine.tokenizer, "chat_template", HERMES_TEMPLATE)
    asked = chat(max_tokens=200, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "add-node"}})
    asked |= {"parallel_tool_calls": False}
    made = client.chat.completions.create(**asked).choices[0]
    assert made.finish_reason == "tool_calls" and made.message.content is None and made.message.tool_calls
    call = made.message.tool_calls[0].function  # type: ignore[union-attr]
    assert call.name == "add-node" and set(json.loads(call.arguments)) == {"kind", "on"}
    deltas = [
        d
        for e in events(server.ask(CHAT, asked | {"stream": True}))
        for d in e["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert deltas[0]["id"] and deltas[0]["function"]["name"] == "add-node"
    assert "".join(d["function"].get("arguments", "") for d in deltas) == call.arguments
    again = [
        *HELLO,
        made.message.to_dict(),
        {"role": "tool", "tool_call_id": made.message.tool_calls[0].id, "content": "4"},
    ]
    assert server.ask(CHAT, chat(messages=again, tools=TOOLS)).status == 200
    assert server.ask(CHAT, chat(tools=TOOLS * 65)).error["param"] == "tools"
    for bad in ("sometimes", {"type": "function", "function": {"name": "missing"}}):
        assert server.ask(CHAT, chat(tools=TOOLS, tool_choice=bad)).status == 400
