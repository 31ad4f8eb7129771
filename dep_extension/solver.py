"""Which plan: how the batch is cut, in which order, on how many GPUs (FinDEP, Algorithm 1, and what it leaves open). Knows
costs, memory and schedules; knows no devices and no files.

Closed forms (`closed.py`) prune, the event simulation (`schedule.py`) has the final say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dep_extension.closed import aass_s, asas_s, best_r2, printed_s
from dep_extension.cost import (
    Line,
    Machine,
    Model,
    Split,
    attention_s,
    chunks,
    durations,
    expert_line,
    expert_s,
    shared_s,
    tokens_per_expert,
)
from dep_extension.imbalance import Burden, Held, Loads, burden, burden_of_shares
from dep_extension.partition import Room, largest_r1, largest_samples, room, shares, shares_after, splits
from dep_extension.schedule import Order, Turn, Work, every_order, exposed_link_s, lower_bound, makespan, turns

MAX_R2 = 64
SIMULATED, MOST_SIMULATED = 12, 48  # of the candidates, those best by their closed forms: these are low by
NEAR = 0.9  # a tenth at most
DRAWS = 4  # of measured chunks, that a plan is judged by
MAX_FREE = 5  # micro-batches up to which all orders of the attention group are tried: 42 of them


@dataclass(frozen=True)
class Problem:
    """`samples`: of the whole batch, over all attention GPUs, where it is fixed; None: as many as fit. Each of `length`
    tokens.

    `skew`: measured loads of the experts; None: all are alike. `replicas`: expert GPUs that hold each expert. `held`: who
    holds what, of a split with as many expert GPUs; None: as `partition.shares` says.
    """

    model: Model
    machine: Machine
    length: int
    samples: int | None = None
    max_r1: int = 8
    max_r2: int = MAX_R2
    skew: Loads | None = None
    replicas: int = 1
    held: Held | None = None

    def __post_init__(self) -> None:
        if self.skew is not None and self.skew.experts != self.model.experts:
            raise ValueError(
                f"loads are of {self.skew.experts} experts, {self.model.name} has {self.model.experts}: measure them on it"
            )
        if self.length < 1 or (self.samples is not None and self.samples < 1):
            raise ValueError(
                f"{self.samples} samples of {self.length} tokens are nothing to plan for: ask for at least 1 of 1"
            )

    def burden(self, split: Split) -> Burden | None:
        """Of a split's expert GPUs; None where the costs of balanced experts say it all."""
        if self.skew is None and self.held is None and self.replicas == 1:
            return None
        if self.held is None:
            return burden_of_shares(self.skew, self.model.experts, split.eg, self.replicas)
        if len(self.held) != split.eg:
            raise ValueError(f"{len(self.held)} expert GPUs are said to hold experts, the split has {split.eg}")
        return burden(self.skew, self.held, self.model.experts)

    def room(self, split: Split) -> Room | None:
        found = self.burden(split)
        given = (None, None) if found is None else (found.experts, float(found.most_C.max()))
        return room(self.model, self.machine, split, self.length, *given)


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


def work_of(problem: Problem, split: Split, cut: Cut, draw: int = 0) -> Work:
    """The durations of one cut, its last chunk smaller, uneven where the problem says how; `draw`: see `works_of`."""
    many, d = durations(problem.model, problem.machine, split, cut.samples, problem.length, cut.r2)
    even = Work.even(problem.model.layers, cut.r1, many, d.attention, d.shared, d.a2e, d.expert, d.e2a, d.counts)
    found = problem.burden(split)
    if found is not None:
        return _uneven(problem, split, cut, even, found, draw)
    for row, last in ((even.a2e_IJ, d.last[0]), (even.expert_IJ, d.last[1]), (even.e2a_IJ, d.last[2])):
        row[:, -1] = last
    return even


def works_of(problem: Problem, split: Split, cut: Cut) -> list[Work]:
    """Under skew several draws of the measured chunks: who saw one sequence of them alone would plan for that sequence."""
    found = problem.burden(split)
    many = DRAWS if found is not None and len(found.most_C) > 1 else 1
    return [work_of(problem, split, cut, draw) for draw in range(many)]


