"""Dense passes of many sequences, one token each: most of a layer's experts are needed, but which ones changes from token to
token. Chooses order and pace; touches no stream and no bytes.

    layer L:   [resident] computed   absent ones fetched a few at a time, busiest first, into slots that fall free

Unlike a prompt's, such a pass guesses nothing behind it: of the next layer's absent experts it needs about half, and those
that it does not need push out others that it does. And it takes few slots at a time: what it has computed is what comes
round last, so the next arrival may have its slot; a layer that took slots for all its absent experts at once would take
them from the layers to come. docs/log.md has the bytes of both.
"""

from __future__ import annotations

from collections.abc import Generator

from duoserve.cache import Slot
from duoserve.core import Key
from duoserve.transfer import Transfer

AT_ONCE = 4  # copies under way or waiting: enough to keep both workers, or one stream, busy


class Crowd:
    def __init__(self, transfer: Transfer):
        self._transfer = transfer

    def run(self, layer: int, rows: int, tokens: dict[int, int]) -> Generator[Slot, None, None]:
        """Slots of the experts that one layer's route needs (`tokens`: expert -> rows), resident ones first."""
        self._transfer.turn(layer, rows, tokens)
        busiest = sorted(tokens, key=lambda e: (-tokens[e], e))
        yield from self._transfer.through([Key(layer, e) for e in busiest], AT_ONCE)
