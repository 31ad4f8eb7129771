"""The walk: one order for all ranks, every exchange before what needs it, all stop together, and it can be taken up."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dep_extension.comm import PeerLost, Role
from dep_extension.local import local_world, together
from dep_extension.partition import shares
from dep_extension.rows import arrived, cut, seats
from dep_extension.schedule import Order, Work, every_order
from dep_extension.walk import START, AttentionWalk, ExpertWalk, Itinerary, Op, Position, Sent, Way

WIDTH = 4


def itineraries(seed: int, many: int) -> list[Itinerary]:
    """Random plans with random durations, some of them nothing at all."""
    rng, found = random.Random(seed), []
    for _ in range(many):
        layers, r1, r2 = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 4)
        draw = np.random.default_rng(rng.randrange(10**6))
        seconds = [draw.integers(0, 4, size).astype(float) for size in (r1, r1, (r1, r2), (r1, r2), (r1, r2))]
        work = Work(layers, seconds[0], seconds[1], float(rng.randint(0, 1)), *seconds[2:])
        order = rng.choice([Order.ASAS, Order.AASS, rng.choice(list(every_order(r1)))])
        found.append(Itinerary.of(layers, r1, r2, order, rng.choice([work, None])))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_exchange_comes_once_and_after_what_it_needs(seed: int) -> None:
    for plan in itineraries(seed, 5):
        at = {op: n for n, op in enumerate(plan.ops)}
        assert len(at) == len(plan.ops) == plan.layers * plan.r1 * (1 + 2 * plan.r2) + 1
        for layer in range(plan.layers):
            for i in range(plan.r1):
                counts = at[Op(Way.COUNTS, layer, i, -1)]
                out = [at[Op(Way.OUT, layer, i, j)] for j in range(plan.r2)]
                back = [at[Op(Way.BACK, layer, i, j)] for j in range(plan.r2)]
                assert counts < out[0] and out == sorted(out) and back == sorted(back)
                assert all(a < b for a, b in zip(out, back, strict=True))
                if layer + 1 < plan.layers:
                    assert back[-1] < at[Op(Way.COUNTS, layer + 1, i, -1)]
        heard = [at[Op(Way.COUNTS, 0, i, -1)] for i in range(plan.r1)]
        verdict = at[Op(Way.VERDICT, 0, -1, -1)]
        assert max(heard) < verdict
        assert all(verdict < at[op] for op in plan.ops if op.way is Way.COUNTS and op.layer > 0)


def test_plans_that_differ_in_anything_have_other_digests() -> None:
    plans = {Itinerary.of(n, r1, r2, o).digest for n in (1, 2) for r1 in (2, 3) for r2 in (1, 2) for o in Order}
    assert len(plans) == 16
    assert Itinerary.of(2, 2, 2).digest == Itinerary.of(2, 2, 2).digest


def test_durations_of_another_plan_are_refused() -> None:
    with pytest.raises(ValueError, match="durations are of 2 layers, r1=2, r2=1, the plan of 3, 2, 1"):
        Itinerary.of(3, 2, 1, work=Work.even(2, 2, 1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="0 layers, r1=1 and r2=1"):
        Itinerary.of(0, 1, 1)


class Numbers:
    """An attention side without a model: micro-batch i makes `rounds[i]` rounds; back must come what was sent + 1."""

    def __init__(self, plan: Itinerary, eg: int, rounds: list[int], rank: int):
        self.plan, self.eg, self.rounds, self.rank = plan, eg, rounds, rank
        self.at: list[Position | None] = [None] * plan.r1
        self.sent: list[Sent | None] = [None] * plan.r1
        self.missing: list[set[int]] = [set() for _ in rounds]
        self.shared: list[tuple[int, Position]] = []
        self.trace: list[tuple[int, Position]] = []

    def attend(self, batch: int, here: Position) -> Sent | None:
        if not self.ended(batch) and not self.missing[batch]:
            self._go_on(batch)
        return None if self.ended(batch) or self.at[batch] != here else self.sent[batch]

    def ended(self, batch: int) -> bool:
        at = self.at[batch]
        return self.rounds[batch] == 0 or (at is not None and at.round >= self.rounds[batch])

    def _go_on(self, batch: int) -> None:
        at = self.at[batch]
        if at is None:
            self.at[batch] = Position(0, 0)
        else:
            last = at.layer + 1 == self.plan.layers
            self.at[batch] = Position(at.round + 1, 0) if last else Position(at.round, at.layer + 1)
        if self.ended(batch):
            return
        now = self.at[batch]
        assert now is not None
        self.trace.append((batch, now))
        draw = random.Random(hash((self.rank, batch, now)))
        to = [[draw.randint(0, 2) for _ in range(self.eg)] for _ in range(self.plan.r2)]
        rows = [torch.full((sum(each), WIDTH), float(draw.randint(0, 99))) for each in to]
        self.sent[batch] = Sent(rows, to, torch.tensor(to).T[:, :, None].contiguous())
        self.missing[batch] = set(range(self.plan.r2))

    def going(self, batch: int) -> bool:
        return not self.ended(batch)

    def share(self, batch: int) -> None:
        at = self.at[batch]
        if at is not None and not self.ended(batch):
            self.shared.append((batch, at))

    def returned(self, batch: int, chunk: int, rows_PD: torch.Tensor) -> None:
        sent = self.sent[batch]
        assert sent is not None
        assert torch.equal(rows_PD, sent.rows_C[chunk] + 1)
        self.missing[batch].discard(chunk)


def run(plan: Itinerary, sides: list[Numbers], eg: int, start: Position = START, fail: Any = None) -> None:
    """All ranks as greenlets; `fail` is told each chunk that an expert rank computes."""
    comms = local_world(len(sides), eg, torch.float32, poison=True)
    empty = torch.empty(0, WIDTH)

    def experts(layer: int, batch: int, chunk: int, rows_PD: torch.Tensor, counts_AL: torch.Tensor) -> torch.Tensor:
        assert counts_AL.sum() == len(rows_PD)
        if fail is not None:
            fail(layer, batch, chunk)
        return rows_PD + 1

    def walk(comm: Any) -> Callable[[], None]:
        if comm.place.role is Role.ATTENTION:
            walker: Any = AttentionWalk(comm, plan, sides[comm.place.index], empty, 1)
        else:
            walker = ExpertWalk(comm, plan, experts, empty, 1)
        return lambda: (walker.run(start), comm.close())[0]

    together(comms, *[walk(comm) for comm in comms])


def everything(plan: Itinerary, rounds: list[int]) -> set[tuple[int, Position]]:
    return {(i, Position(r, at)) for i, n in enumerate(rounds) for r in range(n) for at in range(plan.layers)}


@pytest.mark.parametrize("seed", range(25))
def test_all_micro_batches_of_all_ranks_go_their_whole_way_and_all_stop(seed: int) -> None:
    rng = random.Random(seed)
    plan, ag, eg = itineraries(seed, 1)[0], rng.randint(1, 3), rng.randint(1, 3)
    sides = [Numbers(plan, eg, [rng.randint(0, 3) for _ in range(plan.r1)], rank) for rank in range(ag)]
    run(plan, sides, eg)
    for side in sides:
        assert len(side.trace) == len(set(side.trace)) and set(side.trace) == everything(plan, side.rounds)
        assert set(side.shared) == set(side.trace)


@pytest.mark.parametrize("seed", range(25))
def test_a_walk_that_was_cut_short_is_taken_up_where_it_was(seed: int) -> None:
    """Whatever chunk is lost: survivors begin again at the least position, nothing is done twice, nothing left out."""
    rng = random.Random(seed)
    plan, ag, eg = itineraries(seed, 1)[0], rng.randint(1, 3), rng.randint(2, 3)
    sides = [Numbers(plan, eg, [rng.randint(1, 3) for _ in range(plan.r1)], rank) for rank in range(ag)]
    left = [rng.randrange(plan.layers * plan.r1 * plan.r2 * eg * 2)]

    def fail(layer: int, batch: int, chunk: int) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise PeerLost((ag,), "gone")

    try:
        run(plan, sides, eg, fail=fail)
    except PeerLost:
        for side in sides:  # what was not wholly back is sent anew
            side.missing = [set(range(plan.r2)) if gone else set() for gone in side.missing]
        places = [side.at[i] or Position(0, 0) for side in sides for i in range(plan.r1) if not side.ended(i)]
        if places:
            run(plan, sides, eg, min(places))
    for side in sides:
        assert len(side.trace) == len(set(side.trace)) and set(side.trace) == everything(plan, side.rounds)


def test_ranks_with_other_plans_are_told_at_the_start() -> None:
    comms = local_world(1, 1, torch.float32)
    plans = [Itinerary.of(2, 2, 1), Itinerary.of(2, 1, 2)]
    empty, said = torch.empty(0, WIDTH), []

    def guarded(walk: Any) -> None:
        try:
            walk.run()
        except ValueError as error:
            said.append(str(error))

    attention = AttentionWalk(comms[0], plans[0], Numbers(plans[0], 1, [1, 1], 0), empty, 1)
    expert = ExpertWalk(comms[1], plans[1], lambda *args: args[3], empty, 1)
    together(comms, lambda: guarded(attention), lambda: guarded(expert))
    assert said == ["the plans of 2 ranks differ: give all the same"] * 2


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_cut_into_chunks_that_together_are_all_of_them(seed: int) -> None:
    rng = random.Random(seed)
    experts, ranks, r2 = rng.randint(1, 9), rng.randint(1, 4), rng.randint(1, 5)
    held = shares(experts, ranks, rng.randint(1, ranks))
    spans, row = {}, 0
    for expert in range(experts):
        many = rng.randint(0, 6)
        if many:
            spans[expert] = (row, row + many)
        row += many
    at = seats(held, rng.randint(0, 5))
    most = max(map(len, held))
    found = cut(spans, at, ranks, r2, most)
    assert sorted(i for index in found.index_C for i in index.tolist()) == list(range(row))
    assert torch.equal(found.counts_ECL.sum(2).T, torch.tensor(found.to_CE))
    owner = {i: set(at[expert]) for expert, (a, b) in spans.items() for i in range(a, b)}
    for chunk, (index, to) in enumerate(zip(found.index_C, found.to_CE, strict=True)):
        for rank, rows in enumerate(index.split(to)):
            locals_ = arrived(found.counts_ECL[None, rank, chunk].reshape(1, -1))[:, 0].tolist()
            assert all((rank, local) in owner[i] for i, local in zip(rows.tolist(), locals_, strict=True))
    for expert, (a, b) in spans.items():
        each = [int(found.counts_ECL[rank, :, local].sum()) for rank, local in at[expert]]
        assert max(each) - min(each) <= r2 and sum(each) == b - a, "evenly among those who hold it, chunk for chunk"
