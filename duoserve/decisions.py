"""What a run decided by the clock: which copy was there in time, which guess could be withdrawn, when a ranking came. Notes
the answers, or repeats noted ones, so that the same passes on another machine, or another clock, take the same slots and
move the same bytes. Knows questions and answers; knows nothing of experts, streams or seconds. Imports no torch.

Two threads ask, one at a time: every section behind the lock of the transfer begins with `tick`. A ranking made on the
predictor's thread comes between two ticks, and in a repetition comes there again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Decisions:
    """Lets the clock decide."""

    def tick(self) -> None:
        """Somebody enters the transfer's lock."""

    def said(self, what: str, found: bool) -> bool:
        """The answer to a question that the clock answers with `found`."""
        return found

    def cancelled(self, copies: Any, event: Any) -> bool:
        """Withdraw a guess's copy from a stream, if nobody began it."""
        return bool(copies.cancel(event))

    def think(self, number: int, rank: Callable[[], None], hand_over: Callable[[], Any]) -> None:
        """The ranking `number` of this run is to be made, by another thread."""
        hand_over()

    def ranked(self, number: int, experts: list[int]) -> list[int]:
        """It came, with these experts; behind the transfer's lock."""
        return experts


class Ranked(NamedTuple):
    """A ranking that came after so many ticks."""

    ticks: int
    number: int
    experts: list[int]


class Noting(Decisions):
    """Lets the clock decide, and notes what it said."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, bool]] = []
        self.rankings: list[Ranked] = []
        self._ticks = 0

    def tick(self) -> None:
        self._ticks += 1

    def said(self, what: str, found: bool) -> bool:
        self.answers.append((what, found))
        return found

    def cancelled(self, copies: Any, event: Any) -> bool:
        return self.said("cancelled", bool(copies.cancel(event)))

    def ranked(self, number: int, experts: list[int]) -> list[int]:
        self.rankings.append(Ranked(self._ticks, number, experts))
        return experts


class Repeating(Decisions):
    """Says again what was noted of a run with the same passes. Copies must be a virtual machine's: they can be undone."""

    def __init__(self, answers: Iterable[tuple[str, bool]], rankings: Iterable[Ranked]):
        self._answers, self._rankings = deque(answers), deque(rankings)
        self._ticks = 0
        self._held: dict[int, Callable[[], None]] = {}
        self._coming: Ranked | None = None

    @property
    def over(self) -> bool:
        """Whether all that was noted was asked again, but for rankings that came behind the end."""
        return not self._answers and all(ranked.ticks >= self._ticks for ranked in self._rankings)

    def tick(self) -> None:
        while self._rankings and self._rankings[0].ticks == self._ticks and self._rankings[0].number in self._held:
            self._coming = self._rankings.popleft()
            self._held.pop(self._coming.number)()
        self._ticks += 1

    def said(self, what: str, found: bool) -> bool:
        assert self._answers and self._answers[0][0] == what, (what, list(self._answers)[:3], len(self._answers))
        return self._answers.popleft()[1]

    def cancelled(self, copies: Any, event: Any) -> bool:
        if self.said("cancelled", False):
            copies.withdraw(event)
            return True
        return False

    def think(self, number: int, rank: Callable[[], None], hand_over: Callable[[], Any]) -> None:
        """Kept until it comes, where it came."""
        self._held[number] = rank

    def ranked(self, number: int, experts: list[int]) -> list[int]:
        if self._coming is None or self._coming.number != number:  # made at once, on the model's thread
            self._coming = self._rankings.popleft()
        assert self._coming.number == number, (number, self._coming)
        return self._coming.experts
