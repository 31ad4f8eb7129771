"""How slabs travel on a virtual machine. Knows bytes, rates and what workers take between two copies; knows nothing of what
is copied or why.

    host     (submit_s) (submit_s) | computes ........... waits ........... (wake_s) goes on
    worker   sleeps (begin_s) copy .......... (between_s) copy ........... (between_s) sleeps

A worker takes a job when it is there, not when the job is handed over: until then another can overtake it, or it can be
withdrawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from duoserve.clockstream import Clock, ClockStream, Job


@dataclass(frozen=True)
class Link:
    """How slabs travel. `workers` copies can be under way at once; others can still be overtaken or withdrawn.

    Without `alone` the wire takes them one after the other, and `latency_s` is what a copy takes beside the wire. With it
    they share: one copy gets `alone`, several `bytes_per_s` together (a disk), each after its latency. `spread`: what
    single copies took, over their mean; copies take these in turn. Empty: all take the mean.

    `quicker`: by this factor where they share, while the host waits and leaves them its core.

    `submit_s` is the host's to hand one over; `begin_s`, `between_s` and `wake_s` are in the picture above.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    workers: int = 2
    alone: float | None = None
    submit_s: float = 0.0
    begin_s: float = 0.0
    between_s: float = 0.0
    wake_s: float = 0.0
    quicker: float = 1.0
    spread: tuple[float, ...] = ()


class Drawn:
    """Samples in their own order, again and again: what hangs together in time stays together. Deterministic."""

    def __init__(self, samples: tuple[float, ...]):
        assert samples
        self._samples, self._at = samples, -1

    def draw(self) -> float:
        self._at = (self._at + 1) % len(self._samples)
        return self._samples[self._at]


class Road(ClockStream):
    """Workers that copy; how long a copy takes is said below."""

    def __init__(self, device: Clock, name: str, link: Link):
        super().__init__(device, name, link.workers, submit_s=link.submit_s)
        self._link = link
        self._spread = Drawn(link.spread) if link.spread else None

    def start(self) -> None:
        """Who sleeps is woken, and takes what is first when it comes."""
        if not self._link.begin_s:
            super().start()
            return
        for _ in range(min(self.workers - self._active - self._away, sum(map(len, self._ready)))):
            self._away += 1
            self.device.wake(self._link.begin_s, self._arrive)

    def finish(self, job: Job) -> None:
        if self._link.between_s:
            self._away += 1
            self.device.at(self.device.time + self._link.between_s, self._arrive)
        super().finish(job)

    def pace(self, waiting: bool) -> None:
        """The host begins to wait, or no longer does."""

    def _arrive(self) -> None:
        """A worker is there for the next job, if there is one."""
        self._away -= 1
        super().start()

    def _work(self, job: Job) -> float:
        """Bytes that the copy is worth, on a road that takes as long for each byte."""
        return job.cost if self._spread is None else job.cost * self._spread.draw()


class Wire(Road):
    """Copies one after the other; the latency of one overlaps the next."""

    def __init__(self, device: Clock, name: str, link: Link):
        super().__init__(device, name, link)
        self._free_at = 0.0

    def _begin(self, job: Job) -> None:
        self._free_at = max(self._free_at, self.device.time) + self._work(job) / self._link.bytes_per_s
        self.device.at(self._free_at + self._link.latency_s, self.finish, job)


class Shared(Road):
    """Copies that share a rate, each after its latency; a disk."""

    def __init__(self, device: Clock, name: str, link: Link):
        super().__init__(device, name, link)
        assert link.alone is not None, link
        self._rates = (link.alone, link.bytes_per_s)
        self._left: dict[Job, float] = {}  # bytes of those that are past their latency
        self._since = 0.0  # when `_left` was true
        self._factor = 1.0  # of both
        self._turn = 0  # which of the ends foreseen is still foreseen

    def _begin(self, job: Job) -> None:
        self.device.at(self.device.time + self._link.latency_s, self._join, job)

    def _join(self, job: Job) -> None:
        self._progress()
        self._left[job] = self._work(job)
        self._foresee()

    def _rate(self) -> float:
        """Bytes/s of each."""
        return self._factor * (self._rates[0] if len(self._left) == 1 else self._rates[1] / len(self._left))

    def pace(self, waiting: bool) -> None:
        if self._link.quicker != 1.0:
            self._progress()
            self._factor = self._link.quicker if waiting else 1.0
            self._foresee()

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

    def _end(self, job: Job, turn: int) -> None:
        if turn != self._turn:
            return  # others began or ended since, and it was foreseen anew
        self._progress()
        del self._left[job]
        self._foresee()
        self.finish(job)


def road(device: Clock, name: str, link: Link) -> Road:
    return Wire(device, name, link) if link.alone is None else Shared(device, name, link)
