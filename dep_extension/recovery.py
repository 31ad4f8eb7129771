"""A run that outlives its expert ranks. Knows sides, shares, positions and the world; knows nothing of prompts, nor of how a
loss is noticed.

    step      all say something, or all walk; numbered alike on every rank
    lost   -> survivors agree, form the next generation -> shares_after: who holds what nobody holds any more -> the plan is
              solved again -> each says its step, where its micro-batches are, and its plan
           -> who is a step ahead says once more what the others missed; all walk on from the least position

An attention rank keeps what it sent until it is back, so only chunks that are missing are sent again and no request is lost;
expert ranks keep nothing but their experts, and read those that are new to them from the store as rows come for them. An
attention rank has keys and values that nobody else has: its loss ends the run.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dep_extension.comm import PeerLost
from dep_extension.cost import Split
from dep_extension.executor import AttentionSide, Course, ExpertSide
from dep_extension.partition import shares_after
from dep_extension.solver import Plan, Problem, as_planned, recut
from dep_extension.walk import START, Itinerary, Note, Position
from dep_extension.world import World

BEYOND = 1 << 62  # the round of whoever has nothing under way

Side = AttentionSide | ExpertSide
Replan = Callable[[Course], Itinerary]
"""The order to walk once a course has fewer expert ranks, of as many micro-batches: the same on every rank."""


class Outage(NamedTuple):
    """One loss: launch ranks; seconds of `time.time` when this rank noticed it and when it walked on; how many experts this
    rank holds now that it did not hold before, over all layers; what is walked since then, and the seconds of solving it."""

    ranks: tuple[int, ...]
    noticed: float
    resumed: float
    taken_over: int
    cut: dict[str, Any]
    solved_s: float


class Said(NamedTuple):
    """What a rank says after a loss: its step, the least position of its micro-batches, and which order it would walk."""

    step: int
    round: int
    layer: int
    order: int


class Company:
    """A rank among those who are left, from the world's first moment on. `side` is there once it is loaded.

    Steps are taken by all together, and again where a rank was lost in them. They raise PeerLost where a loss cannot be
    outlived, Fenced where this rank was it.
    """

    def __init__(self, world: World, course: Course, replan: Replan | None = None):
        self.world, self.replan = world, replan
        self.course, self._launched = course, course.itinerary
        self.side: Side | None = None
        self.outages: list[Outage] = []
        self._step = 0
        self._before: str | None = None  # what was said in the step before this one
        if world.absent.ranks:
            noticed = time.time()
            seconds = self._share_out(world.absent.experts)[1]
            self._note(world.absent.ranks, noticed, 0, seconds)

    def tell(self, text: str) -> list[str]:
        """What each who is left says, in order of ranks."""
        while True:
            try:
                said = self.world.tell(text)
                break
            except PeerLost:
                self._recover()
        self._step, self._before = self._step + 1, text
        return said

    def last_words(self, text: str) -> list[str]:
        """As `tell`, the last step: the first rank has heard all once it returns, and leaves; the others stay until then."""
        while True:
            try:
                said = self.world.tell(text)
                if self.world.place.rank != 0:
                    self.world.see_off(0)
                return said
            except PeerLost:
                try:
                    self._recover()
                except PeerLost:
                    if not self.world.has_left(0):
                        raise
                    return []

    def attend(self, works: Sequence[Callable[[], Any]], note: Note | None = None) -> list[Any]:
        """As `AttentionSide.run`."""
        assert isinstance(self.side, AttentionSide)
        return self.side.run(self.world, works, note, lambda: self._walk(note))

    def serve(self, note: Note | None = None) -> None:
        """As `ExpertSide.walk`."""
        self._walk(note)

    def _walk(self, note: Note | None) -> None:
        """Nobody goes on to the next step before all have ended: who is lost until then is lost to all."""
        assert self.side is not None
        start: Position | None = START
        while start is not None:
            try:
                self.side.walk(self.world, start, note)
                self.world.gather((0,))
                break
            except PeerLost:
                start = self._recover()
        self._step, self._before = self._step + 1, None

    def _recover(self) -> Position | None:
        """Where to walk on; None where somebody is a step ahead, so that all had ended. Another loss meanwhile begins it
        again."""
        while True:
            noticed = time.time()
            loss = self.world.reform()
            taken, seconds = self._share_out(loss.experts)
            try:
                said = self._meet()
                if self._before is not None and min(one.step for one in said) < self._step:
                    self.world.tell(self._before)
            except PeerLost:
                continue
            finally:
                self._note(loss.ranks, noticed, taken, seconds)
            return self._resume(said)

    def _note(self, ranks: tuple[int, ...], noticed: float, taken: int, seconds: float) -> None:
        """What is walked can still be another: see `_meet`."""
        walked = self.course.itinerary
        cut = {"eg": self.course.eg, "r1": walked.r1, "r2": walked.r2, "order": walked.name}
        self.outages.append(Outage(ranks, noticed, time.time(), taken, cut, seconds))

    def _meet(self) -> list[Said]:
        """Where everybody is. Ranks whose machines round differently might solve differently: then the launch's order."""
        at = position(self.side) if isinstance(self.side, AttentionSide) else None
        (order,) = struct.unpack("<q", self.course.itinerary.digest[:8])
        said = [Said(*one) for one in self.world.gather(Said(self._step, *(at or (BEYOND, 0)), order))]
        if len({one.order for one in said}) > 1:
            self._follow(replace(self.course, itinerary=self._launched))
        return said

    def _resume(self, said: Sequence[Said]) -> Position | None:
        """The start where all have ended, so that all stop together there; as well for who is a step ahead, and waits."""
        if max(one.step for one in said) > self._step:
            return None
        mine = [Position(one.round, one.layer) for one in said]
        least = min(mine) if min(one.step for one in said) == self._step else START
        return START if least.round == BEYOND else least

    def _share_out(self, lost: Sequence[int]) -> tuple[int, float]:
        """The course of those who are left; how many experts this rank took over, and seconds of solving the plan again."""
        shares_L = tuple(shares_after(shares, lost) for shares in self.course.shares_L)
        course, began, seconds = replace(self.course, eg=len(shares_L[0]), shares_L=shares_L), time.perf_counter(), 0.0
        if self.replan is not None:
            course = replace(course, itinerary=self.replan(course))
            seconds = time.perf_counter() - began
        return self._follow(course), seconds

    def _follow(self, course: Course) -> int:
        self.course, side = course, self.side
        if side is None:
            return 0
        if isinstance(side, AttentionSide):
            side.follow(course)
            return 0
        return _take_over(side, course, self.world)


def _take_over(side: ExpertSide, course: Course, world: World) -> int:
    """How many experts are new to it."""
    before, after = side.rank.share.held, course.held(world.place.index)
    if [tuple(held) for held in after] == before:  # where replicas are left: its slots stay as they are
        side.course = course
        return 0
    side.follow(course, world.place)
    return sum(len(set(new) - set(held)) for new, held in zip(after, before, strict=True))


def position(side: AttentionSide) -> Position | None:
    """The least of this rank's micro-batches; None where all have ended."""
    found = [side.hub.position(i) for i in range(len(side.hub.batches))]
    return min((at for at in found if at is not None), default=None)


def solved_again(problem: Problem, plan: Plan) -> Replan:
    """The solver's chunks and order for the experts as they are held now. Micro-batches stay: they are there already."""

    def replan(course: Course) -> Itinerary:
        old = course.itinerary
        held = tuple(tuple(map(tuple, shares)) for shares in course.shares_L)
        now = replace(as_planned(problem, plan), held=held)
        found = recut(now, Split(course.ag, course.eg), plan.samples, old.r1)
        return Itinerary.of(old.layers, old.r1, found.r2, found.order)

    return replan
