"""A machine in virtual time: the same streams, lanes and events as `device.py`, and no thread, byte or second of its own.
Knows seconds and bytes per second; knows nothing of experts, files or models.

The host has a clock. Whatever takes host time (`spend`, inline compute, waiting) moves it, and on the way everything that
the streams do until then happens, in order of time. Between two such moves nothing happens: whoever holds a lock and does
not wait sees the world stand still, as behind a lock of threads.

    host     | trunk ........ | submit, submit | expert ... | wait .......... |
    copy     [ guess ....................][ demand ...........................]    a demand goes before guesses nobody began
    predict  [ rank ]-> guess

A job starts once what it waits for is over and a worker is free; of a lane the first that can, of lanes `DEMAND` before
`AHEAD`, as `WorkerStream` has it (the tests compare the two). What a copy takes is the link's affair, what other work takes
is its `cost` in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from duoserve.core import Key, Lane
from duoserve.device import DONE, Event
from duoserve.timeline import (
    COMBINE,
    COMPUTE,
    DEMAND,
    EXPERT,
    GUESS,
    IN_FLIGHT,
    MODEL,
    NONE,
    SCHEDULE,
    ModelThread,
    Timeline,
    Why,
    place,
)  # fmt: skip


@dataclass(frozen=True)
class Link:
    """How slabs travel. `workers` copies can be under way at once; others can still be overtaken or withdrawn.

    Without `alone` the wire takes them one after the other, and `latency_s` is what a copy takes beside the wire. With it
    they share: one copy gets `alone`, several `bytes_per_s` together (a disk), each after its latency.

    What copies cost whoever computes on the host: `submit_s` to hand one over, and, while any is under way, `company` times
    the time (memory and cores are shared).
    """

    bytes_per_s: float
    latency_s: float = 0.0
    workers: int = 2
    alone: float | None = None
    submit_s: float = 0.0
    company: float = 1.0


class Moment:
    """Something that will have happened on a virtual machine: `device.Event` without threads."""

    __slots__ = ("_device", "cost", "done", "error", "job", "waiters", "why")

    def __init__(self, device: ClockDevice, job: _Job):
        self._device, self.cost = device, job.cost
        self.job: _Job | None = job  # until it is over
        self.done = False
        self.why = Why(GUESS if job.lane is Lane.AHEAD else DEMAND)
        self.error: BaseException | None = None
        self.waiters: list[_Job] | None = []

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


class _Job:
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

    def __init__(self, device: ClockDevice, name: str, workers: int = 1, in_order: bool = False, submit_s: float = 0.0):
        self.device, self.name, self._submit_s = device, name, submit_s
        self._workers, self._in_order = workers, in_order
        self._waiting: deque[_Job] = deque()  # of a stream in order
        self._ready: tuple[list[tuple[int, _Job]], ...] = ([], [])  # by lane, those that can start: heaps
        self._given = 0  # numbers
        self._active = 0
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
        job = _Job(self, fn, tuple(after), lane, cost, what)
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
        while self._active < self._workers and (job := self._next()) is not None:
            if self._active == 0:
                self._busy_since = self.device.time
            self._active += 1
            job.start, job.worker = self.device.time, self._idle.pop()
            self._begin(job)

    def _next(self) -> _Job | None:
        if self._in_order:
            return self._waiting.popleft() if self._waiting and self._waiting[0].pending == 0 else None
        for heap in self._ready:
            while heap:
                number, job = heappop(heap)
                if number == job.number:  # else it was cancelled or promoted since
                    return job
        return None

    def _number(self, job: _Job) -> None:
        """Put a job last in its lane."""
        self._given += 1
        job.number = self._given
        if job.pending == 0:
            self.can_start(job)

    def can_start(self, job: _Job) -> None:
        """It waits for nothing any more."""
        if not self._in_order and job.number > 0:
            heappush(self._ready[job.lane], (job.number, job))

    def _begin(self, job: _Job) -> None:
        """Say when it will be over."""
        self.device.at(self.device.time + job.cost, self.finish, job)

    def finish(self, job: _Job) -> None:
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

    def _add(self, timeline: Timeline, job: _Job) -> None:
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


class Wire(ClockStream):
    """Copies one after the other; the latency of one overlaps the next."""

    def __init__(self, device: ClockDevice, name: str, link: Link):
        super().__init__(device, name, link.workers, submit_s=link.submit_s)
        self._link, self._free_at = link, 0.0

    def _begin(self, job: _Job) -> None:
        self._free_at = max(self._free_at, self.device.time) + job.cost / self._link.bytes_per_s
        self.device.at(self._free_at + self._link.latency_s, self.finish, job)


class Shared(ClockStream):
    """Copies that share a rate, each after its latency; a disk."""

    def __init__(self, device: ClockDevice, name: str, link: Link):
        super().__init__(device, name, link.workers, submit_s=link.submit_s)
        assert link.alone is not None, link
        self._latency_s, self._rates = link.latency_s, (link.alone, link.bytes_per_s)
        self._left: dict[_Job, float] = {}  # bytes of those that are past their latency
        self._since = 0.0  # when `_left` was true
        self._turn = 0  # which of the ends foreseen is still foreseen

    def _begin(self, job: _Job) -> None:
        self.device.at(self.device.time + self._latency_s, self._join, job)

    def _join(self, job: _Job) -> None:
        self._progress()
        self._left[job] = job.cost
        self._foresee()

    def _rate(self) -> float:
        """Bytes/s of each."""
        return self._rates[0] if len(self._left) == 1 else self._rates[1] / len(self._left)

    def _progress(self) -> None:
        seconds, self._since = self.device.time - self._since, self.device.time
        if self._left:
            moved = seconds * self._rate()
            self._left = {job: left - moved for job, left in self._left.items()}

    def _foresee(self) -> None:
        self._turn += 1
        if self._left:
            turn, job = self._turn, min(self._left, key=lambda j: self._left[j])
            at = self.device.time + max(0.0, self._left[job]) / self._rate()
            self.device.at(at, self._end, job, turn)

    def _end(self, job: _Job, turn: int) -> None:
        if turn != self._turn:
            return  # others began or ended since, and it was foreseen anew
        self._progress()
        del self._left[job]
        self._foresee()
        self.finish(job)


class Thinking(ClockStream):
    """The predictor's stream: its work runs while it takes time (`ClockDevice.spend`), and acts once that has passed."""

    def _begin(self, job: _Job) -> None:
        thought = greenlet(lambda: self.finish(job), parent=self.device.host)
        self.device.at(self.device.time, thought.switch)


