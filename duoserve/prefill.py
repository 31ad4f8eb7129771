"""Dense passes (DuoServe-MoE, section "prefill"): every needed expert crosses once per layer, resident ones are computed
first, the next layer's follow behind. Chooses order and guesses; touches no stream and no bytes.

    layer L:   [resident | in flight] computed   absent ones fetched, busiest first
    layer L+1:                                   guessed while L computes, only if L turned out dense

What stays is the pool's decision, by worth: an expert that few rows chose is the next to be streamed over, so a prompt
leaves its busiest experts behind and decode starts warm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

from duoserve.cache import ExpertCache, Slot
from duoserve.core import Key, Policy
from duoserve.transfer import Transfer

DENSE = 0.5  # share of a layer's experts from which the next layer is guessed to need all of its own


class Prefill:
    def __init__(self, cache: ExpertCache, transfer: Transfer, experts_per_layer: list[int], policy: Policy):
        self._cache, self._transfer, self._policy = cache, transfer, policy
        self._experts = experts_per_layer

    def run(self, layer: int, rows: int, tokens: dict[int, int]) -> Generator[Slot, None, None]:
        """Slots of the experts that one layer's route needs (`tokens`: expert -> rows), resident ones first."""
        self._transfer.turn(layer, rows, tokens)
        busiest = sorted(tokens, key=lambda e: (-tokens[e], e))
        if self._policy is Policy.ON_DEMAND:
            yield from self._transfer.one_by_one([Key(layer, e) for e in busiest])
            return
        ahead = self._next(layer, len(tokens)) if self._policy is Policy.DUOSERVE else deque()
        for slot in self._transfer.through([Key(layer, e) for e in busiest]):
            yield slot
            # one guess per computed expert keeps the lane short: what the route then contradicts is little
            if ahead and self._transfer.guess(ahead[0]) is not None:
                ahead.popleft()

    def _next(self, layer: int, needed: int) -> deque[Key]:
        after = layer + 1
        if after >= len(self._experts) or needed < DENSE * self._experts[layer]:
            return deque()
        return deque(self._cache.absent(after))
