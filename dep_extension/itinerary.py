"""The order of everything in one round of a disaggregated run, derived from the schedule. Knows turns, exchanges and
durations; knows no ranks and no rows.

Exchanges are sorted by when the schedule begins them, so a rank that walks along them never waits for one that must come
later: each comes behind what it needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dep_extension.schedule import Order, Resource, Task, Turn, Work, timeline, turns

LEAST_S = 1e-9  # so that what takes no time still has its place in the order
NOMINAL = (
    1.0,
    0.25,
    0.25,
    1.0,
)  # attention, shared, a2e, expert of a micro-batch: where nobody says how long things take


class Way(Enum):
    """Kinds of exchange, in the order in which a micro-batch meets them."""

    COUNTS = "counts"
    OUT = "a2e"
    VERDICT = "verdict"
    BACK = "e2a"


class Op(NamedTuple):
    """One exchange. `batch` and `chunk` are -1 where it is not of one."""

    way: Way
    layer: int
    batch: int
    chunk: int


class Position(NamedTuple):
    """The MoE layer, of the round, that a micro-batch has come to; ordered as they are walked."""

    round: int
    layer: int


START = Position(0, 0)


@dataclass(frozen=True)
class Itinerary:
    """What every rank walks: the attention group's turns of a layer, and all exchanges of a round."""

    layers: int
    r1: int
    r2: int
    turns: tuple[Turn, ...]
    ops: tuple[Op, ...]

    @classmethod
    def of(
        cls, layers: int, r1: int, r2: int, order: Order | Sequence[Turn] = Order.ASAS, work: Work | None = None
    ) -> Itinerary:
        """`work`: how long things take, of as many layers, micro-batches and chunks; without it a layer's parts are taken
        to be alike. ValueError where turns or numbers are none."""
        if min(layers, r1, r2) < 1:
            raise ValueError(f"{layers} layers, r1={r1} and r2={r2}: there is at least 1 of each")
        found = tuple(turns(order, r1))
        a, s, link, e = NOMINAL
        expected = Work.even(layers, r1, r2, a, s, link / r2, e / r2) if work is None else work
        if (expected.layers, expected.r1, expected.r2) != (layers, r1, r2):
            have = f"{expected.layers} layers, r1={expected.r1}, r2={expected.r2}"
            raise ValueError(f"durations are of {have}, the plan of {layers}, {r1}, {r2}: solve it again")
        return cls(layers, r1, r2, found, tuple(_ops(_lasting(expected), found)))

    @property
    def name(self) -> str:
        """Of the order, for people: one of FinDEP's two, or its turns."""
        for order in Order:
            if list(self.turns) == turns(order, self.r1):
                return order.value
        return " ".join(f"{what}{i}" for what, i in self.turns)

    @cached_property
    def digest(self) -> bytes:
        """sha256 over turns and exchanges: ranks that differ in it would wait for each other for ever."""
        text = repr((self.layers, self.r1, self.r2, self.turns, [(op.way.value, *op[1:]) for op in self.ops]))
        return hashlib.sha256(text.encode()).digest()


def _lasting(work: Work) -> Work:
    """The same where everything takes some time."""
    parts = {name: np.maximum(getattr(work, name), LEAST_S) for name in ("attention_I", "shared_I", "a2e_IJ")}
    parts |= {name: np.maximum(getattr(work, name), LEAST_S) for name in ("expert_IJ", "e2a_IJ")}
    return replace(work, count=max(work.count, LEAST_S), **parts)


def _ops(work: Work, order: Sequence[Turn]) -> Iterator[Op]:
    ways = {"count": Way.COUNTS, "a2e": Way.OUT, "e2a": Way.BACK}
    tasks = [task for task in timeline(work, order) if task.resource in (Resource.A2E, Resource.E2A)]
    unheard = work.r1  # micro-batches whose counts of the first layer are not sent yet
    for task in sorted(tasks, key=_place):
        yield Op(ways[task.what], task.layer, task.batch, task.chunk)
        unheard -= task.what == "count" and task.layer == 0
        if unheard == 0:
            unheard = -1
            yield Op(Way.VERDICT, 0, -1, -1)


def _place(task: Task) -> tuple[float, str, int, int, int]:
    return task.start, task.resource.value, task.layer, task.batch, task.chunk
