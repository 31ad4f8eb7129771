"""Streams in virtual time: which job starts when, as `device.WorkerStream` has it, and no thread. Knows lanes, events and
costs; knows no links and no host.

A job starts once what it waits for is over and a worker is free; of a lane the first that can, of lanes `DEMAND` before
`AHEAD` (the tests compare this with threads). When it is over is the affair of its kind of stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import Any, Protocol

from duoserve.core import Key, Lane
from duoserve.timeline import DEMAND, GUESS, IN_FLIGHT, NONE, Timeline, Why, place


class Clock(Protocol):
    """What a stream asks of its machine."""

    time: float
    owed_s: float

    def at(self, time: float, fn: Callable[..., Any], *args: Any) -> None: ...

    def wait_for(self, event: Moment) -> None: ...

    def wake(self, seconds: float, fn: Callable[[], Any]) -> None: ...


class Moment:
    """Something that will have happened on a virtual machine: `device.Event` without threads."""

    __slots__ = ("_device", "cost", "done", "error", "job", "waiters", "why")

    def __init__(self, device: Clock, job: Job):
        self._device, self.cost = device, job.cost
        self.job: Job | None = job  # until it is over
        self.done = False
        self.why = Why(GUESS if job.lane is Lane.AHEAD else DEMAND)
        self.error: BaseException | None = None
        self.waiters: list[Job] | None = []

    @property
    def issued(self) -> bool:
        return self.done

    def wait(self) -> None:
        """Let time pass until it happened; raises what the work raised."""
        if not self.done:
            self._device.wait_for(self)
        if self.error is not None:
            raise self.error

    def order(self, stream: Any = None, needed: bool = True) -> None:
        """As `device.Event.order`: where its result is `needed`, its failure rises here."""
        if not self.done:
            self._device.wait_for(self)
        if needed and self.error is not None:
            raise self.error


class Job:
    __slots__ = ("after", "cost", "event", "fn", "lane", "number", "pending", "start", "stream", "what", "worker")

    def __init__(self, stream: ClockStream, fn: Callable[[], Any], after: tuple[Any, ...], lane: Lane, cost: float,
                 what: Key | None):  # fmt: skip
        self.stream, self.fn, self.after, self.lane, self.cost, self.what = stream, fn, after, lane, cost, what
        self.event = Moment(stream.device, self)
        self.pending = 0  # of the events it waits for
        self.number = 0  # in the order of its lane
        self.worker = 0
        self.start: float | None = None


class ClockStream:
    """`device.WorkerStream` in virtual time; a job's `cost` is its seconds."""

    def __init__(self, device: Clock, name: str, workers: int = 1, in_order: bool = False, submit_s: float = 0.0):
        self.device, self.name, self._submit_s = device, name, submit_s
        self.workers, self._in_order = workers, in_order
        self._waiting: deque[Job] = deque()  # of a stream in order
        self._ready: tuple[list[tuple[int, Job]], ...] = ([], [])  # by lane, those that can start: heaps
        self._given = 0  # numbers
        self._active = 0
        self._away = 0  # workers that neither work nor sleep (`road.Road`)
        self._idle = list(range(workers))[::-1]
        self._numbered = workers > 1
        self._timeline: Timeline | None = None
        self._busy_since = self._busy_s = 0.0
        self.cost_done: float = 0

    @property
    def busy(self) -> bool:
        return self._active > 0

    @property
    def busy_s(self) -> float:
        """Seconds with at least one job running."""
        return self._busy_s + (self.device.time - self._busy_since if self._active else 0.0)

    def submit(
        self,
        fn: Callable[[], Any],
        after: Iterable[Any] = (),
        behind: Iterable[Any] = (),
        lane: Lane = Lane.DEMAND,
        cost: float = 0,
        what: Key | None = None,
    ) -> Moment:
        """Queue `fn` in its lane; it starts once all of `after` succeeded and all of `behind` are over."""
        job = Job(self, fn, tuple(after), lane, cost, what)
        for event in (*job.after, *behind):
            if not event.done:
                event.waiters.append(job)
                job.pending += 1
        if self._in_order:
            self._waiting.append(job)
        else:
            self._number(job)
        self.start()
        self.device.owed_s += self._submit_s
        return job.event

    def cancel(self, event: Any) -> bool:
        """Take a job that nobody started out of the AHEAD queue; False where it is too late."""
        if not self.queued(event):
            return False
        event.job.number = -1
        self._over(event)
        return True

    def queued(self, event: Any) -> bool:
        """Whether the event is that of a guess which nobody began."""
        job = getattr(event, "job", None)
        return job is not None and job.lane is Lane.AHEAD and job.start is None and not event.done

    def promote(self, event: Any) -> None:
        """A guess turned out to be needed: move its job, if still queued, to the DEMAND lane."""
        if event.why.said == GUESS and not event.done:
            event.why.said = IN_FLIGHT
        if self.queued(event):
            event.job.lane = Lane.DEMAND
            self._number(event.job)

    def withdraw(self, event: Any) -> None:
        """In a replay: the copy was never made, whatever this clock made of it. Takes back its bytes, not its time."""
        if self.cancel(event):
            return
        if event.done:
            self.cost_done -= event.cost
        else:
            event.job.cost = 0

    def record(self, timeline: Timeline | None) -> None:
        """Note jobs that end from now on in `timeline`."""
        self._timeline = timeline

    def close(self) -> None: ...

    def start(self) -> None:
        """Begin what can begin now."""
        while self._active + self._away < self.workers and (job := self._next()) is not None:
            if self._active == 0:
                self._busy_since = self.device.time
            self._active += 1
            job.start, job.worker = self.device.time, self._idle.pop()
            self._begin(job)

    def _next(self) -> Job | None:
        if self._in_order:
            return self._waiting.popleft() if self._waiting and self._waiting[0].pending == 0 else None
        for heap in self._ready:
            while heap:
                number, job = heappop(heap)
                if number == job.number:  # else it was cancelled or promoted since
                    return job
        return None

    def _number(self, job: Job) -> None:
        """Put a job last in its lane."""
        self._given += 1
        job.number = self._given
        if job.pending == 0:
            self.can_start(job)

    def can_start(self, job: Job) -> None:
        """It waits for nothing any more."""
        if not self._in_order and job.number > 0:
            heappush(self._ready[job.lane], (job.number, job))

    def _begin(self, job: Job) -> None:
        """Say when it will be over."""
        self.device.at(self.device.time + job.cost, self.finish, job)

    def finish(self, job: Job) -> None:
        """The job is over now: do what it does, and let others begin."""
        try:
            for event in job.after:
                if event.error is not None:
                    raise event.error
            job.fn()
        except BaseException as raised:  # handed to whoever waits for the event
            job.event.error = raised
        self._active -= 1
        self._idle.append(job.worker)
        if self._timeline is not None:
            self._add(self._timeline, job)
        self.cost_done += job.cost
        if self._active == 0:
            self._busy_s += self.device.time - self._busy_since
        self._over(job.event)

    def _add(self, timeline: Timeline, job: Job) -> None:
        assert job.start is not None, job.what
        layer, expert = job.what or (NONE, NONE)
        track, kind = place(self.name, job.lane, job.what)
        timeline.add(f"{track} {job.worker}" if self._numbered else track, kind, layer, expert, job.start, self.device.time,
                     job.event.why)  # fmt: skip

    def _over(self, event: Moment) -> None:
        waiters, event.waiters, event.job, event.done = event.waiters, None, None, True
        streams = [self]
        for job in waiters or ():
            job.pending -= 1
            if job.pending == 0:
                job.stream.can_start(job)
                if job.stream not in streams:
                    streams.append(job.stream)
        for stream in streams:
            stream.start()
