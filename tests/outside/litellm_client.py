"""litellm against a server of ours: chat, stream, tools. Run where litellm is, with the address; fails with a traceback.

python tests/outside/litellm_client.py http://127.0.0.1:8000 [tools]
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}

import litellm

MESSAGES = [{"role": "user", "content": "What is Git?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"kind": {"enum": ["left", "right"]}, "on": {"type": "boolean"}},
            "required": ["kind", "on"],
            "additionalProperties": False,
        },
    },
}


def ask(**more: Any) -> Any:
    given = {"model": "openai/demo", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    return litellm.completion(**(given | more), api_base=f"{sys.argv[1]}/v1", api_key="none", num_retries=0)


def chat() -> str:
    found = ask()
    text = found.choices[0].message.content
    assert text and found.usage.completion_tokens <= 12 and found.usage.prompt_tokens > 1
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.choices[0].finish_reason in ("stop", "length"), found
    return text


def stream(text: str) -> None:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)], chunks[-1]
    whole = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert whole.choices[0].message.content == text


def refused() -> None:
    try:
        ask(temperature=5)
    except litellm.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("a temperature of 5 was taken")


def schema() -> None:
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": TOOL["function"]["parameters"], "strict": True},
    }
    found = json.loads(ask(response_format=wanted, max_tokens=60).choices[0].message.content)
    assert set(found) == {"kind", "on"}


def tools() -> None:
    forced: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "max_tokens": 200,
    }
    forced["parallel_tool_calls"] = False
    made = ask(**forced).choices[0]
    (call,) = made.message.tool_calls
    assert made.finish_reason == "tool_calls" and call.function.name == "add" and call.id
    assert set(json.loads(call.function.arguments)) == {"kind", "on"}
    chunks = list(ask(**forced, stream=True))
    (streamed,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments and streamed.function.name == "add"
    answered = [*MESSAGES, made.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    assert ask(messages=answered, tools=[TOOL]).choices[0].finish_reason in ("stop", "length", "tool_calls")


if __name__ == "__main__":
    stream(chat())
    refused()
    schema()
    if "tools" in sys.argv:
        tools()
    print(json.dumps({"client": "litellm", "calls": 4 + 3 * ("tools" in sys.argv)}))
