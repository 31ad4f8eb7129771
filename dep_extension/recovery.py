"""A run that outlives its expert ranks. Knows sides, shares, positions and the world; knows nothing of prompts, nor of how a
loss is noticed.

    lost -> survivors agree, form the next generation -> shares_after: who holds what nobody holds any more
         -> each says where its micro-batches are -> all walk on from the least; those beyond it send nothing until then

Attention ranks keep what they sent until all of it is back, so a layer of a micro-batch is sent again and no request is
lost; expert ranks keep nothing but their experts, and read those that are new to them from the store as rows come for them.
An attention rank has keys and values that nobody else has: its loss ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dep_extension.comm import PeerLost
from dep_extension.executor import AttentionSide, Course, ExpertSide
from dep_extension.partition import shares_after
from dep_extension.solver import Plan, Problem, after_loss
from dep_extension.walk import START, Itinerary, Note, Position
from dep_extension.world import World

BEYOND = 1 << 62  # the round of whoever has nothing under way

Replan = Callable[[Course], Itinerary]
"""The order to walk once a course has fewer expert ranks, of as many micro-batches: the same on every rank."""


class Outage(NamedTuple):
    """One loss: launch ranks; seconds of `time.time` when this rank noticed it and when it walked on; how many experts this
    rank holds now that it did not hold before, over all layers."""

    ranks: tuple[int, ...]
    noticed: float
    resumed: float
    taken_over: int


def attend(
    side: AttentionSide,
    world: World,
    works: Sequence[Callable[[], Any]],
    note: Note | None = None,
    replan: Replan | None = None,
) -> tuple[list[Any], list[Outage]]:
    """As `AttentionSide.run`, through losses. Raises PeerLost where one cannot be outlived."""
    outages: list[Outage] = []
    results = side.run(world, works, note, lambda: _walk_on(side, world, note, replan, outages))
    return results, outages


def serve(side: ExpertSide, world: World, note: Note | None = None, replan: Replan | None = None) -> list[Outage]:
    """As `ExpertSide.walk`, through losses. Raises PeerLost where one cannot be outlived, Fenced where this rank was it."""
    outages: list[Outage] = []
    _walk_on(side, world, note, replan, outages)
    return outages


def solved_again(problem: Problem, plan: Plan) -> Replan:
    """The solver's plan for the experts that are left. Micro-batches are there already: a plan of more or fewer of them is
    taken for its chunks alone, in the order that was."""

    def replan(course: Course) -> Itinerary:
        old = course.itinerary
        found = after_loss(problem, plan, plan.split.eg - course.eg)
        if found is None:
            return old
        return Itinerary.of(old.layers, old.r1, found.r2, found.order if found.r1 == old.r1 else old.turns)

    return replan


def _walk_on(
    side: AttentionSide | ExpertSide,
    world: World,
    note: Note | None,
    replan: Replan | None,
    outages: list[Outage],
) -> None:
    """Nobody leaves before all have ended: who is lost until then is lost to all."""
    start = START
    while True:
        try:
            side.walk(world, start, note)
            world.gather((0,))
            return
        except PeerLost:
            start = _recover(side, world, replan, outages)


def _recover(side: AttentionSide | ExpertSide, world: World, replan: Replan | None, outages: list[Outage]) -> Position:
    """Where to walk on. Another loss meanwhile begins it again."""
    while True:
        noticed = time.time()
        loss = world.reform()
        taken = _share_out(side, world, loss.experts, replan)
        try:
            start = _least(side, world)
        except PeerLost:
            continue
        finally:
            outages.append(Outage(loss.ranks, noticed, time.time(), taken))
        return start


def _share_out(side: AttentionSide | ExpertSide, world: World, lost: Sequence[int], replan: Replan | None) -> int:
    """The course of those who are left; how many experts this rank took over."""
    old = side.course
    shares_L = tuple(shares_after(shares, lost) for shares in old.shares_L)
    course = replace(old, eg=world.place.eg, shares_L=shares_L)
    if replan is not None:
        course = replace(course, itinerary=replan(course))
    if isinstance(side, AttentionSide):
        side.follow(course)
        return 0
    before = side.rank.share.held
    after = course.held(world.place.index)
    if [tuple(held) for held in after] == before:  # where replicas are left: its slots stay as they are
        side.course = course
        return 0
    side.follow(course, world.place)
    return sum(len(set(new) - set(held)) for new, held in zip(after, before, strict=True))


def _least(side: AttentionSide | ExpertSide, world: World) -> Position:
    """Of all micro-batches of all attention ranks; the start where all have ended, so that all stop together there."""
    mine = position(side) if isinstance(side, AttentionSide) else None
    said = world.gather(mine or (BEYOND, 0))
    least = Position(*min(said))
    return START if least.round == BEYOND else least


def position(side: AttentionSide) -> Position | None:
    """The least of this rank's micro-batches; None where all have ended."""
    found = [side.hub.position(i) for i in range(len(side.hub.batches))]
    return min((at for at in found if at is not None), default=None)
