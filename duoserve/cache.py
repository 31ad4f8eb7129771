"""Which expert sits in which slot, and what each is worth keeping. Knows keys, slots and how often each key was wanted, or
what it is told of their worth; knows nothing of bytes, streams or models, and decides nothing about what to fetch. One
instance per tier.

Worth is how often a layer's router chose the expert, older tokens counting less: aged by the layer's *own* tokens, not by
accesses to the pool. A plain LRU pool smaller than one token's experts hits nothing, because it evicts just what the layers
ahead are about to want; by worth, an expert goes when its own layer has passed it over (figures in docs/log.md). Of
equals, the one whose layer comes round last goes first.

    worth' = worth * DECAY^rows + (1 - DECAY^rows) / (1 - DECAY) * share of the rows        rows = 1: worth * DECAY + chosen
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from duoserve.core import Key

DECAY = 0.9
NOTHING = -1e18  # what an expert is worth that nobody will want again
TIE = 1e-6  # per layer of distance: far less than any difference of worth that matters


class Keep(Enum):
    """What decides which expert goes first."""

    WORTH = "worth"  # the one worth least, as above
    RECENT = "recent"  # the one whose layer chose it longest ago (LRU), for comparison
    TOLD = "told"  # the one worth least by what others foresee (`appraise`)


class Slot:
    """Room for one slab. `ready` and `released` are events of the tier's device; `ready` is None while empty."""

    __slots__ = ("index", "key", "pins", "ready", "released")

    def __init__(self, index: int):
        self.index = index
        self.key: Key | None = None
        self.pins = 0
        self.ready: Any = None
        self.released: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"Slot({self.index}, {self.key}, pins={self.pins})"


class View(NamedTuple):
    """All experts at one moment, flat: layer after layer. `heat`: 1 where every recent token of its layer chose it, 0 where
    none did, and where that is not counted; `turn`: the layer whose router spoke last."""

    resident: np.ndarray  # or on its way
    pinned: np.ndarray
    heat: np.ndarray
    turn: int


