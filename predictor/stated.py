"""A predictor of a stated quality, to simulate with: knows what will be chosen and spoils it to a slot recall; at 100 % it
is the oracle. Knows Steps that were made or recorded beforehand; learns nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from duoserve.core import Step, When
from predictor.baselines import NOTHING


class StatedPredictor:
    """Of every row's K experts each is named with probability `recall`, and a random other one in its stead if it is not.

    Scores are `recall` for each row that is named for an expert: what a calibrated predictor would expect. Steps are told
    apart by their index; the same index, layer and seed give the same answer. Errors are independent of each other, where
    those of real predictors gather in hard tokens and layers. `first`: asked about the first layers too, when a pass begins.
    """

    wants = NOTHING
    fingerprint: str | None = None
    n_params = 0

    def __init__(self, steps: Iterable[Step], experts: Sequence[int], recall: float = 1.0, lead: int = 1, seed: int = 0,
                 n_bytes: int = 0, first: bool = False):  # fmt: skip
        self.name = "oracle" if recall == 1 else f"stated recall {recall:.0%}"
        self.experts, self.recall, self.lead, self.n_bytes = list(experts), recall, lead, n_bytes
        self._seed, self._first = seed, When.START if first else None
        self._routes = {step.index: {route.layer: route.ids_TK for route in step.routes} for step in steps}

    def when(self, layer: int) -> When | None:
        return When.ROUTE if layer >= self.lead else self._first

    def rank(self, step: Step, layer: int) -> torch.Tensor:
        return self.rank_rows(step, layer).sum(dim=0)

    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        n = self.experts[layer]
        true_TK = self._routes.get(step.index, {}).get(layer)
        scores_TE = torch.zeros(step.rows, n)
        if true_TK is None or true_TK.shape[0] != step.rows:
            return scores_TE
        named_TK = self._spoiled(true_TK, n, (self._seed, step.index, layer)) if self.recall < 1 else true_TK
        return scores_TE.scatter_(1, named_TK, self.recall)

    def observe(self, step: Step) -> None:
        pass

    def _spoiled(self, true_TK: torch.Tensor, n: int, seed: tuple[int, int, int]) -> torch.Tensor:
        """(T, K): the choices, some of them replaced by experts that were not chosen."""
        drawn = np.random.default_rng(seed)
        ids_TK = true_TK.numpy().copy()
        wrong_TK = drawn.random(ids_TK.shape) >= self.recall
        for row in np.flatnonzero(wrong_TK.any(axis=1)):
            others = np.setdiff1d(np.arange(n), ids_TK[row])
            some = np.flatnonzero(wrong_TK[row])[: len(others)]
            ids_TK[row, some] = drawn.choice(others, len(some), replace=False)
        return torch.from_numpy(np.minimum(ids_TK, n - 1))
