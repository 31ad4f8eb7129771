"""One choice's text, read into reasoning, answer and calls while it comes. Knows deltas; knows no reply's shape."""

from __future__ import annotations

from dataclasses import dataclass

from duoserve.api.calls import Call, Content, Delta, Format, Parser, Reasoning
from duoserve.api.thoughts import Thought
from duoserve.sampling import Logprob
from duoserve.service import End, Piece


@dataclass
class Called:
    """A call; `arguments` is JSON once it is whole."""

    id: str
    name: str
    arguments: str = ""


class Told:
    """What a choice has said so far."""

    def __init__(self, format: Format | None, thought: Thought | None = None):
        self._parser = Parser(format, thought)
        self.text = self.reasoning = ""
        self.calls: list[Called] = []
        self.logprobs: list[Logprob] = []

    def put(self, piece: Piece) -> list[Delta]:
        """What became certain."""
        self.logprobs += piece.logprobs
        return self._noted(self._parser.put(piece.text))

    def end(self, how: End) -> list[Delta]:
        """What was held back; a marker cut off by the length is none of it."""
        return self._noted(self._parser.end(how.finish))

    def finish(self, end: End) -> str:
        return self._parser.finish(end.finish)

    def _noted(self, deltas: list[Delta]) -> list[Delta]:
        for delta in deltas:
            if isinstance(delta, Content):
                self.text += delta.text
            elif isinstance(delta, Reasoning):
                self.reasoning += delta.text
            elif isinstance(delta, Call):
                self.calls.append(Called(delta.id, delta.name))
            else:
                self.calls[delta.index].arguments += delta.text
        return deltas
