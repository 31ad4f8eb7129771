"""The attention side of a disaggregated run: micro-batches as coroutines of the stock model, stopped at every MoE layer.
Knows arrivals, rows and shared experts; knows nothing of processes, of plans (`walk.py`) or of who computes experts.

    coroutine i   attention, norm, router | arrives: rows are cut and sent | <- y | residual, attention of the next layer ...
    hub           attend(i) ............... share(i) ... attend(i') ......... attend(i)

Each micro-batch is one `generate` of transformers with keys and values of its own, all under one outer inference_mode: a
thread, or a mode entered inside, would leak into the others. What it sent is kept until all of it is back, so that a walk
that was cut short can be taken up where it was: chunks that are back stay, and the others are sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import greenlet
import torch

from dep_extension.rows import Cut, Seats, Shares, cut, cut_again, seats
from dep_extension.shared import Shared
from dep_extension.walk import Position, Sent
from duoserve.core import Step
from duoserve.device import Device
from duoserve.experts import Groups, combine, group
from duoserve.moe import Arrival


class MicroBatch:
    """One generation: `work` runs in pieces on the thread of the hub; `result` is what it returned."""

    def __init__(self, work: Callable[[], Any]):
        self.work = work
        self.coroutine: greenlet.greenlet | None = None
        self.position: Position | None = None  # of the layer that it came to last
        self.round = -1
        self.arrival: Arrival | None = None  # until its rows are back
        self.groups: Groups | None = None
        self.cut: Cut | None = None
        self.missing: set[int] = set()  # chunks that are not back
        self.sent = False  # of this arrival, once already
        self.rows = 0
        self.result: Any = None

    @property
    def ended(self) -> bool:
        return self.coroutine is not None and self.coroutine.dead


class Attention:
    """The micro-batches of one attention rank; stands where a model expects its `Runtime`, and is what the walk calls.

    `shares_L`: who holds which experts of each layer; `most`: local experts of the expert rank that has most of any layer.
    """

    learns = False

    def __init__(
        self, device: Device, experts_L: Sequence[int], shares_L: Sequence[Shares], r2: int, sender: int = 0
    ) -> None:
        self.device = device
        self._experts_L, self.sender = list(experts_L), sender
        self.shared = Shared()
        self.batches: list[MicroBatch] = []
        self.steps = 0
        self.rows_sent = self.rows_again = 0  # to expert ranks; of those, a second time since a rank was lost
        self._running: MicroBatch | None = None
        self._hub = greenlet.getcurrent()
        self.share_out(shares_L, r2)

    def share_out(self, shares_L: Sequence[Shares], r2: int) -> None:
        """Send by these shares and in so many chunks from now on: of what is under way, the chunks that are not back."""
        self._seats_L: list[Seats] = [seats(shares, self.sender) for shares in shares_L]
        self._ranks, self._r2 = len(shares_L[0]), r2
        self.most = max(len(held) for shares in shares_L for held in shares)
        for batch in self.batches:
            if batch.cut is not None and batch.arrival is not None:
                self._cut_again(batch, batch.cut, batch.arrival.layer)

    def add(self, work: Callable[[], Any]) -> MicroBatch:
        """Before the walk begins, as many as the plan has."""
        self.batches.append(MicroBatch(work))
        return self.batches[-1]

    # Called inside a micro-batch, by the model

    def begin(self, step: Step) -> None:
        assert self._running is not None, "the model runs only in micro-batches"
        self._running.round += 1
        self._running.rows = step.rows
        self.steps += 1

    def enter(self, layer: int, x_TD: torch.Tensor) -> None:
        pass

    def finish(self) -> int:
        assert self._running is not None
        return self._running.rows

    def run(
        self,
        layer: int,
        expert: Callable[..., torch.Tensor],
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """y_TD of one layer's routed experts, once the hub has it."""
        y_TD: torch.Tensor = self._hub.switch(Arrival(layer, expert, x_TD, ids_TK, weights_TK))
        return y_TD

    # Called by the walk

    def attend(self, batch: int, here: Position) -> Sent | None:
        mine = self.batches[batch]
        if not mine.ended and not mine.missing:
            self._resume(mine)
        if mine.ended or mine.position != here:
            return None
        assert mine.groups is not None and mine.cut is not None, here
        rows_C = [mine.groups.x_PD[index.to(mine.groups.x_PD.device)] for index in mine.cut.index_C]
        self._count(mine, sum(map(len, rows_C)))
        return Sent(rows_C, mine.cut.to_CE, mine.cut.counts_ECL)

    def _count(self, mine: MicroBatch, rows: int) -> None:
        self.rows_sent += rows
        self.rows_again += rows if mine.sent else 0
        mine.sent = True

    def going(self, batch: int) -> bool:
        return not self.batches[batch].ended

    def share(self, batch: int) -> None:
        if not self.batches[batch].ended:
            self.shared.fill(batch)

    def returned(self, batch: int, chunk: int, rows_PD: torch.Tensor) -> None:
        mine = self.batches[batch]
        assert mine.groups is not None and mine.cut is not None, (batch, chunk)
        mine.groups.out_PD[mine.cut.index_C[chunk].to(rows_PD.device)] = rows_PD
        mine.missing.discard(chunk)

    def position(self, batch: int) -> Position | None:
        """Where a walk that was cut short has to go on for this micro-batch; None where it has ended."""
        mine = self.batches[batch]
        return None if mine.ended else mine.position or Position(0, 0)

    # The hub's

    def _resume(self, mine: MicroBatch) -> None:
        """Let it run on to its next MoE layer, or to its end; what it raises rises here."""
        y_TD = self._answer(mine)
        self._hub = greenlet.getcurrent()
        self._running = mine
        number = self.batches.index(mine)
        try:
            with self.shared.running(number):
                if mine.coroutine is None:
                    mine.coroutine = greenlet.greenlet(mine.work, self._hub)
                    came = mine.coroutine.switch()
                else:
                    came = mine.coroutine.switch(y_TD)
        finally:
            self._running = None
        if mine.ended:
            mine.result = came
        else:
            self._arrive(mine, number, came)

    def _answer(self, mine: MicroBatch) -> torch.Tensor | None:
        """What the experts made of its rows, weighed and summed in the router's order, as one process does it."""
        arrival, groups = mine.arrival, mine.groups
        if arrival is None or groups is None:
            return None
        mine.arrival = mine.groups = mine.cut = None
        return combine(groups, arrival.weights_TK, arrival.x_TD.dtype)

    def _arrive(self, mine: MicroBatch, number: int, arrival: Arrival) -> None:
        mine.position, mine.arrival = Position(mine.round, arrival.layer), arrival
        self.shared.arrived(number, arrival.layer)
        ids_TK = self.device.read(arrival.ids_TK)
        mine.groups = group(arrival.x_TD, ids_TK, self._experts_L[arrival.layer])
        at = self._seats_L[arrival.layer]
        mine.cut = cut(mine.groups.spans, at, self._ranks, self._r2, self.most)
        mine.missing, mine.sent = set(range(self._r2)), False

    def _cut_again(self, mine: MicroBatch, former: Cut, layer: int) -> None:
        at = self._seats_L[layer]
        mine.cut, mine.missing = cut_again(former, mine.missing, at, self._ranks, self._r2, self.most)