def mean_makespan(works: Sequence[Work], order: Order | Sequence[Turn]) -> float:
    return sum(makespan(work, order) for work in works) / len(works)


def _uneven(problem: Problem, split: Split, cut: Cut, even: Work, found: Burden, draw: int) -> Work:
    """Each chunk takes as long as its busiest GPU, and so do its transfers; measured chunks are drawn."""
    whole = tokens_per_expert(problem.model, split, cut.samples, problem.length)
    _, size, last = chunks(whole, cut.r2)
    tokens_IJ = np.full(even.expert_IJ.shape, float(size))
    tokens_IJ[:, -1] = last
    tokens_IJ *= np.random.default_rng(draw).choice(found.most_C, tokens_IJ.shape)
    expert, link = _lines(problem, split, found)
    over_IJ = link.a + link.b * tokens_IJ
    return replace(even, a2e_IJ=over_IJ, expert_IJ=expert.a + expert.b * tokens_IJ, e2a_IJ=over_IJ)


def _lines(problem: Problem, split: Split, found: Burden) -> tuple[Line, Line]:
    """Expert and link, in what the busiest GPU gets: tokens of a balanced expert times `most`."""
    model, machine = problem.model, problem.machine
    a, b = expert_line(model, machine, found.experts)
    link = machine.link(split)
    return Line(a * machine.overlap, b * machine.overlap), Line(link.a, link.b * model.hidden)


def findep(problem: Problem, split: Split) -> Plan | None:
    """Algorithm 1 for one split: walk the frontier of (m_a, r1) that memory allows, both orders, the best r2 of each.

    None where the model does not fit. With a fixed batch every r1 is tried, since more micro-batches are then smaller ones.
    """
    return findep_of([(problem, split)])


Site = tuple[Problem, Split]


def findep_of(sites: Iterable[Site]) -> Plan | None:
    """The best plan of several splits, or of several numbers of replicas. None where the model fits none of them."""
    found = [(site, c) for site in sites for at in _frontier(*site) for c in _candidates(*site, at)]
    if not found:
        return None
    found.sort(key=lambda pair: -pair[1].estimate)
    near = [pair for pair in found[:MOST_SIMULATED] if pair[1].estimate >= NEAR * found[0][1].estimate]
    simulated = near if len(near) > SIMULATED else found[:SIMULATED]
    (problem, split), best = max(simulated, key=lambda pair: _simulated(pair[0][0], pair[0][1], pair[1]))
    if problem.skew is not None:
        best = max(_other_r2(problem, split, best), key=lambda c: _simulated(problem, split, c))
    return scored(problem, split, best.cut, best.order, "FinDEP")


def _other_r2(problem: Problem, split: Split, found: _Candidate) -> Iterable[_Candidate]:
    """Closed forms see the mean over measured chunks alone: under skew other numbers of chunks are simulated, too."""
    samples, r1, r2 = found.cut
    most = min(problem.max_r2, tokens_per_expert(problem.model, split, samples, problem.length))
    for n in {*(1 << k for k in range(most.bit_length())), *range(max(1, r2 - 2), min(most, r2 + 2) + 1)}:
        if n <= most:
            yield found._replace(cut=Cut(samples, r1, n))


class _Candidate(NamedTuple):
    """`estimate`: tokens per second by the closed form."""

    estimate: float
    cut: Cut
    order: Order


def _simulated(problem: Problem, split: Split, candidate: _Candidate) -> float:
    """Tokens per second."""
    seconds = mean_makespan(works_of(problem, split, candidate.cut), candidate.order)
    return _tokens(problem, split, candidate.cut) / seconds


def _tokens(problem: Problem, split: Split, cut: Cut) -> int:
    """That one run of the plan reads."""
    samples = cut.r1 * cut.samples * split.ag if problem.samples is None else problem.samples
    return samples * problem.length


