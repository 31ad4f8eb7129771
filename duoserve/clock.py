"""A machine in virtual time: the same streams, lanes and events as `device/`, and no thread, byte or second of its own.
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

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from duoserve.clockstream import ClockStream, Job, Moment
from duoserve.core import Key, Lane
from duoserve.device import DONE, Event
from duoserve.road import Link, road
from duoserve.timeline import COMBINE, COMPUTE, EXPERT, MODEL, NONE, SCHEDULE, ModelThread, Timeline

__all__ = ["ClockDevice", "Link"]


class Thinking(ClockStream):
    """The predictor's stream: its work runs while it takes time (`ClockDevice.spend`), and acts once that has passed."""

    def __init__(self, device: ClockDevice):
        super().__init__(device, "predict")
        self._host = device.host

    def _begin(self, job: Job) -> None:
        thought = greenlet(lambda: self.finish(job), parent=self._host)
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
        self._host = device

    def submit(self, *args: Any, **named: Any) -> Moment:
        event = super().submit(*args, **named)
        self.last = event
        self._host.spend(0.0)
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
        self._stepping = False  # whether what happens just now is the streams' doing
        self._woken: list[tuple[float, Callable[[], Any]]] = []  # until the host lets go
        self._wake_s = link.wake_s
        self.compute: Inline | Queued = Queued(self, launch_s) if asynchronous else Inline(self)
        self.copy = road(self, "copy", link)
        self.disk = road(self, "disk", disk) if disk is not None else None
        self.predict = Thinking(self)

    def now(self) -> float:
        return self.time

    def spend(self, seconds: float) -> None:
        """The host, or whoever thinks on the predictor's stream, takes so long."""
        thinking = getcurrent()
        if thinking is self.host:
            self._pay()
            self._pass(seconds)
        else:
            self.at(self.time + seconds, thinking.switch)
            self.host.switch()

    def wait_for(self, event: Moment) -> None:
        """The host waits, and wakes."""
        assert getcurrent() is self.host, "whoever guesses never waits"
        self._pay()
        if event.done:
            return
        self.copy.pace(waiting=True)
        while not event.done:
            assert self._ends, "nothing that runs leads to the event"
            self._step()
        self.copy.pace(waiting=False)
        self._pass(self._wake_s)

    def at(self, time: float, fn: Callable[..., Any], *args: Any) -> None:
        """Call `fn` at `time`; of equal times in the order of asking."""
        self._numbered += 1
        heappush(self._ends, (time, self._numbered, fn, args))

    def wake(self, seconds: float, fn: Callable[[], Any]) -> None:
        """Call `fn` so long after somebody else can run: at once where the streams ask, else when the host, who holds the
        interpreter, next computes or waits."""
        if self._stepping:
            self.at(self.time + seconds, fn)
        else:
            self._woken.append((seconds, fn))

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

    def _pay(self) -> None:
        """What handing over took passes now; then those it woke come."""
        if self.owed_s:
            seconds, self.owed_s = self.owed_s, 0.0
            self._pass(seconds)
        if self._woken:
            woken, self._woken = self._woken, []
            at = self.time
            for seconds, fn in woken:  # one after the other: there is one interpreter
                at += seconds
                self.at(at, fn)

    def _pass(self, seconds: float) -> None:
        """So long nobody but the streams does anything."""
        until = self.time + seconds
        while self._ends and self._ends[0][0] <= until:
            self._step()
        self.time = until

    def _step(self) -> None:
        time, _, fn, args = heappop(self._ends)
        self.time = max(self.time, time)
        self._stepping = True
        fn(*args)
        self._stepping = False