class ExpertCache:
    """`n_slots` slots shared by all layers; `experts` is the number of experts of each layer."""

    def __init__(self, n_slots: int, experts: list[int], keep: Keep = Keep.WORTH):
        assert n_slots >= 1 and experts, (n_slots, experts)
        self.slots = [Slot(i) for i in range(n_slots)]
        self.evictions = 0
        self._keep, self._turns = keep, 0
        self._first = [sum(experts[:layer]) for layer in range(len(experts) + 1)]  # of each layer, in the flat arrays
        self._layers = len(experts)
        self._layer = np.repeat(np.arange(len(experts)), experts)  # of each expert
        self._slot = np.full(len(self._layer), -1, dtype=np.int64)  # of each expert, or -1
        self._worth = np.zeros(len(self._layer))
        self._shut = np.full(len(self._layer), np.inf)  # 0 where it sits in a slot that is not pinned
        self._ties: dict[int, np.ndarray] = {}  # by turn: what of each expert's worth breaks ties
        self._value = np.empty(len(self._layer))  # worth, ties broken; infinite where it is shut
        self._valued = False  # whether that is up to date
        self._free = list(reversed(self.slots))
        self._turn = 0  # the layer whose turn it is

    def __len__(self) -> int:
        return len(self.slots) - len(self._free)

    def __contains__(self, key: Key) -> bool:
        return self.lookup(key) is not None

    def keys(self) -> Iterator[Key]:
        """What the slots hold, in no particular order."""
        return (slot.key for slot in self.slots if slot.key is not None)

    def lookup(self, key: Key) -> Slot | None:
        """The slot that holds, or is about to hold, `key`."""
        index = self._slot[self._at(key)]
        return self.slots[index] if index >= 0 else None

    def whole(self, layer: int) -> bool:
        """Whether all experts of a layer sit in slots."""
        return bool((self._slot[self._first[layer] : self._first[layer + 1]] >= 0).all())

    def absent(self, layer: int) -> list[Key]:
        """The experts of a layer that sit in no slot."""
        first, end = self._first[layer], self._first[layer + 1]
        return [Key(layer, int(e)) for e in np.flatnonzero(self._slot[first:end] < 0)]

    def view(self) -> View:
        """What it holds and how often each was wanted, to be looked at."""
        resident = self._slot >= 0
        if self._keep is Keep.WORTH:
            heat = self._worth * (1 - DECAY)
        elif self._keep is Keep.RECENT:
            heat = np.where(self._worth > 0, DECAY ** ((self._turns - self._worth) / self._layers), 0.0)
        else:  # worth is what others foresee
            heat = np.zeros(len(resident))
        return View(resident, resident & (self._shut > 0), heat, self._turn)

    def turn(self, layer: int, rows: int, chosen: Mapping[int, int]) -> None:
        """A layer's router has spoken for `rows` tokens: `chosen` is how many of them each expert got."""
        self._turn, self._valued = layer, False
        if self._keep is Keep.TOLD:
            return
        worth = self._worth[self._first[layer] : self._first[layer + 1]]
        if self._keep is Keep.RECENT:
            self._turns += 1
            worth[list(chosen)] = self._turns
            return
        kept = DECAY**rows
        worth *= kept
        per_row = (1 - kept) / (1 - DECAY) / rows
        for expert, n in chosen.items():
            worth[expert] += n * per_row

    def appraise(self, worth: np.ndarray, experts: np.ndarray | slice = slice(None)) -> None:
        """What experts are worth from now on, larger is better: all of them, layer by layer, or those at `experts`."""
        self._worth[experts] = worth
        self._valued = False

    def wanted(self) -> Key | None:
        """The expert worth most of those that sit in no slot and are worth anything; None where there is none."""
        worth = np.where(self._slot < 0, self._worth, NOTHING)
        best = int(worth.argmax())
        layer = int(self._layer[best])
        return Key(layer, best - self._first[layer]) if worth[best] > NOTHING else None

    def outranks(self, key: Key, slot: Slot) -> bool:
        """Whether a key is worth more than what a slot holds."""
        return slot.key is None or bool(self._worth[self._at(key)] > self._worth[self._at(slot.key)])

    def claim(self, key: Key, sparing: int | None = None) -> Slot | None:
        """A pinned slot for a key that has none, nothing of layer `sparing` evicted for it; None while there is none.

        The slot's `ready` and `released` are still those of its former life: the caller's write must wait for both.
        """
        slot = self.offer(sparing)
        if slot is not None:
            self.take(slot, key)
        return slot

    def take(self, slot: Slot, key: Key) -> None:
        """Give a key this slot, pinned: one that was offered, or any with a key that is not pinned."""
        assert self._slot[self._at(key)] < 0 and slot.pins == 0, (key, slot)
        if slot.key is None:
            if self._free[-1] is not slot:
                self._free.remove(slot)
                self._free.append(slot)
            self._free.pop()
        else:
            former = self._at(slot.key)
            self._slot[former] = -1
            self._close(former)
            self.evictions += 1
        slot.key, slot.pins = key, 1
        self._slot[self._at(key)] = slot.index

    def offer(self, sparing: int | None = None) -> Slot | None:
        """The slot that `claim` would take: a free one, else that of the expert worth least."""
        if self._free:
            return self._free[-1]
        value = self._values()
        if sparing is None:
            expert = value.argmin()
            return self.slots[self._slot[expert]] if value[expert] < np.inf else None
        spared = value[self._first[sparing] : self._first[sparing + 1]]
        former = spared.copy()
        spared.fill(np.inf)
        expert = value.argmin()
        found = self.slots[self._slot[expert]] if value[expert] < np.inf else None
        spared[:] = former
        return found

    def _values(self) -> np.ndarray:
        """Of each expert, what `offer` goes by; made anew once a turn, and kept up by who opens and closes."""
        if not self._valued:
            np.add(self._worth, self._shut, out=self._value)
            if self._keep is not Keep.TOLD:
                self._value -= self._tie()
            self._valued = True
        return self._value

    def _close(self, at: int) -> None:
        """An expert can not be evicted: it is in use, or in no slot."""
        self._shut[at] = self._value[at] = np.inf

    def _open(self, at: int) -> None:
        """It can."""
        self._shut[at] = 0.0
        if self._valued:
            self._value[at] = self._worth[at] - (self._tie()[at] if self._keep is not Keep.TOLD else 0.0)

    def least(self, worth: np.ndarray) -> Slot:
        """A free slot, else that of the expert worth least by other figures than the pool's own; it may be pinned."""
        if self._free:
            return self._free[-1]
        return self.slots[self._slot[int(np.where(self._slot >= 0, worth, np.inf).argmin())]]

    def _tie(self) -> np.ndarray:
        """What makes the layer that comes round last worth a little less."""
        ties = self._ties.get(self._turn)
        if ties is None:
            ties = self._ties[self._turn] = TIE * ((self._layer - self._turn - 1) % self._layers)
        return ties

    def pin(self, slot: Slot) -> None:
        assert slot.key is not None, slot
        slot.pins += 1
        self._close(self._at(slot.key))

    def unpin(self, slot: Slot) -> None:
        assert slot.key is not None and slot.pins > 0, slot
        slot.pins -= 1
        if slot.pins == 0:
            self._open(self._at(slot.key))

    def forget(self, slot: Slot) -> None:
        """Empty a slot whose copy failed."""
        assert slot.key is not None, slot
        self._slot[self._at(slot.key)] = -1
        self._close(self._at(slot.key))
        slot.key, slot.pins, slot.ready = None, 0, None
        self._free.append(slot)

    def clear(self, released: tuple[Any, ...]) -> None:
        """Empty all slots, whatever is noted of them; what experts are worth stays. `released`: what writers wait for."""
        for slot in self.slots:
            slot.key, slot.pins, slot.ready, slot.released = None, 0, None, released
        self._slot.fill(-1)
        self._shut.fill(np.inf)
        self._valued = False
        self._free = list(reversed(self.slots))

    def restore(self, slot: Slot, former: Key | None, ready: Any, released: tuple[Any, ...]) -> None:
        """The copy that evicted `former` was never begun: the slot still holds it, with the events it had then."""
        assert slot.key is not None and slot.pins == 0, slot
        self.forget(slot)
        slot.released = released
        if former is None or self._slot[self._at(former)] >= 0:
            return
        self._free.pop()
        slot.key, slot.ready = former, ready
        self._slot[self._at(former)] = slot.index
        self._open(self._at(former))
        self.evictions -= 1

    def check(self) -> None:
        """Integrity when idle: every key has one slot, every slot at most one key, nothing is pinned."""
        held = [slot for slot in self.slots if slot.key is not None]
        assert len(held) == len(self) == int((self._slot >= 0).sum()) == int((self._shut == 0).sum()), (
            len(held),
            len(self),
        )
        for slot in held:
            assert slot.key is not None and self.lookup(slot.key) is slot and slot.pins == 0, slot

    def _at(self, key: Key) -> int:
        return self._first[key.layer] + key.expert
