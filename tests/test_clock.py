"""Streams in virtual time keep the rules of streams on threads, and a link takes as long as its figures say."""

from __future__ import annotations

import random
import threading
from itertools import pairwise
from typing import Any

import pytest

from duoserve.clock import ClockDevice, Link
from duoserve.clockstream import ClockStream
from duoserve.core import Key, Lane
from duoserve.device import WorkerStream
from duoserve.timeline import Timeline

Program = list[tuple[Any, ...]]


def program(rng: random.Random) -> Program:
    """What somebody asks of a stream while its only worker is busy."""
    steps: Program = []
    submitted = 0
    for _ in range(rng.randrange(5, 40)):
        kind = rng.choices(["submit", "cancel", "promote"], [6, 1, 2])[0]
        if kind == "submit" or not submitted:
            after, behind = (
                [rng.randrange(submitted) for _ in range(rng.choice([0, 0, 1, 2])) if submitted] for _ in "ab"
            )
            steps.append(("submit", rng.choice(list(Lane)), after, behind))
            submitted += 1
        else:
            steps.append((kind, rng.randrange(submitted)))
    return steps


def perform(stream: Any, steps: Program) -> tuple[list[int], list[bool], list[Any]]:
    """The order in which jobs will start, what could be cancelled, and their events."""
    order: list[int] = []
    cancelled: list[bool] = []
    events: list[Any] = []
    for kind, *args in steps:
        if kind == "submit":
            lane, after, behind = args
            number = len(events)
            events.append(stream.submit(lambda n=number: order.append(n), [events[i] for i in after],
                                        [events[i] for i in behind], lane, 1))  # fmt: skip
        elif kind == "cancel":
            cancelled.append(stream.cancel(events[args[0]]))
        else:
            stream.promote(events[args[0]])
    return order, cancelled, events


@pytest.mark.parametrize("in_order", [False, True])
def test_jobs_start_in_the_order_of_the_thread_that_they_stand_for(in_order: bool) -> None:
    for seed in range(100):
        steps = program(random.Random(seed))
        if in_order:  # and in one lane, as the compute stream has it
            steps = [(s[0], Lane.DEMAND, *s[2:]) for s in steps if s[0] == "submit"]
        threads = WorkerStream("test", in_order=in_order)
        gate = threading.Event()
        threads.submit(lambda gate=gate: gate.wait(10))
        real = perform(threads, steps)
        gate.set()
        threads.close()  # finishes what is queued
        device = ClockDevice(Link(1.0))
        clock = ClockStream(device, "copy", in_order=in_order)
        clock.submit(lambda: None, cost=1)
        virtual = perform(clock, steps)
        device.spend(1000)
        assert virtual[:2] == real[:2], seed
        assert all(event.done for event in virtual[2])


def test_two_streams_wait_for_each_other_in_time() -> None:
    device = ClockDevice(Link(10.0, workers=1), asynchronous=True)
    first = device.copy.submit(lambda: None, cost=20)  # 0 to 2
    read = device.compute.submit(lambda: None, after=[first], cost=3)  # 2 to 5
    second = device.copy.submit(lambda: None, behind=[read], cost=10)  # 5 to 6
    other = device.copy.submit(lambda: None, cost=10)  # 2 to 3: what cannot start holds up nobody
    other.wait()
    assert device.now() == 3 and not read.done
    second.wait()
    assert device.now() == 6 and device.copy.busy_s == 4 and device.copy.cost_done == 40


def test_a_wire_takes_copies_in_turn_and_their_latencies_overlap() -> None:
    device = ClockDevice(Link(100.0, latency_s=0.5, workers=2))
    events = [device.copy.submit(lambda: None, cost=100) for _ in range(3)]
    ends = []
    for event in events:
        event.wait()
        ends.append(device.now())
    assert ends == [1.5, 2.5, 3.5]


def test_readers_of_a_disk_share_its_rate() -> None:
    device = ClockDevice(Link(150.0, workers=2, alone=100.0))
    long, short = (device.copy.submit(lambda: None, cost=cost) for cost in (250, 75))
    short.wait()
    assert device.now() == pytest.approx(1.0)  # both at 75
    long.wait()
    assert device.now() == pytest.approx(1.0 + 175 / 100)


