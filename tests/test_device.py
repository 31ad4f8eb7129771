"""Streams: lanes, dependencies, failures. The machine's contract, on threads."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

from duoserve.core import Key, Lane
from duoserve.device import DONE, Event, ThreadDevice, Traffic, WorkerStream, host_arena
from duoserve.system import available_ram, use_threads


@pytest.fixture
def stream() -> Any:
    stream = WorkerStream("test")
    yield stream
    stream.close()


def held(stream: WorkerStream) -> tuple[threading.Event, Event]:
    """Occupy the only worker until the returned event is set."""
    started, gate = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        gate.wait(10)

    event = stream.submit(wait)
    assert started.wait(10)
    return gate, event


def test_demand_overtakes_every_guess(stream: WorkerStream) -> None:
    gate, _ = held(stream)
    order: list[str] = []
    guesses = [stream.submit(lambda i=i: order.append(f"guess {i}"), lane=Lane.AHEAD) for i in range(3)]
    stream.submit(lambda: order.append("need"))
    gate.set()
    guesses[-1].wait()
    assert order == ["need", "guess 0", "guess 1", "guess 2"]


def test_a_promoted_guess_is_a_need_and_a_cancelled_one_is_nothing(stream: WorkerStream) -> None:
    gate, _ = held(stream)
    order: list[int] = []
    guesses = [stream.submit(lambda i=i: order.append(i), lane=Lane.AHEAD) for i in range(4)]
    stream.promote(guesses[3])
    assert stream.cancel(guesses[1]) and not stream.cancel(guesses[3])
    gate.set()
    guesses[2].wait()
    assert order == [3, 0, 2] and guesses[1].done


def test_a_lane_tells_whose_work_waits_runs_and_is_done(stream: WorkerStream) -> None:
    first, second, guess, hurried = (Key(0, e) for e in range(4))
    started, gate = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        gate.wait(10)

    stream.submit(wait, what=first)
    assert started.wait(10)
    events = [
        stream.submit(lambda: None, what=second),
        stream.submit(lambda: None, lane=Lane.AHEAD, what=guess),
        stream.submit(lambda: None, lane=Lane.AHEAD, what=hurried),
    ]
    stream.promote(events[2])
    seen = stream.traffic()
    assert seen[Lane.DEMAND] == Traffic([second, hurried], [first], [], 0)
    assert seen[Lane.AHEAD] == Traffic([guess], [], [], 0)
    gate.set()
    for event in events:
        event.wait()
    seen = stream.traffic()
    assert seen[Lane.DEMAND] == Traffic([], [], [first, second, hurried], 3)
    assert seen[Lane.AHEAD] == Traffic([], [], [guess], 1)


@pytest.mark.parametrize("how", ["after", "behind"])
def test_work_waits_for_other_streams(stream: WorkerStream, how: str) -> None:
    other = WorkerStream("other", board=stream._board)
    gate, first = held(other)
    order: list[str] = []
    last = stream.submit(lambda: order.append("after"), **{how: [first]})
    stream.submit(lambda: order.append("free")).wait()
    assert order == ["free"], "a job that cannot start holds up nobody"
    gate.set()
    last.wait()
    assert order == ["free", "after"]
    other.close()


def test_failure_reaches_who_needs_it_and_not_who_only_follows(stream: WorkerStream) -> None:
    def fail() -> None:
        raise OSError("no")

    broken = stream.submit(fail)
    needs = stream.submit(lambda: None, after=[broken])
    follows = stream.submit(lambda: None, behind=[broken])
    follows.wait()
    for event in (broken, needs):
        with pytest.raises(OSError, match="no"):
            event.wait()


def test_busy_seconds_count_overlapping_work_once() -> None:
    stream = WorkerStream("pair", threads=2)
    gates = threading.Barrier(2)
    for event in [stream.submit(lambda: gates.wait(10), cost=5) for _ in range(2)]:
        event.wait()
    stream.close()
    assert stream.cost_done == 10 and stream.busy_s > 0 and not stream._running


def test_a_closed_stream_refuses_work() -> None:
    stream = WorkerStream("closed")
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream.submit(lambda: None)


def test_inline_work_is_done_when_submitted() -> None:
    device = ThreadDevice()
    seen: list[int] = []
    assert device.compute.submit(lambda: seen.append(1)) is DONE and seen == [1]
    device.close()


def test_host_arenas_start_on_a_page() -> None:
    arena = host_arena(10_000)
    assert arena.data_ptr() % 4096 == 0 and arena.numel() == 10_000 and arena.dtype == torch.uint8


def test_available_ram_is_some_of_this_machine() -> None:
    with open("/proc/meminfo") as lines:
        total = int(lines.readline().split()[1]) * 1024
    assert 0 < available_ram() <= total


def test_threads_are_chosen_by_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert use_threads(3) == torch.get_num_threads() == 3
        assert 1 <= use_threads() == torch.get_num_threads() <= len(os.sched_getaffinity(0))
        monkeypatch.setattr("duoserve.system.usable_cores", lambda: 1.5)  # a container's quota
        assert use_threads() == torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert use_threads() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
