"""Attention and expert ranks in one process: each a greenlet of one thread, exchanging through memory. Knows whose turn it
is and what was posted; knows nothing of models or plans.

    attention, expert = local_pair(torch.float32)
    attended, _ = together([attention, expert], lambda: attend(attention), lambda: serve(expert))

A `wait` for what is not there yet lets the others run. On CUDA each direction is a stream: rows are copied on it behind what
made them, and whoever waits makes its current stream wait; a side keeps its own current stream over its waits. Modes of
torch that belong to a thread (inference_mode above all) are set around `together`, not inside a side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from dep_extension.comm import Place, Role, poisoned, raw


@dataclass
class Parcel:
    """What one rank posted for another; `sent`: the event behind the copy, on CUDA."""

    rows: Tensor
    sent: Any = None


class LocalComm:
    """A Comm among the ranks of one `local_world`."""

    blocks = False

    def __init__(self, place: Place, room: Room, dtype: torch.dtype, device: torch.device, poison: bool):
        self.place, self.generation = place, 0
        self._room, self._dtype, self._device, self._poison = room, dtype, device, poison
        self._issued = {"A2E": 0, "E2A": 0}
        self._waiting: set[LocalHandle] = set()

    def counts(self, sent_EW: Tensor | None, width: int) -> LocalHandle:
        one, none = [1] * self.place.others, [0] * self.place.others
        if self.place.role is Role.EXPERT:
            return self._exchange("A2E", sent_EW, Role.ATTENTION, none, one, _none(width, torch.int64))
        assert sent_EW is not None and sent_EW.shape == (self.place.eg, width) and sent_EW.dtype == torch.int64
        return self._exchange("A2E", sent_EW.cpu(), Role.ATTENTION, one, none, _none(width, torch.int64))

    def dispatch(self, rows_PD: Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> LocalHandle:
        return self._exchange("A2E", rows_PD, Role.ATTENTION, to, of, _none(width, self._dtype, self._device))

    def combine(self, rows_PD: Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> LocalHandle:
        return self._exchange("E2A", rows_PD, Role.EXPERT, to, of, _none(width, self._dtype, self._device))

    def close(self) -> None:
        left, self._waiting = self._waiting, set()
        assert not (self._poison and left), f"{len(left)} exchanges were never waited for"

    def _exchange(
        self, way: str, rows: Tensor | None, sender: Role, to: Sequence[int], of: Sequence[int], none: Tensor
    ) -> LocalHandle:
        turn, self._issued[way] = self._issued[way], self._issued[way] + 1
        if self.place.role is not sender:
            assert rows is None, f"{self.place} sends nothing in this direction"
            return self._await(way, turn, of, none)
        assert rows is not None and rows.dtype == none.dtype and rows.shape[1] == none.shape[1]
        assert len(to) == self.place.others and sum(to) == len(rows), f"splits {list(to)} of {len(rows)} rows"
        for peer, part in enumerate(rows.split(list(to))):
            self._room.post((way, turn, self.place.index, peer), part)
        return self._await(way, turn, [], none)

    def _await(self, way: str, turn: int, of: Sequence[int], none: Tensor) -> LocalHandle:
        assert len(of) in (0, self.place.others), f"{len(of)} splits for {self.place.others} ranks of the other role"
        handle = LocalHandle(self._room, [(way, turn, peer, self.place.index) for peer in range(len(of))], of, none)
        handle.settled = self._waiting.discard
        if self._poison:
            handle.buffer = poisoned(handle.buffer)
        self._waiting.add(handle)
        return handle


At = tuple[str, int, int, int]  # direction, how many were before it, index of the sender, of the receiver


class LocalHandle:
    """The handle of a LocalComm."""

    settled: Callable[[LocalHandle], None]

    def __init__(self, room: Room, at: list[At], of: Sequence[int], none: Tensor):
        self._room, self._at, self._of = room, at, of
        self.buffer = none.new_empty(sum(of), none.shape[1])

    def wait(self) -> Tensor:
        missing = self._at
        self._room.until(lambda: all(at in self._room.parcels for at in missing), f"{missing}")
        parts = [self._room.take(at) for at in self._at]
        self._at = []
        sizes = [len(part) for part in parts]
        assert not parts or sizes == list(self._of), f"rows of {sizes} came where {list(self._of)} were expected"
        if parts:
            torch.cat([raw(part) for part in parts], out=raw(self.buffer))
        self.settled(self)
        return self.buffer

    def ended(self) -> bool:
        return all(at in self._room.parcels for at in self._at)


@dataclass
class Side:
    """One rank's function: where it stands, and what it waits for. `stream`: its current one when it stopped."""

    root: greenlet
    at: Any
    ready: Callable[[], bool] = lambda: True
    what: str = "its start"
    stream: Any = None
    result: Any = None


