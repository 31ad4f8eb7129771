"""What work and copies cost on this machine, measured for a virtual one. Knows spans of recorded runs; knows no cells and no
verdicts.

    trunk, experts by rows      the model's thread, of the engine that is to be compared, on other passes than those compared
    sums, schedule              the same of an engine that holds all experts: `once` a layer
    submit_s                    what scheduling took more, for each copy
    begin_s, between_s          idle workers, a host that waits: from handing over to a copy's begin; from one to the next
    wake_s                      from a copy's end until whoever waited for it goes on
    rates, alone and together   so that all copies, with what each shared with others, come to their bytes
    spread                      what single copies took over what these rates say

Costs of decode are not means but samples, drawn evenly (`road.Spread`): where a guess lands just in time, how they scatter
decides.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.course import CHOICES, EXPERTS, LAYERS, Forced, foreseen
from duoserve.ahead import _likely
from duoserve.core import Key, Phase, Step
from duoserve.device import ThreadDevice, host_arena
from duoserve.road import Link, Spread
from duoserve.simulate import Pass
from duoserve.store import Store
from duoserve.timeline import (
    COMBINE,
    COMPUTE,
    COPY,
    EXPERT,
    HEAD,
    PASSES,
    QUICK,
    ROUTE,
    SCHEDULE,
    STALL,
    TRUNK,
    Span,
    Timeline,
)

READS = 64  # of an idle link's measurement
FEW = 20  # samples; fewer say nothing of how they scatter


class Watched(NamedTuple):
    """A recorded run."""

    passes: Sequence[Pass]
    spans: list[Span]
    seconds: list[float]  # of each pass


def watch(forced: Forced, passes: Sequence[Pass]) -> Watched:
    runtime, timeline = forced.engine.runtime, Timeline()
    runtime.record(timeline)
    seconds = forced.run(passes)
    runtime.record(None)
    return Watched(passes, timeline.spans(), seconds)


class Measured:
    """Costs of this machine, from runs of the engine that is compared and of one that holds all experts."""

    launch_s = 0.0

    def __init__(self, runs: Sequence[Watched], whole: Sequence[Watched], predict_s: float):
        self.predict_s = predict_s
        between: dict[tuple[int, Phase], list[float]] = defaultdict(list)
        rows_s: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            for one, own, took in _by_pass(run):
                for layer, seconds in _trunk(own, took).items():
                    between[layer, one.phase].append(seconds)
                for span in own:
                    if span.kind == EXPERT:
                        rows_s[one.chosen[span.layer][span.expert]].append(span.end - span.start)
        self._samples = between, rows_s
        self._rows = sorted(rows_s)
        self._once = _once(whole)
        self.again()

    def again(self) -> None:
        """Draw from the beginning."""
        between, rows_s = self._samples
        self._between = {at: _spread(samples) for at, samples in between.items()}
        self._expert = {rows: _spread(samples) for rows, samples in rows_s.items()}

    def trunk_s(self, layer: int, rows: int, phase: Phase) -> float:
        return self._between[layer, phase].draw()

    def expert_s(self, layer: int, rows: int) -> float:
        near = min(self._rows, key=lambda known: abs(known - rows))
        return self._expert[near].draw()

    def combine_s(self, layer: int, rows: int) -> float:
        return self._once[layer, Phase.DECODE if rows == 1 else Phase.PREFILL]


def _spread(samples: list[float]) -> Spread:
    """The mean, where there are few: a prompt's."""
    return Spread(tuple(samples) if len(samples) >= FEW else (statistics.mean(samples),))


class Machine(NamedTuple):
    """What a cell is simulated with."""

    link: Link
    costs: Measured


class Idle(NamedTuple):
    """A link with nothing else to do: seconds of a single copy, bytes/s of many, and what workers take around them."""

    single_s: float
    bytes_per_s: float
    begin_s: float
    between_s: float


