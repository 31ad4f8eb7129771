"""Dense passes (DuoServe-MoE, papers.md 1.3): every needed expert crosses once per layer, resident ones are computed
first, the next layer's follow behind. Chooses order, guesses and what stays; touches no stream and no bytes.

A plain least-recently-used pool would lose all it holds to every prompt, because a pass over the layers evicts just what
it will want next. So each layer keeps its busiest experts, as many as its share of the pool, and the rest is spent:
its slots are the ring that the stream runs through.

    layer L:   [resident | in flight] computed   absent: fetched into spent or old slots, busiest first
    layer L+1:                                   guessed into spent slots while L computes, only if L was dense
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

from duoserve.cache import ExpertCache, Slot
from duoserve.core import Key
from duoserve.transfer import Transfer

DENSE = 0.5  # share of a layer's experts from which the next layer is guessed to need all of its own


class Prefill:
    def __init__(self, cache: ExpertCache, transfer: Transfer, experts_per_layer: list[int]):
        self._cache, self._transfer = cache, transfer
        self._experts = experts_per_layer
        ring = min(max(experts_per_layer), max(2, len(cache.slots) // 4))
        self._share = (len(cache.slots) - ring) // len(experts_per_layer)
        self._ahead: deque[Key] = deque()
        self._guessed: list[Key] = []

    def run(self, layer: int, tokens: dict[int, int]) -> Generator[Slot, None, None]:
        """Slots of the experts that one layer's route needs (`tokens`: expert -> rows), resident ones first."""
        busiest = sorted(tokens, key=lambda e: (-tokens[e], e))
        stay = set(busiest[: max(0, self._share)])
        absent = {e for e in tokens if Key(layer, e) not in self._cache}
        self._ahead = self._next(layer, len(tokens))
        for slot in self._transfer.through([Key(layer, e) for e in busiest]):
            assert slot.key is not None, slot
            if slot.key.expert in stay:
                self._cache.keep(slot)
            elif slot.key.expert in absent:
                self._cache.spend(slot)
            yield slot
            self._guess()
        self._settle(layer)

    def _next(self, layer: int, needed: int) -> deque[Key]:
        after = layer + 1
        if after >= len(self._experts) or needed < DENSE * self._experts[layer]:
            return deque()
        return deque(key for e in range(self._experts[after]) if (key := Key(after, e)) not in self._cache)

    def _guess(self) -> None:
        """One guess per computed expert keeps the lane short: what the route then contradicts is little."""
        if self._ahead and self._transfer.guess(self._ahead[0]) is not None:
            self._guessed.append(self._ahead.popleft())

    def _settle(self, layer: int) -> None:
        """Guesses for this layer that nobody asked for are the first to go."""
        for key in self._guessed:
            slot = self._cache.lookup(key)
            if key.layer == layer and slot is not None and not slot.pins:
                self._cache.spend(slot)
        self._guessed = [key for key in self._guessed if key.layer > layer]
