"""Who does what next: one order of all exchanges, the same on every rank, and the walk along it on either side. Knows turns,
positions, counts of rows and a `Comm`; knows no models, and no arithmetic on what the rows hold.

    attention rank    attend(i) -> counts -> A2E chunks ... share(i) ... -> rows are back -> attend(i) of the next layer
    expert rank       counts -> A2E chunks -> experts, on the worker -> E2A chunks

Two communicators on one device must be issued in one order by one thread on every rank (NCCL's rule), so the order is fixed
beforehand: exchanges sorted by when the schedule begins them. What differs from it costs waiting, never a deadlock.
A round is one pass of every micro-batch; one that has ended sends zero counts. In the first layer of a round each attention
rank says which of its micro-batches still go; the expert ranks answer (the verdict), so that all stop at the same exchange.
"""

from __future__ import annotations

import contextlib
import struct
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from dep_extension.comm import Comm, Handle, PeerLost
from dep_extension.itinerary import START, Itinerary, Op, Position, Way
from dep_extension.schedule import Turn

HEADER = 5  # numbers before the counts of a message: generation, round, layer, micro-batch, whether it still goes


class Sent(NamedTuple):
    """Rows of one micro-batch on their way to one layer's experts: of each chunk the rows (P, D), sorted by expert rank and
    there by expert, and how many go to each expert rank. `counts_ECL`: by expert rank, chunk and local expert."""

    rows_C: list[torch.Tensor]
    to_CE: list[list[int]]
    counts_ECL: torch.Tensor


class Attending(Protocol):
    """What an attention rank does at its turns."""

    def attend(self, batch: int, here: Position) -> Sent | None:
        """Run on with what came back, up to the next MoE layer. None where the micro-batch has ended or is beyond `here`."""
        ...

    def going(self, batch: int) -> bool: ...

    def share(self, batch: int) -> None:
        """Shared experts of the layer that the micro-batch has come to."""
        ...

    def returned(self, batch: int, chunk: int, rows_PD: torch.Tensor) -> None:
        """A chunk's rows, in the order in which they were sent."""
        ...


