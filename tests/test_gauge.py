"""What the benchmark of the simulator measures of copies: known rates are found again from when copies began and ended."""

from __future__ import annotations

import random

import pytest

from benchmarks.gauge import (
    FEW,
    Idle,
    Stamp,
    Watched,
    _drawn,
    _rates,
    _shared,
    begin_s,
    late_s,
    look_s,
    quicker_by,
    ranking_s,
)
from benchmarks.simulator import nearest, parts
from duoserve.clock import ClockDevice, Link
from duoserve.core import Key
from duoserve.timeline import COMPUTE, COPY, EXPERT, ROUTE, SCHEDULE, Span, Timeline

IDLE = Idle(1.0, 100.0, 0.0, 0.0)


@pytest.mark.parametrize(("alone", "together"), [(100.0, 150.0), (100.0, 100.0), (80.0, 160.0)])
def test_the_rates_of_a_disk_are_found_again(alone: float, together: float) -> None:
    device, timeline, rng = ClockDevice(Link(together, alone=alone)), Timeline(), random.Random(0)
    device.record(timeline)
    for n in range(400):
        device.copy.submit(lambda: None, cost=100, what=Key(0, n))
        device.spend(rng.choice([0.1, 3.0]))
    device.record(None)
    copies = list(_shared(Watched([], timeline.spans(), [])))
    assert len(copies) >= 398
    assert _rates(copies, 100, IDLE) == pytest.approx((alone, together), rel=0.02)


def test_copies_of_one_kind_leave_the_other_to_the_idle_link() -> None:
    device, timeline = ClockDevice(Link(150.0, alone=100.0)), Timeline()
    device.record(timeline)
    for n in range(50):
        device.copy.submit(lambda: None, cost=100, what=Key(0, n)).wait()
    device.record(None)
    copies = list(_shared(Watched([], timeline.spans(), [])))
    assert _rates(copies, 100, Idle(1.1, 170.0, 0.0, 0.0)) == pytest.approx((100.0, 170.0))


def test_what_a_slowed_link_takes_beside_its_rate_is_found_again() -> None:
    device, timeline, rng = ClockDevice(Link(100.0, latency_s=0.25)), Timeline(), random.Random(0)
    device.record(timeline)
    for n in range(100):
        device.copy.submit(lambda: None, cost=100, what=Key(0, n))
        device.spend(rng.choice([0.1, 3.0]))
    device.spend(1000)
    device.record(None)
    assert late_s([Watched([], timeline.spans(), [])], 1.0) == pytest.approx(0.25)


def layer(at: float, copy: float, took: float = 0.5) -> list[Span]:
    """One layer of the model's thread from `at` on, whose copy begins at `at + copy`."""
    own = [(ROUTE, 0.0, 1.0), (SCHEDULE, 1.0, 2.0), (EXPERT, 2.0, 4.0)]
    spans = [Span(COMPUTE, kind, 0, -1, at + start, at + end, None) for kind, start, end in own]
    return [*spans, Span("ahead 0", COPY, 1, 0, at + copy, at + copy + took, None)]


def test_a_copy_begins_so_long_after_the_models_thread_let_go_of_the_interpreter() -> None:
    spans = [span for n in range(FEW) for span in layer(10.0 * n, 2.25)]
    assert begin_s([Watched([], spans, [])]) == pytest.approx(0.25)


@pytest.mark.parametrize(("copy", "took"), [(4.5, 0.5), (-1.0, 3.5)])
def test_copies_handed_over_later_and_workers_that_were_awake_say_nothing_of_it(copy: float, took: float) -> None:
    spans = [span for n in range(FEW) for span in layer(10.0 * n, copy, took)]
    assert begin_s([Watched([], spans, [])]) == 0.0


def test_the_pool_is_asked_so_long_after_the_router_spoke() -> None:
    spans = [span for n in range(3) for span in layer(10.0 * n, 2.25)]
    stamps = [
        Stamp(1.5, "resident"),
        Stamp(1.75, "resident"),
        Stamp(21.25, "resident"),
    ]  # nothing of the second was there
    assert look_s([Watched([], spans, [], stamps)]) == pytest.approx((0.5 + 0.25) / 2)


def test_a_ranking_takes_from_the_pools_answer_until_it_came() -> None:
    plain = [(1.0, "resident"), (1.1, "resident"), (1.2, "whole"), (1.25, "quick"), (1.5, "ranked")]
    later = [
        (2.0, "resident"),
        (2.1, "free"),
        (2.2, "whole"),
        (2.3, "quick"),
        (2.9, "ranked"),
    ]  # something else between
    stamps = [Stamp(*stamp) for stamp in plain + later]
    assert ranking_s([Watched([], [], [], stamps)]) == pytest.approx(0.4)
    assert ranking_s([Watched([], [], [], [])]) == 0.0


def test_costs_come_from_the_neighbours_in_their_order_and_from_all_where_those_are_few() -> None:
    stretches = parts(2, 1)
    assert [part.compared for part in stretches] == [False, False, True, False, True, False]
    assert nearest(stretches) == [[0], [0], [0, 1], [1], [1, 2], [2]]
    many = [float(n) for n in range(FEW)]
    drawn = _drawn([many[:3], many[3:]], [100.0])
    assert [drawn.draw() for _ in range(FEW + 1)] == [*many, 0.0]
    assert _drawn([[1.0], [2.0]], [1.0, 2.0, 6.0]).draw() == 3.0


def test_how_much_quicker_copies_are_while_the_host_waits_is_found_again() -> None:
    device, timeline, rng = ClockDevice(Link(100.0, alone=50.0, quicker=1.25)), Timeline(), random.Random(0)
    device.record(timeline)
    for n in range(0, 400, 2):
        events = [device.copy.submit(lambda: None, cost=100, what=Key(0, n + at)) for at in range(2)]
        device.spend(rng.choice([0.1, 1.5, 4.0]))
        device.thread.wait(events[1].wait, "demand", Key(0, n + 1))
    device.record(None)
    assert quicker_by([Watched([], timeline.spans(), [])]) == pytest.approx(1.25, rel=0.01)
