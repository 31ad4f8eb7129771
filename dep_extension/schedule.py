"""When everything happens: micro-batches and chunks on four resources, each doing one thing at a time in a given order. The
final say over a plan, and the bound below which none can be. Knows durations and orders; knows nothing of models or
machines.

    AG    attention and shared experts, in the plan's order        EG    expert chunks, as they arrive
    A2E   one direction of the link                                E2A   the other (where they slow each other: duplex.py)

    attention(l, i) after shared(l - 1, i) and every E2A(l - 1, i, *)     A2E(l, i, j), shared(l, i) after attention(l, i)
    expert(l, i, j) after A2E(l, i, j)                                    E2A(l, i, j) after expert(l, i, j)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from dep_extension import duplex

SAME = 1e-12  # of a layer's time: steps that differ by less are alike


class Order(Enum):
    """Of the attention group within a layer, FinDEP's two."""

    ASAS = "ASAS"  # attention and shared experts of one micro-batch, then the next
    AASS = "AASS"  # all attentions first: transfers begin earliest


class Resource(Enum):
    AG = "AG"
    A2E = "A2E"
    EG = "EG"
    E2A = "E2A"


class Task(NamedTuple):
    """Seconds from the beginning. `chunk` is -1 for what is not cut into chunks, and for the count exchange."""

    resource: Resource
    what: str
    layer: int
    batch: int
    chunk: int
    start: float
    end: float


@dataclass(frozen=True)
class Work:
    """Durations in seconds: of each micro-batch (r1,), and of each chunk (r1, r2); the same in every one of `layers`.

    Chunks of one micro-batch may differ: the last is smaller, and measured routing is uneven. A chunk of the expert group
    takes as long as its slowest GPU, since the exchange back is one for all. Chunks that are not there have duration 0.
    `both_ways`: how much slower each direction of the link is while the other is busy, see `duplex.py`; 1: not at all.
    """

    layers: int
    attention_I: np.ndarray
    shared_I: np.ndarray
    count: float
    a2e_IJ: np.ndarray
    expert_IJ: np.ndarray
    e2a_IJ: np.ndarray
    both_ways: float = 1.0

    @property
    def r1(self) -> int:
        return len(self.attention_I)

    @property
    def r2(self) -> int:
        return int(self.expert_IJ.shape[1])

    @classmethod
    def even(
        cls,
        layers: int,
        r1: int,
        r2: int,
        attention: float,
        shared: float,
        a2e: float,
        expert: float,
        e2a: float | None = None,
        count: float = 0.0,
    ) -> Work:
        """All micro-batches and chunks alike."""
        back = a2e if e2a is None else e2a
        flat, cut = np.ones(r1), np.ones((r1, r2))
        return cls(layers, attention * flat, shared * flat, count, a2e * cut, expert * cut, back * cut)


Turn = tuple[str, int]  # ("A" | "S", micro-batch): a step of the attention group within a layer


def turns(order: Order | Sequence[Turn], r1: int) -> list[Turn]:
    """The attention group's order within a layer; a sequence is taken as it is, once it is seen to be possible."""
    if order is Order.ASAS:
        return [(what, i) for i in range(r1) for what in "AS"]
    if order is Order.AASS:
        return [("A", i) for i in range(r1)] + [("S", i) for i in range(r1)]
    assert not isinstance(order, Order)
    found = list(order)
    if sorted(found) != sorted((what, i) for i in range(r1) for what in "AS"):
        raise ValueError(
            f"{len(found)} turns are not the attention and shared experts of {r1} micro-batches, once each"
        )
    if any(found.index(("A", i)) > found.index(("S", i)) for i in range(r1)):
        raise ValueError("shared experts of a micro-batch come before its attention")
    return found


def every_order(r1: int) -> Iterator[list[Turn]]:
    """All orders of a layer in which attentions, and shared experts, come in order of their micro-batches: Catalan(r1)."""

    def grow(done: list[Turn], a: int, s: int) -> Iterator[list[Turn]]:
        if s == r1:
            yield done
            return
        if a < r1:
            yield from grow([*done, ("A", a)], a + 1, s)
        if s < a:
            yield from grow([*done, ("S", s)], a, s + 1)

    yield from grow([], 0, 0)


