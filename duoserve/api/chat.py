"""POST /v1/chat/completions. Knows OpenAI's chat replies; what is asked of the model is `asking`'s."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Literal, cast

from openai.types import CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
)
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as Delta
from openai.types.chat.chat_completion_chunk import ChoiceDelta, ChoiceDeltaToolCall, ChoiceDeltaToolCallFunction
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as DeltaLogprobs
from openai.types.chat.chat_completion_message_function_tool_call import Function as CalledFunction

from duoserve.api import asking
from duoserve.api.answers import Answers
from duoserve.api.calls import Arguments, Call, Content, Format, Parser
from duoserve.api.errors import of_failure
from duoserve.api.kit import Kit
from duoserve.api.rendering import Prompt
from duoserve.api.schema import ChatRequest
from duoserve.api.stream import DONE, PING, error_event, event
from duoserve.sampling import Logprob
from duoserve.service import End, Piece, Request

Finish = Literal["stop", "length", "tool_calls"]


class Chat:
    """One chat request: what it asks of the service, and its reply whole or in events."""

    def __init__(self, kit: Kit, asked: ChatRequest, prompt: Prompt, client: str):
        self._kit, self._asked = kit, asked
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
        self._told = [_Told(prompt.format) for _ in range(self._n)]
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    async def whole(self, answers: Answers) -> ChatCompletion:
        """ApiError where a choice failed."""
        ends: dict[int, End] = {}
        async for seen in answers.events():
            if seen is None:
                continue
            index, what = seen
            if isinstance(what, Piece):
                self._told[index].put(what)
            elif isinstance(what, End):
                ends[index] = checked(what)
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._kit.host.name,
            system_fingerprint=self._kit.fingerprint,
            choices=[self._choice(n, ends[n]) for n in range(self._n)],
            usage=usage(list(ends.values())),
        )

    def _choice(self, index: int, end: End) -> Choice:
        told = self._told[index]
        told.end(end)
        logprobs = None
        if self._asked.logprobs:
            logprobs = ChoiceLogprobs(content=self._kit.tokens.chat(told.logprobs), refusal=None)
        return Choice(index=index, finish_reason=told.finish(end), message=told.message(), logprobs=logprobs)

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """A role, text as it comes, a reason, usage where asked for, [DONE]; or an error, and nothing after it."""
        for n in range(self._n):
            yield self._chunk(n, ChoiceDelta(role="assistant", content=""))
        ends: list[End] = []
        async for seen in answers.events():
            if seen is None:
                yield PING
                continue
            index, what = seen
            told = self._told[index]
            if isinstance(what, Piece):
                logprobs = self._kit.tokens.chat(what.logprobs) if self._asked.logprobs else None
                for delta in told.put(what) or ([ChoiceDelta(content="")] if logprobs else []):
                    yield self._chunk(index, delta, logprobs=logprobs)
                    logprobs = None
            elif isinstance(what, End):
                if what.finish in ("error", "cancelled"):
                    yield error_event(of_failure(what.error))
                    return
                ends.append(what)
                for delta in told.end(what):
                    yield self._chunk(index, delta)
                yield self._chunk(index, ChoiceDelta(), told.finish(what))
        if self._asked.usage_streamed:
            yield event(self._of([], usage=usage(ends)))
        yield DONE

    def _chunk(
        self, index: int, delta: ChoiceDelta, reason: Finish | None = None, logprobs: list[Any] | None = None
    ) -> bytes:
        shown = DeltaLogprobs(content=logprobs, refusal=None) if logprobs is not None else None
        choice = Delta(index=index, delta=delta, finish_reason=reason, logprobs=shown)
        return event(self._of([choice], **({"usage": None} if self._asked.usage_streamed else {})))

    def _of(self, choices: list[Delta], **more: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._kit.host.name,
            system_fingerprint=self._kit.fingerprint,
            choices=choices,
            **more,
        )


class _Told:
    """One choice's text, read into content and calls."""

    def __init__(self, format: Format | None):
        self._parser = Parser(format)
        self.text = ""
        self.calls: list[tuple[str, str]] = []  # id, name
        self.arguments: list[str] = []
        self.logprobs: list[Logprob] = []

    def put(self, piece: Piece) -> list[ChoiceDelta]:
        self.logprobs += piece.logprobs
        return [self._noted(delta) for delta in self._parser.put(piece.text)]

    def end(self, how: End) -> list[ChoiceDelta]:
        """What was held back; a marker cut off by the length is none of it."""
        return [self._noted(delta) for delta in self._parser.end(how.finish)]

    def finish(self, end: End) -> Finish:
        return cast(Finish, self._parser.finish(end.finish))

    def message(self) -> ChatCompletionMessage:
        if not self.calls:
            return ChatCompletionMessage(role="assistant", content=self.text, refusal=None)
        calls = [
            ChatCompletionMessageFunctionToolCall(
                id=call_id, type="function", function=CalledFunction(name=name, arguments=arguments)
            )
            for (call_id, name), arguments in zip(self.calls, self.arguments, strict=True)
        ]
        return ChatCompletionMessage(role="assistant", content=self.text or None, refusal=None, tool_calls=list(calls))

    def _noted(self, delta: Content | Call | Arguments) -> ChoiceDelta:
        if isinstance(delta, Content):
            self.text += delta.text
            return ChoiceDelta(content=delta.text)
        if isinstance(delta, Call):
            self.calls.append((delta.id, delta.name))
            self.arguments.append("")
            function = ChoiceDeltaToolCallFunction(name=delta.name, arguments="")
            call = ChoiceDeltaToolCall(index=delta.index, id=delta.id, type="function", function=function)
        else:
            self.arguments[delta.index] += delta.text
            call = ChoiceDeltaToolCall(index=delta.index, function=ChoiceDeltaToolCallFunction(arguments=delta.text))
        return ChoiceDelta(tool_calls=[call])


def checked(end: End) -> End:
    if end.finish in ("error", "cancelled"):
        raise of_failure(end.error)
    return end


def usage(ends: list[End]) -> CompletionUsage:
    """One prompt, however many choices were made of it."""
    prompt = ends[0].prompt_tokens if ends else 0
    return total(prompt, sum(end.new_tokens for end in ends))


def total(prompt: int, new: int) -> CompletionUsage:
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)
