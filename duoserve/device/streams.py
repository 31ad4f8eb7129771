"""Work in order, on the thread that hands it over or on threads of its own, each with a CUDA stream where there is one.
Knows lanes and events; knows nothing of memory, or of which device it is part of.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from duoserve.core import Key, Lane
from duoserve.device.events import Event, marked
from duoserve.timeline import (
    COMBINE,
    COMPUTE,
    DEMAND,
    DISK,
    EXPERT,
    GUESS,
    IN_FLIGHT,
    MODEL,
    NONE,
    SCHEDULE,
    SLOT,
    STALL,
    ModelThread,
    Timeline,
    Why,
    place,
)

SETTLING_S = 0.01  # between two looks whether a stream has nothing to do
REMEMBERED = 32  # jobs of a lane that were done last


@dataclass(eq=False)
class _Job:
    fn: Callable[[], Any]
    after: tuple[Event, ...]
    behind: tuple[Event, ...]
    event: Event
    cost: float
    what: Key | None
    lane: Lane
    held_by: Event | None = None  # what it was first seen to wait for, and since when
    held_since: float = 0.0

    @property
    def can_start(self) -> bool:
        return all(event.issued for event in self.after) and all(event.issued for event in self.behind)

    def hold(self) -> None:
        """It cannot start yet: note once why."""
        if self.held_by is None:
            self.held_since = time.perf_counter()
            self.held_by = next((event for event in (*self.behind, *self.after) if not event.issued), None)
            if self.held_by in self.behind and self.event.why.said == DEMAND:
                self.event.why.said = SLOT


class Traffic(NamedTuple):
    """Of one lane: whose work waits, is under way, and was done last (oldest first) of `done` in all."""

    waiting: list[Key]
    running: list[Key]
    last: list[Key]
    done: int


class InlineStream:
    """Runs work on the submitting thread, in order; on CUDA that is the current stream of that thread."""

    def __init__(self, thread: ModelThread, cuda: bool = False):
        self._thread, self._cuda = thread, cuda

    def submit(
        self,
        fn: Callable[[], Any],
        after: Iterable[Event] = (),
        behind: Iterable[Event] = (),
        lane: Lane = Lane.DEMAND,
        cost: float = 0,
        what: Key | None = None,
    ) -> Event:
        """Run `fn` once all of `after` succeeded and all of `behind` are over; exceptions rise here."""
        stream = torch.cuda.current_stream() if self._cuda else None
        for event in behind:
            event.order(stream, needed=False)
        for event in after:
            if event.issued:
                event.order(stream)
            else:
                self._thread.wait(partial(event.order, stream), event.why.stall, what)
        if self._thread.timeline is None:
            fn()
        else:
            self._followed(fn, what)
        return marked(stream)

    def _followed(self, fn: Callable[[], Any], what: Key | None) -> None:
        layer, expert = what or (self._thread.layer, NONE)
        self._thread.turn(EXPERT if what is not None else COMBINE, layer, expert)
        fn()
        self._thread.turn(SCHEDULE, layer)

    def close(self) -> None: ...


class WorkerStream:
    """Worker threads behind two queues: whatever lies in `DEMAND` overtakes all of `AHEAD`.

    A job starts once what it waits for was issued, so no worker blocks on a job that others must finish first: with
    dependencies that only point back, something can always run. Jobs of one lane start in the order of submission
    among those that can start; `in_order` streams start nothing before its predecessor.
    """

    def __init__(
        self,
        name: str,
        threads: int = 1,
        cuda: bool = False,
        in_order: bool = False,
        board: threading.Condition | None = None,
        rate: int | None = None,
        stalls: dict[str, float] | None = None,
    ):
        self._rate, self._free_at = rate, 0.0  # bytes per second that jobs are slowed to, and when the next may begin
        self._name, self._stalls = name, stalls  # where a stream that computes counts how long it waited for what
        self._numbered = threads > 1
        self._timeline: Timeline | None = None
        self._lanes: dict[Lane, deque[_Job]] = {lane: deque() for lane in Lane}
        self._board = board or threading.Condition()
        self._shared = board is not None  # by streams that wait for each other
        self._in_order = in_order
        self._closed = False
        self._cuda = torch.cuda.Stream() if cuda else None
        self._running: list[_Job] = []
        self._last: dict[Lane, deque[Key]] = {lane: deque(maxlen=REMEMBERED) for lane in Lane}
        self._done = dict.fromkeys(Lane, 0)
        self._busy_since = 0.0
        self.busy_s = 0.0  # seconds with at least one job running
        self.cost_done: float = 0
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"duoserve-{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        fn: Callable[[], Any],
        after: Iterable[Event] = (),
        behind: Iterable[Event] = (),
        lane: Lane = Lane.DEMAND,
        cost: float = 0,
        what: Key | None = None,
    ) -> Event:
        """Queue `fn` in its lane; it starts once all of `after` succeeded and all of `behind` are over.

        What `fn`, or an event of `after`, raises, waiting for the returned event raises. `cost` is bytes, or
        seconds of compute where they are known; `what` the expert whose work it is.
        """
        event = Event(Why(DEMAND if lane is Lane.DEMAND else GUESS))
        job = _Job(fn, tuple(after), tuple(behind), event, cost, what, lane)
        with self._board:
            if self._closed:
                raise RuntimeError("the stream is closed: the engine was shut down")
            self._lanes[lane].append(job)
            self._wake()
        return event

    def record(self, timeline: Timeline | None) -> None:
        """Note jobs that begin from now on, and what they waited for, in `timeline`."""
        self._timeline = timeline

    def cancel(self, event: Event) -> bool:
        """Take a job that nobody started out of the AHEAD queue; False where it is too late."""
        with self._board:
            job = self._guess(event)
            if job is not None:
                self._lanes[Lane.AHEAD].remove(job)
                event.set()
                if self._shared or any(self._lanes.values()):
                    self._wake()
        return job is not None

    def queued(self, event: Event) -> bool:
        """Whether the event is that of a guess which nobody began."""
        with self._board:
            return self._guess(event) is not None

    def promote(self, event: Event) -> None:
        """A guess turned out to be needed: move its job, if still queued, to the DEMAND lane."""
        with self._board:
            if event.why.said == GUESS and not event.issued:
                event.why.said = IN_FLIGHT
            job = self._guess(event)
            if job is not None:
                self._lanes[Lane.AHEAD].remove(job)
                self._lanes[Lane.DEMAND].append(job)
                job.lane = Lane.DEMAND

    def settle(self) -> None:
        """Wait until nothing is queued or under way."""
        with self._board:
            self._board.notify_all()  # whoever submitted last may have been interrupted before it did
            while self._running or any(self._lanes.values()):
                self._board.wait(SETTLING_S)

    def traffic(self) -> dict[Lane, Traffic]:
        """What moves just now, by lane."""
        with self._board:
            return {lane: self._traffic(lane) for lane in Lane}

    def _traffic(self, lane: Lane) -> Traffic:
        waiting = [job.what for job in self._lanes[lane] if job.what is not None]
        running = [job.what for job in self._running if job.lane is lane and job.what is not None]
        return Traffic(waiting, running, list(self._last[lane]), self._done[lane])

    def close(self) -> None:
        """Finish what is queued, then end the threads."""
        with self._board:
            self._closed = True
            self._board.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    def _guess(self, event: Event) -> _Job | None:
        return next((job for job in self._lanes[Lane.AHEAD] if job.event is event), None)

    def _next(self) -> _Job | None:
        with self._board:
            while True:
                for queue in self._lanes.values():
                    for job in list(queue)[: 1 if self._in_order else None]:
                        if job.can_start:
                            queue.remove(job)
                            self._enter(job)
                            return job
                        job.hold()
                if self._closed and not any(self._lanes.values()):
                    return None
                self._board.wait()

    def _work(self, number: int) -> None:
        ended = 0.0
        while (job := self._next()) is not None:
            mark, error, timeline, free_since = None, None, self._timeline, ended
            began = time.perf_counter()
            try:
                for event in job.behind:
                    event.order(self._cuda, needed=False)
                for event in job.after:
                    event.order(self._cuda)
                until = self._slowed(job.cost)
                with torch.cuda.stream(self._cuda) if self._cuda is not None else contextlib.nullcontext():
                    job.fn()
                if until is not None:
                    time.sleep(max(0.0, until - time.perf_counter()))
                mark = self._cuda.record_event() if self._cuda is not None else None
            except BaseException as raised:  # handed to whoever waits for the event
                error = raised
            ended = time.perf_counter()
            if job.held_by is not None:
                self._waited(timeline, number, job, max(free_since, job.held_since), began)
            if timeline is not None:
                layer, expert = job.what or (NONE, NONE)
                timeline.add(*self._place(number, job), layer, expert, began, ended, job.event.why)
            with self._board:
                self._leave(job)
                job.event.set(mark, error)
                if self._shared or any(self._lanes.values()):  # what waited for this one may start
                    self._wake()

    def _waited(self, timeline: Timeline | None, number: int, job: _Job, since: float, until: float) -> None:
        """A worker had nothing else to do while the job could not start."""
        assert job.held_by is not None, job
        cause = SLOT if job.held_by in job.behind else DISK if self._stalls is None else job.held_by.why.stall
        if self._stalls is not None:
            self._stalls[cause] += until - since
        if timeline is not None:
            timeline.add(self._place(number, job)[0], STALL, *(job.what or (NONE, NONE)), since, until, cause)

    def _place(self, number: int, job: _Job) -> tuple[str, str]:
        """Track and kind of a job's span."""
        track, kind = place(self._name, job.lane, job.what)
        return f"{track} {number}" if self._numbered else track, kind

    def _wake(self) -> None:
        """A job may be able to start. One worker is enough, unless those who wait are of several streams: each that wakes in
        vain takes the interpreter from whoever computes."""
        if self._shared:
            self._board.notify_all()
        else:
            self._board.notify()

    def _slowed(self, cost: float) -> float | None:
        """When a job of `cost` bytes that begins now would end on a link of this rate, one job at a time."""
        if self._rate is None:
            return None
        with self._board:
            self._free_at = max(self._free_at, time.perf_counter()) + cost / self._rate
            return self._free_at

    def _enter(self, job: _Job) -> None:
        if not self._running:
            self._busy_since = time.perf_counter()
        self._running.append(job)

    def _leave(self, job: _Job) -> None:
        self._running.remove(job)
        self.cost_done += job.cost
        if not self._running:
            self.busy_s += time.perf_counter() - self._busy_since
        if job.what is not None:
            self._done[job.lane] += 1
            self._last[job.lane].append(job.what)


class Streams:
    """The streams of a device and the model's thread, on one clock."""

    thread: ModelThread
    compute: InlineStream | WorkerStream
    copy: WorkerStream
    predict: WorkerStream
    disk: WorkerStream | None  # where host memory stands between disk and slots

    def now(self) -> float:
        """Seconds on the clock that this device's work takes its time from."""
        return time.perf_counter()

    def record(self, timeline: Timeline | None) -> None:
        """Note what the host does from now on in `timeline`, or in none; what a GPU does in between is not seen."""
        self.thread.record(timeline, COMPUTE if isinstance(self.compute, InlineStream) else MODEL)
        for stream in (self.predict, self.copy, self.disk, self.compute):
            if isinstance(stream, WorkerStream):
                stream.record(timeline)

    def close(self) -> None:
        for stream in (self.predict, self.copy, self.disk, self.compute):
            if stream is not None:
                stream.close()