def test_readers_of_a_disk_are_quicker_while_the_host_waits() -> None:
    device = ClockDevice(Link(100.0, workers=1, alone=100.0, quicker=1.25))
    event = device.copy.submit(lambda: None, cost=200)
    device.spend(1.0)
    event.wait()
    assert device.now() == pytest.approx(1.0 + 100 / 125)


def test_workers_wake_turn_around_and_wake_who_waits_in_their_own_time() -> None:
    device, order = ClockDevice(Link(100.0, workers=1, submit_s=0.5, begin_s=1.0, between_s=5.0, wake_s=4.0)), []
    guess = device.copy.submit(lambda: order.append("guess"), lane=Lane.AHEAD, cost=100)
    need = device.copy.submit(lambda: order.append("need"), cost=100)
    need.wait()  # in the queue before the worker was there, which came once both had been handed over
    assert order == ["need"] and device.now() == 1 + 1 + 1 + 4
    guess.wait()
    assert order == ["need", "guess"] and device.now() == 3 + 5 + 1 + 4


def test_workers_come_one_after_the_other_once_the_host_lets_go_of_the_interpreter() -> None:
    device, ends = ClockDevice(Link(100.0, workers=2, alone=50.0, begin_s=1.0)), []
    for _ in range(2):
        device.copy.submit(lambda: ends.append(device.now()), cost=50)
    assert not device.copy.busy  # whatever happened meanwhile: no time has passed
    device.spend(10.0)
    assert ends == [2.0, 3.0]  # begun at 1 and at 2


def test_a_guess_can_be_withdrawn_until_the_worker_is_there() -> None:
    device = ClockDevice(Link(100.0, begin_s=1.0))
    early, late = (device.copy.submit(lambda: None, lane=Lane.AHEAD, cost=100) for _ in range(2))
    device.spend(0.5)
    assert device.copy.cancel(early)
    device.spend(1.0)
    assert not device.copy.cancel(late)
    late.wait()
    assert device.now() == 2.0


def test_copies_take_measured_shares_of_their_mean_in_their_order() -> None:
    shares = (0.5, 1.0, 1.5)
    device, took = ClockDevice(Link(100.0, workers=1, spread=shares)), []
    for _ in range(30):
        began = device.now()
        device.copy.submit(lambda: None, cost=100).wait()
        took.append(round(device.now() - began, 6))
    assert took == list(shares) * 10


def test_a_failure_reaches_who_needs_it_and_not_who_only_follows() -> None:
    device = ClockDevice(Link(1.0))

    def fail() -> None:
        raise OSError("no")

    broken = device.copy.submit(fail, cost=1)
    needs = device.copy.submit(lambda: None, after=[broken])
    device.copy.submit(lambda: None, behind=[broken]).wait()
    for event in (broken, needs):
        with pytest.raises(OSError, match="no"):
            event.wait()


def test_a_thought_acts_when_its_time_has_passed() -> None:
    device = ClockDevice(Link(1.0))
    seen: list[float] = []

    def think() -> None:
        device.spend(3)
        seen.append(device.now())

    thoughts = [device.predict.submit(think) for _ in range(2)]
    device.spend(2)
    assert seen == []
    device.spend(2)
    assert seen == [3] and device.now() == 4
    thoughts[1].wait()
    assert seen == [3, 6] and device.now() == 6


def test_busy_spans_of_a_wire_add_up_and_do_not_overlap_on_a_track() -> None:
    device, timeline = ClockDevice(Link(10.0, workers=2)), Timeline()
    device.record(timeline)
    rng = random.Random(0)
    for n in range(50):
        device.copy.submit(lambda: None, cost=rng.randrange(1, 20), lane=rng.choice(list(Lane)), what=Key(0, n))
        device.spend(rng.random())
    device.spend(1000)
    device.record(None)
    spans = [span for span in timeline.spans() if span.kind == "copy"]
    assert len(spans) == 50
    for worker in "01":
        own = [span for span in spans if span.lane.endswith(worker)]
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(own))
    edges = sorted({span.start for span in spans} | {span.end for span in spans})
    busy = sum(b - a for a, b in pairwise(edges) if any(s.start <= a and b <= s.end for s in spans))
    assert busy == pytest.approx(device.copy.busy_s)
