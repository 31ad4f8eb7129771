"""Tools, reasoning and who speaks, as unmodified clients see them over a real socket: chat's and responses'."""

# ruff: noqa: F811  (fixtures of test_api)
from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from servers import CHAT, RESPONSES, Running, check_chat
from test_api import HELLO, chat, client, engine, server  # noqa: F401
from test_formats import TEMPLATES
from test_tools import HERMES_TEMPLATE, TOOLS

from duoserve.api.formats import HARMONY
from duoserve.api.rendering import Prompt
from duoserve.api.responses import Responses
from duoserve.api.responses_input import ResponsesRequest
from duoserve.api.tokens import Tokens
from duoserve.service import End, Event, Piece

ON = {"type": "object", "properties": {"on": {"enum": [1, 2]}}, "required": ["on"], "additionalProperties": False}
FLAT: Any = [{"type": "function", "name": name, "strict": True, "parameters": ON} for name in ("switch", "lamp")]
NAMED: Any = {"type": "function", "name": "lamp"}
ASKED: dict[str, Any] = {"model": "demo", "max_output_tokens": 200, "temperature": 0, "parallel_tool_calls": False}


@pytest.fixture
def with_tools(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", HERMES_TEMPLATE)


def test_responses_call_strictly_and_their_items_can_be_sent_back(client: openai.OpenAI, with_tools: None) -> None:
    made = client.responses.create(**ASKED, input="Go on", tools=FLAT, tool_choice=NAMED)
    [call] = made.output
    assert call.type == "function_call" and call.name == "lamp" and made.status == "completed"
    assert json.loads(call.arguments)["on"] in (1, 2) and made.tool_choice.type == "function"  # type: ignore[union-attr]
    assert made.parallel_tool_calls is False and [tool.name for tool in made.tools] == [t["name"] for t in FLAT]  # type: ignore[union-attr]
    with client.responses.stream(**ASKED, input="Go on", tools=FLAT, tool_choice=NAMED) as stream:
        found = list(stream)
        assert stream.get_final_response().output[0].arguments == call.arguments  # type: ignore[union-attr]
    kinds = [event.type for event in found]
    deltas = [event for event in found if event.type == "response.function_call_arguments.delta"]
    assert "".join(event.delta for event in deltas) == call.arguments
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added"),
        *["response.function_call_arguments.delta"] * len(deltas),
        *("response.function_call_arguments.done", "response.output_item.done", "response.completed"),
    ]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    again: Any = [*HELLO, {"role": "assistant", "content": "I look."}, call.to_dict(), result]
    assert client.responses.create(
        **ASKED | {"max_output_tokens": 4}, input=again, tools=FLAT, tool_choice="auto"
    ).output


