"""Belady's policy with an oracle's prefetch. Not a policy to serve with: it replays what was recorded. Chooses; moves no
bytes itself.

    a need      evicts what is needed last: as few misses as can be (MIN)
    ahead       what is absent and needed next comes next, over what MIN would evict for it then, as soon as that has had its
                last use before: as few bytes as on demand, as early as they can be moved for so few
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from duoserve.cache import NOTHING, ExpertCache
from duoserve.core import Step
from duoserve.foresight import Foresight
from duoserve.future import NEVER, Future
from duoserve.transfer import Transfer


class Sighted(Foresight):
    """Wants a pool that keeps what it is told to, and guesses that wait for a slot (`transfer.Manners`)."""

    def __init__(self, cache: ExpertCache, transfer: Transfer, experts_per_layer: list[int]):
        self._cache, self._transfer, self._experts = cache, transfer, experts_per_layer
        self._first = np.cumsum([0, *experts_per_layer])
        self.foresee(Future(experts_per_layer, ()))

    def foresee(self, future: Future) -> None:
        """The passes from the next on will choose so."""
        assert future.experts == tuple(self._experts), (future.experts, self._experts)
        self._future, self._next = future, future.soonest.copy()  # the turn that each expert is needed next,
        self._told = _worth(self._next)  # and what it is worth for that
        self._pass, self._turn = -1, -1
        self._until = 0  # the turn before which nothing can be done
        self._otherwise = 0  # turns that went otherwise than was foreseen
        with self._transfer.lock:
            self._cache.appraise(self._told)

    def begin(self, step: Step) -> None:
        self._pass += 1
        self._turn = self._pass * len(self._experts) - 1
        self._until = 0
        self.push()

    def spoken(self, step: Step | None, layer: int, tokens: Mapping[int, int]) -> None:
        self._turn = self._pass * len(self._experts) + layer
        experts, following = self._future.between(self._turn, self._turn + 1)
        self._next[experts], self._told[experts] = following, _worth(following)
        if self._turn < self._future.turns:
            self._otherwise += set((experts - self._first[layer]).tolist()) != set(tokens)
        with self._transfer.lock:
            self._cache.appraise(self._told[experts], experts)
            self._transfer.met(layer, tokens)

    def push(self) -> None:
        if self._turn < self._until:
            return
        with self._transfer.lock:
            while self._bring_next():
                pass

    def stats(self) -> dict[str, Any] | None:
        """How far what was foreseen came true."""
        return {"predictor": "future", "turns": self._future.turns, "turns_otherwise": self._otherwise}

    def _bring_next(self) -> bool:
        """Fetch the absent expert that is needed next, if what is to go for it can go now."""
        key = self._cache.wanted()
        if key is None:
            self._until = self._turn + 1
            return False
        turn = self._next[self._first[key.layer] + key.expert]
        then = self._told.copy()
        experts, following = self._future.between(self._turn + 1, turn)
        then[experts] = _worth(following)  # of one that is used several times until then, the last counts
        slot = self._cache.least(then)
        if slot.key is not None:
            leaves = self._first[slot.key.layer] + slot.key.expert
            if self._next[leaves] <= turn:
                self._until = self._next[leaves]
                return False
        return slot.pins == 0 and self._transfer.guess(key, slot) is not None


def _worth(following: np.ndarray) -> np.ndarray:
    return np.where(following == NEVER, NOTHING, -following.astype(np.float64))
