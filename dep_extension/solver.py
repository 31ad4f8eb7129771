"""Which plan: how the batch is cut, in which order, on how many GPUs (FinDEP, Algorithm 1, and what it leaves open). Knows
costs, memory and schedules; knows no devices and no files.

Closed forms prune, the event simulation (`schedule.py`) has the final say. With X = t_a + t_s, Y = max(t_e, t_c),
F = max(X, r2 Y), G = t_a + 2 t_c + t_e + (r2 - 1) Y:

    ASAS    (T - 1) max(G, r1 F) + max(X, G) + (r1 - 1) F                      exact where all chunks are alike
    AASS    (T - 1) max(G, r1 F) + max(r1 X, G + (r1 - 1) max(t_a, r2 Y))      exact in 98 of 100, else low

The paper prints (r2 - 1) Y once more in the first; the simulation says that it counts it twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dep_extension.cost import (
    Machine,
    Model,
    Split,
    attention_s,
    chunks,
    durations,
    expert_s,
    shared_s,
    tokens_per_expert,
)
from dep_extension.partition import Room, largest_r1, largest_samples, room, splits
from dep_extension.schedule import Order, Turn, Work, every_order, exposed_link_s, lower_bound, makespan, turns

MAX_R2 = 64
SIMULATED = 12  # of the candidates, the best by their closed forms: these are low by a tenth at most
MAX_FREE = 5  # micro-batches up to which all orders of the attention group are tried: 42 of them


@dataclass(frozen=True)
class Problem:
    """`samples`: of the whole batch, over all attention GPUs, where it is fixed; None: as many as fit. Each of `length`
    tokens.

    `skew`: measured loads, (chunks of the measurement, expert GPUs), 1 where balanced; None: all are 1.
    """

    model: Model
    machine: Machine
    length: int
    samples: int | None = None
    max_r1: int = 8
    max_r2: int = MAX_R2
    skew: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.length < 1 or (self.samples is not None and self.samples < 1):
            raise ValueError(
                f"{self.samples} samples of {self.length} tokens are nothing to plan for: ask for at least 1 of 1"
            )


@dataclass(frozen=True)
class Plan:
    """How to run. `samples`: in a micro-batch on each attention GPU (m_a); `tokens`: of each expert in a chunk (m_e).

    `makespan_s` by the simulation; `bound_s`: no order of the same cut can be faster. Throughput in tokens per second.
    """

    name: str
    split: Split
    samples: int
    r1: int
    r2: int
    tokens: int
    order: tuple[Turn, ...]
    makespan_s: float
    bound_s: float
    exposed_s: float
    tokens_per_s: float
    replicas: int = 1

    @property
    def gap(self) -> float:
        """How far from the bound, at most: 0 is optimal."""
        return self.makespan_s / self.bound_s - 1


class Cut(NamedTuple):
    """A way to cut: samples per micro-batch and GPU, micro-batches, chunks."""

    samples: int
    r1: int
    r2: int


def asas_s(layers: int, r1: int, r2: int, attention: float, shared: float, link: float, expert: float) -> float:
    """The closed form above."""
    x, _, f, g = _terms(r2, attention, shared, link, expert)
    return (layers - 1) * max(g, r1 * f) + max(x, g) + (r1 - 1) * f


def aass_s(layers: int, r1: int, r2: int, attention: float, shared: float, link: float, expert: float) -> float:
    """The closed form above."""
    x, y, f, g = _terms(r2, attention, shared, link, expert)
    return (layers - 1) * max(g, r1 * f) + max(r1 * x, g + (r1 - 1) * max(attention, r2 * y))


def printed_s(layers: int, r1: int, r2: int, attention: float, shared: float, link: float, expert: float) -> float:
    """The denominator of the paper's Eq. 13 as printed."""
    _, y, _, _ = _terms(r2, attention, shared, link, expert)
    return asas_s(layers, r1, r2, attention, shared, link, expert) + (r2 - 1) * y


def _terms(r2: int, attention: float, shared: float, link: float, expert: float) -> tuple[float, float, float, float]:
    x, y = attention + shared, max(expert, link)
    return x, y, max(x, r2 * y), attention + 2 * link + expert + (r2 - 1) * y