def makespan(work: Work, order: Order | Sequence[Turn]) -> float:
    """Seconds until the last layer's last shared expert and last exchange back are over."""
    if work.both_ways > 1:
        return max(one.end for one in _duplex(work, order))
    return _run(work, turns(order, work.r1), None)


def timeline(work: Work, order: Order | Sequence[Turn]) -> list[Task]:
    """Every task with its times, in order of their beginning."""
    tasks = [
        Task(run.resource, run.what, run.layer, run.batch, run.chunk + j, float(start), float(end))
        for run in _runs(work, order)
        for j, (start, end) in enumerate(zip(run.starts, run.ends, strict=True))
        if end > start
    ]
    return sorted(tasks, key=lambda task: (task.start, task.end))


class _Run(NamedTuple):
    """Tasks of one kind, layer and micro-batch on one resource, from chunk `chunk` on."""

    resource: Resource
    what: str
    layer: int
    batch: int
    chunk: int
    starts: np.ndarray
    ends: np.ndarray


def _runs(work: Work, order: Order | Sequence[Turn]) -> list[_Run]:
    if work.both_ways > 1:
        return [
            _Run(list(Resource)[at], piece.what, *piece[1:4], np.array([start]), np.array([end]))
            for at, piece, start, end in _duplex(work, order)
        ]
    found: list[_Run] = []
    _run(work, turns(order, work.r1), found)
    return found


def _duplex(work: Work, order: Order | Sequence[Turn]) -> list[duplex.Done]:
    lists = (work.a2e_IJ.tolist(), work.expert_IJ.tolist(), work.e2a_IJ.tolist())
    parts = duplex.Durations(work.layers, work.attention_I.tolist(), work.shared_I.tolist(), work.count, *lists)
    return duplex.run(parts, turns(order, work.r1), work.both_ways)


def _run(work: Work, order: list[Turn], runs: list[_Run] | None) -> float:
    """Layers are alike: once everything is later than in the layer before by one and the same time, it is in all others."""
    ag = a2e = eg = e2a = 0.0  # when each resource is free
    ready_I = np.zeros(work.r1)  # when each micro-batch may attend again
    attended_I, shared_I = np.zeros(work.r1), np.zeros(work.r1)
    cut = _Cut(work)
    before = np.zeros(4 + work.r1)
    for layer in range(work.layers):
        back_I = np.zeros(work.r1)
        for what, i in order:
            if what == "A":
                start = max(ag, ready_I[i])
                ag = attended_I[i] = start + work.attention_I[i]
                a2e, eg, e2a = cut.send(layer, i, ag, a2e, eg, e2a, runs)
                back_I[i] = e2a
            else:
                start = max(ag, attended_I[i])
                ag = shared_I[i] = start + work.shared_I[i]
            if runs is not None:
                part = "attention" if what == "A" else "shared"
                runs.append(_Run(Resource.AG, part, layer, i, -1, np.array([start]), np.array([ag])))
        ready_I = np.maximum(back_I, shared_I)
        state = np.array([ag, a2e, eg, e2a, *ready_I])
        step, before = state - before, state
        if runs is None and layer and np.abs(step - step[0]).max() <= SAME * step[0]:
            return float(ready_I.max() + (work.layers - 1 - layer) * step[0])  # so will every further layer
    return float(ready_I.max())


