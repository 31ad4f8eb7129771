"""Does a plan hold? The walk and the exchange are real, between processes over Gloo; compute is sleep of the seconds that
the solver plans with. Prints what the solver says and what was measured, for naive DEP, PPPipe and FinDEP, as one JSON line.

    python -m benchmarks.dep_emulated [--ag 2 --eg 2 --layers 5 --runs 7 --exchange 0.03 --link slow]

The exchange is measured first, by the same Comm: a line over elements, the exchange of counts, and how much longer an
exchange takes while as much travels the other way (both directions share the processes' cores); and what handing a chunk to
the experts' thread and back takes. Half the batch is as many
rows as take --exchange seconds, and compute is --attention and --expert times as long (the shared expert follows), so that
what is tested is the schedule, not this machine. `--link slow` is a link whose directions do not slow each other: rows still
travel, few of them, and each exchange ends no earlier than its line says, one at a time in each direction, from when the
last sender began it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from dep_extension.comm import Comm, Handle, Place, Role
from dep_extension.cost import Line, Machine, Model, Split, chunks, tokens_per_expert
from dep_extension.schedule import Work
from dep_extension.shares import Beside
from dep_extension.solver import Cut, Plan, Problem, findep, naive, pppipe, work_of
from dep_extension.walk import AttentionWalk, ExpertWalk, Itinerary, Position, Sent
from dep_extension.world import host_store, open_world

SPIN_S = 0.0008  # a sleep wakes late by less than this
SIZES = (0, 1 / 8, 1 / 4, 1 / 2, 1)  # of the rows of a whole micro-batch, at which the exchange is measured
WARM, TIMES = 5, 25
NAP_S = 0.005
FEW = 256  # rows of an attention rank, of the first guess at how long they take
WIDTH, EXPERTS, CHOICES = 2048, 16, 8
HEADS, HEAD = 4, 128


class Case(NamedTuple):
    """What to emulate. Durations in units of the exchange of half the batch."""

    ag: int
    eg: int
    layers: int
    samples: int
    max_r1: int
    attention: float
    expert: float
    max_r2: int
    exchange: float
    link: str = "real"


def sleep(seconds: float) -> None:
    """Exactly: the end of it awake."""
    until = time.perf_counter() + seconds
    if seconds > SPIN_S:
        time.sleep(seconds - SPIN_S)
    while time.perf_counter() < until:
        pass


# The exchange


class Load(NamedTuple):
    """Rows of each expert rank, in one direction or in both at once."""

    rows: int
    ways: tuple[str, ...] = ("A2E",)


def measure(comm: Comm, loads: Sequence[Load]) -> list[float]:
    """Median seconds of each from when all ranks are ready until the last has its rows. They take turns, so that a machine
    that drifts bends no line."""
    others = comm.place.others
    mine = torch.zeros(max(load.rows for load in loads) // comm.place.ag * others, WIDTH)
    taken: list[list[float]] = [[] for _ in loads]
    for _ in range(TIMES):
        for load, found in zip(loads, taken, strict=True):
            each = load.rows // comm.place.ag
            torch.distributed.barrier()
            began = time.perf_counter()
            for handle in [_send(comm, way, mine[: each * others], [each] * others) for way in load.ways]:
                handle.wait()
            found.append(time.perf_counter() - began)
    return [_median(found) for found in taken]


def _send(comm: Comm, way: str, mine: torch.Tensor, splits: list[int]) -> Handle:
    none = [0] * len(splits)
    start = comm.dispatch if way == "A2E" else comm.combine
    if (comm.place.role is Role.ATTENTION) == (way == "A2E"):
        return start(mine, splits, none, WIDTH)
    return start(None, none, splits, WIDTH)


def _median(taken: Sequence[float]) -> float:
    """Of the runs that count, of each the slowest rank's: the same on every rank."""
    found = torch.tensor(taken[WARM:], dtype=torch.float64)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found.median())


def measure_counts(comm: Comm) -> float:
    taken = []
    for _ in range(TIMES):
        torch.distributed.barrier()
        began = time.perf_counter()
        sent = torch.zeros(comm.place.eg, 16, dtype=torch.int64) if comm.place.role is Role.ATTENTION else None
        comm.counts(sent, 16).wait()
        taken.append(time.perf_counter() - began)
    return _median(taken)


