"""What copies of experts are worth in a plan, for people and scripts: none, every expert as often, and hot ones alone. Knows
plans and loads; plans each way at the plan's own ratio, so that nothing else differs. Every figure is a simulation's.

Placed experts are judged by chunks that their placement has not seen, where each layer has two or more (imbalance.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from duoserve.config import size

if TYPE_CHECKING:
    from dep_extension.ratio import Comparison
    from dep_extension.solver import Plan, Problem

SHOWN = 5  # hot experts of a layer that are named


class Way(NamedTuple):
    """`experts`: of a layer on the fullest GPU. None: there is no room."""

    name: str
    experts: int
    tokens_per_s: float | None


def ways_to_copy(problem: Problem, plan: Plan) -> list[Way]:
    """At the plan's ratio and batch: no copies, as few uniform ones as fill the plan's places or more, and placed by loads
    with no spare place, with the plan's, and with as many as those uniform copies take."""
    from dep_extension.solver import findep

    ranks, experts = plan.split.eg, problem.model.experts
    share = math.ceil(experts / ranks)
    twice = min(ranks, max(2, plan.replicas))
    places = min(experts, math.ceil(experts * twice / ranks))
    spares = sorted({0, plan.spare or 0, places - share})
    asked = [("each once", share, replace(problem, replicas=1))]
    if twice > 1:
        asked.append((f"each {twice} times", places, replace(problem, replicas=twice)))
    asked += [(f"placed, {n} spare", min(experts, share + n), replace(problem, spare=n)) for n in spares]
    plans = [(name, held, findep(at, plan.split)) for name, held, at in asked]
    return [Way(name, held, None if found is None else found.tokens_per_s) for name, held, found in plans]


def copies_table(problem: Problem, found: Comparison) -> Iterator[tuple[str, str]]:
    """Rows for people."""
    plan, model = found.plan, problem.model
    assert problem.skew is not None
    yield "", ""
    each = size(model.layers * model.expert_bytes)
    yield (
        f"at {plan.split.ag}:{plan.split.eg}",
        f"{'tokens/s':>12s}{'of each once':>14s}  experts on a GPU, {each} each",
    )
    ways = ways_to_copy(problem, plan)
    once = ways[0].tokens_per_s
    for way in ways:
        rate = f"{'no room':>12s}" if way.tokens_per_s is None else f"{way.tokens_per_s:12,.0f}"
        gain = f"{way.tokens_per_s / once:14.3f}" if way.tokens_per_s and once else " " * 14
        yield way.name, f"{rate}{gain}  {way.experts}"
    if not problem.skew.judged_apart:
        yield "", "a layer has one chunk of loads: what is placed by it is judged by it, too"
    if plan.held is not None:
        yield "copies", _which(plan)


def _which(plan: Plan) -> str:
    """How many, and the most copied ones of the first layer."""
    counts = counted(plan)
    more = sum(n - 1 for layer in counts for n in layer.values())
    hot = sorted((expert for expert in counts[0] if counts[0][expert] > 1), key=lambda e: (-counts[0][e], e))
    named = ", ".join(f"{expert} x{counts[0][expert]}" for expert in hot[:SHOWN])
    said = f"{more:,} over all {len(counts)} layers; "
    rest = f" and {len(hot) - SHOWN} others" if len(hot) > SHOWN else ""
    return said + (f"of the first layer experts {named}{rest}" if hot else "none of the first layer")


def counted(plan: Plan) -> list[dict[int, int]]:
    """Of each layer how often each expert is there."""
    assert plan.held is not None
    found = []
    for held in plan.held:
        counts: dict[int, int] = {}
        for one in held:
            for expert in one:
                counts[expert] = counts.get(expert, 0) + 1
        found.append(counts)
    return found


def copies_json(problem: Problem, found: Comparison) -> list[dict[str, Any]] | None:
    return None if problem.skew is None else [way._asdict() for way in ways_to_copy(problem, found.plan)]