def machine(store: Store, rate: int | None, runs: Sequence[Watched], whole: Sequence[Watched]) -> Machine:
    """Of what was watched. `rate`: bytes/s that copies are slowed to, None where they are not."""
    costs, idle, slab = Measured(runs, whole, ranking_s(runs[0].passes)), idle_link(store, rate), store.slab_bytes
    beside = {"submit_s": submit_s(runs, costs), "wake_s": wake_s(runs)}
    beside |= {"begin_s": idle.begin_s, "between_s": idle.between_s}
    if rate is not None:
        return Machine(Link(rate, late_s(runs, slab / rate), **beside), costs)
    copies = [copy for run in runs for copy in _shared(run)]
    alone, together = _rates(copies, slab, idle)
    work = [(c.alone_s * alone + c.shared_s * together / 2) / slab for c in copies]
    spread = tuple(w / statistics.mean(work) for w in work) if len(work) >= FEW else ()
    return Machine(Link(together, alone=alone, spread=spread, **beside), costs)


def late_s(runs: Sequence[Watched], copy_s: float) -> float:
    """By how much copies that are slowed to `copy_s` one after the other end later than that: mean."""
    late = []
    for run in runs:
        free = 0.0
        for copy in sorted((span for span in run.spans if span.kind == COPY), key=lambda span: span.start):
            free = max(free, copy.start) + copy_s
            late.append(copy.end - free)
    return max(0.0, statistics.mean(late)) if late else 0.0


class Copy(NamedTuple):
    """How long a copy had the link alone, and how long it shared it."""

    alone_s: float
    shared_s: float


def _shared(run: Watched) -> Iterator[Copy]:
    copies = sorted((span for span in run.spans if span.kind == COPY), key=lambda span: span.start)
    for n, copy in enumerate(copies):
        others = (o for o in copies[max(0, n - 4) : n + 5] if o is not copy)
        shared = sum(max(0.0, min(copy.end, o.end) - max(copy.start, o.start)) for o in others)
        yield Copy(copy.end - copy.start - shared, shared)


def _rates(copies: Sequence[Copy], slab: int, idle: Idle) -> tuple[float, float]:
    """Bytes/s of one copy alone and of two together, so that those mostly alone and those mostly not both come to their
    bytes. Where there are few of a kind, what the idle link does."""
    kinds = [[c for c in copies if (c.alone_s > c.shared_s) is alone] for alone in (True, False)]
    sums = np.array([[sum(c.alone_s for c in kind), sum(c.shared_s for c in kind) / 2] for kind in kinds])
    n_bytes = np.array([slab * len(kind) for kind in kinds])
    if min(map(len, kinds)) >= FEW:
        alone, together = np.linalg.solve(sums, n_bytes)
        if together / 2 <= alone <= together:  # else these were too few
            return float(alone), float(together)
    if len(kinds[1]) >= FEW:
        together = float(n_bytes.sum() / sums.sum())
        return min(together, max(together / 2, slab / idle.single_s)), together
    alone = float(n_bytes[0] / sums[0, 0]) if len(kinds[0]) >= FEW else slab / idle.single_s
    return alone, max(alone, idle.bytes_per_s)


def _by_pass(run: Watched) -> Iterator[tuple[Pass, list[Span], float]]:
    """Each pass, what the model's thread did in it, and its seconds."""
    whole = [span for span in run.spans if span.lane == PASSES]
    own = [span for span in run.spans if span.lane == COMPUTE]
    starts = [span.start for span in own]
    for one, span, seconds in zip(run.passes, whole, run.seconds, strict=True):
        yield one, own[bisect(starts, span.start - 1e-9) : bisect(starts, span.end - 1e-9)], seconds


def _trunk(own: list[Span], took: float) -> dict[int, float]:
    """Seconds before each MoE layer and, under their number, behind the last, with what the pass takes outside."""
    found: dict[int, float] = defaultdict(float)
    for span in own:
        if span.kind in (TRUNK, HEAD, ROUTE):
            found[span.layer] += span.end - span.start
    found[LAYERS] += took - sum(span.end - span.start for span in own)
    return found


