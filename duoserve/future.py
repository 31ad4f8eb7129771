"""What passes to come will choose, for policies that know it (Belady) where recorded passes are replayed. Knows turns and
experts as arrays; knows no slots.

Turn t is layer t % L of pass t // L. Experts are numbered through all layers, as the pool numbers them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from duoserve.core import Step

NEVER = np.iinfo(np.int64).max


class Future:
    """`passes`: of each pass, of each layer, the experts that it chooses. `experts`: how many each layer has."""

    def __init__(self, experts: Sequence[int], passes: Iterable[Sequence[Collection[int]]]):
        self.experts = tuple(experts)
        first = np.cumsum([0, *experts])
        chosen: list[np.ndarray] = []
        for layers in passes:
            assert len(layers) == len(experts), (len(layers), len(experts))
            for layer, ids in enumerate(layers):
                chosen.append(np.fromiter(ids, np.int64, len(ids)) + first[layer])
        self._start = np.cumsum([0, *(len(ids) for ids in chosen)])
        self._expert = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
        turn = np.repeat(np.arange(len(chosen)), np.diff(self._start))
        self._next, self.soonest = _uses(self._expert, turn, int(first[-1]))

    @classmethod
    def of(cls, steps: Iterable[Step], experts: Sequence[int]) -> Future:
        """Of recorded passes: each Step is one."""
        return cls(experts, (_chosen(step, experts) for step in steps))

    @property
    def turns(self) -> int:
        return len(self._start) - 1

    def between(self, turn: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The experts that the turns from `turn` to before `end` choose, in their order, and the turn that each is chosen
        next after that, or NEVER."""
        start = self._start[min(max(turn, 0), self.turns)]
        span = slice(start, max(start, self._start[min(max(end, 0), self.turns)]))
        return self._expert[span], self._next[span]


def _uses(expert: np.ndarray, turn: np.ndarray, n_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each use, in the order of turns, the expert's next; and the first of each expert."""
    order = np.argsort(expert, kind="stable")
    following, first = np.full(len(expert), NEVER), np.full(n_experts, NEVER)
    same = expert[order][1:] == expert[order][:-1]
    following[order[:-1][same]] = turn[order[1:][same]]
    first[expert[::-1]] = turn[::-1]  # of equal indices the last stays
    return following, first


def _chosen(step: Step, experts: Sequence[int]) -> list[Collection[int]]:
    found: list[Any] = []
    for layer, n in enumerate(experts):
        route = step.route(layer)
        found.append({e for e in route.ids_TK.flatten().tolist() if e < n} if route is not None else ())
    return found