class _Cut:
    """The chunks of a micro-batch through A2E, EG and E2A, first come first served: sums and running maxima, so that a
    thousand chunks are a few array operations."""

    def __init__(self, work: Work):
        self._work = work
        self._sent = np.cumsum(work.a2e_IJ, axis=1)
        self._computed = np.cumsum(work.expert_IJ, axis=1)
        self._returned = np.cumsum(work.e2a_IJ, axis=1)

    def send(
        self, layer: int, i: int, ready: float, a2e: float, eg: float, e2a: float, runs: list[_Run] | None
    ) -> tuple[float, float, float]:
        """When the three are free again."""
        work = self._work
        begin = max(a2e, ready)
        sent = begin + work.count + self._sent[i]
        computed = _served(sent, eg, work.expert_IJ[i], self._computed[i])
        returned = _served(computed, e2a, work.e2a_IJ[i], self._returned[i])
        if runs is not None:
            counted = np.array([begin]), np.array([begin + work.count])
            runs.append(_Run(Resource.A2E, "count", layer, i, -1, *counted))
            runs.append(_Run(Resource.A2E, "a2e", layer, i, 0, sent - work.a2e_IJ[i], sent))
            runs.append(_Run(Resource.EG, "expert", layer, i, 0, computed - work.expert_IJ[i], computed))
            runs.append(_Run(Resource.E2A, "e2a", layer, i, 0, returned - work.e2a_IJ[i], returned))
        return float(sent[-1]), float(computed[-1]), float(returned[-1])


def _served(arrive_J: np.ndarray, free: float, seconds_J: np.ndarray, summed_J: np.ndarray) -> np.ndarray:
    """When each of a queue is done: end_j = max(end_(j-1), arrive_j) + seconds_j, with end_(-1) = free."""
    begin_J = summed_J - seconds_J
    waited_J = np.maximum.accumulate(arrive_J - begin_J)
    return np.maximum(waited_J, free) + summed_J


def lower_bound(work: Work) -> float:
    """No order can be faster: each resource's whole work with what must come before its first and after its last piece, and
    the longest chain of one micro-batch."""
    first = float(work.attention_I.min())
    ahead = first + work.count + float(work.a2e_IJ[:, 0].min())
    once = np.cumsum(work.a2e_IJ, axis=1) + work.count  # (r1, r2): when chunk j is over there, from the attention's end
    chain_I = np.array([_chain(work, i, once[i]) for i in range(work.r1)])
    link = float(work.a2e_IJ.sum() + work.e2a_IJ.sum() + work.count * work.r1)
    last_back = float(min(row[row > 0].min() if (row > 0).any() else 0.0 for row in work.e2a_IJ))
    sums = (
        work.layers * float(work.attention_I.sum() + work.shared_I.sum()),
        first + work.layers * float(work.a2e_IJ.sum() + work.count * work.r1) + last_back,
        ahead + work.layers * float(work.expert_IJ.sum()) + last_back,
        ahead + float(work.expert_IJ[:, 0].min()) + work.layers * float(work.e2a_IJ.sum()),
        first + work.layers * link * min(1.0, work.both_ways / 2),  # both directions together, were both always busy
    )
    return max(*sums, work.layers * float(chain_I.max()))


def _chain(work: Work, i: int, sent_J: np.ndarray) -> float:
    """One micro-batch alone, one layer."""
    computed = _served(sent_J, 0.0, work.expert_IJ[i], np.cumsum(work.expert_IJ[i]))
    returned = _served(computed, 0.0, work.e2a_IJ[i], np.cumsum(work.e2a_IJ[i]))
    return float(work.attention_I[i] + max(returned[-1], work.shared_I[i]))


def exposed_link_s(work: Work, order: Order | Sequence[Turn]) -> float:
    """Seconds during which the link carries something and neither group computes: what the schedule could not hide."""
    runs = _runs(work, order)
    busy = [run for run in runs if run.resource in (Resource.AG, Resource.EG)]
    return max(0.0, _covered(runs) - _covered(busy))


def _covered(runs: list[_Run]) -> float:
    """Seconds during which at least one of them runs."""
    starts, ends = np.concatenate([run.starts for run in runs]), np.concatenate([run.ends for run in runs])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    reached = np.concatenate([starts[:1], np.maximum.accumulate(ends)[:-1]])  # by those that began before
    return float(np.maximum(0.0, ends - np.maximum(starts, reached)).sum())
