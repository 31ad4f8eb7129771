"""POST /v1/chat/completions. Knows OpenAI's chat replies; what is asked of the model is `asking`'s.

Beyond OpenAI's: `reasoning`, where a family writes its reasoning apart from its answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
)
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta, ChoiceDeltaToolCall, ChoiceDeltaToolCallFunction
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as DeltaLogprobs
from openai.types.chat.chat_completion_message_function_tool_call import Function as CalledFunction

from duoserve.api import asking
from duoserve.api.calls import Call, Content, Delta, Reasoning
from duoserve.api.kit import Kit
from duoserve.api.rendering import Prompt
from duoserve.api.reply import Reply
from duoserve.api.schema import ChatRequest
from duoserve.api.stream import DONE, event
from duoserve.api.told import Called, Told
from duoserve.service import End, Event, Piece, Request

Finish = Literal["stop", "length", "tool_calls"]


class Chat(Reply):
    """One chat request: what it asks of the service, and its reply whole or in events."""

    def __init__(self, kit: Kit, asked: ChatRequest, prompt: Prompt, client: str):
        super().__init__(kit, "chatcmpl-")
        self._asked, self._prompt_tokens = asked, len(prompt.ids)
        self._n = asked.n or 1
        drawn = (asked.top_logprobs or 0) if asked.logprobs else None
        base = asking.sampling(asked, kit.engine, drawn)
        self.requests = [
            Request(
                prompt.ids,
                asked.limit,
                asking.seeded(base, choice),
                asked.stops,
                ignore_eos=asked.ignore_eos,
                mask=prompt.mask.again() if prompt.mask is not None else None,
                visible=prompt.visible,
                client=client,
            )
            for choice in range(self._n)
        ]
        self._told = [Told(prompt.format, prompt.thought) for _ in range(self._n)]

    def _hear(self, index: int, what: Event) -> None:
        if isinstance(what, Piece):
            self._told[index].put(what)
        elif isinstance(what, End):
            self._told[index].end(what)

    def _made(self) -> ChatCompletion:
        choices = [self._choice(n) for n in range(self._n)]
        return ChatCompletion(object="chat.completion", choices=choices, usage=self._used(), **self._about())

    def _choice(self, index: int) -> Choice:
        told, logprobs = self._told[index], None
        if self._asked.logprobs:
            logprobs = ChoiceLogprobs(content=self._kit.tokens.chat(told.logprobs), refusal=None)
        reason = cast(Finish, told.finish(self._ends[index]))
        return Choice(index=index, finish_reason=reason, message=message(told), logprobs=logprobs)

    def _first(self) -> Iterator[bytes]:
        for n in range(self._n):
            yield self._chunk(n, ChoiceDelta(role="assistant", content=""))

    def _tell(self, index: int, what: Event) -> Iterator[bytes]:
        told = self._told[index]
        if isinstance(what, Piece):
            logprobs = self._kit.tokens.chat(what.logprobs) if self._asked.logprobs else None
            deltas = [shown(delta) for delta in told.put(what)]
            for delta in deltas or ([ChoiceDelta(content="")] if logprobs else []):
                yield self._chunk(index, delta, logprobs=logprobs)
                logprobs = None
        elif isinstance(what, End):
            for last in told.end(what):
                yield self._chunk(index, shown(last))
            yield self._chunk(index, ChoiceDelta(), cast(Finish, told.finish(what)))

    def _last(self) -> Iterator[bytes]:
        """Usage where asked for, [DONE]."""
        if self._asked.usage_streamed:
            yield event(self._of([], usage=self._used()))
        yield DONE

    def _chunk(
        self, index: int, delta: ChoiceDelta, reason: Finish | None = None, logprobs: list[Any] | None = None
    ) -> bytes:
        shown = DeltaLogprobs(content=logprobs, refusal=None) if logprobs is not None else None
        choice = ChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=shown)
        return event(self._of([choice], **({"usage": None} if self._asked.usage_streamed else {})))

    def _of(self, choices: list[ChunkChoice], **more: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(object="chat.completion.chunk", choices=choices, **self._about(), **more)

    def _about(self) -> dict[str, Any]:
        name, fingerprint = self._kit.host.name, self._kit.fingerprint
        return {"id": self._id, "created": self._created, "model": name, "system_fingerprint": fingerprint}

    def _used(self) -> Any:
        return self._usage(self._prompt_tokens)


def message(told: Told) -> ChatCompletionMessage:
    more: dict[str, Any] = {"reasoning": told.reasoning} if told.reasoning else {}
    if told.calls:
        more["tool_calls"] = [_call(call) for call in told.calls]
    content = told.text or (None if told.calls else "")
    return ChatCompletionMessage(role="assistant", content=content, refusal=None, **more)


def _call(call: Called) -> ChatCompletionMessageFunctionToolCall:
    function = CalledFunction(name=call.name, arguments=call.arguments)
    return ChatCompletionMessageFunctionToolCall(id=call.id, type="function", function=function)


def shown(delta: Delta) -> ChoiceDelta:
    """As a chunk has it."""
    if isinstance(delta, Content):
        return ChoiceDelta(content=delta.text)
    if isinstance(delta, Reasoning):
        more: dict[str, Any] = {"reasoning": delta.text}
        return ChoiceDelta(**more)
    if isinstance(delta, Call):
        function = ChoiceDeltaToolCallFunction(name=delta.name, arguments="")
        call = ChoiceDeltaToolCall(index=delta.index, id=delta.id, type="function", function=function)
    else:
        call = ChoiceDeltaToolCall(index=delta.index, function=ChoiceDeltaToolCallFunction(arguments=delta.text))
    return ChoiceDelta(tool_calls=[call])