def work_of(problem: Problem, split: Split, cut: Cut) -> Work:
    """The durations of one cut, its last chunk smaller, skewed where the problem says how."""
    many, d = durations(problem.model, problem.machine, split, cut.samples, problem.length, cut.r2)
    even = Work.even(problem.model.layers, cut.r1, many, d.attention, d.shared, d.a2e, d.expert, d.e2a, d.counts)
    for row, last in ((even.a2e_IJ, d.last[0]), (even.expert_IJ, d.last[1]), (even.e2a_IJ, d.last[2])):
        row[:, -1] = last
    return even if problem.skew is None else skewed(even, np.array(problem.skew))


def skewed(work: Work, loads_CG: np.ndarray) -> Work:
    """Each chunk takes as long as its most loaded GPU; measured chunks are taken in turn."""
    slowest_C = loads_CG.max(axis=1)
    at = np.arange(work.expert_IJ.size).reshape(work.expert_IJ.shape) % len(slowest_C)
    return replace(work, expert_IJ=work.expert_IJ * slowest_C[at])


def best_r2(cost: Callable[[int], float], most: int) -> int:
    """The r2 of least cost, which is convex in 1 / r2 (the paper's Theorem 4): a ternary search, then the neighbours."""
    low, high = 1, most
    while high - low > 3:
        a, b = low + (high - low) // 3, high - (high - low) // 3
        if cost(a) <= cost(b):
            high = b
        else:
            low = a
    return min(range(max(1, low - 1), min(most, high + 1) + 1), key=lambda r2: (cost(r2), r2))


def findep(problem: Problem, split: Split) -> Plan | None:
    """Algorithm 1 for one split: walk the frontier of (m_a, r1) that memory allows, both orders, the best r2 of each.

    None where the model does not fit. With a fixed batch every r1 is tried, since more micro-batches are then smaller ones.
    """
    candidates = [c for at in _frontier(problem, split) for c in _candidates(problem, split, at)]
    simulated = [(_simulated(problem, split, c), c) for c in sorted(candidates, key=lambda c: -c.estimate)[:SIMULATED]]
    if not simulated:
        return None
    _, best = max(simulated, key=lambda pair: pair[0])
    return scored(problem, split, best.cut, best.order, "FinDEP")


class _Candidate(NamedTuple):
    """`estimate`: tokens per second by the closed form."""

    estimate: float
    cut: Cut
    order: Order


def _simulated(problem: Problem, split: Split, candidate: _Candidate) -> float:
    """Tokens per second."""
    seconds = makespan(work_of(problem, split, candidate.cut), candidate.order)
    return _tokens(problem, split, candidate.cut) / seconds


def _tokens(problem: Problem, split: Split, cut: Cut) -> int:
    """That one run of the plan reads."""
    samples = cut.r1 * cut.samples * split.ag if problem.samples is None else problem.samples
    return samples * problem.length


def _frontier(problem: Problem, split: Split) -> Iterable[tuple[int, int]]:
    """(m_a, r1) worth a look."""
    fits = room(problem.model, problem.machine, split, problem.length)
    if fits is None:
        return
    if problem.samples is not None:
        each = math.ceil(problem.samples / split.ag)
        for r1 in range(1, min(problem.max_r1, each) + 1):
            samples = math.ceil(each / r1)
            if fits.holds(samples, r1):
                yield samples, r1
        return
    former = 0
    for samples in range(largest_samples(fits), 0, -1):
        r1 = min(problem.max_r1, largest_r1(fits, samples))
        if r1 not in (0, former):
            former = r1
            yield samples, r1


def _candidates(problem: Problem, split: Split, at: tuple[int, int]) -> Iterable[_Candidate]:
    samples, r1 = at
    most = min(problem.max_r2, tokens_per_expert(problem.model, split, samples, problem.length))
    for order, closed in ((Order.ASAS, asas_s), (Order.AASS, aass_s)):
        cost = _closed_cost(problem, split, samples, r1, closed)
        r2 = best_r2(cost, most)
        cut = Cut(samples, r1, r2)
        yield _Candidate(_tokens(problem, split, cut) / cost(r2), cut, order)


