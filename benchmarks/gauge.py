"""What work and copies cost on this machine, measured for a virtual one. Knows spans of recorded runs; knows no cells and no
verdicts.

    trunk, experts by rows      the model's thread, of the engine that is to be compared, on other passes than those compared
    look                        the same, from the router's answer until the pool is asked: what scheduling does before
    ranking                     the same, of each layer that is guessed about
    sums, schedule              of an engine that holds all experts: `once` a layer
    submit_s                    what scheduling took more than all these, for each copy
    begin_s                     from the moment that the model's thread lets go of the interpreter to a copy's begin
    between_s                   idle workers, a host that waits: from one copy to the next
    wake_s                      from a copy's end until whoever waited for it goes on
    rates, alone and together   so that all copies, with what each shared with others, come to their bytes
    quicker                     while the model's thread waits
    spread                      what single copies took over what these rates say

Costs of decode and of copies are not means but samples, drawn in the order in which they were measured (`road.Drawn`):
where a guess lands just in time, how they scatter decides, and slow ones come together.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.course import CHOICES, EXPERTS, LAYERS, Forced, foreseen
from duoserve.ahead import _likely
from duoserve.core import Key, Phase, Step
from duoserve.decisions import Noting
from duoserve.device import ThreadDevice, host_arena
from duoserve.road import Drawn, Link
from duoserve.simulate import Pass
from duoserve.store import Store
from duoserve.timeline import (
    COMBINE,
    COMPUTE,
    COPY,
    EXPERT,
    HEAD,
    PASSES,
    PREDICTOR,
    QUICK,
    ROUTE,
    SCHEDULE,
    STALL,
    TRUNK,
    Span,
    Timeline,
)

READS = 64  # of an idle link's measurement
RANKED = "ranked"  # of stamps: a ranking came
BEFORE_RANKED = ("whole", "quick")  # and what is asked between that and the pool's answer
SPOILS = 32 << 20  # bytes that leave nothing else in a processor's cache
WORKERS = 2
MOST_QUICKER = 1.5  # two cores for two copies, instead of one and a half
FEW = 20  # samples; fewer say nothing of how they scatter


class Stamp(NamedTuple):
    """When a question to `Decisions` was asked."""

    at: float
    what: str


class Stamping(Noting):
    """Notes also when it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.stamps: list[Stamp] = []

    def said(self, what: str, found: bool) -> bool:
        self.stamps.append(Stamp(time.perf_counter(), what))
        return super().said(what, found)

    def ranked(self, number: int, experts: list[int]) -> list[int]:
        self.stamps.append(Stamp(time.perf_counter(), RANKED))
        return super().ranked(number, experts)


class Watched(NamedTuple):
    """A recorded run."""

    passes: Sequence[Pass]
    spans: list[Span]
    seconds: list[float]  # of each pass
    stamps: Sequence[Stamp] = ()


def watch(forced: Forced, passes: Sequence[Pass], stamping: Stamping | None = None) -> Watched:
    runtime, timeline = forced.engine.runtime, Timeline()
    before = len(stamping.stamps) if stamping is not None else 0
    runtime.record(timeline)
    seconds = forced.run(passes)
    runtime.record(None)
    return Watched(passes, timeline.spans(), seconds, stamping.stamps[before:] if stamping is not None else ())


class Samples:
    """What pieces of a pass took: trunk by layer and phase, experts by rows."""

    def __init__(self, runs: Sequence[Watched]):
        self.between: dict[tuple[int, Phase], list[float]] = defaultdict(list)
        self.expert: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            for one, own, took in _by_pass(run):
                for layer, seconds in _trunk(own, took).items():
                    self.between[layer, one.phase].append(seconds)
                for span in own:
                    if span.kind == EXPERT:
                        self.expert[one.chosen[span.layer][span.expert]].append(span.end - span.start)


class Measured:
    """Costs of this machine, from runs of the engine that is compared and of one that holds all experts. Those of decode are
    samples in the order in which they were measured, so that slow passes stay slow as a whole; a prompt's are means."""

    launch_s = 0.0

    def __init__(self, runs: Sequence[Watched], whole: Sequence[Watched], idle_ranking_s: float):
        self.predict_s = ranking_s(runs) or idle_ranking_s
        self.look_s = look_s(runs)
        self._runs, self._all = [Samples([run]) for run in runs], Samples(runs)
        self._rows = sorted(self._all.expert)
        self._once = _once(whole)
        self.near(range(len(runs)))

    def near(self, numbers: Sequence[int]) -> None:
        """Draw from the beginning of these runs on, those that were measured just before and after."""
        all_, runs = self._all, [self._runs[number] for number in numbers]
        self._between = {at: _drawn([r.between[at] for r in runs], every) for at, every in all_.between.items()}
        self._expert = {rows: _drawn([r.expert[rows] for r in runs], every) for rows, every in all_.expert.items()}

    def trunk_s(self, layer: int, rows: int, phase: Phase) -> float:
        return self._between[layer, phase].draw() + (self.look_s if layer < LAYERS else 0.0)

    def expert_s(self, layer: int, rows: int) -> float:
        near = min(self._rows, key=lambda known: abs(known - rows))
        return self._expert[near].draw()

    def combine_s(self, layer: int, rows: int) -> float:
        return max(0.0, self._once[layer, Phase.DECODE if rows == 1 else Phase.PREFILL] - self.look_s)