def _once(whole: Sequence[Watched]) -> dict[tuple[int, Phase], float]:
    """What a layer takes beside trunk and experts where nothing is missing."""
    found: dict[tuple[int, Phase], list[float]] = defaultdict(list)
    for run in whole:
        for one, own, _ in _by_pass(run):
            took: dict[int, float] = defaultdict(float)
            for span in own:
                if span.kind in (SCHEDULE, COMBINE):
                    took[span.layer] += span.end - span.start
            for layer, seconds in took.items():
                found[layer, one.phase].append(seconds)
    return {at: statistics.mean(samples) for at, samples in found.items()}


def submit_s(runs: Sequence[Watched], costs: Measured) -> float:
    """What each copy costs the model's thread: all that scheduling, sums and guesses take beyond `once`."""
    took, copies = 0.0, 0
    for run in runs:
        kinds: dict[str, float] = defaultdict(float)
        for span in run.spans:
            kinds[span.kind if span.lane == COMPUTE else span.lane] += span.end - span.start
        ranked = sum(span.lane == QUICK for span in run.spans)
        took += kinds[SCHEDULE] + kinds[COMBINE] + kinds[QUICK] - ranked * costs.predict_s
        took -= sum(costs.combine_s(layer, one.rows) for one in run.passes for layer in range(LAYERS))
        copies += sum(span.kind == COPY for span in run.spans)
    return max(0.0, took / max(copies, 1))


def wake_s(runs: Sequence[Watched]) -> float:
    """From the end of a copy until whoever waited for it goes on."""
    late = []
    for run in runs:
        ends: dict[tuple[int, int], list[float]] = {}
        for copy in (span for span in run.spans if span.kind == COPY):
            ends.setdefault((copy.layer, copy.expert), []).append(copy.end)
        for stall in (span for span in run.spans if span.kind == STALL and span.lane == COMPUTE):
            late += [stall.end - e for e in ends.get((stall.layer, stall.expert), ()) if stall.start < e <= stall.end]
    return statistics.mean(late) if late else 0.0


def ranking_s(passes: Sequence[Pass]) -> float:
    predictor, took = foreseen(passes), []
    number = next(n for n, one in enumerate(passes) if one.rows == 1)
    step = Step(number, Phase.DECODE, 1)
    for _ in range(200):
        began = time.perf_counter()
        _likely(predictor.rank(step, 1), CHOICES)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def idle_link(store: Store, rate: int | None) -> Idle:
    """Single copies that somebody waits for, then many at once."""
    device = ThreadDevice(link=rate)
    slabs = [host_arena(store.slab_bytes).zero_() for _ in range(4)]
    rng = random.Random(0)
    spans: list[tuple[int, float, float]] = []  # worker, begin, end

    def read(n: int) -> Any:
        key = Key(rng.randrange(LAYERS), rng.randrange(EXPERTS))

        def work() -> None:
            began = time.perf_counter()
            store.read_into(key, slabs[n % 4])
            spans.append((threading.get_ident(), began, time.perf_counter()))

        return device.copy.submit(work, cost=store.slab_bytes)

    single, begin = [], []
    for n in range(READS):
        began = time.perf_counter()
        read(n).wait()
        single.append(time.perf_counter() - began)
        begin.append(spans[-1][1] - began)
    spans.clear()
    began = time.perf_counter()
    for event in [read(n) for n in range(READS)]:
        event.wait()
    together = READS * store.slab_bytes / (time.perf_counter() - began)
    device.close()
    return Idle(statistics.median(single), together, statistics.mean(begin), _between(spans) if rate is None else 0.0)


def _between(spans: list[tuple[int, float, float]]) -> float:
    """From the end of a worker's read to the begin of its next: mean."""
    ends: dict[int, float] = {}
    gaps = []
    for worker, began, ended in sorted(spans, key=lambda span: span[1]):
        if worker in ends:
            gaps.append(began - ends[worker])
        ends[worker] = ended
    return statistics.mean(gaps)