class Inline:
    """Compute on the host's own time, in order; a job's `cost` is its seconds."""

    def __init__(self, device: ClockDevice):
        self._device = device
        self.busy_s = 0.0

    def submit(
        self,
        fn: Callable[[], Any],
        after: Iterable[Any] = (),
        behind: Iterable[Any] = (),
        lane: Lane = Lane.DEMAND,
        cost: float = 0,
        what: Key | None = None,
    ) -> Event:
        for event in behind:
            if not event.done:
                event.order(needed=False)
        for event in after:
            if not event.done:
                self._device.thread.wait(event.order, event.why.stall, what)
            elif event.error is not None:
                raise event.error
        fn()
        self.busy_s += cost
        if self._device.thread.timeline is None:
            self._device.spend(cost)
        else:
            self._followed(cost, what)
        return DONE

    def _followed(self, cost: float, what: Key | None) -> None:
        thread = self._device.thread
        layer, expert = what or (thread.layer, NONE)
        thread.turn(EXPERT if what is not None else COMBINE, layer, expert)
        self._device.spend(cost)
        thread.turn(SCHEDULE, layer)

    def close(self) -> None: ...


class Queued(ClockStream):
    """Compute as a stream of its own, in order; handing over a job takes the host `launch_s`."""

    def __init__(self, device: ClockDevice, launch_s: float):
        super().__init__(device, "compute", in_order=True, submit_s=launch_s)
        self.last: Moment | Event = DONE

    def submit(self, *args: Any, **named: Any) -> Moment:
        event = super().submit(*args, **named)
        self.last = event
        self.device.spend(0.0)
        return event