def _drawn(samples: Sequence[Sequence[float]], every: Sequence[float]) -> Drawn:
    """The mean of `every` one, where there are few."""
    few = tuple(chain.from_iterable(samples))
    return Drawn(few if len(few) >= FEW else (statistics.mean(every),))


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
    costs, idle, slab = Measured(runs, whole, idle_ranking_s(runs[0].passes)), idle_link(store, rate), store.slab_bytes
    beside = {"submit_s": submit_s(runs, costs), "wake_s": wake_s(runs)}
    beside |= {"begin_s": begin_s(runs) or idle.begin_s, "between_s": idle.between_s}
    if rate is not None:
        return Machine(Link(rate, late_s(runs, slab / rate), **beside), costs)
    beside |= {"quicker": (quicker := quicker_by(runs))}
    copies = [copy for run in runs for copy in _shared(run, quicker)]
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
    """How long a copy had the link alone, and how long it shared it; `waited`: of that, the share in which the model's
    thread waited. Seconds are those of a computing host."""

    alone_s: float
    shared_s: float
    waited: float = 0.0


def _shared(run: Watched, quicker: float = 1.0) -> Iterator[Copy]:
    copies = sorted((span for span in run.spans if span.kind == COPY), key=lambda span: span.start)
    stalls = [span for span in run.spans if span.lane == COMPUTE and span.kind == STALL and span.cause != PREDICTOR]
    starts = [stall.start for stall in stalls]
    for n, copy in enumerate(copies):
        others = (o for o in copies[max(0, n - 4) : n + 5] if o is not copy)
        shared = sum(_both_s(copy, other) for other in others)
        near = stalls[max(0, bisect(starts, copy.start) - 1) : bisect(starts, copy.end)]
        waited = sum(_both_s(copy, stall) for stall in near) / (copy.end - copy.start)
        longer = 1 + (quicker - 1) * waited
        yield Copy((copy.end - copy.start - shared) * longer, shared * longer, waited)


def _both_s(one: Span, other: Span) -> float:
    return max(0.0, min(one.end, other.end) - max(one.start, other.start))


def quicker_by(runs: Sequence[Watched]) -> float:
    """By which factor copies that share the link are quicker while the model's thread waits: so that those mostly then and
    those mostly not come to the same work. 1 where there are few of a kind."""
    copies = [copy for run in runs for copy in _shared(run) if copy.alone_s < copy.shared_s / 10]
    kinds = [[c for c in copies if (c.waited > 0.5) is waits] for waits in (False, True)]
    if min(map(len, kinds)) < FEW:
        return 1.0
    took = [[c.alone_s + c.shared_s for c in kind] for kind in kinds]
    waited = [
        [s * c.waited for s, c in zip(seconds, kind, strict=True)] for seconds, kind in zip(took, kinds, strict=True)
    ]
    sums = np.array([[sum(s) - sum(w), sum(w)] for s, w in zip(took, waited, strict=True)])
    computes, waits = np.linalg.solve(sums, [len(kind) for kind in kinds])
    return float(min(MOST_QUICKER, max(1.0, waits / computes)))


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
        took -= sum(costs.look_s + costs.combine_s(layer, one.rows) for one in run.passes for layer in range(LAYERS))
        copies += sum(span.kind == COPY for span in run.spans)
    return max(0.0, took / max(copies, 1))


def begin_s(runs: Sequence[Watched]) -> float:
    """From the moment that the model's thread lets others have the interpreter, which is when it computes or waits first
    after a router spoke, until the first of two sleeping workers has begun a copy: median; 0 where that was seen too seldom.
    """
    late = []
    for run in runs:
        copies = sorted((span for span in run.spans if span.kind == COPY), key=lambda span: span.start)
        starts = [copy.start for copy in copies]
        asked = None
        for span in (span for span in run.spans if span.lane == COMPUTE):
            if span.kind == ROUTE:
                asked = span.end
            elif asked is not None and (span.kind == EXPERT or (span.kind == STALL and span.cause != PREDICTOR)):
                n = bisect(starts, asked)
                asleep = all(copy.end < asked for copy in copies[max(0, n - WORKERS) : n])
                if asleep and n < len(copies) and starts[n] < span.end:
                    late.append(starts[n] - span.start)
                asked = None
    return max(0.0, statistics.median(late)) if len(late) >= FEW else 0.0


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


def look_s(runs: Sequence[Watched]) -> float:
    """From the router's answer until the pool is asked what it has: mean."""
    took = []
    for run in runs:
        asked = [stamp.at for stamp in run.stamps if stamp.what == "resident"]
        own = (span for span in run.spans if span.lane == COMPUTE and span.kind in (ROUTE, SCHEDULE))
        for route, first in pairwise(own):
            if route.kind == ROUTE and first.kind == SCHEDULE:
                at = bisect(asked, first.start)
                if at < len(asked) and asked[at] < first.end:  # else nothing of this layer was there
                    took.append(asked[at] - first.start)
    return statistics.mean(took) if took else 0.0


def ranking_s(runs: Sequence[Watched]) -> float:
    """One ranking on the model's thread, with what leads to it since the pool was asked: mean; 0 where there was none."""
    took = []
    for run in runs:
        last = 0.0  # when the pool was asked
        for stamp in run.stamps:
            if stamp.what == RANKED and last:
                took.append(stamp.at - last)
            if stamp.what not in BEFORE_RANKED:
                last = stamp.at if stamp.what == "resident" else 0.0
    return statistics.mean(took) if took else 0.0


def idle_ranking_s(passes: Sequence[Pass]) -> float:
    """The same where nothing else happens, but others' work took the processor's caches: median."""
    predictor, took = foreseen(passes), []
    number = next(n for n, one in enumerate(passes) if one.rows == 1)
    step = Step(number, Phase.DECODE, 1)
    others = torch.ones(SPOILS // 4)
    for _ in range(100):
        others.add_(1)
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
