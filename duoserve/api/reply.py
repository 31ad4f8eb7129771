"""What all replies have in common: one request's choices are heard, and the reply is told whole or in events. Knows the
service's events; knows no reply's shape.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable

from openai.types import CompletionUsage
from pydantic import BaseModel

from duoserve.api.answers import Answers
from duoserve.api.errors import ApiError, of_failure
from duoserve.api.kit import Kit
from duoserve.api.stream import PING, error_event
from duoserve.service import End, Event, Request


class Reply(ABC):
    """One request's answer: `requests` of the service, and what becomes of what it tells."""

    requests: list[Request]

    def __init__(self, kit: Kit, prefix: str):
        self._kit = kit
        self._id, self._created = f"{prefix}{uuid.uuid4().hex}", int(time.time())
        self._ends: dict[int, End] = {}

    async def whole(self, answers: Answers) -> BaseModel:
        """ApiError where a choice failed."""
        async for seen in answers.events():
            if seen is not None:
                index, what = seen
                if isinstance(what, End):
                    if what.finish in ("error", "cancelled"):
                        raise of_failure(what.error)
                    self._ends[index] = what
                self._hear(index, what)
        return self._made()

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """As it comes; or an error, and nothing after it."""
        for body in self._first():
            yield body
        async for seen in answers.events():
            if seen is None:
                yield PING
                continue
            index, what = seen
            if isinstance(what, End):
                if what.finish in ("error", "cancelled"):
                    yield self._failed(of_failure(what.error))
                    return
                self._ends[index] = what
            for body in self._tell(index, what):
                yield body
        for body in self._last():
            yield body

    # What a reply is made of

    @abstractmethod
    def _hear(self, index: int, what: Event) -> None:
        """Something of a choice, for a whole reply."""

    @abstractmethod
    def _made(self) -> BaseModel:
        """The whole reply."""

    def _first(self) -> Iterable[bytes]:
        return ()

    @abstractmethod
    def _tell(self, index: int, what: Event) -> Iterable[bytes]:
        """Something of a choice, as events."""

    def _last(self) -> Iterable[bytes]:
        return ()

    def _failed(self, error: ApiError) -> bytes:
        return error_event(error)

    def _usage(self, prompt: int) -> CompletionUsage:
        """A prompt's tokens count once, however many choices were made of it."""
        new = sum(end.new_tokens for end in self._ends.values())
        return CompletionUsage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)