class ClockDevice:
    """Streams in virtual time. `asynchronous`: compute is a stream of its own, as on a GPU; else the host's own work.

    `link` is the way to the slots, `disk` the one into host memory, where there is a host tier between.
    """

    torch_device = torch.device("cpu")

    def __init__(self, link: Link, disk: Link | None = None, asynchronous: bool = False, launch_s: float = 0.0):
        self.name = "clock" if asynchronous else "cpu"
        self.time = 0.0  # the host's, and what the streams have come to
        self._ends: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._numbered = 0
        self.thread = ModelThread(self.now)
        self.host = getcurrent()
        self.owed_s = 0.0  # host time for what was handed over; paid when the host next lets time pass, behind no lock
        self._company = link.company
        self.compute: Inline | Queued = Queued(self, launch_s) if asynchronous else Inline(self)
        self.copy = _road(self, "copy", link)
        self.disk = _road(self, "disk", disk) if disk is not None else None
        self.predict = Thinking(self, "predict")

    def now(self) -> float:
        return self.time

    def spend(self, seconds: float) -> None:
        """The host, or whoever thinks on the predictor's stream, takes so long."""
        thinking = getcurrent()
        if thinking is self.host:
            seconds, self.owed_s = seconds + self.owed_s, 0.0
            self._pass(seconds)
        else:
            self.at(self.time + seconds, thinking.switch)
            self.host.switch()

    def wait_for(self, event: Moment) -> None:
        """The host waits."""
        assert getcurrent() is self.host, "whoever guesses never waits"
        if self.owed_s:
            self.spend(0.0)
        while not event.done:
            assert self._ends, "nothing that runs leads to the event"
            self._step()

    def at(self, time: float, fn: Callable[..., Any], *args: Any) -> None:
        """Call `fn` at `time`; of equal times in the order of asking."""
        self._numbered += 1
        heappush(self._ends, (time, self._numbered, fn, args))

    def arena(self, n_bytes: int) -> torch.Tensor:
        """Memory without bytes; slices of it are empty."""
        return torch.empty(0, dtype=torch.uint8)

    def read(self, tensor: Any) -> Any:
        """The host waits for what was computed so far."""
        self.mark().wait()
        return tensor

    def mark(self) -> Any:
        return self.compute.last if isinstance(self.compute, Queued) else DONE

    def join(self, event: Any) -> None:
        """What is computed next follows `event`: it does, the stream is in order."""
        if not isinstance(self.compute, Queued):
            event.wait()

    def record(self, timeline: Timeline | None) -> None:
        """Note what happens from now on in `timeline`, or in none."""
        self.thread.record(timeline, MODEL if isinstance(self.compute, Queued) else COMPUTE)
        for stream in (self.predict, self.copy, self.disk, self.compute):
            if isinstance(stream, ClockStream):
                stream.record(timeline)

    def free_bytes(self) -> int:
        return 1 << 62

    def pin(self, memory: torch.Tensor) -> int:
        return int(memory.numel())

    def close(self) -> None: ...

    def _pass(self, seconds: float) -> None:
        """The host computes so long, and longer while copies are under way."""
        while True:
            slower = self._company if self.copy.busy else 1.0
            until = self.time + seconds * slower
            if not self._ends or self._ends[0][0] > until:
                break
            seconds -= max(0.0, self._ends[0][0] - self.time) / slower
            self._step()
        self.time = until

    def _step(self) -> None:
        time, _, fn, args = heappop(self._ends)
        self.time = max(self.time, time)
        fn(*args)


def _road(device: ClockDevice, name: str, link: Link) -> Wire | Shared:
    return Wire(device, name, link) if link.alone is None else Shared(device, name, link)