def measure_handover(comm: Comm) -> float:
    """Seconds that a chunk takes at the experts beyond its compute: to the worker and back, and waking up from it."""
    beside, taken = Beside(), []
    for _ in range(TIMES):
        torch.distributed.barrier()
        began = time.perf_counter()
        beside.submit(_nap).wait()
        taken.append(time.perf_counter() - began - NAP_S if comm.place.role is Role.EXPERT else 0.0)
    beside.close()
    return max(0.0, _median(taken))


def _nap() -> torch.Tensor:
    sleep(NAP_S)
    return torch.empty(0)


def fit(points: Sequence[tuple[float, float]]) -> Line:
    slope, start = np.polyfit([x for x, _ in points], [y for _, y in points], 1)
    if slope <= 0:
        taken = ", ".join(f"{y * 1e3:.2f}" for _, y in points)
        raise RuntimeError(f"exchanges of more rows take no longer ({taken} ms): the machine is busy, try again")
    return Line(max(0.0, float(start)), float(slope))


class SlowLink:
    """A Comm whose exchanges of rows take as long as `line` says. What a sender began when travels in its first row."""

    def __init__(self, comm: Comm, line: Line):
        self._comm, self._line = comm, line
        self.place, self.generation = comm.place, comm.generation
        self._free = {"A2E": 0.0, "E2A": 0.0}  # when each direction is, as this rank sees it

    def counts(self, sent_EW: torch.Tensor | None, width: int) -> Any:
        return self._comm.counts(sent_EW, width)

    def dispatch(self, rows_PD: torch.Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> Any:
        return _Slow(self, "A2E", self._comm.dispatch(_stamped(rows_PD, to), to, of, width), of)

    def combine(self, rows_PD: torch.Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> Any:
        return _Slow(self, "E2A", self._comm.combine(_stamped(rows_PD, to), to, of, width), of)

    def close(self) -> None:
        self._comm.close()

    def until(self, way: str, began: float, elements: int) -> float:
        self._free[way] = max(self._free[way], began) + self._line(elements)
        return self._free[way]


class _Slow:
    def __init__(self, link: SlowLink, way: str, inner: Any, of: Sequence[int]):
        self._link, self._way, self._inner, self._of = link, way, inner, of

    def wait(self) -> torch.Tensor:
        rows_PD: torch.Tensor = self._inner.wait()
        firsts = [sum(self._of[:peer]) for peer, many in enumerate(self._of) if many]
        if firsts and rows_PD.shape[1] == WIDTH:
            began = max(float(rows_PD[first, :2].view(torch.float64)) for first in firsts)
            share = (
                self._link.place.ag / self._link.place.eg if self._way == "E2A" else 1.0
            )  # of an expert rank's elements
            sleep(self._link.until(self._way, began, round(rows_PD.numel() * share)) - time.perf_counter())
        return rows_PD


def _stamped(rows_PD: torch.Tensor | None, to: Sequence[int]) -> torch.Tensor | None:
    if rows_PD is None or rows_PD.shape[1] != WIDTH:
        return rows_PD
    stamped = rows_PD.clone()
    now = torch.tensor([time.perf_counter()], dtype=torch.float64).view(torch.float32)
    for peer, many in enumerate(to):
        if many:
            stamped[sum(to[:peer]), :2] = now
    return stamped


# The walk, asleep


class Asleep:
    """An attention rank without a model: durations of `work`, rows as many as the plan sends; one round."""

    def __init__(self, work: Work, sent_C: Sent):
        self._work, self._sent, self._ended = work, sent_C, False
        self.began = self.ended = 0.0

    def attend(self, batch: int, here: Position) -> Sent | None:
        self.began = self.began or time.perf_counter()
        self._ended = here.round > 0
        if self._ended:
            return None
        sleep(float(self._work.attention_I[batch]))
        return self._sent

    def going(self, batch: int) -> bool:
        return not self._ended

    def share(self, batch: int) -> None:
        if not self._ended:
            sleep(float(self._work.shared_I[batch]))
            self.ended = time.perf_counter()

    def returned(self, batch: int, chunk: int, rows_PD: torch.Tensor) -> None:
        self.ended = time.perf_counter()


def walk(comm: Comm, problem: Problem, plan: Plan) -> tuple[float, float]:
    """When this rank began and ended; an expert rank's are of no account."""
    cut = Cut(plan.samples, plan.r1, plan.r2)
    work = work_of(problem, plan.split, cut)
    itinerary = Itinerary.of(work.layers, work.r1, work.r2, plan.order, work)
    asleep = replace(problem, machine=replace(problem.machine, experts=None))  # handing over takes its time by itself
    work = work_of(asleep, plan.split, cut)
    empty_0D = torch.empty(0, WIDTH)
    torch.distributed.barrier()
    if comm.place.role is Role.EXPERT:

        def experts(layer: int, batch: int, chunk: int, rows_PD: torch.Tensor, counts_AL: Any) -> torch.Tensor:
            sleep(float(work.expert_IJ[batch, chunk]))
            return rows_PD

        beside = Beside()
        ExpertWalk(comm, itinerary, experts, empty_0D, 1, beside).run()
        beside.close()
        return 0.0, 0.0
    side = Asleep(work, _rows(problem, plan, work.r2))
    AttentionWalk(comm, itinerary, side, empty_0D, 1).run()
    return side.began, side.ended


def _rows(problem: Problem, plan: Plan, r2: int) -> Sent:
    """What one attention rank sends: its part of the tokens of every local expert, chunk by chunk."""
    ag, eg = plan.split
    many, size, last = chunks(tokens_per_expert(problem.model, plan.split, plan.samples, problem.length), plan.r2)
    assert many == r2
    each = [problem.model.experts // eg * (last if chunk == r2 - 1 else size) // ag for chunk in range(r2)]
    counts_ECL = torch.tensor(each)[None, :, None].expand(eg, r2, 1)
    return Sent([torch.zeros(n * eg, WIDTH) for n in each], [[n] * eg for n in each], counts_ECL)


# Ranks and their answers


class Exchanges(NamedTuple):
    """What they cost here, and of how many tokens samples are for them to take as long as they should."""

    link: Line
    count_s: float
    both_ways: float
    handover_s: float
    length: int


def solve(case: Case, costs: Exchanges) -> tuple[Problem, list[Plan]]:
    """A machine whose compute stands to its link as the case says, and the three plans of the same batch."""
    link, length = costs.link, costs.length
    split = Split(case.ag, case.eg)
    half = case.samples // case.ag // 2
    model = Model("emulated", case.layers, WIDTH, WIDTH, EXPERTS, CHOICES, 1, HEADS, HEAD, HEAD, 1e-6, 1e-6)
    many = tokens_per_expert(model, split, half, length)
    unit = link(EXPERTS / case.eg * many * WIDTH)
    gemm = Line(0.0, case.expert * unit / (3 * EXPERTS / case.eg * many * WIDTH**2))
    projections = 4 * gemm(half * length * WIDTH * HEADS * HEAD)
    rest = max(0.0, case.attention * unit - projections)
    attention = Line(0.0, rest / (HEADS * half * length**2 * 2 * HEAD))
    machine = Machine("emulated", case.ag + case.eg, 1e15, gemm, attention, {split: link}, costs.count_s)
    machine = replace(machine, both_ways=costs.both_ways, experts=Line(costs.handover_s / 3, gemm.b))
    problem = Problem(model, machine, length, case.samples, max_r1=case.max_r1, max_r2=case.max_r2)
    plans = [solver(problem, split) for solver in (naive, pppipe, findep)]
    return problem, [plan for plan in plans if plan is not None]


def rank(number: int, port: int, case: Case, runs: int, out: Any) -> None:
    torch.set_num_threads(1)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place = Place.of(number, case.ag, case.eg)
    env |= {"RANK": str(number), "WORLD_SIZE": str(case.ag + case.eg), "LOCAL_WORLD_SIZE": str(case.ag + case.eg)}
    comm = open_world(place, torch.float32, poison=False, env=env)
    costs = _slow(comm, case) if case.link == "slow" else _calibrated(comm, case)
    problem, plans = solve(case, costs)
    way: Any = SlowLink(comm, costs.link) if case.link == "slow" else comm
    for run in range(runs + 1):
        for plan in plans:
            began, ended = walk(way, problem, plan)
            if run:
                out.put((plan.name, run, place.role.value, began, ended))
    if number == 0:
        out.put((problem, plans))
    comm.close()


def _calibrated(comm: Comm, case: Case) -> Exchanges:
    """`length` so that an exchange of half the batch takes as long as it should; then the line, alone, and both at once."""
    half = case.samples // case.ag // 2
    few, many = FEW * case.ag, 8 * FEW * case.ag
    first = fit(list(zip((few, many), measure(comm, [Load(few), Load(many)]), strict=True)))
    wanted = (case.exchange - first.a) / first.b  # rows of an expert rank
    length = max(16, round(wanted * case.eg / (half * case.ag * CHOICES) / 16) * 16)
    whole = half * case.ag * CHOICES * length // case.eg
    sizes = [int(whole * size) for size in SIZES]
    *alone, both = measure(comm, [*map(Load, sizes), Load(whole, ("A2E", "E2A"))])
    line = fit([(n * WIDTH, seconds) for n, seconds in zip(sizes, alone, strict=True)])
    return Exchanges(line, measure_counts(comm), max(1.0, both / alone[-1]), measure_handover(comm), length)


def _slow(comm: Comm, case: Case) -> Exchanges:
    """A link of which half the batch takes so long as asked and half a millisecond, whatever it really takes."""
    half, length = case.samples // case.ag // 2, 16
    elements = half * case.ag * CHOICES * length // case.eg * WIDTH
    line = Line(0.0005, case.exchange / elements)
    return Exchanges(line, measure_counts(comm), 1.0, measure_handover(comm), length)


def _said(out: Any, processes: Sequence[Any]) -> Any:
    while True:
        try:
            return out.get(timeout=2)
        except queue.Empty:
            failed = [n for n, process in enumerate(processes) if process.exitcode]
            if failed:
                raise RuntimeError(f"ranks {failed} of {len(processes)} failed, see above") from None


def measured(case: Case, runs: int) -> dict[str, Any]:
    store = host_store("127.0.0.1", 0, 60)
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    many = case.ag + case.eg
    processes = [context.Process(target=rank, args=(n, store.port, case, runs, out)) for n in range(many)]
    for process in processes:
        process.start()
    try:
        said = [_said(out, processes) for _ in range(1 + 3 * runs * many)]
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    problem, plans = next(one for one in said if len(one) == 2)
    return summary(problem, plans, [one for one in said if len(one) == 5], case.link)


def summary(problem: Problem, plans: Sequence[Plan], said: Sequence[Any], kind: str) -> dict[str, Any]:
    """Makespans: from the first attention rank's beginning to the last one's end; medians."""
    rows = []
    for plan in plans:
        ends: dict[int, list[tuple[float, float]]] = {}
        for name, run, role, began, ended in said:
            if name == plan.name and role == Role.ATTENTION.value:
                ends.setdefault(run, []).append((began, ended))
        seconds = [max(e for _, e in one) - min(b for b, _ in one) for one in ends.values()]
        found = statistics.median(seconds)
        rows.append(
            {
                "plan": plan.name,
                "r1": plan.r1,
                "r2": plan.r2,
                "order": "".join(what for what, _ in plan.order),
                "predicted_s": plan.makespan_s,
                "measured_s": found,
                "error": found / plan.makespan_s - 1,
                "runs_s": seconds,
            }
        )
    best = rows[-1]
    for row in rows:
        row["findep_ahead_predicted"] = row["predicted_s"] / best["predicted_s"] - 1
        row["findep_ahead_measured"] = row["measured_s"] / best["measured_s"] - 1
    machine, split = problem.machine, plans[0].split
    return {
        "benchmark": "dep_emulated",
        "split": list(split),
        "layers": problem.model.layers,
        "samples": problem.samples,
        "length": problem.length,
        "link_kind": kind,
        "link": list(machine.link(split)),
        "count_s": machine.count_s,
        "both_ways": machine.both_ways,
        "handover_s": 0.0 if machine.experts is None else 3 * machine.experts.a,
        "cores": os.cpu_count(),
        "plans": rows,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Plans against walks with emulated compute.")
    numbers: list[tuple[str, Callable[[str], Any], Any]] = [
        ("ag", int, 2), ("eg", int, 2), ("layers", int, 5), ("samples", int, 4), ("max_r1", int, 2),
        ("max_r2", int, 4), ("exchange", float, 0.03),
        ("attention", float, 4.0), ("expert", float, 4.0), ("runs", int, 7),
    ]  # fmt: skip
    for name, kind, default in numbers:
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    parser.add_argument("--link", choices=("real", "slow"), default="real")
    options = vars(parser.parse_args(argv))
    runs = options.pop("runs")
    found = measured(Case(**options), runs)
    for row in found["plans"]:
        line = f"{row['plan']:10} r1={row['r1']} r2={row['r2']}  predicted {row['predicted_s']:.3f} s"
        ahead = (
            f"FinDEP ahead {row['findep_ahead_predicted']:.1%} predicted, {row['findep_ahead_measured']:.1%} measured"
        )
        print(f"{line}, measured {row['measured_s']:.3f} s ({row['error']:+.1%}); {ahead}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
