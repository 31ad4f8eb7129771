"""DuoServe as published (arXiv 2509.07379), to compare with what became of it here. Chooses; moves no bytes itself.

    prefill    two buffers take turns, experts in the order of their ids; the first of a layer is fetched while the part
               before its router runs
    decode     the first layer on demand; once layer N's experts compute, the predictor's top-k of layer N + 1 are fetched,
               likely or not, pass after pass; what it got wrong is fetched again, what it fetched in vain has travelled

The paper's working set is top-k slots. Whether of each layer or in all it does not say; its peak memory, 0.3 GB above
on-demand, leaves room for the second only, and so reads `slots="top-k"`: one pool of as many slots as a token chooses in
one layer. Without that it gets the slots that every policy gets, kept by recency.
"""

from __future__ import annotations

from collections.abc import Generator

from duoserve.ahead import Ahead
from duoserve.cache import Slot
from duoserve.core import Key, Phase, Predictor, Step
from duoserve.transfer import Transfer

BUFFERS = 2


class TopK(Ahead):
    """As many guesses as a token chooses experts, always. Wants guesses that wait for a slot and that stay."""

    def use(self, predictor: Predictor | None, always: bool) -> None:
        super().use(predictor, True)

    def begin(self, step: Step) -> None:
        super().begin(step)
        if step.phase is Phase.PREFILL:
            self.first(0)

    def first(self, layer: int) -> None:
        """Fetch the first expert of a layer while the part before its router runs."""
        key = Key(layer, 0)
        if layer < len(self._experts) and key not in self._cache:
            self._transfer.guess(key)

    def _room(self) -> int:
        return self._choices


class Buffers:
    """The schedule of prompts."""

    def __init__(self, transfer: Transfer, ahead: TopK):
        self._transfer, self._ahead = transfer, ahead

    def run(self, layer: int, rows: int, tokens: dict[int, int]) -> Generator[Slot, None, None]:
        """Slots of the experts that one layer's route needs (`tokens`: expert -> rows), those that are there first."""
        self._transfer.turn(layer, rows, tokens)
        yield from self._transfer.through([Key(layer, e) for e in sorted(tokens)], BUFFERS)
        self._ahead.first(layer + 1)