Experts = Callable[[int, int, int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, micro-batch, chunk, rows_PD, counts_AL) -> rows_PD: rows come by attention rank and there by local expert."""

Note = Callable[[str, int, int, int, float, float], Any]
"""(what, layer, micro-batch, chunk, began, ended) of a stretch of work or of waiting; seconds of `time.perf_counter`."""


class Later(Protocol):
    """Rows that are being computed."""

    def wait(self) -> torch.Tensor: ...


class Worker(Protocol):
    """Computes beside the thread that issues."""

    def submit(self, fn: Callable[[], torch.Tensor]) -> Later: ...


class Inline:
    """Computes when it is asked for: where both sides are one thread, and on a GPU, whose streams run beside it anyway."""

    def submit(self, fn: Callable[[], torch.Tensor]) -> Later:
        return _Lazy(fn)


class _Lazy:
    def __init__(self, fn: Callable[[], torch.Tensor]):
        self._fn = fn

    def wait(self) -> torch.Tensor:
        return self._fn()


class _Walk(ABC):
    """What both sides have in common. `empty_0D`: says how wide rows are and of which dtype and device; `most`: local
    experts of the expert rank that has most."""

    def __init__(self, comm: Comm, itinerary: Itinerary, empty_0D: torch.Tensor, most: int, note: Note | None = None):
        self._comm, self._itinerary, self._empty = comm, itinerary, empty_0D
        self._most, self._note = most, note
        self._width = empty_0D.shape[1]
        self._message = HEADER + itinerary.r2 * most
        self._hash = struct.unpack("<4q", itinerary.digest)

    def run(self, start: Position = START) -> None:
        """Walk until nobody goes on. A walk that was cut short is taken up at `start`, the least position of any rank's
        micro-batches. ValueError where ranks have different plans; whatever `comm` and the callbacks raise."""
        self._agree()
        here = start
        while self._round(here):
            here = Position(here.round + 1, 0)
        self._drain()

    @abstractmethod
    def _agree(self) -> None:
        """Every rank has the same plan, or all raise ValueError."""

    def _round(self, here: Position) -> bool:
        """One pass of all; whether there will be another."""
        for op in self._itinerary.ops:
            if op.layer < here.layer or (op.layer > 0 and here.layer == 0 and self._over()):
                continue
            self._step(op, here.round)
        return not (here.layer == 0 and self._over())

    @abstractmethod
    def _over(self) -> bool:
        """Whether all micro-batches of all ranks have ended, as said in the first layer of this round."""

    @abstractmethod
    def _step(self, op: Op, number: int) -> None:
        """One exchange of round `number`, with what is due before it."""

    @abstractmethod
    def _drain(self) -> None:
        """Wait for what is under way."""

    def _timed(self, what: str, op: Op, fn: Callable[[], Any]) -> Any:
        if self._note is None:
            return fn()
        began = time.perf_counter()
        result = fn()
        self._note(what, op.layer, op.batch, op.chunk, began, time.perf_counter())
        return result


class AttentionWalk(_Walk):
    """The walk of an attention rank."""

    def __init__(
        self,
        comm: Comm,
        itinerary: Itinerary,
        side: Attending,
        empty_0D: torch.Tensor,
        most: int,
        note: Note | None = None,
    ):
        super().__init__(comm, itinerary, empty_0D, most, note)
        self._side = side
        self._none = [0] * comm.place.eg
        self._turns: deque[tuple[int, Turn]] = deque()
        self._sent: dict[int, Sent | None] = {}
        self._posted: dict[int, list[Handle]] = {}  # by micro-batch: what only has to be over
        self._backs: dict[int, dict[int, Handle]] = {}  # and what comes back, by chunk
        self._verdict: Handle | None = None
        self._mine = True  # whether a micro-batch of this rank still goes

    def run(self, start: Position = START) -> None:
        try:
            super().run(start)
        except PeerLost:
            self._keep()
            raise

    def _agree(self) -> None:
        eg = self._comm.place.eg
        self._comm.counts(torch.tensor([self._hash] * eg), len(self._hash)).wait()
        if not bool((self._comm.combine(None, self._none, [1] * eg, 1).wait() == 1).all()):
            raise ValueError(f"the plans of {self._comm.place.ag + eg} ranks differ: give all the same")

    def _round(self, here: Position) -> bool:
        self._settle_verdict()
        layers = range(here.layer, self._itinerary.layers)
        self._turns = deque((layer, turn) for layer in layers for turn in self._itinerary.turns)
        self._mine = here.layer > 0
        goes_on = super()._round(here)
        for layer, (_, batch) in self._turns:  # only shared experts are left
            if goes_on:
                self._share(layer, batch)
        return goes_on

    def _over(self) -> bool:
        if self._mine:
            return False
        assert self._verdict is not None, "the verdict comes after all counts of the first layer"
        return not bool(self._verdict.wait()[0, 0] == 1)

    def _step(self, op: Op, number: int) -> None:
        if op.way is Way.COUNTS:
            self._attend(op, Position(number, op.layer))
        elif op.way is Way.OUT:
            sent = self._sent[op.batch]
            rows, to = (self._empty, self._none) if sent is None else (sent.rows_C[op.chunk], sent.to_CE[op.chunk])
            self._posted[op.batch].append(self._comm.dispatch(rows, to, self._none, self._width))
        elif op.way is Way.VERDICT:
            of = [1, *self._none[1:]]
            self._verdict = self._comm.combine(None, self._none, of, 1)
        else:
            sent = self._sent[op.batch]
            of = self._none if sent is None else sent.to_CE[op.chunk]
            self._backs[op.batch][op.chunk] = self._comm.combine(None, self._none, of, self._width)

    def _attend(self, op: Op, here: Position) -> None:
        """The turns up to this micro-batch's attention; then say what will be sent."""
        while (turn := self._turns.popleft())[1] != ("A", op.batch) or turn[0] != op.layer:
            assert turn[1][0] == "S", (turn, op)
            self._share(turn[0], turn[1][1])
        self._timed("wait", op, lambda: self._collect(op.batch))
        sent = self._timed("attention", op, lambda: self._side.attend(op.batch, here))
        going = self._side.going(op.batch)
        self._mine = self._mine or going
        message_EW = torch.zeros(self._comm.place.eg, self._message, dtype=torch.int64)
        message_EW[:, :HEADER] = torch.tensor([self._comm.generation, *here, op.batch, going])
        if sent is not None:
            message_EW[:, HEADER:] = sent.counts_ECL.flatten(1)
        self._sent[op.batch] = sent
        self._posted[op.batch] = [self._comm.counts(message_EW, self._message)]
        self._backs[op.batch] = {}

    def _share(self, layer: int, batch: int) -> None:
        self._timed("shared", Op(Way.OUT, layer, batch, -1), lambda: self._side.share(batch))

    def _collect(self, batch: int) -> None:
        """Wait for what is under way of a micro-batch, and hand its rows back."""
        for handle in self._posted.pop(batch, ()):
            handle.wait()
        for chunk in sorted(self._backs.get(batch, ())):
            self._take(batch, chunk)

    def _take(self, batch: int, chunk: int) -> None:
        rows_PD = self._backs[batch][chunk].wait()
        del self._backs[batch][chunk]
        if self._sent[batch] is not None:
            self._side.returned(batch, chunk, rows_PD)

    def _keep(self) -> None:
        """Somebody is lost: what came back before stays, and need not be sent again."""
        for batch, handles in self._backs.items():
            for chunk in [chunk for chunk, handle in handles.items() if handle.ended()]:
                with contextlib.suppress(PeerLost):  # it ended because somebody is lost
                    self._take(batch, chunk)

    def _settle_verdict(self) -> None:
        if self._verdict is not None:
            self._verdict.wait()
            self._verdict = None

    def _drain(self) -> None:
        self._settle_verdict()
        for batch in range(self._itinerary.r1):
            self._collect(batch)


class ExpertWalk(_Walk):
    """The walk of an expert rank."""

    def __init__(
        self,
        comm: Comm,
        itinerary: Itinerary,
        experts: Experts,
        empty_0D: torch.Tensor,
        most: int,
        worker: Worker | None = None,
        note: Note | None = None,
    ):
        super().__init__(comm, itinerary, empty_0D, most, note)
        self._experts, self._worker = experts, worker or Inline()
        self._none = [0] * comm.place.ag
        self._counts: dict[int, torch.Tensor] = {}  # by micro-batch: (attention ranks, chunks, local experts)
        self._jobs: dict[tuple[int, int], tuple[Later, list[int]]] = {}
        self._posted: dict[tuple[int, int], Handle] = {}
        self._heard = 0  # micro-batches that still go, of all attention ranks, as far as heard in this round

    def _agree(self) -> None:
        theirs_A4 = self._comm.counts(None, len(self._hash)).wait()
        same = bool((theirs_A4 == torch.tensor(self._hash)).all())
        ag = self._comm.place.ag
        self._comm.combine(self._empty.new_full((ag, 1), float(same)), [1] * ag, self._none, 1).wait()
        if not same:
            raise ValueError(f"the plans of {ag + self._comm.place.eg} ranks differ: give all the same")

    def _round(self, here: Position) -> bool:
        self._heard = 0
        return super()._round(here)

    def _over(self) -> bool:
        return self._heard == 0

    def _step(self, op: Op, number: int) -> None:
        at = (op.batch, op.chunk)
        if op.way is Way.COUNTS:
            message_AW = self._timed("wait", op, lambda: self._comm.counts(None, self._message).wait())
            self._read(message_AW, op, number)
        elif op.way is Way.OUT:
            counts_AL = self._counts[op.batch][:, op.chunk]
            of = counts_AL.sum(dim=1).tolist()
            arriving = self._comm.dispatch(None, self._none, of, self._width)
            self._jobs[at] = self._worker.submit(lambda: self._compute(op, arriving, counts_AL)), of
        elif op.way is Way.VERDICT:
            self._speak()
        else:
            job, to = self._jobs.pop(at)
            rows_PD = job.wait()
            if at in self._posted:
                self._posted.pop(at).wait()  # of the layer before: they have it
            self._posted[at] = self._comm.combine(rows_PD, to, self._none, self._width)

    def _read(self, message_AW: torch.Tensor, op: Op, number: int) -> None:
        """Counts of one micro-batch; all attention ranks must be where this rank is."""
        header_AH = message_AW[:, :HEADER].tolist()
        want = [self._comm.generation, number, op.layer, op.batch]
        assert all(header[:-1] == want for header in header_AH), (want, header_AH)
        if op.layer == 0:
            self._heard += sum(header[-1] for header in header_AH)
        self._counts[op.batch] = message_AW[:, HEADER:].reshape(-1, self._itinerary.r2, self._most)

    def _compute(self, op: Op, arriving: Handle, counts_AL: torch.Tensor) -> torch.Tensor:
        rows_PD = self._timed("arriving", op, arriving.wait)
        rows: torch.Tensor = self._timed(
            "expert", op, lambda: self._experts(op.layer, op.batch, op.chunk, rows_PD, counts_AL)
        )
        return rows

    def _speak(self) -> None:
        """The first expert rank tells every attention rank whether anybody goes on."""
        speaks = self._comm.place.index == 0
        rows_A1 = self._empty.new_full((self._comm.place.ag if speaks else 0, 1), float(self._heard > 0))
        at = (-1, -1)
        if at in self._posted:
            self._posted.pop(at).wait()
        self._posted[at] = self._comm.combine(rows_A1, [int(speaks)] * self._comm.place.ag, self._none, 1)

    def _drain(self) -> None:
        for handle in self._posted.values():
            handle.wait()
        self._posted.clear()