def _frontier(problem: Problem, split: Split) -> Iterable[tuple[int, int]]:
    """(m_a, r1) worth a look."""
    fits = problem.room(split)
    if fits is None:
        return
    if problem.samples is not None:
        each = math.ceil(problem.samples / split.ag)
        for r1 in range(1, min(problem.max_r1, each) + 1):
            samples = math.ceil(each / r1)
            if fits.holds(samples, r1):
                yield samples, r1
        return
    if problem.skew is not None:
        yield from _all_pairs(
            problem, split
        )  # busy chunks of many micro-batches may fall together: fewer can be better
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
        for r2 in {best_r2(cost, most)} | ({1} if problem.skew is not None else set()):
            cut = Cut(samples, r1, r2)
            yield _Candidate(_tokens(problem, split, cut) / cost(r2), cut, order)


def _closed_cost(
    problem: Problem, split: Split, samples: int, r1: int, closed: Callable[..., float]
) -> Callable[[int], float]:
    model, machine = problem.model, problem.machine
    attention = attention_s(model, machine, samples, problem.length) * machine.overlap
    shared = shared_s(model, machine, samples, problem.length) * machine.overlap
    whole = tokens_per_expert(model, split, samples, problem.length)
    expert_of, link_of = _per_tokens(problem, split)

    def cost(r2: int) -> float:
        tokens = whole / r2  # not rounded: convexity is of the exact cut
        found = closed(model.layers, r1, r2, attention, shared, link_of(tokens), expert_of(tokens))
        return found + machine.count_s * r1

    return cost


def _per_tokens(problem: Problem, split: Split) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Seconds of a chunk on the expert group and of one of its transfers, by tokens of an expert: the mean over chunks."""
    model, machine = problem.model, problem.machine
    found = problem.burden(split)
    if found is None:
        link = machine.link(split)
        each = model.experts / split.eg * model.hidden
        return lambda n: expert_s(model, machine, split, n) * machine.overlap, lambda n: link(each * n)
    expert, link = _lines(problem, split, found)
    mean = float(found.most_C.mean())
    return lambda n: expert(mean * n), lambda n: link(mean * n)


def scored(problem: Problem, split: Split, cut: Cut, order: Order | Sequence[Turn], name: str) -> Plan:
    """A plan with its figures, by simulation: under skew means over draws of the measured chunks."""
    works = works_of(problem, split, cut)
    seconds = mean_makespan(works, order)
    _, tokens, _ = chunks(tokens_per_expert(problem.model, split, cut.samples, problem.length), cut.r2)
    return Plan(
        name,
        split,
        cut.samples,
        cut.r1,
        works[0].r2,
        tokens,
        tuple(turns(order, cut.r1)),
        seconds,
        sum(map(lower_bound, works)) / len(works),
        sum(exposed_link_s(work, order) for work in works) / len(works),
        _tokens(problem, split, cut) / seconds,
        problem.replicas,
    )


def recut(problem: Problem, split: Split, samples: int, r1: int) -> Plan:
    """The best chunks and order for micro-batches that are there already, `r1` of `samples` on each attention GPU: whether
    they have room is not asked any more."""
    found = list(_candidates(problem, split, (samples, r1)))
    if problem.skew is not None:
        found = [other for one in found for other in _other_r2(problem, split, one)]
    best = max(found, key=lambda candidate: _simulated(problem, split, candidate))
    return scored(problem, split, best.cut, best.order, "FinDEP")


def naive(problem: Problem, split: Split) -> Plan | None:
    """Everything one after the other: one micro-batch, one chunk."""
    fits = problem.room(split)
    each = None if problem.samples is None else math.ceil(problem.samples / split.ag)
    samples = 0 if fits is None else largest_samples(fits) if each is None else each
    if fits is None or samples == 0 or not fits.holds(samples, 1):
        return None
    return scored(problem, split, Cut(samples, 1, 1), _glued(1), "naive DEP")


def pppipe(problem: Problem, split: Split) -> Plan | None:
    """MegaScale-Infer's ping-pong: micro-batches, no chunks, and shared experts computed with attention."""
    cuts = [Cut(samples, r1, 1) for samples, r1 in _all_pairs(problem, split)]
    if not cuts:
        return None

    def rate(cut: Cut) -> float:
        return _tokens(problem, split, cut) / mean_makespan(works_of(problem, split, cut), _glued(cut.r1))

    best = max(cuts, key=rate)
    return scored(problem, split, best, _glued(best.r1), "PPPipe")


