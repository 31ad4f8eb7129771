"""POST /v1/chat/completions. Knows OpenAI's chat replies; what is asked of the model is `asking`'s."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Literal, cast

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as Delta
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as DeltaLogprobs

from duoserve.api import asking
from duoserve.api.answers import Answers
from duoserve.api.errors import of_failure
from duoserve.api.kit import Kit
from duoserve.api.schema import ChatRequest
from duoserve.api.stream import DONE, PING, error_event, event
from duoserve.service import End, Piece, Request

Finish = Literal["stop", "length", "tool_calls"]


class Chat:
    """One chat request: what it asks of the service, and its reply whole or in events."""

    def __init__(self, kit: Kit, asked: ChatRequest, ids: list[int], client: str):
        self._kit, self._asked = kit, asked
        self._n = asked.n or 1
        drawn = (asked.top_logprobs or 0) if asked.logprobs else None
        base = asking.sampling(asked, kit.engine, drawn)
        self.requests = [
            Request(
                ids,
                asked.limit,
                asking.seeded(base, choice),
                asked.stops,
                ignore_eos=asked.ignore_eos,
                client=client,
            )
            for choice in range(self._n)
        ]
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    async def whole(self, answers: Answers) -> ChatCompletion:
        """ApiError where a choice failed."""
        texts, drawn = [""] * self._n, [[] for _ in range(self._n)]  # type: list[str], list[list[Any]]
        ends: dict[int, End] = {}
        async for seen in answers.events():
            if seen is None:
                continue
            index, what = seen
            if isinstance(what, Piece):
                texts[index] += what.text
                drawn[index] += what.logprobs
            elif isinstance(what, End):
                ends[index] = checked(what)
        choices = [
            Choice(
                index=n,
                finish_reason=finish(ends[n]),
                message=ChatCompletionMessage(role="assistant", content=texts[n], refusal=None),
                logprobs=ChoiceLogprobs(content=self._kit.tokens.chat(drawn[n]), refusal=None)
                if self._asked.logprobs
                else None,
            )
            for n in range(self._n)
        ]
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._kit.host.name,
            system_fingerprint=self._kit.fingerprint,
            choices=choices,
            usage=usage(list(ends.values())),
        )

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
            if isinstance(what, Piece):
                logprobs = self._kit.tokens.chat(what.logprobs) if self._asked.logprobs else None
                yield self._chunk(index, ChoiceDelta(content=what.text), logprobs=logprobs)
            elif isinstance(what, End):
                if what.finish in ("error", "cancelled"):
                    yield error_event(of_failure(what.error))
                    return
                ends.append(what)
                yield self._chunk(index, ChoiceDelta(), finish(what))
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


def checked(end: End) -> End:
    if end.finish in ("error", "cancelled"):
        raise of_failure(end.error)
    return end


def finish(end: End) -> Finish:
    return cast(Finish, end.finish)


def usage(ends: list[End]) -> CompletionUsage:
    """One prompt, however many choices were made of it."""
    prompt = ends[0].prompt_tokens if ends else 0
    return total(prompt, sum(end.new_tokens for end in ends))


def total(prompt: int, new: int) -> CompletionUsage:
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)