def test_what_responses_cannot_call_is_refused_by_name(server: Running, with_tools: None) -> None:
    asked = {"model": "demo", "input": "Go on", "max_output_tokens": 4}
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    for more, what in (
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": TOOLS}, "tools"),
        ({"tools": FLAT, "tool_choice": {"type": "function", "name": "other"}}, "names 'other'"),
        ({"tool_choice": "required"}, "there are 0 tools"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": ""}]}, "nobody waits for"),
        ({"input": [call | {"arguments": "[1]"}]}, "no JSON object"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ):
        reply = server.ask(RESPONSES, asked | more)
        assert reply.status == 400, more
        assert what in (reply.error["message"] + str(reply.error["param"])), (more, reply.error)


def test_responses_tell_logprobs_where_they_are_asked_for(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "input": "What is Git?", "max_output_tokens": 5, "temperature": 0}
    plain = client.responses.create(**asked).output[0].content[0]  # type: ignore[union-attr]
    assert plain.logprobs == []  # type: ignore[union-attr]
    for more, alternatives in (({"include": ["message.output_text.logprobs"]}, 0), ({"top_logprobs": 3}, 3)):
        part = client.responses.create(**asked, **more).output[0].content[0]  # type: ignore[union-attr]
        assert "".join(p.token for p in part.logprobs) == part.text == plain.text  # type: ignore[union-attr]
        assert all(len(p.top_logprobs) == alternatives and p.logprob <= 0 for p in part.logprobs)  # type: ignore[union-attr]
    with client.responses.stream(**asked, top_logprobs=1) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
    assert "".join(p.token for event in deltas for p in event.logprobs) == plain.text  # type: ignore[union-attr]


def test_a_name_is_for_the_template_and_within_bounds(
    server: Running,
    client: openai.OpenAI,
    engine: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named: Any = [{"role": "user", "name": "ann_7", "content": "Hi"}]
    tokens = [
        client.chat.completions.create(**chat(messages=m)).usage.prompt_tokens
        for m in (named, [named[0] | {"name": "b"}])
    ]  # type: ignore[union-attr]
    assert tokens[0] == tokens[1]  # the demo's template shows none
    show = "{% for m in messages %}{{ m.name or '' }}: {{ m.content }}{% endfor %}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", show)
    shown = client.chat.completions.create(**chat(messages=named)).usage.prompt_tokens  # type: ignore[union-attr]
    assert shown > client.chat.completions.create(**chat(messages=[named[0] | {"name": "b"}])).usage.prompt_tokens  # type: ignore[union-attr]
    for bad in ("", "a" * 65, "a b", "<x>", "a\\b", "a/b", 5, ["a"]):
        reply = server.ask(CHAT, chat(messages=[named[0] | {"name": bad}]))
        assert reply.status == 400 and reply.error["param"] == "messages.0.name", bad


def test_reasoning_is_told_apart_from_the_answer_and_may_be_sent_back(
    server: Running,
    client: openai.OpenAI,
    engine: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATES["harmony"])
    [thinks] = engine.tokenizer("analysis", add_special_tokens=False)["input_ids"][:1]
    asked = chat(max_tokens=32, logit_bias={str(thinks): 30}, response_format={"type": "json_object"})
    made = client.chat.completions.create(**asked).choices[0]
    assert made.message.content == "" and made.message.reasoning  # type: ignore[attr-defined]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    told = "".join(getattr(c.choices[0].delta, "reasoning", "") or "" for c in chunks)
    assert told == made.message.reasoning  # type: ignore[attr-defined]
    back = [*HELLO, made.message.to_dict(), *HELLO]
    assert server.ask(CHAT, chat(messages=back)).status == 200
    assert server.ask(CHAT, chat(messages=[HELLO[0] | {"reasoning": "x"}])).status == 400
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    asked = chat(max_tokens=80, stream=True, logit_bias={str(thinks): -100})
    reply = server.ask(
        CHAT, asked | {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    )
    [text] = check_chat(reply, 1, usage=False)
    assert set(json.loads(text)) == {"ok"}


class Scripted:
    """Answers that say what a model of another family would."""

    def __init__(self, text: str):
        self.text = text

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        for letter in self.text:
            yield 0, Piece(letter, [1], [])
        yield 0, End("stop", 3, len(self.text), 0.0, 0.0, 0.0)


async def told(reply: Responses, answers: Any) -> list[Any]:
    return [json.loads(body.partition(b"data: ")[2]) async for body in reply.events(answers)]


def test_responses_tell_reasoning_message_and_call_as_items_in_order(engine: Any) -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'
    )
    kit: Any = SimpleNamespace(engine=engine, host=SimpleNamespace(name="demo"), tokens=Tokens(engine.tokenizer))
    asked = ResponsesRequest(model="demo", input="Go on", tools=[{"type": "function", "name": "f"}])  # type: ignore[list-item]
    prompt = Prompt([1, 2, 3], None, replace(HARMONY, schemas={"f": {}}))
    found = asyncio.run(told(Responses(kit, asked, prompt, ""), Scripted(text)))
    for event in found:
        TypeAdapter(ResponseStreamEvent).validate_python(event, strict=False)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found if not event["type"].endswith(".delta")]
    part = ["output_item.added", "content_part.added", "{}.done", "content_part.done", "output_item.done"]
    call = ["output_item.added", "function_call_arguments.done", "output_item.done"]
    assert kinds == ["created", "in_progress", *(k.format("reasoning_text") for k in part),
                     *(k.format("output_text") for k in part), *call, "completed"]  # fmt: skip
    reasoning, message, called = found[-1]["response"]["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "I look." and called["arguments"] == '{"a": 1}'
    whole = asyncio.run(Responses(kit, asked, prompt, "").whole(Scripted(text)))  # type: ignore[arg-type]
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]  # type: ignore[attr-defined]
