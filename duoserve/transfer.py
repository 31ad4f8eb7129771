"""Moves slabs to slots. Knows bytes, lanes and the two ordering edges; does not choose what to fetch.

Both edges, always: a reader of a slot waits for `slot.ready` (copy done); a writer waits for `slot.released` (last
reader done) and for the former copy into the same slot. With a host tier, slabs pass through host memory:

    store --disk--> host slab --link--> device slot        (CUDA)
    store ----------disk--------------> slot               (CPU: the slots are the host memory)

Two threads come here: the model's, with needs, and the predictor's, with guesses. `lock` guards the cache and the book of
guesses; nobody waits for a copy or computes while holding it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch

from duoserve.cache import ExpertCache, Slot
from duoserve.codec import Weight
from duoserve.core import Key, Lane
from duoserve.decisions import Decisions
from duoserve.device import DONE, Device, Event, host_arena
from duoserve.int4 import Scratch
from duoserve.store import Store
from duoserve.timeline import READY, SLOT, WRONG


class Counts(NamedTuple):
    """Of the experts asked for: resident and whole when asked, on their way, absent.

    `guesses` were begun unasked (those withdrawn before anybody began them do not count). Of the guesses about layers
    whose router has spoken since: `ready` were needed and there, `late` needed and on their way, `wrong` not needed.
    """

    hits: int = 0
    in_flight: int = 0
    misses: int = 0
    guesses: int = 0
    ready: int = 0
    late: int = 0
    wrong: int = 0


class Manners(NamedTuple):
    """How guesses behave towards others."""

    waits: bool = False  # for the slot's last reader and former copy; else a slot that has any is not taken
    stays: bool = False  # it is copied even where the router has spoken against it, or a need wants its slot
    trades: bool = False  # takes only what is worth less, of whatever layer; else anything but of its own layer


POLITE = Manners()


class Guess(NamedTuple):
    """A slot that is being filled unasked, and what it held before."""

    slot: Slot
    copy: Event
    former: Key | None
    ready: Event | None
    released: tuple[Event, ...]


class Transfer:
    """The slots' memory and the way into it."""

    def __init__(
        self,
        device: Device,
        store: Store,
        cache: ExpertCache,
        host: HostTier | None = None,
        scratch: Scratch | None = None,
        manners: Manners = POLITE,
    ):
        self.device, self.store, self.cache, self.host, self.scratch = device, store, cache, host, scratch
        self.manners = manners
        self.slab_bytes = store.slab_bytes
        self.memory = device.arena(len(cache.slots) * self.slab_bytes)
        self._slabs = self.memory.view(len(cache.slots), self.slab_bytes).unbind()  # once: a view takes microseconds
        self._weights: dict[tuple[int, int], dict[str, Weight | torch.Tensor]] = {}
        self.hits = self.in_flight = self.misses = self.guesses = 0
        self.lock = threading.RLock()
        self.ready = self.late = self.wrong = 0
        self._guessed: dict[Key, Guess] = {}  # until the layer's router speaks
        self.waiting = 0  # experts of the running layer that have no slot yet
        self._coming: tuple[deque[Slot], deque[Slot]] = (
            deque(),
            deque(),
        )  # of it, resident and arriving: not handed out yet
        self.decisions = Decisions()

    def decide(self, decisions: Decisions) -> None:
        """Ask these what the clock would say from now on."""
        self.decisions = decisions
        if self.host is not None:
            self.host.decisions = decisions

    def slab(self, slot: Slot) -> torch.Tensor:
        """The slot's memory, (slab_bytes,) uint8 on the device."""
        return self._slabs[slot.index]

    def weights(self, slot: Slot) -> dict[str, Weight | torch.Tensor]:
        """The slot's expert as parameters by name: views, made once per slot."""
        assert slot.key is not None, slot
        layer = self.store.layers[slot.key.layer]
        at = (slot.index, layer.layout)
        if at not in self._weights:
            self._weights[at] = self.store.layouts[layer.layout].weights(self.slab(slot), self.scratch)
        return self._weights[at]

    def fetch(self, slot: Slot, lane: Lane) -> Slot:
        """Start filling a claimed slot with its key's slab; returns it with `ready` set."""
        key, into = slot.key, self.slab(slot)
        assert key is not None, slot
        self._take_back(slot)
        former = slot.released if slot.ready is None else (*slot.released, slot.ready)
        cost = self.store.layout(key.layer).slab_bytes
        if self.host is None:
            slot.ready = self.device.copy.submit(lambda: self.store.read_into(key, into), (), former, lane, cost, key)
        else:
            slot.ready = self.host.send(key, into[:cost], former, lane)
        slot.released = tuple([event for event in former if not event.done])  # should this copy be taken back
        return slot

    def _take_back(self, slot: Slot) -> bool:
        """The guess that was to fill the slot gives way, if nobody began it; then the slot holds nothing."""
        if slot.ready is None or self.manners.stays or not self.decisions.cancelled(self.device.copy, slot.ready):
            return False
        self.guesses -= 1
        return True

    def guess(self, key: Key, over: Slot | None = None) -> Slot | None:
        """Fetch ahead, but never before a need, never evicting what the same layer needs or, where guesses trade, what is
        worth more, and, unless they wait, never waiting for a reader nor evicting another guess that is on its way.

        None where that leaves no slot. The slot is left unpinned: a demand may take it back. `over`: take this one.
        """
        sparing = None if self.manners.trades else key.layer
        with self.lock:
            self.decisions.tick()
            if self.waiting:
                return None
            offer = over or self.cache.offer(sparing)
            if offer is None or not (self.manners.waits or self.decisions.said("free", _idle(offer))):
                return None
            if over is None and self.manners.trades and not self.cache.outranks(key, offer):
                return None
            former = (None if self._take_back(offer) else offer.key, offer.ready, offer.released)
            self.cache.take(offer, key)
            self.guesses += 1
            self.fetch(offer, Lane.AHEAD)
            self.cache.unpin(offer)
            self._guessed[key] = Guess(offer, offer.ready, *former)
            return offer

    def met(self, layer: int, needed: Collection[int]) -> None:
        """A layer's router has spoken: what was guessed and is needed has come true; the rest may be meant for later."""
        with self.lock:
            self.decisions.tick()
            for expert in needed:
                guess = self._guessed.pop(key := Key(layer, expert), None)
                if guess is not None and guess.slot.key == key and guess.slot.ready is guess.copy:
                    done = self.decisions.said("ready", guess.copy.done)
                    self.ready, self.late = self.ready + done, self.late + (not done)

    def settle(self, layer: int | None, needed: Collection[int]) -> tuple[int, int]:
        """A layer's router has spoken (None: the pass is over): withdraw guesses about it that are not needed and that
        nobody began. Returns how many were begun in time and how many not.
        """
        began = withdrawn = 0
        with self.lock:
            self.decisions.tick()
            for key in [key for key in self._guessed if layer is None or key.layer == layer]:
                guess = self._guessed.pop(key)
                if guess.slot.key != key or guess.slot.ready is not guess.copy:
                    withdrawn += 1  # a need took its slot
                elif layer is not None and key.expert in needed:
                    done = self.decisions.said("ready", guess.copy.done)
                    if done:
                        guess.copy.why.said = READY
                    self.ready, self.late = self.ready + done, self.late + (not done)
                    began += done or not self.decisions.said("queued", self.device.copy.queued(guess.copy))
                elif not self.manners.stays and self.decisions.cancelled(self.device.copy, guess.copy):
                    self.cache.restore(guess.slot, guess.former, guess.ready, guess.released)
                    self.guesses -= 1
                    withdrawn += 1
                else:
                    guess.copy.why.said = WRONG
                    self.wrong += 1
                    began += 1
        return began, withdrawn

    @property
    def guessed(self) -> list[Key]:
        """Guesses about layers whose router has not spoken."""
        return list(self._guessed)

    def read_ahead(self, keys: list[Key]) -> None:
        """Bring slabs from the disk to host memory, where there are such tiers; they take no slot."""
        if self.host is not None:
            for key in keys:
                if key not in self.cache:
                    self.host.read_ahead(key)

    def through(self, keys: list[Key], at_once: int | None = None) -> Iterator[Slot]:
        """Bring the experts of one layer past the compute: yields each key's slot, pinned, resident ones first.

        Fetches as many at a time as there are slots, or `at_once`. The caller submits its compute after `slot.ready` and
        hands the slot back with `release` before it asks for the next, unless that one is `at_hand`.
        """
        resident: deque[Slot] = deque()
        arriving: deque[Slot] = deque()
        absent: deque[Key] = deque()
        with self.lock:
            self.decisions.tick()
            for key in keys:
                slot = _whole(self.cache, key)
                if slot is None:
                    absent.append(key)
                    continue
                self.cache.pin(slot)
                if self.decisions.said("resident", slot.ready.done):
                    resident.append(slot)
                else:
                    self._hurry(slot)
                    arriving.append(slot)
            self.waiting = len(absent)
        self.hits, self.in_flight = self.hits + len(resident), self.in_flight + len(arriving)
        self.misses += len(absent)
        self._coming = (resident, arriving)
        short = False  # of slots
        try:
            while resident or arriving or absent:
                while absent and (at_once is None or len(arriving) < at_once):
                    slot = self._demand(absent[0], short)
                    if slot is None:
                        break
                    absent.popleft()
                    arriving.append(slot)
                short = True
                assert resident or arriving, f"no slot is free for {absent[0]} and none will be"
                yield (resident or arriving).popleft()
        finally:  # an error above leaves nothing pinned
            self.waiting = 0
            for slot in (*resident, *arriving):
                self.abandon(slot)
            self._coming = (deque(), deque())

    def at_hand(self) -> bool:
        """Whether what `through` hands out next is whole already: it then needs none of the slots handed out so far, and the
        caller may keep them, to compute them together with it."""
        resident, arriving = self._coming
        return bool(resident) or bool(arriving and arriving[0].ready.done)

    def _demand(self, key: Key, short: bool) -> Slot | None:
        """A slot that is being filled with what is needed now; None while all are in use. `short`: it waited for one."""
        with self.lock:
            self.decisions.tick()
            slot = self.cache.claim(key)
            if slot is not None:
                self.waiting -= 1
                self.fetch(slot, Lane.DEMAND)
                if short:
                    slot.ready.why.said = SLOT
            return slot

    def one_by_one(self, keys: list[Key]) -> Iterator[Slot]:
        """The same without any overlap (synchronous on-demand): an absent expert is fetched and waited for in its turn."""
        for key in keys:
            with self.lock:
                self.decisions.tick()
                slot = _whole(self.cache, key)
                if slot is None:
                    self.misses += 1
                    slot = self.cache.claim(key)
                    assert slot is not None, f"no slot is free for {key}"
                    self.fetch(slot, Lane.DEMAND)
                else:
                    self.hits += 1
                    self.cache.pin(slot)
            try:
                self._await(slot)
            except BaseException:
                self.abandon(slot)
                raise
            yield slot

    def _await(self, slot: Slot) -> None:
        """The model's thread waits for a copy; raises what that raised."""
        if slot.ready.done:
            slot.ready.wait()
        else:
            self.device.thread.wait(slot.ready.wait, slot.ready.why.stall, slot.key)

    def _hurry(self, slot: Slot) -> None:
        """A guess turned out to be needed: it is a demand now, on the way from the disk as well."""
        self.device.copy.promote(slot.ready)
        if self.host is not None and slot.key is not None:
            self.host.hurry(slot.key)

    def release(self, slot: Slot, read: Event) -> None:
        """The work behind `read` was the slot's last reader for now."""
        with self.lock:
            self.decisions.tick()
            slot.released = (read,)
            self.cache.unpin(slot)

    def abandon(self, slot: Slot) -> None:
        """Nobody will read it now: hand the slot back."""
        with self.lock:
            self.decisions.tick()
            self.cache.unpin(slot)

    def turn(self, layer: int, rows: int, chosen: dict[int, int]) -> None:
        """A layer's router has spoken: what the pool keeps follows from that (`ExpertCache.turn`)."""
        with self.lock:
            self.decisions.tick()
            self.cache.turn(layer, rows, chosen)

    def forget(self) -> None:
        """Begin anew with empty slots: a step ended half-way, and which slot holds what is not known."""
        with self.lock:
            self.device.copy.settle()
            self._guessed.clear()
            self.waiting, self._coming = 0, (deque(), deque())
            self.cache.clear((self.device.mark(),))
            if self.host is not None:
                self.host.forget()

    def counts(self) -> Counts:
        return Counts(self.hits, self.in_flight, self.misses, self.guesses, self.ready, self.late, self.wrong)


