"""Which plan: how the batch is cut, in which order, on how many GPUs (FinDEP, Algorithm 1, and what it leaves open). Knows
costs, memory and schedules; knows no devices and no files.

Closed forms (`closed.py`) prune, the event simulation (`schedule.py`) has the final say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dep_extension.closed import aass_s, asas_s, best_r2, printed_s
from dep_extension.cost import (
    Line,
    Split,
    attention_s,
    chunks,
    durations,
    expert_line,
    expert_s,
    shared_s,
    tokens_per_expert,
)
from dep_extension.imbalance import Burden
from dep_extension.partition import Room, largest_r1, largest_samples, shares, shares_after, splits
from dep_extension.placement import Held, Placement, repeated
from dep_extension.problem import MAX_R2, Cut, Plan, Problem, as_planned
from dep_extension.schedule import Order, Turn, Work, every_order, exposed_link_s, lower_bound, makespan, turns

SIMULATED, MOST_SIMULATED = 12, 48  # of the candidates, those best by their closed forms: these are low by
NEAR = 0.9  # a tenth at most
DRAWS = 4  # of measured chunks, that a plan is judged by
NOTHING = 1e-6  # a gap to the bound that no other order is looked for
MOST_CLIMBED = 400  # orders that are simulated where not all are
MAX_FREE = 5  # micro-batches up to which all orders of the attention group are tried: 42 of them


def work_of(problem: Problem, split: Split, cut: Cut, draw: int = 0) -> Work:
    """The durations of one cut, its last chunk smaller, uneven where the problem says how; `draw`: see `works_of`."""
    many, d = durations(problem.model, problem.machine, split, cut.samples, problem.length, cut.r2)
    even = Work.even(problem.model.layers, cut.r1, many, d.attention, d.shared, d.a2e, d.expert, d.e2a, d.counts)
    even = replace(even, both_ways=problem.machine.both_ways)
    found = problem.burden(split.eg)
    if found is not None:
        return _uneven(problem, split, cut, even, found, draw)
    for row, last in ((even.a2e_IJ, d.last[0]), (even.expert_IJ, d.last[1]), (even.e2a_IJ, d.last[2])):
        row[:, -1] = last
    return even


def works_of(problem: Problem, split: Split, cut: Cut) -> list[Work]:
    """Under skew several draws of the measured chunks: who saw one sequence of them alone would plan for that sequence."""
    found = problem.burden(split.eg)
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
    near = [pair for pair in found[:MOST_SIMULATED] if pair[1].estimate >= _near(pair[0][0]) * found[0][1].estimate]
    simulated = near if len(near) > SIMULATED else found[:SIMULATED]
    (problem, split), best = _quickest(simulated)
    if problem.skew is not None or problem.machine.both_ways > 1:
        _, best = _quickest(
            (((problem, split), best), *(((problem, split), c) for c in _other_r2(problem, split, best)))
        )
    return scored(problem, split, best.cut, best.order, "FinDEP")


def _near(problem: Problem) -> float:
    """Closed forms know nothing of directions that slow each other: then they are low by as much, at most."""
    return NEAR / problem.machine.both_ways


def _other_r2(problem: Problem, split: Split, found: _Candidate) -> Iterable[_Candidate]:
    """Closed forms see the mean over measured chunks alone, and a link whose directions do not slow each other: where that
    is not so, other numbers of chunks are simulated, too."""
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


def _quickest(found: Iterable[tuple[Site, _Candidate]]) -> tuple[Site, _Candidate]:
    """By simulation; those whose bound promises no more than the best so far are not simulated."""
    best, rate = None, 0.0
    for (problem, split), candidate in found:
        works = works_of(problem, split, candidate.cut)
        tokens = _tokens(problem, split, candidate.cut) * len(works)
        if tokens / sum(map(lower_bound, works)) > rate and (mine := _simulated(problem, split, candidate)) > rate:
            best, rate = ((problem, split), candidate), mine
    assert best is not None, "there are candidates"
    return best


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
    for r1 in range(1, problem.max_r1 + 1):
        samples = largest_samples(fits, r1)
        if samples and (most := min(problem.max_r1, largest_r1(fits, samples))) != former:
            former = most
            yield samples, most


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
    found = problem.burden(split.eg)
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
        problem.spare,
        problem.placement(split.eg),
    )


def recut(problem: Problem, split: Split, samples: int, r1: int) -> Plan:
    """The best chunks and order for micro-batches that are there already, `r1` of `samples` on each attention GPU: whether
    they have room is not asked any more."""
    found = list(_candidates(problem, split, (samples, r1)))
    if problem.skew is not None or problem.machine.both_ways > 1:
        found = [other for one in found for other in _other_r2(problem, split, one)]
    best = max(found, key=lambda candidate: _simulated(problem, split, candidate))
    return scored(problem, split, best.cut, best.order, "FinDEP")


def naive(problem: Problem, split: Split) -> Plan | None:
    """Everything one after the other: one micro-batch, one chunk. None where the model does not fit."""
    return naive_of([(problem, split)])


def naive_of(sites: Iterable[Site]) -> Plan | None:
    """The best of several splits, or ways to copy experts."""
    found = []
    for problem, split in sites:
        fits = problem.room(split)
        each = None if problem.samples is None else math.ceil(problem.samples / split.ag)
        samples = 0 if fits is None else largest_samples(fits) if each is None else each
        if fits is not None and samples and fits.holds(samples, 1):
            found.append((problem, split, Cut(samples, 1, 1)))
    return _best_glued(found, "naive DEP")


def pppipe(problem: Problem, split: Split) -> Plan | None:
    """MegaScale-Infer's ping-pong: micro-batches, no chunks, and shared experts computed with attention."""
    return pppipe_of([(problem, split)])


