"""Sparse passes: a few experts per layer, over one pool shared by all layers; those absent are fetched, the next layers' are
guessed in between (`ahead.py`). Chooses what to fetch; touches no stream and no bytes.
"""

from __future__ import annotations

from collections.abc import Generator

from duoserve.cache import Slot
from duoserve.core import Key, Policy
from duoserve.foresight import Foresight
from duoserve.transfer import Transfer


class Decode:
    def __init__(self, transfer: Transfer, policy: Policy, ahead: Foresight):
        self._transfer, self._policy, self._ahead = transfer, policy, ahead

    def run(self, layer: int, rows: int, tokens: dict[int, int]) -> Generator[Slot, None, None]:
        """Slots of the experts that one layer's route needs (`tokens`: expert -> rows), resident ones first."""
        self._transfer.turn(layer, rows, tokens)
        keys = [Key(layer, e) for e in tokens]
        if self._policy is Policy.ON_DEMAND:
            yield from self._transfer.one_by_one(keys)
            return
        for slot in self._transfer.through(keys):
            self._ahead.ask()  # behind this layer's needs, which are on their way now
            yield slot
            self._ahead.push()
