"""POST /v1/responses, stateless: nothing is kept, so nothing of before can be named. Knows the shape of its events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from openai.types.responses import Response

from duoserve.api import asking
from duoserve.api.answers import Answers
from duoserve.api.chat import checked
from duoserve.api.errors import ApiError, of_failure
from duoserve.api.kit import Kit
from duoserve.api.rendering import Prompt
from duoserve.api.schema import ResponsesRequest
from duoserve.api.stream import PING, event
from duoserve.service import End, Piece, Request


def messages(asked: ResponsesRequest) -> list[dict[str, Any]]:
    """The instructions first, then the input, as chat templates know them."""
    first = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    if isinstance(asked.input, str):
        return [*first, {"role": "user", "content": asked.input}]
    return [*first, *(message.plain for message in asked.input)]


def answer_format(asked: ResponsesRequest) -> dict[str, Any] | None:
    """As chat's response_format has it."""
    if asked.text is None or asked.text.format is None:
        return None
    found = asked.text.format.model_dump(exclude_none=True, by_alias=True)
    kind = found.pop("type")
    return {"type": kind, "json_schema": found} if kind == "json_schema" else {"type": kind}


class Responses:
    """One response: whole, or as the events that make it."""

    def __init__(self, kit: Kit, asked: ResponsesRequest, prompt: Prompt, client: str):
        self._kit, self._asked = kit, asked
        sampling = asking.sampling(asked, kit.engine)
        self._temperature, self._top_p = sampling.temperature, sampling.top_p
        self.requests = [Request(prompt.ids, asked.max_output_tokens, sampling, mask=prompt.mask, client=client)]
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._number = -1

    async def whole(self, answers: Answers) -> Response:
        text, end = "", None
        async for seen in answers.events():
            if seen is None:
                continue
            if isinstance(seen[1], Piece):
                text += seen[1].text
            elif isinstance(seen[1], End):
                end = checked(seen[1])
        assert end is not None
        return Response.model_validate(self._ended(text, end))

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        begun = self._response("in_progress", [])
        where = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._item("", "in_progress", []))
        yield self._event("response.content_part.added", **where, part=_part(""))
        text = ""
        async for seen in answers.events():
            if seen is None:
                yield PING
            elif isinstance(seen[1], Piece):
                text += seen[1].text
                yield self._event("response.output_text.delta", **where, delta=seen[1].text, logprobs=[])
            elif isinstance(seen[1], End):
                if seen[1].finish in ("error", "cancelled"):
                    yield self._failed(of_failure(seen[1].error))
                    return
                for each in self._last(text, seen[1], where):
                    yield each

    def _last(self, text: str, end: End, where: dict[str, Any]) -> list[bytes]:
        ended = self._ended(text, end)
        return [
            self._event("response.output_text.done", **where, text=text, logprobs=[]),
            self._event("response.content_part.done", **where, part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=ended["output"][0]),
            self._event(f"response.{ended['status']}", response=ended),
        ]

    def _failed(self, error: ApiError) -> bytes:
        failed = self._response("failed", []) | {"error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=failed)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number} | fields, kind)

    def _ended(self, text: str, end: End) -> dict[str, Any]:
        status = "incomplete" if end.finish == "length" else "completed"
        found = self._response(status, [self._item(text, status, [_part(text)])])
        if status == "incomplete":
            found["incomplete_details"] = {"reason": "max_output_tokens"}
        return found | {"usage": _usage(end)}

    def _item(self, text: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        asked = self._asked
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._kit.host.name,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": self._temperature,
            "text": {"format": _format(asked)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": self._top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _format(asked: ResponsesRequest) -> dict[str, Any]:
    if asked.text is None or asked.text.format is None:
        return {"type": "text"}
    return asked.text.format.model_dump(exclude_none=True, by_alias=True)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(end: End) -> dict[str, Any]:
    return {
        "input_tokens": end.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": end.new_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": end.prompt_tokens + end.new_tokens,
    }