def pppipe_of(sites: Iterable[Site]) -> Plan | None:
    """The best of several splits, or ways to copy experts."""
    pairs = ((problem, split, pair) for problem, split in sites for pair in _all_pairs(problem, split))
    return _best_glued([(problem, split, Cut(samples, r1, 1)) for problem, split, (samples, r1) in pairs], "PPPipe")


def _best_glued(found: list[tuple[Problem, Split, Cut]], name: str) -> Plan | None:
    """Simulated from the most promising down, until no bound of the others promises more."""
    works = [works_of(*one) for one in found]
    tokens = [_tokens(*one) for one in found]
    bound = [many * len(each) / sum(map(lower_bound, each)) for many, each in zip(tokens, works, strict=True)]
    best, rate = None, 0.0
    for i in sorted(range(len(found)), key=lambda i: -bound[i]):
        if bound[i] <= rate:
            break
        mine = tokens[i] / mean_makespan(works[i], _glued(found[i][2].r1))
        if mine > rate:
            best, rate = found[i], mine
    return None if best is None else scored(*best, _glued(best[2].r1), name)


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
            samples = largest_samples(fits, r1)
        if samples and fits.holds(samples, r1) and (samples, r1) not in seen:
            seen.add((samples, r1))
            yield samples, r1


def interleaved(problem: Problem, plan: Plan) -> Plan:
    """The same cut with another order of the attention group: the best of all where there are few enough to try, else what
    exchanging neighbours in it leads to, within a bounded number of simulations. As it is where nothing is to gain."""
    if plan.gap <= NOTHING:
        return plan
    cut = Cut(plan.samples, plan.r1, plan.r2)
    works = works_of(problem, plan.split, cut)
    if plan.r1 <= MAX_FREE:
        best = min(every_order(plan.r1), key=lambda order: mean_makespan(works, order))
    else:
        best = _climbed(works, list(plan.order))
    found = scored(problem, plan.split, cut, best, "free order")
    return found if found.makespan_s < plan.makespan_s else plan


def _climbed(works: Sequence[Work], order: list[Turn]) -> list[Turn]:
    """Exchange two neighbours as long as that makes it shorter; a micro-batch attends before its shared experts."""
    seconds, left = mean_makespan(works, order), MOST_CLIMBED
    while left > 0:
        others = [
            [*order[:i], order[i + 1], order[i], *order[i + 2 :]]
            for i in range(len(order) - 1)
            if order[i][1] != order[i + 1][1]
        ][:left]
        left -= len(others)
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
    """What goes on once expert GPUs are gone: the plan, who holds what, and how many experts of all layers are to load."""

    plan: Plan
    held: Placement
    loaded: int


def after_loss(problem: Problem, plan: Plan, lost: int = 1) -> Plan | None:
    """The plan once the first `lost` expert GPUs are gone; see `survived`."""
    found = survived(problem, plan, range(lost))
    return None if found is None else found.plan


def survived(problem: Problem, plan: Plan, lost: Collection[int] = (0,)) -> AfterLoss | None:
    """Plan anew for the expert GPUs that are left once those of these numbers are gone and the others took over what nobody
    holds any more: nothing, where there are replicas enough. None where they have no room, or where nobody is left.
    """
    before = problem.held or plan.held or (shares(problem.model.experts, plan.split.eg, plan.replicas),)
    if len(set(lost)) >= plan.split.eg:
        return None
    before = repeated(before, problem.model.layers)
    held = tuple(shares_after(layer, lost) for layer in before)
    found = findep(replace(as_planned(problem, plan), held=held), Split(plan.split.ag, len(held[0])))
    return None if found is None else AfterLoss(found, held, sum(map(_orphans, before, held, [set(lost)] * len(held))))


def _orphans(before: Held, after: Held, lost: set[int]) -> int:
    """Experts of a layer that somebody has to load."""
    kept = [set(one) for rank, one in enumerate(before) if rank not in lost]
    return sum(len(set(new) - old) for new, old in zip(after, kept, strict=True))


__all__ = [
    "MAX_R2", "AfterLoss", "Cut", "Plan", "Problem", "Room", "aass_s", "after_loss", "as_planned", "asas_s", "best_r2",
    "best_split", "findep", "findep_of", "interleaved", "mean_makespan", "naive", "naive_of", "pppipe", "pppipe_of",
    "printed_s", "recut", "scored", "survived", "work_of", "works_of",
]  # fmt: skip
