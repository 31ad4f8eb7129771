"""POST /v1/responses, stateless. Knows the shape of its items and the order of its events; what may be asked is
`responses_input`'s.

    created, in_progress, per item: item added, [part added,] deltas, [text] done, [part done,] item done, completed

An item begins with its first letter and ends with the next one's: reasoning, a message, each call.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from openai.types.responses import Response

from duoserve.api import asking
from duoserve.api.calls import Arguments, Call, Content, Delta, Reasoning
from duoserve.api.errors import ApiError
from duoserve.api.kit import Kit
from duoserve.api.rendering import Prompt
from duoserve.api.reply import Reply
from duoserve.api.responses_input import ResponsesRequest
from duoserve.api.stream import event
from duoserve.api.told import Told
from duoserve.service import End, Event, Piece, Request

KINDS = {Content: "message", Reasoning: "reasoning", Call: "function_call", Arguments: "function_call"}
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


@dataclass
class Item:
    """One item of the output. `text`: a message's, reasoning, or a call's arguments."""

    kind: str
    index: int
    call: Call | None = None
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    status: str = "in_progress"

    def __post_init__(self) -> None:
        self.id = f"{PREFIXES[self.kind]}_{uuid.uuid4().hex}"

    def part(self) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def shown(self) -> dict[str, Any]:
        about: dict[str, Any] = {"id": self.id, "type": self.kind, "status": self.status}
        if self.call is not None:
            return about | {"call_id": self.call.id, "name": self.call.name, "arguments": self.text}
        parts = [self.part()] if self.text or self.status != "in_progress" else []
        more: dict[str, Any] = {"summary": []} if self.kind == "reasoning" else {"role": "assistant"}
        return about | {"content": parts} | more


class Responses(Reply):
    """One response: whole, or as the events that make it."""

    def __init__(self, kit: Kit, asked: ResponsesRequest, prompt: Prompt, client: str):
        super().__init__(kit, "resp_")
        self._asked = asked
        sampling = asking.sampling(asked, kit.engine, asked.logprobs)
        self._temperature, self._top_p = sampling.temperature, sampling.top_p
        self.requests = [
            Request(
                prompt.ids,
                asked.max_output_tokens,
                sampling,
                mask=prompt.mask,
                visible=prompt.visible,
                client=client,
            )
        ]
        self._told, self._items, self._number = Told(prompt.format, prompt.thought), list[Item](), -1

    def _hear(self, index: int, what: Event) -> None:
        for _ in self._tell(index, what):
            pass

    def _made(self) -> Response:
        return Response.model_validate(self._ended(self._ends[0]))

    def _first(self) -> Iterator[bytes]:
        begun = self._response("in_progress")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)

    def _tell(self, index: int, what: Event) -> Iterator[bytes]:
        if isinstance(what, Piece):
            logprobs = self._logprobs(what)
            for delta in self._told.put(what):
                yield from self._add(delta, logprobs)
                if isinstance(delta, Content):
                    logprobs = []
        elif isinstance(what, End):
            for delta in self._told.end(what):
                yield from self._add(delta, [])
            if not self._items:
                yield from self._begin(Content(""))
            yield from self._close("incomplete" if what.finish == "length" else "completed")
            ended = self._ended(what)
            yield self._event(f"response.{ended['status']}", response=ended)

    def _failed(self, error: ApiError) -> bytes:
        failed = self._response("failed") | {"error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=failed)

    # Items

    def _add(self, delta: Delta, logprobs: list[dict[str, Any]]) -> Iterator[bytes]:
        if not self._items or isinstance(delta, Call) or self._items[-1].kind != KINDS[type(delta)]:
            if self._items:
                yield from self._close("completed")
            yield from self._begin(delta)
        if isinstance(delta, Call):
            return
        item, more = self._items[-1], dict[str, Any]()
        item.text += delta.text
        if isinstance(delta, Content):
            item.logprobs += logprobs
            more = {"logprobs": logprobs}
        yield self._event(f"{DELTAS[item.kind]}.delta", **self._where(item), delta=delta.text, **more)

    def _begin(self, delta: Delta) -> Iterator[bytes]:
        item = Item(KINDS[type(delta)], len(self._items), delta if isinstance(delta, Call) else None)
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=item.index, item=item.shown())
        if item.call is None:
            yield self._event("response.content_part.added", **self._where(item), part=item.part())

    def _close(self, status: str) -> Iterator[bytes]:
        """The last item is whole, or all there is of it."""
        item = self._items[-1]
        item.status = status
        if item.call is not None:
            yield self._event(f"{DELTAS[item.kind]}.done", **self._where(item), arguments=item.text)
        else:
            more = {"logprobs": item.logprobs} if item.kind == "message" else {}
            yield self._event(f"{DELTAS[item.kind]}.done", **self._where(item), text=item.text, **more)
            yield self._event("response.content_part.done", **self._where(item), part=item.part())
        yield self._event("response.output_item.done", output_index=item.index, item=item.shown())

    def _where(self, item: Item) -> dict[str, Any]:
        where = {"item_id": item.id, "output_index": item.index}
        return where if item.call is not None else where | {"content_index": 0}

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        if self._asked.logprobs is None:
            return []
        return [logprob.model_dump() for logprob in self._kit.tokens.chat(piece.logprobs)]

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number} | fields, kind)

    # The response

    def _ended(self, end: End) -> dict[str, Any]:
        incomplete = end.finish == "length"
        found = self._response("incomplete" if incomplete else "completed")
        if incomplete:
            found["incomplete_details"] = {"reason": "max_output_tokens"}
        return found | {"usage": self._used(end)}

    def _used(self, end: End) -> dict[str, Any]:
        return {
            "input_tokens": end.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": end.new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},  # not counted apart
            "total_tokens": end.prompt_tokens + end.new_tokens,
        }

    def _response(self, status: str) -> dict[str, Any]:
        asked = self._asked
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._kit.host.name,
            "output": [item.shown() for item in self._items],
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self._temperature,
            "text": {"format": _format(asked)},
            "tool_choice": _shown(asked.tool_choice) or "auto",
            "tools": [_tool(tool) for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": self._top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _format(asked: ResponsesRequest) -> dict[str, Any]:
    if asked.text is None or asked.text.format is None:
        return {"type": "text"}
    return asked.text.format.model_dump(exclude_none=True, by_alias=True)


def _shown(choice: Any) -> Any:
    return choice if choice is None or isinstance(choice, str) else choice.model_dump()


def _tool(tool: Any) -> dict[str, Any]:
    return {"type": "function", "name": tool.name, "description": tool.description, "parameters": tool.parameters or {},
            "strict": bool(tool.strict)}  # fmt: skip
