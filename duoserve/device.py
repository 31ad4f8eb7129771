"""The machine, and the only file that names CUDA, pinned memory, streams or threads.

A device has a compute stream, a copy stream, arenas of memory, and one way to wait for its data (`read`). Work is handed
over as `stream.submit(fn, after=events, behind=events, lane=..., cost=...) -> Event`. How long compute waited for what is
counted always (`device.thread.stalls`), all that happens only while somebody records. Knows nothing of experts or files.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from duoserve.core import Key, Lane, Refusal
from duoserve.system import available_ram
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
)  # fmt: skip

PAGE = 4096  # direct reads want addresses, offsets and lengths in multiples of this
PIN_CHUNK = 256 << 20  # bytes registered per call: one failing call must not cost the whole pool
SETTLING_S = 0.01  # between two looks whether a stream has nothing to do
REMEMBERED = 32  # jobs of a lane that were done last
_COMPUTED = Why(COMPUTE)


class Event:
    """Something that will have happened, and why it was begun. On a GPU: `issued` by the host, later done on the device."""

    __slots__ = ("_issued", "_mark", "error", "why")

    def __init__(self, why: Why = _COMPUTED) -> None:
        self.why = why
        self._issued = threading.Event()
        self._mark: torch.cuda.Event | None = None
        self.error: BaseException | None = None

    def set(self, mark: torch.cuda.Event | None = None, error: BaseException | None = None) -> None:
        self._mark, self.error = mark, error
        self._issued.set()

    @property
    def issued(self) -> bool:
        return self._issued.is_set()

    @property
    def done(self) -> bool:
        return self._issued.is_set() and (self._mark is None or self._mark.query())

    def wait(self) -> None:
        """Block this host thread until it happened; raises what the work raised."""
        self._issued.wait()
        if self.error is not None:
            raise self.error
        if self._mark is not None:
            self._mark.synchronize()

    def order(self, stream: torch.cuda.Stream | None, needed: bool = True) -> None:
        """Make later work wait: on `stream` for device marks, on this thread for anything the host does.

        Where its result is `needed`, its failure rises here; else it only has to be over.
        """
        self._issued.wait()
        if self.error is not None:
            if needed:
                raise self.error
            return
        if self._mark is not None:
            stream.wait_event(self._mark) if stream is not None else self._mark.synchronize()


def _happened() -> Event:
    event = Event()
    event.set()
    return event


DONE = _happened()  # what holds before anything was submitted


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
        return _marked(stream)

    def _followed(self, fn: Callable[[], Any], what: Key | None) -> None:
        layer, expert = what or (self._thread.layer, NONE)
        self._thread.turn(EXPERT if what is not None else COMBINE, layer, expert)
        fn()
        self._thread.turn(SCHEDULE, layer)

    def close(self) -> None: ...


def _marked(stream: torch.cuda.Stream | None) -> Event:
    """Happens once all that `stream` was given so far is done; without one, that is now."""
    if stream is None:
        return DONE
    event = Event()
    event.set(mark=stream.record_event())
    return event


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


def host_arena(n_bytes: int) -> torch.Tensor:
    """Page-aligned host memory as a flat uint8 tensor, taken once and untouched until used."""
    if n_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no large pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class ThreadDevice:
    """The CPU as a device: slots are a bounded arena in RAM, copies are direct reads by worker threads.

    Compute runs on the calling thread. `threaded_compute` gives it a worker of its own and `host_tier` puts host slabs
    between disk and slots, as on a GPU: so that both edges and all three tiers are tested without one. `link` slows copies
    to so many bytes per second, one at a time: for experiments on what a slower link would do.
    """

    name = "cpu"
    torch_device = torch.device("cpu")

    def __init__(
        self, copy_threads: int = 2, threaded_compute: bool = False, host_tier: bool = False, link: int | None = None
    ):
        board = threading.Condition() if threaded_compute or host_tier else None
        self.thread = ModelThread(time.perf_counter)
        self.compute: InlineStream | WorkerStream = InlineStream(self.thread)
        if threaded_compute:
            self.compute = WorkerStream("compute", in_order=True, board=board, stalls=self.thread.stalls)
        self.copy = WorkerStream("copy", copy_threads, board=board, rate=link)
        self.disk = WorkerStream("disk", copy_threads, board=board) if host_tier else None
        self.predict = WorkerStream("predict")

    def now(self) -> float:
        """Seconds on the clock that this device's work takes its time from."""
        return time.perf_counter()

    def arena(self, n_bytes: int) -> torch.Tensor:
        return host_arena(n_bytes)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's values on the host: the only way to wait for device data."""
        return tensor

    def mark(self) -> Event:
        """Happens once all that this thread computed so far is done."""
        return DONE

    def join(self, event: Event) -> None:
        """What this thread computes next follows `event`."""
        event.wait()

    def free_bytes(self) -> int:
        return available_ram()

    def pin(self, memory: torch.Tensor) -> int:
        """Nothing to register: copies between host memory need none."""
        return 0

    def record(self, timeline: Timeline | None) -> None:
        """Note what happens from now on in `timeline`, or in none."""
        inline = isinstance(self.compute, InlineStream)
        self.thread.record(timeline, COMPUTE if inline else MODEL)
        for stream in (self.predict, self.copy, self.disk, None if inline else self.compute):
            if isinstance(stream, WorkerStream):
                stream.record(timeline)

    def close(self) -> None:
        for stream in (self.predict, self.copy, self.disk, self.compute):
            if stream is not None:
                stream.close()