def _closed_cost(
    problem: Problem, split: Split, samples: int, r1: int, closed: Callable[..., float]
) -> Callable[[int], float]:
    model, machine = problem.model, problem.machine
    attention = attention_s(model, machine, samples, problem.length) * machine.overlap
    shared = shared_s(model, machine, samples, problem.length) * machine.overlap
    whole = tokens_per_expert(model, split, samples, problem.length)
    worst = 1.0 if problem.skew is None else float(np.mean([max(row) for row in problem.skew]))

    def cost(r2: int) -> float:
        tokens = whole / r2  # not rounded: convexity is of the exact cut
        expert = expert_s(model, machine, split, tokens) * machine.overlap * worst
        link = machine.link(split)(model.experts / split.eg * tokens * model.hidden)
        return closed(model.layers, r1, r2, attention, shared, link, expert) + machine.count_s * r1

    return cost


def scored(problem: Problem, split: Split, cut: Cut, order: Order | Sequence[Turn], name: str) -> Plan:
    """A plan with its figures, by simulation."""
    work = work_of(problem, split, cut)
    seconds = makespan(work, order)
    _, tokens, _ = chunks(tokens_per_expert(problem.model, split, cut.samples, problem.length), cut.r2)
    return Plan(
        name,
        split,
        cut.samples,
        cut.r1,
        work.r2,
        tokens,
        tuple(turns(order, cut.r1)),
        seconds,
        lower_bound(work),
        exposed_link_s(work, order),
        _tokens(problem, split, cut) / seconds,
    )


def naive(problem: Problem, split: Split) -> Plan | None:
    """Everything one after the other: one micro-batch, one chunk."""
    fits = room(problem.model, problem.machine, split, problem.length)
    each = None if problem.samples is None else math.ceil(problem.samples / split.ag)
    samples = 0 if fits is None else largest_samples(fits) if each is None else each
    if fits is None or samples == 0 or not fits.holds(samples, 1):
        return None
    return scored(problem, split, Cut(samples, 1, 1), _glued(1), "naive DEP")


def pppipe(problem: Problem, split: Split) -> Plan | None:
    """MegaScale-Infer's ping-pong: micro-batches, no chunks, and shared experts computed with attention."""
    found = [
        scored(problem, split, Cut(samples, r1, 1), _glued(r1), "PPPipe") for samples, r1 in _all_pairs(problem, split)
    ]
    return max(found, key=lambda plan: plan.tokens_per_s, default=None)


def _glued(r1: int) -> list[Turn]:
    return [(what, i) for i in range(r1) for what in "AS"]


def _all_pairs(problem: Problem, split: Split) -> Iterable[tuple[int, int]]:
    """PPPipe's best is searched over every r1 that fits, not only the largest: a baseline gets its best."""
    fits = room(problem.model, problem.machine, split, problem.length)
    if fits is None:
        return
    seen = set()
    for r1 in range(1, problem.max_r1 + 1):
        if problem.samples is not None:
            samples = math.ceil(math.ceil(problem.samples / split.ag) / r1)
        else:
            samples = max((m for m in range(1, largest_samples(fits) + 1) if fits.holds(m, r1)), default=0)
        if samples and fits.holds(samples, r1) and (samples, r1) not in seen:
            seen.add((samples, r1))
            yield samples, r1


def interleaved(problem: Problem, plan: Plan) -> Plan:
    """The same cut with the best of all orders of the attention group, where there are few enough to try."""
    if plan.r1 > MAX_FREE:
        return plan
    cut = Cut(plan.samples, plan.r1, plan.r2)
    work = work_of(problem, plan.split, cut)
    best = min(every_order(plan.r1), key=lambda order: makespan(work, order))
    found = scored(problem, plan.split, cut, best, "free order")
    return found if found.makespan_s < plan.makespan_s else plan


def best_split(
    problem: Problem, gpus: int | None = None, solve: Callable[[Problem, Split], Plan | None] = findep
) -> Plan | None:
    """Over every ratio of attention to expert GPUs."""
    many = problem.machine.gpus if gpus is None else gpus
    found = [plan for split in splits(problem.model, many) if (plan := solve(problem, split)) is not None]
    return max(found, key=lambda plan: plan.tokens_per_s, default=None)


def after_loss(problem: Problem, plan: Plan, lost: int = 1) -> Plan | None:
    """The plan once `lost` expert GPUs are gone and the others took over their experts; None where they have no room."""
    if plan.split.eg <= lost:
        return None
    return findep(problem, Split(plan.split.ag, plan.split.eg - lost))


__all__ = [
    "Cut", "Plan", "Problem", "Room", "aass_s", "after_loss", "asas_s", "best_r2", "best_split", "findep", "interleaved",
    "naive", "pppipe", "printed_s", "scored", "skewed", "work_of",
]  # fmt: skip