class HostTier:
    """Slabs in host memory between the disk and a GPU: filled once, registered for direct copies, then kept by worth."""

    def __init__(self, device: Device, store: Store, n_slabs: int):
        assert device.disk is not None, device.name
        self.device, self.store, self.disk = device, store, device.disk
        self.cache = ExpertCache(n_slabs, [layer.n_experts for layer in store.layers])
        self.slab_bytes = store.slab_bytes
        self.memory = host_arena(n_slabs * self.slab_bytes)
        self._lock = threading.Lock()
        self.decisions = Decisions()

    def fill(self) -> None:
        """Read as many experts as fit, one of each layer in turn, then register the memory (pin after fill)."""
        order = sorted(
            (Key(i, e) for i, layer in enumerate(self.store.layers) for e in range(layer.n_experts)),
            key=lambda k: k[::-1],
        )
        for key in order[: len(self.cache.slots)]:
            slot = self.cache.claim(key)
            assert slot is not None, key
            self.store.read_into(key, self._slab(slot))
            slot.ready = DONE
            self.cache.unpin(slot)
        self.device.pin(self.memory)

    def send(self, key: Key, into: torch.Tensor, behind: tuple[Event, ...], lane: Lane) -> Event:
        """Copy one slab to `into` on the device, through host memory; returns the event of its arrival."""
        with self._lock:
            slot = _whole(self.cache, key)
            if slot is not None:
                self.cache.pin(slot)
                if lane is Lane.DEMAND:
                    self.disk.promote(slot.ready)
            else:
                slot = self._read(key, lane)
            source, cost = self._slab(slot)[: into.numel()], self.store.layout(key.layer).slab_bytes
            sent = self.device.copy.submit(
                lambda: into.copy_(source, non_blocking=True), (slot.ready,), behind, lane, cost, key
            )
            slot.released = (*(e for e in slot.released if not e.done), sent)
            self.cache.turn(key.layer, 1, {key.expert: 1})
            self.cache.unpin(slot)
            return sent

    def read_ahead(self, key: Key) -> None:
        """Read a slab that may be wanted, unless it is here or on its way; never over one that is being read or sent."""
        with self._lock:
            if self.cache.lookup(key) is not None:
                return
            offer = self.cache.offer()
            if offer is None or not self.decisions.said("free to read", _idle(offer)):
                return
            slot = self._read(key, Lane.AHEAD)
            self.cache.unpin(slot)

    def forget(self) -> None:
        """Begin anew, as `Transfer.forget`; nothing is being sent any more."""
        self.disk.settle()
        self.cache.clear(())

    def hurry(self, key: Key) -> None:
        """The disk read of a slab that was guessed, if there is one, goes before all guesses."""
        with self._lock:
            slot = self.cache.lookup(key)
            if slot is not None and not slot.ready.done:
                self.disk.promote(slot.ready)

    def _read(self, key: Key, lane: Lane) -> Slot:
        slot = self.cache.claim(key)
        assert slot is not None, key  # nothing stays pinned outside `send`
        into = self._slab(slot)
        former = slot.released if slot.ready is None else (*slot.released, slot.ready)
        slot.ready = self.disk.submit(
            lambda: self.store.read_into(key, into), (), former, lane, self.store.layout(key.layer).slab_bytes, key
        )
        slot.released = ()
        return slot

    def _slab(self, slot: Slot) -> torch.Tensor:
        return self.memory[slot.index * self.slab_bytes : (slot.index + 1) * self.slab_bytes]


def _idle(slot: Slot) -> bool:
    """Whether nobody reads or fills it."""
    return all(event.done for event in slot.released) and (slot.ready is None or slot.ready.done)


def _whole(cache: ExpertCache, key: Key) -> Slot | None:
    """The slot of a key whose copy has not failed; one that has is forgotten, to be fetched again."""
    slot = cache.lookup(key)
    if slot is not None and slot.ready.done and slot.ready.error is not None:
        cache.forget(slot)
        return None
    return slot