class CudaDevice:
    """One NVIDIA GPU: slots in device memory, slabs copied from registered host memory on a stream of their own."""

    name = "cuda"

    def __init__(self, copy_threads: int = 2):
        if not torch.cuda.is_available():
            raise Refusal("E_DEVICE", "no CUDA GPU can be used here (0 found)", "run with --device cpu", 7)
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.thread = ModelThread(time.perf_counter)
        self.compute = InlineStream(self.thread, cuda=True)
        board = threading.Condition()
        self.copy = WorkerStream("copy", copy_threads, cuda=True, board=board)
        self.disk: WorkerStream | None = WorkerStream("disk", copy_threads, board=board)
        self.predict = WorkerStream("predict", cuda=True)
        self._warned = False

    def now(self) -> float:
        return time.perf_counter()

    def arena(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.torch_device)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu")

    def mark(self) -> Event:
        return _marked(torch.cuda.current_stream())

    def join(self, event: Event) -> None:
        event.order(torch.cuda.current_stream())

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def pin(self, memory: torch.Tensor) -> int:
        """Register filled host memory for direct copies, in chunks; returns the bytes that could be registered."""
        pinned = 0
        for start in range(0, memory.numel(), PIN_CHUNK):
            chunk = memory[start : start + PIN_CHUNK]
            if not _register(chunk.data_ptr(), chunk.numel()):
                self._warn_pageable(pinned, memory.numel())
                break
            pinned += chunk.numel()
        return pinned

    def record(self, timeline: Timeline | None) -> None:
        """Note what the host does from now on in `timeline`, or in none; what the GPU does in between is not seen."""
        self.thread.record(timeline, COMPUTE)
        for stream in (self.predict, self.copy, self.disk):
            if stream is not None:
                stream.record(timeline)

    def close(self) -> None:
        for stream in (self.predict, self.copy, self.disk):
            if stream is not None:
                stream.close()

    def _warn_pageable(self, pinned: int, total: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"only {pinned >> 20} of {total >> 20} MiB of host slabs could be pinned; the rest is copied slower",
                stacklevel=3,
            )


def _register(address: int, n_bytes: int) -> bool:
    try:
        from cuda.bindings import runtime  # type: ignore[import-not-found]
    except ImportError:
        return int(torch.cuda.cudart().cudaHostRegister(address, n_bytes, 0)) == 0
    (status,) = runtime.cudaHostRegister(address, n_bytes, 0)
    return int(status) == 0


Device = ThreadDevice | CudaDevice


def open_device(name: str, link: int | None = None) -> Device:
    """`auto` takes the GPU where there is one. `link` as `ThreadDevice`."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return CudaDevice()
    return ThreadDevice(link=link)


def in_background(fn: Callable[[], Any], name: str) -> Callable[[], None]:
    """Run `fn` on a thread of its own; returns what waits for its end."""
    thread = threading.Thread(target=fn, name=f"duoserve-{name}", daemon=True)
    thread.start()
    return thread.join


def gpus() -> list[tuple[str, int, int]]:
    """Name, bytes free and bytes in all of each GPU that torch can use."""
    found = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found.append((torch.cuda.get_device_name(i), free, total))
    return found
