"""Layer-wise full prefetch (LFP, as in MoESys): a layer's experts travel together, chosen or not, one layer ahead; prompts
and single tokens alike. Chooses what to fetch; touches no stream and no bytes.

    layer l       router | experts of l compute ...............
    ahead lane                '- expert 0, 1, 2, ... of l + 1, all of them, each as soon as there is a slot -'

The method wants room for two layers: one computes, the other fills. With less, as many of the next layer as fit are
fetched, in the order of their ids, more as the running layer's slots fall free; once its router has spoken, what found no
slot by then is fetched only if it was chosen. A layer is as recent as its last turn, so that the layer that ran longest
ago goes first, as a whole; what of the next layer is still there does not travel again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping

from duoserve.cache import ExpertCache, Slot
from duoserve.core import Key, Step
from duoserve.foresight import Foresight
from duoserve.transfer import Transfer


class WholeLayer(Foresight):
    """Both schedules, and what they fetch ahead. Wants guesses that wait for a slot and that stay (`transfer.Manners`)."""

    def __init__(self, cache: ExpertCache, transfer: Transfer, experts_per_layer: list[int]):
        self._cache, self._transfer, self._experts = cache, transfer, experts_per_layer
        self._due: deque[Key] = deque()  # of the next layer, those without a slot

    def begin(self, step: Step) -> None:
        """The first layer was asked for while the last one of the pass before computed, if there was one."""
        self._ask(0)

    def spoken(self, step: Step | None, layer: int, tokens: Mapping[int, int]) -> None:
        self._due.clear()
        self._transfer.settle(layer, tokens)

    def push(self) -> None:
        while self._due and (self._due[0] in self._cache or self._transfer.guess(self._due[0]) is not None):
            self._due.popleft()

    def run(self, layer: int, rows: int, tokens: dict[int, int]) -> Generator[Slot, None, None]:
        """Slots of the experts that one layer's route needs (`tokens`: expert -> rows), those that are there first."""
        self._transfer.turn(layer, rows, dict.fromkeys(range(self._experts[layer]), 1))
        asked = False
        for slot in self._transfer.through([Key(layer, e) for e in sorted(tokens)]):
            if not asked:  # behind this layer's needs, which are on their way now
                self._ask((layer + 1) % len(self._experts))
                asked = True
            yield slot
            self.push()

    def _ask(self, layer: int) -> None:
        self._due = deque(self._cache.absent(layer))
        self.push()
