"""A world of ranks in one thread, of which one is lost at a chosen exchange: what `World` is over processes, without their
chance. For tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dep_extension.comm import PeerLost, Place
from dep_extension.local import LocalComm, Room, together
from dep_extension.world import Loss


class Killed(Exception):
    """This rank is no more."""


class Town(Room):
    """Where all ranks are. `dies`: at which of its exchanges a launch rank is killed, counted from 1."""

    def __init__(self, ranks: Sequence[int], dies: dict[int, int]):
        super().__init__(torch.device("cpu"))
        self.dies, self.alive = dies, set(ranks)
        self.broken = False  # somebody is lost whom the generation still counts
        self.said: dict[tuple[int, int], dict[int, Any]] = {}
        self.members: dict[int, tuple[int, ...]] = {0: tuple(ranks)}
        self.joined: dict[int, set[int]] = {}
        self.left: set[int] = set()

    def until(self, ready: Callable[[], bool], what: str) -> None:
        super().until(lambda: ready() or self.broken, what)
        if not ready():
            raise PeerLost((), "somebody is lost")

    def bury(self, rank: int) -> None:
        self.alive.discard(rank)
        self.broken = True

    def met(self, generation: int) -> bool:
        """All who live have joined: the first look at that makes the generation."""
        if generation not in self.members and self.alive <= self.joined[generation]:
            self.members[generation], self.broken = tuple(sorted(self.alive)), False
            self.parcels.clear()
        return generation in self.members


NOBODY = Loss((), ())


class LossyWorld:
    """What a `Company` and its walks ask of a World."""

    blocks = False

    def __init__(self, town: Town, rank: int, ag: int, absent: Loss = NOBODY):
        self.town, self.me, self.ag, self.absent = town, rank, ag, absent
        self.ticks = 0
        self._enter(0)

    def _enter(self, generation: int) -> None:
        self.generation, self.ranks, self._turn = generation, self.town.members[generation], 0
        self.place = Place.of(self.ranks.index(self.me), self.ag, len(self.ranks) - self.ag)
        self._comm = LocalComm(self.place, self.town, torch.float32, self.town.device, True)

    def _tick(self) -> None:
        self.ticks += 1
        if self.town.dies.get(self.me) == self.ticks:
            raise Killed

    def counts(self, *args: Any) -> Any:
        self._tick()
        return self._comm.counts(*args)

    def dispatch(self, *args: Any) -> Any:
        self._tick()
        return self._comm.dispatch(*args)

    def combine(self, *args: Any) -> Any:
        self._tick()
        return self._comm.combine(*args)

    def gather(self, numbers: Sequence[int]) -> list[Any]:
        return self._say(list(numbers))

    def tell(self, text: str) -> list[Any]:
        return self._say(text)

    def _say(self, what: Any) -> list[Any]:
        self._tick()
        at, self._turn = (self.generation, self._turn), self._turn + 1
        said = self.town.said.setdefault(at, {})
        said[self.me] = what
        self.town.until(lambda: all(rank in said for rank in self.ranks), f"what {self.ranks} say")
        return [said[rank] for rank in self.ranks]

    def reform(self) -> Loss:
        before, ag, generation = self.ranks, self.ag, self.generation + 1
        self.town.joined.setdefault(generation, set()).add(self.me)
        Room.until(self.town, lambda: self.town.met(generation), "those who are left")
        self._enter(generation)
        lost = tuple(rank for rank in before if rank not in self.ranks)
        return Loss(lost, tuple(before.index(rank) - ag for rank in lost))

    def see_off(self, rank: int) -> None:
        self.town.until(lambda: rank in self.town.left, f"that {rank} leaves")

    def has_left(self, rank: int) -> bool:
        return rank in self.town.left

    def close(self) -> None:
        self.town.left.add(self.me)


def lived(worlds: Sequence[LossyWorld], lives: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each rank's life comes to; None of one that was killed."""

    def live(world: LossyWorld, life: Callable[[], Any]) -> Any:
        try:
            found = life()
            world.close()
            return found
        except Killed:
            world.town.bury(world.me)
            return None

    comms = [world._comm for world in worlds]
    sides = [lambda world=world, life=life: live(world, life) for world, life in zip(worlds, lives, strict=True)]
    with torch.inference_mode():
        return together(comms, *sides)