@dataclass
class Room:
    """What was posted and not yet taken, and who runs."""

    device: torch.device
    parcels: dict[At, Parcel] = field(default_factory=dict)
    hub: Any = None
    running: Side | None = None
    streams: dict[str, Any] = field(default_factory=dict)

    def post(self, at: At, rows: Tensor) -> None:
        """A copy: the sender may write its rows again once it has waited."""
        if not rows.is_cuda:
            self.parcels[at] = Parcel(rows.clone())
            return
        link = self.streams.setdefault(at[0], torch.cuda.Stream(rows.device))
        link.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(link):
            copy = rows.clone()
        rows.record_stream(link)
        self.parcels[at] = Parcel(copy, link.record_event())

    def take(self, at: At) -> Tensor:
        parcel = self.parcels.pop(at)
        if parcel.sent is not None:
            now = torch.cuda.current_stream(parcel.rows.device)
            now.wait_event(parcel.sent)
            parcel.rows.record_stream(now)
        return parcel.rows

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Let the others run until it is."""
        if ready():
            return
        side = self.running
        assert side is not None, f"nobody else can run, and nothing was posted of {what}"
        side.at, side.ready, side.what = getcurrent(), ready, what
        if self.device.type == "cuda":
            side.stream = torch.cuda.current_stream(self.device)
        self.hub.switch()

    def run(self, sides: Sequence[Side]) -> None:
        self.hub = getcurrent()
        while open_ := [side for side in sides if not side.root.dead]:
            able = [side for side in open_ if side.ready()]
            assert able, f"all wait for each other: {[side.what for side in open_]}"
            for side in able:
                self._resume(side)
        self.running = None

    def _resume(self, side: Side) -> None:
        self.running = side
        if side.stream is not None:
            torch.cuda.set_stream(side.stream)
        side.result = side.at.switch()


def together(comms: Sequence[LocalComm], *sides: Callable[[], Any]) -> list[Any]:
    """Run a function per rank, in turns, until all have ended; their results. What one raises rises here, and the others
    are dropped where they stand."""
    assert len(comms) == len(sides), f"{len(sides)} functions for {len(comms)} ranks"
    room = comms[0]._room
    outer = torch.cuda.current_stream(room.device) if room.device.type == "cuda" else None
    running = [Side(root := greenlet(side), root, stream=outer) for side in sides]
    try:
        room.run(running)
    finally:
        room.running = None
        if outer is not None:
            torch.cuda.set_stream(outer)
    return [side.result for side in running]


def local_world(
    ag: int, eg: int, dtype: torch.dtype, device: str | torch.device = "cpu", poison: bool = False
) -> list[LocalComm]:
    """A Comm for every rank, attention ranks first."""
    room = Room(torch.device(device))
    return [LocalComm(Place.of(rank, ag, eg), room, dtype, room.device, poison) for rank in range(ag + eg)]


def local_pair(
    dtype: torch.dtype, device: str | torch.device = "cpu", poison: bool = False
) -> tuple[LocalComm, LocalComm]:
    """One attention rank and one expert rank."""
    attention, expert = local_world(1, 1, dtype, device, poison)
    return attention, expert


def _none(width: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    return torch.empty(0, width, dtype=dtype, device=device)