def _glued(r1: int) -> list[Turn]:
    return [(what, i) for i in range(r1) for what in "AS"]


def _all_pairs(problem: Problem, split: Split) -> Iterable[tuple[int, int]]:
    """PPPipe's best is searched over every r1 that fits, not only the largest: a baseline gets its best."""
    fits = problem.room(split)
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
    """The same cut with another order of the attention group: the best of all where there are few enough to try, else what
    exchanging neighbours in it leads to."""
    works = works_of(problem, plan.split, Cut(plan.samples, plan.r1, plan.r2))
    if plan.r1 <= MAX_FREE:
        best = min(every_order(plan.r1), key=lambda order: mean_makespan(works, order))
    else:
        best = _climbed(works, list(plan.order))
    found = scored(problem, plan.split, Cut(plan.samples, plan.r1, plan.r2), best, "free order")
    return found if found.makespan_s < plan.makespan_s else plan


def _climbed(works: Sequence[Work], order: list[Turn]) -> list[Turn]:
    """Exchange two neighbours as long as that makes it shorter; a micro-batch attends before its shared experts."""
    seconds = mean_makespan(works, order)
    for _ in range(len(order)):
        others = [
            [*order[:i], order[i + 1], order[i], *order[i + 2 :]]
            for i in range(len(order) - 1)
            if order[i][1] != order[i + 1][1]
        ]
        timed = [(mean_makespan(works, other), other) for other in others]
        if not timed or min(timed)[0] >= seconds:
            break
        seconds, order = min(timed)
    return order


def best_split(
    problem: Problem, gpus: int | None = None, solve: Callable[[Problem, Split], Plan | None] = findep
) -> Plan | None:
    """Over every ratio of attention to expert GPUs."""
    many = problem.machine.gpus if gpus is None else gpus
    found = [
        plan for split in splits(problem.model, many, problem.replicas) if (plan := solve(problem, split)) is not None
    ]
    return max(found, key=lambda plan: plan.tokens_per_s, default=None)


class AfterLoss(NamedTuple):
    """What goes on once expert GPUs are gone: the plan, who holds what, and how many experts of a layer must be loaded."""

    plan: Plan
    held: Held
    loaded: int


def after_loss(problem: Problem, plan: Plan, lost: int = 1) -> Plan | None:
    """The plan once the first `lost` expert GPUs are gone; see `survived`."""
    found = survived(problem, plan, range(lost))
    return None if found is None else found.plan


def survived(problem: Problem, plan: Plan, lost: Collection[int] = (0,)) -> AfterLoss | None:
    """Plan anew for the expert GPUs that are left once those of these numbers are gone and the others took over what nobody
    holds any more: nothing, where there are replicas enough. None where they have no room, or where nobody is left.
    """
    before = shares(problem.model.experts, plan.split.eg, plan.replicas) if problem.held is None else problem.held
    if len(set(lost)) >= plan.split.eg:
        return None
    held = shares_after(before, lost)
    left = replace(problem, replicas=plan.replicas, held=held)
    found = findep(left, Split(plan.split.ag, len(held)))
    kept = len({expert for rank, one in enumerate(before) if rank not in lost for expert in one})
    return None if found is None else AfterLoss(found, held, problem.model.experts - kept)


__all__ = [
    "AfterLoss", "Cut", "Plan", "Problem", "Room", "aass_s", "after_loss", "asas_s", "best_r2", "best_split",
    "findep", "findep_of", "interleaved", "mean_makespan", "naive", "pppipe", "printed_s", "recut", "scored",
    "survived", "work_of", "works_of",
]  # fmt: skip
