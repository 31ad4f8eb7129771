"""Which expert sits in which slot. Knows keys, slots and how recently each was wanted; knows nothing of bytes, streams or
models, and decides nothing about what to fetch. One instance per tier (device slots, host slabs).

Order of eviction: `order` runs from the slot given up first to the one given up last. A slot is never taken while pinned.

    claim(new key)   free slot, else the first unpinned slot in `order`; its old key is forgotten, nothing is copied back
    spare()          the slot that the next claim would take, if it is free or spent: what a guess may have
    keep(slot)       to the far end: recently wanted
    spend(slot)      to the near end: streamed past once, the next claim may have it
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from duoserve.core import Key


class Slot:
    """Room for one slab. `ready` and `released` are events of the tier's device; `ready` is None while empty."""

    __slots__ = ("index", "key", "pins", "ready", "released", "spent")

    def __init__(self, index: int):
        self.index = index
        self.key: Key | None = None
        self.pins = 0
        self.ready: Any = None
        self.released: tuple[Any, ...] = ()
        self.spent = False

    def __repr__(self) -> str:
        return f"Slot({self.index}, {self.key}, pins={self.pins})"


class ExpertCache:
    """`n_slots` slots shared by all layers, least recently wanted first out."""

    def __init__(self, n_slots: int):
        assert n_slots >= 1, n_slots
        self.slots = [Slot(i) for i in range(n_slots)]
        self._of: dict[Key, Slot] = {}
        self._free = list(reversed(self.slots))
        self._order: OrderedDict[int, Slot] = OrderedDict()
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, key: Key) -> bool:
        return key in self._of

    def keys(self) -> Iterator[Key]:
        """From the key given up first to the one given up last."""
        return (slot.key for slot in self._order.values() if slot.key is not None)

    def lookup(self, key: Key) -> Slot | None:
        """The slot that holds or is about to hold `key`; does not count as wanting it."""
        return self._of.get(key)

    def claim(self, key: Key) -> Slot | None:
        """A pinned slot for a key that has none; None while every slot is pinned.

        The slot's `ready` and `released` are still those of its former life: the caller's write must wait for both.
        """
        assert key not in self._of, key
        slot = self._free.pop() if self._free else self._evict()
        if slot is None:
            return None
        slot.key, slot.pins, slot.spent = key, 1, False
        self._of[key] = slot
        self._order[slot.index] = slot
        return slot

    def spare(self) -> Slot | None:
        """The slot that a guess may claim next: a free or a spent one, so that nothing wanted is evicted; else None."""
        if self._free:
            return self._free[-1]
        return next((slot for slot in takewhile(lambda s: s.spent, self._order.values()) if not slot.pins), None)

    def pin(self, slot: Slot) -> None:
        assert slot.key is not None, slot
        slot.pins += 1

    def unpin(self, slot: Slot) -> None:
        assert slot.pins > 0, slot
        slot.pins -= 1

    def keep(self, slot: Slot) -> None:
        slot.spent = False
        self._order.move_to_end(slot.index)

    def spend(self, slot: Slot) -> None:
        slot.spent = True
        self._order.move_to_end(slot.index, last=False)

    def forget(self, slot: Slot) -> None:
        """Empty a slot whose copy failed."""
        assert slot.key is not None, slot
        del self._of[slot.key]
        del self._order[slot.index]
        slot.key, slot.pins, slot.ready = None, 0, None
        self._free.append(slot)

    def check(self) -> None:
        """Integrity when idle: every key has one slot, every slot at most one key, nothing is pinned."""
        assert len(self._of) == len(self._order) == len(self.slots) - len(self._free)
        for key, slot in self._of.items():
            assert slot.key == key and self._order[slot.index] is slot, (key, slot)
            assert slot.pins == 0, slot

    def _evict(self) -> Slot | None:
        slot = next((slot for slot in self._order.values() if not slot.pins), None)
        if slot is not None:
            assert slot.key is not None, slot
            del self._of[slot.key]
            del self._order[slot.index]
            self.evictions += 1
        return slot
