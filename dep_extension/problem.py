"""What is asked of a planner, and what it answers: plain values. Knows costs, memory and loads; knows no schedules, and not
how a plan is found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from dep_extension.cost import Machine, Model, Split
from dep_extension.imbalance import Burden, Loads, burden, burden_of_places, burden_of_shares
from dep_extension.partition import RESERVE, Room, expert_gpu_bytes, room
from dep_extension.placement import Placement, repeated
from dep_extension.schedule import Turn

MAX_R2 = 64


@dataclass(frozen=True)
class Problem:
    """`samples`: of the whole batch, over all attention GPUs, where it is fixed; None: as many as fit. Each of `length`
    tokens.

    `skew`: measured loads of the experts; None: all are alike. `replicas`: expert GPUs that hold each expert. `spare`: of
    each layer, places on each expert GPU for copies of what is hot, beside its share; all are then placed by the loads, and
    0 makes only what copies its share has places for. None: they are held as `partition.shares` says. `held`: who holds
    what, already settled, of a split with as many expert GPUs.
    """

    model: Model
    machine: Machine
    length: int
    samples: int | None = None
    max_r1: int = 8
    max_r2: int = MAX_R2
    skew: Loads | None = None
    replicas: int = 1
    spare: int | None = None
    held: Placement | None = None

    def __post_init__(self) -> None:
        if self.skew is not None and self.skew.experts != self.model.experts:
            raise ValueError(
                f"loads are of {self.skew.experts} experts, {self.model.name} has {self.model.experts}: measure them on it"
            )
        if self.length < 1 or (self.samples is not None and self.samples < 1):
            raise ValueError(
                f"{self.samples} samples of {self.length} tokens are nothing to plan for: ask for at least 1 of 1"
            )
        if self.spare is not None and (self.skew is None or self.replicas > 1 or self.spare < 0):
            what = f"{self.spare} spare places with {self.replicas} replicas"
            raise ValueError(
                f"{what}{'' if self.skew else ' and no loads'}: give loads, and at least 0 places or replicas"
            )

    def burden(self, ranks: int) -> Burden | None:
        """Of so many expert GPUs; None where the costs of balanced experts say it all."""
        if self.held is not None:
            if len(self.held[0]) != ranks:
                raise ValueError(f"{len(self.held[0])} expert GPUs are said to hold experts, the split has {ranks}")
            return _settled(self.skew, self.held, self.model.experts)
        if self.spare is not None and self.skew is not None:
            return burden_of_places(self.skew, ranks, self.places(ranks))
        if self.skew is None and self.replicas == 1:
            return None
        return burden_of_shares(self.skew, self.model.experts, ranks, self.replicas)

    def places(self, ranks: int) -> int:
        """On each of so many expert GPUs, of a layer: its share and what is spare."""
        return min(self.model.experts, math.ceil(self.model.experts / ranks) + (self.spare or 0))

    def placement(self, ranks: int) -> Placement | None:
        """Who holds what, where loads or a loss say so: of every layer of the model."""
        if self.held is not None:
            return repeated(self.held, self.model.layers)
        if self.spare is None or self.skew is None:
            return None
        return repeated(self.skew.place(ranks, self.places(ranks)), self.model.layers)

    def room(self, split: Split) -> Room | None:
        if not self.has_places(split.eg):
            return None
        found = self.burden(split.eg)
        given = (None, None) if found is None else (found.experts, float(found.most_C.max()))
        return room(self.model, self.machine, split, self.length, *given)

    def has_places(self, ranks: int) -> bool:
        """Before anything is placed: whether a GPU has the places at all."""
        if self.spare is None or self.held is not None:
            return True
        return expert_gpu_bytes(self.model, self.places(ranks)) <= RESERVE * self.machine.memory_bytes


@lru_cache(maxsize=64)
def _settled(loads: Loads | None, held: Placement, experts: int) -> Burden:
    return burden(loads, held, experts)


@dataclass(frozen=True)
class Plan:
    """How to run. `samples`: in a micro-batch on each attention GPU (m_a); `tokens`: of each expert in a chunk (m_e).

    `makespan_s` by the simulation; `bound_s`: no order of the same cut can be faster. Throughput in tokens per second.
    `replicas` and `spare`: as the problem has them. `held`: who holds which experts of each layer; None: as
    `partition.shares` says.
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
    spare: int | None = None
    held: Placement | None = None

    @property
    def gap(self) -> float:
        """How far from the bound, at most: 0 is optimal."""
        return self.makespan_s / self.bound_s - 1


class Cut(NamedTuple):
    """A way to cut: samples per micro-batch and GPU, micro-batches, chunks."""

    samples: int
    r1: int
    r2: int


def as_planned(problem: Problem, plan: Plan) -> Problem:
    """With the plan's copies of experts."""
    return replace(problem, replicas=plan.replicas, spare=plan.spare)
