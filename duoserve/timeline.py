"""What happened when: spans on tracks, appended as they end. Knows seconds of a device's clock, real or virtual; knows
nothing of streams, files or pictures. Imports no torch.

A track is one thread that does one thing at a time, or one lane of it: `demand 0` and `ahead 0` are one worker's copies. The
model's thread is followed without gaps: what it does next ends what it did before.

    compute    outside | trunk 0 | route | schedule | stall (demand) | expert | schedule | expert | combine | trunk 1 | ...
    demand 0                                [ copy 0/3 ..... ]
    ahead 1                                                                [ copy 1/5 (ready) ]

On a GPU the spans are what the host saw: of a copy its submission, of a stall only what the host itself waited for. What the
device did in between is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from duoserve.core import Key, Lane

# Why compute waits: for an expert fetched since the router spoke; for a guess that is under way; for one that found no
# free slot; for a ranking that the model's own thread makes.
DEMAND, IN_FLIGHT, SLOT, PREDICTOR = "demand", "in flight", "slot", "predictor"
CAUSES = (DEMAND, IN_FLIGHT, SLOT, PREDICTOR)
# Of a copy nobody has asked for yet: still so; needed, and there in time; never needed.
GUESS, READY, WRONG = "guess", "ready", "wrong"
DISK = "disk"  # why a copy waits: its bytes are not in host memory yet
COMPUTE, MODEL, AHEAD = "compute", "model", "ahead"  # MODEL: the model's thread, where another computes the experts

OUTSIDE, STALL = "outside", "stall"  # between passes; waiting
TRUNK, HEAD, ROUTE, SCHEDULE, EXPERT, COMBINE = "trunk", "head", "route", "schedule", "expert", "combine"
COPY, READ, RANK = "copy", "read", "rank"
PASSES = "passes"  # the track that has whole passes, by phase
QUICK = "predictor quick"  # the track of rankings that the model's thread makes
NONE = -1  # of a layer or an expert
TURN = 5  # fields of a turn

_TRACKS = {"copy": (DEMAND, AHEAD), "disk": (DISK, DISK), "predict": (PREDICTOR, PREDICTOR)}  # of a stream's lanes
_KINDS = {"copy": COPY, "disk": READ, "predict": RANK}

MOST = 500_000  # spans; of the bundled demo some five thousand tokens


class Span(NamedTuple):
    """`start` and `end` in seconds of the device's clock."""

    lane: str
    kind: str
    layer: int
    expert: int
    start: float
    end: float
    cause: str | None


def place(stream: str, lane: Lane, what: Key | None) -> tuple[str, str]:
    """Track and kind of a job of one of a device's streams."""
    track = _TRACKS[stream][lane] if stream in _TRACKS else stream
    return track, _KINDS.get(stream) or (COMBINE if what is None else EXPERT)


class Timeline:
    """Spans of one recording. Once it holds `most` it takes no more passes, so that nobody's memory fills.

    Fields lie one after another in plain lists: a tuple for each span would be one more thing for the garbage collector to
    look at, which takes longer than all the rest.
    """

    def __init__(self, most: int = MOST) -> None:
        self.began = self.ended = 0.0
        self.most = most
        self._fields: list[Any] = []  # as `add` takes them
        self._followed: list[tuple[str, list[Any]]] = []

    @property
    def full(self) -> bool:
        turns = sum(len(fields) for _, fields in self._followed) // TURN
        return len(self._fields) // len(Span._fields) + turns >= self.most

    def add(
        self, lane: str, kind: str, layer: int, expert: int, start: float, end: float, cause: str | Why | None = None
    ) -> None:
        """Something ended. What is not known yet of its cause may still be said of the `Why`."""
        self._fields.extend((lane, kind, layer, expert, start, end, cause))

    def follow(self, lane: str) -> list[Any]:
        """Where a thread notes its turns: when, kind, layer, expert, cause of what begins and so ends what was before."""
        self._followed.append((lane, []))
        return self._followed[-1][1]

    def spans(self) -> list[Span]:
        """In order of their starts; what has not ended is left out."""
        found = [
            Span(lane, kind, layer, expert, start, after[0], cause)
            for lane, fields in self._followed
            for (start, kind, layer, expert, cause), after in pairwise(_grouped(fields, TURN))
        ]
        for span in map(Span._make, _grouped(self._fields, len(Span._fields))):
            found.append(span._replace(cause=span.cause.said) if isinstance(span.cause, Why) else span)
        return sorted(found, key=lambda span: span.start)


def _grouped(fields: list[Any], n: int) -> Iterator[tuple[Any, ...]]:
    return zip(*[iter(fields)] * n, strict=False)


class Why:
    """Why a slab is being copied, as far as is known: it changes when a guess turns out to be needed, or not."""

    __slots__ = ("said",)

    def __init__(self, said: str) -> None:
        self.said = said

    @property
    def stall(self) -> str:
        """What whoever waits for it waits for."""
        return self.said if self.said in CAUSES else IN_FLIGHT


class ModelThread:
    """What the thread that runs the model does: how long it stalls, by cause, always; all of it while a timeline is kept."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.stalls: dict[str, float] = dict.fromkeys(
            CAUSES, 0.0
        )  # seconds; of the thread that computes, if it is another
        self.timeline: Timeline | None = None
        self._turns: list[Any] | None = None

    @property
    def layer(self) -> int:
        """Of what it does."""
        return int(self._turns[2 - TURN]) if self._turns else NONE

    def record(self, timeline: Timeline | None, lane: str) -> None:
        """From now on into `timeline`, on track `lane`; what was recorded into before is over."""
        now = self._now()
        if self.timeline is not None and self._turns is not None:
            self.timeline.ended = now
            self._turns.extend((now, OUTSIDE, NONE, NONE, None))
        self.timeline, self._turns = timeline, None
        if timeline is not None:
            timeline.began = timeline.ended = now
            self._turns = timeline.follow(lane)
            self._turns.extend((now, OUTSIDE, NONE, NONE, None))

    def turn(self, kind: str, layer: int = NONE, expert: int = NONE, cause: str | None = None) -> None:
        """The thread begins something, and so ends what it did."""
        if self._turns is not None:
            self._turns.extend((self._now(), kind, layer, expert, cause))

    def wait(self, wait: Callable[[], Any], cause: str, key: Key | None = None) -> None:
        """Wait, and count how long: a stall. Then the thread goes on with what it did."""
        does = self._turns[1 - TURN :] if self._turns else None
        layer, expert = key or (self.layer, NONE)
        self.turn(STALL, layer, expert, cause)
        began = self._now()
        try:
            wait()
        finally:
            self.stalls[cause] += self._now() - began
            if does is not None:
                self.turn(*does)
