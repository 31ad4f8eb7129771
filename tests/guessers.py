"""Predictors for tests of whoever asks them: dice, a replay of what happened, its opposite, one that fails."""

from __future__ import annotations

from typing import Any

import torch

from duoserve.core import Phase, Route, Step, When
from duoserve.simulate import Pass
from predictor.stated import StatedPredictor


class Dice:
    """Random scores; `when` as asked."""

    name, lead, n_bytes, n_params = "dice", 1, 0, 0
    wants: frozenset[str] = frozenset()

    def __init__(self, n_experts: int, when: When = When.ROUTE, lead: int = 1, fingerprint: str | None = None):
        self.n_experts, self._when, self.lead, self.fingerprint = n_experts, when, lead, fingerprint
        self.observed = 0
        self._generator = torch.Generator().manual_seed(0)

    def when(self, layer: int) -> When | None:
        return None if self._when is When.ROUTE and layer < self.lead else self._when

    def rank(self, step: Step, layer: int) -> torch.Tensor:
        return torch.rand(self.n_experts, generator=self._generator)

    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        return torch.rand(step.rows, self.n_experts, generator=self._generator)

    def observe(self, step: Step) -> None:
        self.observed += 1


def foreseeing(passes: list[Pass], experts: tuple[int, ...], recall: float = 1.0) -> StatedPredictor:
    """Knows passes whose routes are known by counts alone: of those with one row what it chose."""
    steps = [Step(index, one.phase, one.rows) for index, one in enumerate(passes)]
    for step, one in zip(steps, passes, strict=True):
        if one.phase is Phase.DECODE and one.rows == 1:
            for layer, tokens in enumerate(one.chosen):
                step.routes.append(Route(layer, torch.tensor([list(tokens)]), torch.empty(0)))
    return StatedPredictor(steps, experts, recall, first=True)


class Known(Dice):
    """Says what an earlier run did at the same positions, or, `wrong`, everything else."""

    def __init__(self, n_experts: int, wrong: bool = False):
        super().__init__(n_experts, When.START)
        self.wrong, self.name = wrong, "wrong" if wrong else "known"
        self.chosen: dict[tuple[int, int], torch.Tensor] = {}

    def note(self, step: Step) -> None:
        """Observes the run that will be repeated."""
        assert step.positions_BS is not None
        for route in step.routes:
            for row, position in enumerate(step.positions_BS.flatten().tolist()):
                self.chosen[position, route.layer] = route.ids_TK[row]

    def rank(self, step: Step, layer: int) -> torch.Tensor:
        assert step.positions_BS is not None
        scores = torch.zeros(self.n_experts)
        ids = self.chosen.get((int(step.positions_BS[0, -1]), layer))
        if ids is not None:
            scores[ids] = 1
        return 1 - scores if self.wrong else scores


class Broken(Dice):
    def rank(self, step: Step, layer: int) -> Any:
        raise KeyError("no such thing")
