"""When everything happens where the two directions of a link slow each other: processes of one machine whose exchanges share
its cores, cards that share a bus. Knows durations and orders as `schedule.py` does, whose rules these are; knows no models.

    A2E alone  1          each direction's rate; `both_ways` >= 1 is measured: how much longer an exchange takes while
    both       1 / s      as much travels the other way (2: the link carries no more than it does one way)

FinDEP takes the directions for two resources. What they do to each other depends on when each is busy, which depends on what
they do to each other: so this goes from event to event, where the simulation without it is sums and running maxima.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

AG, A2E, EG, E2A = range(4)
LINK = (A2E, E2A)


class Piece(NamedTuple):
    """Something to do, `seconds` alone. `chunk` -1: not cut into chunks, or the counts ahead of them."""

    what: str
    layer: int
    batch: int
    chunk: int
    seconds: float


class Done(NamedTuple):
    resource: int
    piece: Piece
    start: float
    end: float


@dataclass(frozen=True)
class Durations:
    """Seconds alone, in each of `layers`: of micro-batches, and of chunks by micro-batch."""

    layers: int
    attention_I: Sequence[float]
    shared_I: Sequence[float]
    count: float
    a2e_IJ: Sequence[Sequence[float]]
    expert_IJ: Sequence[Sequence[float]]
    e2a_IJ: Sequence[Sequence[float]]


def run(work: Durations, turns: Sequence[tuple[str, int]], both_ways: float) -> list[Done]:
    """Everything in order of its end. `turns`: the attention group's order within a layer, ("A" | "S", micro-batch)."""
    return _Run(work, turns, both_ways).run()


class _Run:
    """What waits at each of the four resources, and what each has left to do."""

    def __init__(self, work: Durations, turns: Sequence[tuple[str, int]], both_ways: float):
        self._work, self._slower = work, both_ways
        self._turns = deque((layer, *turn) for layer in range(work.layers) for turn in turns)
        many = len(work.attention_I)
        self._away = [0] * many  # what of each micro-batch must be over before it attends again
        self._queues: list[deque[Piece]] = [deque() for _ in range(4)]
        self._at: list[Piece | None] = [None] * 4
        self._left, self._began = [0.0] * 4, [0.0] * 4
        self._now = 0.0
        self._done: list[Done] = []

    def run(self) -> list[Done]:
        self._begin()
        while any(self._at):
            self._advance()
            self._begin()
        assert not self._turns, f"{len(self._turns)} turns were never reached"
        return self._done

    def _begin(self) -> None:
        """Give every free resource its next piece."""
        self._next_turn()
        for resource in range(4):
            if self._at[resource] is None and self._queues[resource]:
                piece = self._queues[resource].popleft()
                self._at[resource], self._left[resource], self._began[resource] = piece, piece.seconds, self._now

    def _next_turn(self) -> None:
        if self._at[AG] is not None or self._queues[AG] or not self._turns:
            return
        layer, what, batch = self._turns[0]
        if what == "A" and self._away[batch]:
            return
        self._turns.popleft()
        parts = ("attention", self._work.attention_I) if what == "A" else ("shared", self._work.shared_I)
        self._queues[AG].append(Piece(parts[0], layer, batch, -1, parts[1][batch]))
        if what == "A":
            self._away[batch] = 1 + len(self._work.a2e_IJ[batch])

    def _advance(self) -> None:
        """To the next end of anything."""
        busy = [resource for resource in range(4) if self._at[resource] is not None]
        slower = self._slower if self._at[A2E] is not None and self._at[E2A] is not None else 1.0
        pace = [slower if resource in LINK else 1.0 for resource in range(4)]
        step = min(self._left[resource] * pace[resource] for resource in busy)
        self._now += step
        for resource in busy:
            self._left[resource] -= step / pace[resource]
        for resource in busy:
            if self._left[resource] <= 1e-12 * max(1.0, self._now):
                self._end(resource)

    def _end(self, resource: int) -> None:
        piece = self._at[resource]
        assert piece is not None
        self._at[resource] = None
        self._done.append(Done(resource, piece, self._began[resource], self._now))
        self._follow(piece)

    def _follow(self, piece: Piece) -> None:
        """What may begin now that this is over."""
        what, layer, batch, chunk, _ = piece
        work = self._work
        if what == "attention":
            self._queues[A2E].append(Piece("count", layer, batch, -1, work.count))
            for j, seconds in enumerate(work.a2e_IJ[batch]):
                self._queues[A2E].append(Piece("a2e", layer, batch, j, seconds))
        elif what == "a2e":
            self._queues[EG].append(Piece("expert", layer, batch, chunk, work.expert_IJ[batch][chunk]))
        elif what == "expert":
            self._queues[E2A].append(Piece("e2a", layer, batch, chunk, work.e2a_IJ[batch][chunk]))
        elif what in ("shared", "e2a"):
            self._away[batch] -= 1
