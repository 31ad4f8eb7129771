"""Who is still there, and what those who are agree on. Knows the store and ranks by their numbers at launch; knows nothing
of process groups, tensors or models.

    store   beat/<rank>     a number that the rank raises again and again
            log             lines, appended by anybody, in one order for all:
                                dead <rank> <why>             by a launcher that reaped it
                                left <rank>                   by itself, or its launcher: its silence is no fault
                                over <rank>                   by a launcher: this one gave up, and nothing can go on
                                join <generation> <rank>      by a survivor: it waits for the others
                                members <generation> <ranks>  the first such line of a generation holds for everybody

A killed rank is known at once where a launcher reaps it or a connection breaks; one that is stopped, or whose machine is
gone, is known because its number no longer rises. A rank that was left out finds a generation without it, and gives up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from dep_extension.comm import PeerLost, Place

Store = Any  # of torch.distributed, whose stubs do not know `append` and `clone`
LEFT = 8  # exit status of a rank that gives up because another is gone
NAP = 0.01  # seconds between two looks at a log that should change soon


@dataclass(frozen=True)
class Bounds:
    """Seconds. `beat`: between a rank's signs of life. `stall`: without one, a rank is lost. `join`: how long survivors wait
    for one that lives but computes. `form`: to make the groups. `exchange`: after which one fails, all alive or not."""

    beat: float = 0.2
    stall: float = 5.0
    join: float = 60.0
    form: float = 60.0
    exchange: float = 1800.0


class Fenced(PeerLost):
    """This rank was taken for lost; the others went on without it."""


@dataclass
class Log:
    """The log as it reads now."""

    dead: dict[int, str] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    over: set[int] = field(default_factory=set)
    joined: dict[int, set[int]] = field(default_factory=dict)
    members: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> Log:
        log = cls()
        for line in text.splitlines():
            kind, number, *rest = line.split(" ", 2)
            if kind == "here":
                continue
            if kind == "dead":
                log.dead.setdefault(int(number), rest[0])
            elif kind == "left":
                log.left.add(int(number))
            elif kind == "over":
                log.over.add(int(number))
            elif kind == "join":
                log.joined.setdefault(int(number), set()).add(int(rest[0]))
            elif kind == "members":
                log.members.setdefault(int(number), tuple(map(int, rest[0].split(","))))
        return log

    @property
    def latest(self) -> int:
        """The newest generation that somebody wants."""
        return max([0, *self.joined, *self.members])


def note(store: Store, line: str) -> None:
    store.append("log", line + "\n")


def read_log(store: Store) -> Log:
    return Log.read(store.get("log").decode())


def name_of(rank: int, ag: int, eg: int) -> str:
    """As it was launched: "expert rank 1 (rank 3)"."""
    return f"{Place.of(rank, ag, eg)} (rank {rank})"


class Vigil:
    """A rank's watch over the others: a thread that beats and listens. The Watch of its exchanges.

    `name`: what to call a rank. The store is used by this thread alone.
    """

    def __init__(self, store: Store, me: int, name: Callable[[int], str], bounds: Bounds):
        self._store, self._me, self._name, self._bounds = store, me, name, bounds
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="duoserve-vigil")
        self._beats = 0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._looked = time.monotonic()
        self._log, self._generation, self._cut_off = Log(), 0, ""
        self._silent: dict[int, str] = {}
        note(store, f"here {me}")  # so that there is a log
        self._beat()

    def follow(self, members: Collection[int], generation: int) -> None:
        """Watch these from now on; all of them beat already."""
        with self._lock:
            self._heard = {rank: (b"", time.monotonic()) for rank in members if rank != self._me}
            self._generation, self._silent, self._looked = generation, {}, time.monotonic()
        if not self._thread.is_alive():
            self._thread.start()

    def lost(self) -> PeerLost | None:
        with self._lock:
            return self._verdict()

    def gone(self) -> dict[int, str]:
        """Ranks that are lost for good, and why."""
        with self._lock:
            return {**self._silent, **self._log.dead}

    def blame(self, error: Exception) -> PeerLost:
        """Somebody's connection broke: whose, is known within the bound of a stall."""
        deadline = time.monotonic() + self._bounds.stall + 2 * self._bounds.beat
        while time.monotonic() < deadline:
            if (found := self.lost()) is not None:
                return found
            time.sleep(NAP)
            self._try_to_look()
        return PeerLost((), f"an exchange failed although all ranks live: {str(error).splitlines()[0]}")

    def stop(self, left: bool) -> None:
        """`left`: on good terms, as the others are told."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if left and not self._cut_off:
            with contextlib.suppress(RuntimeError):  # the store was the first rank's, and went with it
                note(self._store, f"left {self._me}")

    def _run(self) -> None:
        while not self._stop.wait(self._bounds.beat) and not self._cut_off:
            self._try_to_look()

    def _try_to_look(self) -> None:
        with self._lock:
            try:
                self._look()
            except RuntimeError as error:
                self._cut_off = str(error).splitlines()[0]

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._me}", str(self._beats))

    def _look(self) -> None:
        self._beat()
        ranks = list(self._heard)
        *beats, log = self._store.multi_get([*(f"beat/{rank}" for rank in ranks), "log"])
        now = time.monotonic()
        unheard = max(0.0, now - self._looked - 3 * self._bounds.beat)  # this rank itself was late: nobody else's fault
        self._looked, self._log = now, Log.read(log.decode())
        for rank, beat in zip(ranks, beats, strict=True):
            before, at = self._heard[rank]
            self._heard[rank] = (beat, now) if beat != before else (before, at + unheard)
        self._silent = {
            rank: f"has not answered for {now - at:.1f} s"
            for rank, (_, at) in self._heard.items()
            if now - at > self._bounds.stall and rank not in self._log.left
        }

    def _verdict(self) -> PeerLost | None:
        if self._cut_off:
            return PeerLost((), f"the store is gone: {self._cut_off}")
        gone = {rank: why for rank, why in {**self._silent, **self._log.dead}.items() if rank in self._heard}
        if gone:
            return PeerLost(sorted(gone), "; ".join(f"{self._name(rank)} {gone[rank]}" for rank in sorted(gone)))
        if self._log.latest > self._generation:
            return PeerLost((), f"others began generation {self._log.latest}")
        return None


def agree(
    store: Store,
    generation: int,
    members: Sequence[int],
    me: int,
    gone: Callable[[], Collection[int]],
    bound_s: float,
) -> tuple[int, ...]:
    """Who of `members` is in this generation: the same answer to everybody, within the bound.

    Whoever first sees that each has joined, is gone or has left says so; after the bound, those who have not joined are
    left out.
    Raises Fenced where that is this rank.
    """
    note(store, f"join {generation} {me}")
    deadline = time.monotonic() + bound_s
    while generation not in (log := read_log(store)).members:
        lost = {*gone(), *log.dead, *log.left}
        here = log.joined[generation] - lost
        if here | lost >= set(members) or time.monotonic() > deadline:
            note(store, f"members {generation} {','.join(map(str, sorted(here)))}")
        else:
            time.sleep(NAP)
    if me not in (found := log.members[generation]):
        raise Fenced((me,), f"rank {me} was taken for lost: generation {generation} is of ranks {found}")
    return found
