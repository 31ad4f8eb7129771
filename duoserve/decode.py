"""Sparse passes: a few experts per layer, fetched on demand over one pool shared by all layers.

Chooses what to fetch; touches no stream and no bytes.
"""

from __future__ import annotations

from collections.abc import Generator

from duoserve.cache import ExpertCache, Slot
from duoserve.core import Key
from duoserve.transfer import Transfer


class Decode:
    def __init__(self, cache: ExpertCache, transfer: Transfer):
        self._cache, self._transfer = cache, transfer

    def run(self, layer: int, rows: int, tokens: dict[int, int]) -> Generator[Slot, None, None]:
        """Slots of the experts that one layer's route needs (`tokens`: expert -> rows), resident ones first."""
        self._cache.turn(layer, rows, tokens)
        yield from self._transfer.through([Key(layer, e) for e in tokens])
