"""Several generations over one model at once. Each is a coroutine with keys and values of its own, and all meet at every MoE
layer, whose experts are brought once for all of them. Knows passes and layers; knows nothing of requests, text or sampling.

    job a   attention --.            .-- attention --.            .-- head, next token, attention --.
    job b   attention --+- experts --+-- attention --+- experts --+-- head, next token, attention --+- experts ...
    job c (a prompt)  --'   layer 0  '--           --'   layer 1  '--   (joins and leaves between passes)   layer 0

A round is one pass of every job. What a job computes between two meetings it computes alone, as if nobody else were there,
and an expert's rows do not depend on their neighbours: so an answer is the same whoever else is served (where kernels are
exact by row; see docs/structure.md). Any model that runs alone runs so, whatever its cache of keys and values is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import greenlet
import torch

from duoserve.core import Phase, Step
from duoserve.moe import Arrival, Cancelled, Runtime


class Job:
    """One generation: `work` runs on the thread that calls `round`, `over` is told its result or what it raised."""

    def __init__(self, work: Callable[[], Any], over: Callable[[Any, BaseException | None], None]):
        self.work, self.over = work, over
        self.cancelled = False
        self.coroutine: greenlet.greenlet | None = None
        self.arrival: Arrival | None = None
        self.step: Step | None = None
        self.read = 0.0  # rows that have come through the model, of the running pass by its layers
        self.before = 0.0  # rows of the passes before

    @property
    def started(self) -> bool:
        return self.coroutine is not None

    def cancel(self) -> None:
        """May be called on any thread: it ends before the next layer, and raises `Cancelled` inside."""
        self.cancelled = True


class Together:
    """The jobs that share a model. All but `Job.cancel` belong to one thread, under `torch.inference_mode`."""

    def __init__(self, runtime: Runtime):
        self._runtime, self._layers = runtime, len(runtime.transfer.store.layers)
        self._hub = greenlet.getcurrent()
        self._running: Job | None = None
        self._new: list[Job] = []
        self.jobs: list[Job] = []
        self.rounds = 0
        self._entered: dict[int, torch.Tensor] = {}  # what entered the running layer, by job
        self._step: Step | None = None
        runtime.company = self

    def add(self, work: Callable[[], Any], over: Callable[[Any, BaseException | None], None]) -> Job:
        """A job that begins with the next round."""
        job = Job(work, over)
        self._new.append(job)
        self.jobs.append(job)
        return job

    def round(self) -> None:
        """One pass of every job, up to where the next one meets; jobs that end are told so and leave."""
        self._hub = greenlet.getcurrent()
        for job in self._drain():
            job.coroutine = greenlet.greenlet(job.work, self._hub)
            self._resume(job)
        self._drop_cancelled()
        if self._present():
            self.rounds += 1
            self._begin()
            for layer in range(self._layers):
                self._meet(layer)

    # Called inside jobs, by the runtime

    @property
    def inside(self) -> bool:
        """Whether a job is running, not the hub."""
        return self._running is not None

    def begin(self, step: Step) -> None:
        assert self._running is not None
        self._running.step = step
        self._running.before = self._running.read

    def enter(self, layer: int, x_TD: torch.Tensor) -> None:
        """The layer's attention is about to read this job's rows; once all have come so far, predictors may look.

        What enters the first layer is shown when the round begins: its jobs come one by one from the round before.
        """
        if self._runtime.wants("inputs"):
            self._entered[id(self._running)] = x_TD
            if self._step is not None:
                self._show(layer, [job for job in self.jobs if job.started])

    def meet(self, arrival: Arrival) -> torch.Tensor:
        """Wait for the others; y_TD of this job's rows."""
        job = self._running
        assert job is not None and job.step is not None, arrival.layer
        job.read = job.before + job.step.rows * arrival.layer / self._layers
        y_TD: torch.Tensor = self._hub.switch(arrival)
        return y_TD

    def finish(self) -> int:
        job = self._running
        assert job is not None and job.step is not None
        job.read = job.before + job.step.rows
        return job.step.rows

    # The hub's

    def _show(self, layer: int, jobs: list[Job]) -> None:
        if not all(id(job) in self._entered for job in jobs):
            return
        rows_TD = torch.cat([self._entered[id(job)] for job in jobs])
        self._entered.clear()
        running, self._running = self._running, None  # the runtime is called as the hub calls it
        try:
            self._runtime.enter(layer, rows_TD)
        finally:
            self._running = running

    def _present(self) -> list[Job]:
        return [job for job in self.jobs if job.arrival is not None]

    def _drain(self) -> list[Job]:
        new, self._new = self._new, []
        return new

    def _begin(self) -> None:
        present = self._present()
        self._step = merged(self._runtime.steps, [job.step for job in present if job.step is not None])
        self._runtime.begin(self._step)
        if self._runtime.wants("inputs"):
            self._show(0, present)
        self._entered.clear()

    def _meet(self, layer: int) -> None:
        """All who are present have come to this layer: run its experts, then let each go on to the next meeting."""
        self._drop_cancelled()
        present = self._present()
        if not present:
            return
        arrivals = [job.arrival for job in present if job.arrival is not None]
        assert all(a.layer == layer for a in arrivals), (layer, [a.layer for a in arrivals])
        x_TD, ids_TK, weights_TK = (
            torch.cat(list(parts)) for parts in zip(*((a.x_TD, a.ids_TK, a.weights_TK) for a in arrivals), strict=True)
        )
        try:
            y_TD = self._runtime.run(layer, arrivals[0].expert, x_TD, ids_TK, weights_TK)
        except Exception as error:
            for job in present:
                self._resume(job, error=error)
            return
        if layer == self._layers - 1:
            self._runtime.finish()
            self._step = None
        for job, y in zip(present, y_TD.split([a.x_TD.shape[0] for a in arrivals]), strict=True):
            self._resume(job, y)

    def _drop_cancelled(self) -> None:
        for job in self._present():
            if job.cancelled:
                self._resume(job, error=Cancelled())

    def _resume(self, job: Job, y_TD: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        assert job.coroutine is not None
        result, raised = None, None
        self._running, job.arrival = job, None
        try:
            if error is not None:
                result = job.coroutine.throw(error)
            else:
                result = job.coroutine.switch() if y_TD is None else job.coroutine.switch(y_TD)
        except BaseException as failure:  # whatever ended this job is for whoever waits for it
            raised = failure
        finally:
            self._running = None
        if raised is None and not job.coroutine.dead:
            job.arrival = result
            return
        self.jobs.remove(job)
        job.over(result, raised)


def merged(index: int, steps: list[Step]) -> Step:
    """One Step of several jobs' passes: a batch where each has one row, else rows without their tokens."""
    rows = sum(step.rows for step in steps)
    if any(step.phase is Phase.PREFILL for step in steps):
        return Step(index, Phase.PREFILL, rows)
    if any(step.rows != 1 for step in steps):
        return Step(index, Phase.DECODE, rows)
    ids, places = [s.ids_BS for s in steps], [s.positions_BS for s in steps]
    known_ids = [i for i in ids if i is not None]
    known_places = [p for p in places if p is not None]
    return Step(
        index,
        Phase.DECODE,
        rows,
        rows,
        torch.cat(known_ids) if len(known_ids) == rows else None,
        torch.cat(known_places) if len(known_places) == rows else None,
    )
