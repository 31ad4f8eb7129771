"""What the benchmark of the simulator measures of copies: known rates are found again from when copies began and ended."""

from __future__ import annotations

import random

import pytest

from benchmarks.gauge import Idle, Watched, _rates, _shared, late_s
from duoserve.clock import ClockDevice, Link
from duoserve.core import Key
from duoserve.timeline import Timeline

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
