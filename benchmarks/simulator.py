"""The simulator against reality: the same passes through a real engine and through `ClockDevice`; and the limit that a
policy which knows the future reaches.

    python -m benchmarks.simulator FOLDER [--machines 300MB,none] [--shares 0.25,0.5,0.75] [--policies lru,...]
                                          [--rounds 5] [--tokens 24] [--runs 1] [--only cells|limits]

FOLDER takes the model (`course.py`). Routes are drawn from a skewed popularity and forced, so that every row chooses the
same; `duoserve` foresees them. A machine is a link that copies are slowed to, or "none": the disk as it is.

    one engine   warm | other passes, recorded | passes compared | other passes, recorded | passes compared | ... | recorded
                        '------------------------- costs (`gauge.py`) --------------------------------------------'

Nothing else runs between these: a copy that is under way when a stretch ends counts in the next.

Each cell: seconds of the compared passes, real and simulated, and their ratio, of all and the median over rounds; the same
with the costs measured under policy lru of the same share (`by lru`); by how much hits, hits with those in flight, and
bytes differ; and whether, with the run's own decisions repeated, they agree to the byte. With `--runs` above 1 the cell is
measured so often, each time in a new engine and simulated with that run's costs: differences are then means over runs, and
`spread` is by how many points hits of the real runs differ among themselves, at most. A line for people and a JSON line for
each cell as soon as it is done, so that a run can be split or lost halfway; the limits last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.course import EXPERTS, LAYERS, Forced, course, foreseen, make_model, open_engine
from benchmarks.gauge import Machine, Stamping, Watched, machine, watch
from benchmarks.machine import describe
from duoserve.config import parse_size
from duoserve.core import Phase, Policy, Route, Step
from duoserve.decisions import Noting, Repeating
from duoserve.future import Future
from duoserve.simulate import Link, Pass, Shape, Simulation, counted, simulate
from predictor.stated import StatedPredictor

POLICIES = ("lru", "on-demand", "lfp", "duoserve")  # lru first: the others are also simulated with its costs
OTHER = 1000  # seed of the passes that costs are measured on


class Part(NamedTuple):
    """A stretch of a run. `compared`: it is what real and simulated seconds are taken of."""

    passes: list[Pass]
    compared: bool


def parts(rounds: int, tokens: int) -> list[Part]:
    """Warm-up, then rounds to be compared, each between passes that costs are measured on."""
    found = [Part(course(1, tokens, seed=0), False)]
    for number in range(rounds):
        found += [Part(course(1, tokens, OTHER + number), False), Part(course(1, tokens, 1 + number), True)]
    return [*found, Part(course(1, tokens, OTHER + rounds), False)]


class Run(NamedTuple):
    """One policy on one pool: seconds of each compared stretch, and counts and bytes of all."""

    seconds: list[float]
    counts: Any
    moved: int

    @property
    def total_s(self) -> float:
        return sum(self.seconds)

    @property
    def asked(self) -> int:
        return int(self.counts.hits + self.counts.in_flight + self.counts.misses)

    @property
    def hit_rate(self) -> float:
        return float(self.counts.hits / self.asked)

    @property
    def held_rate(self) -> float:
        """Hits, and what was on its way."""
        return 1 - float(self.counts.misses / self.asked)


class There(NamedTuple):
    """A real run, what the clock decided in it, and what its machine costs."""

    run: Run
    noting: Noting
    machine: Machine


def real(folder: Path, whole: Whole, rate: int | None, slots: int, policy: str, stretches: list[Part]) -> There:
    engine = open_engine(folder, slots, policy, rate)
    forced, noting = Forced(engine), Stamping()
    engine.runtime.decide(noting)
    if policy == "duoserve":
        all_passes = [one for part in stretches for one in part.passes]
        engine.predict(foreseen(all_passes, engine.runtime.steps), always=True)
    forced.run(stretches[0].passes)
    seconds: list[float] = []
    watched: list[Watched] = []
    for part in stretches[1:]:
        if part.compared:
            seconds.append(sum(forced.run(part.passes)))
        else:
            watched.append(watch(forced, part.passes, noting))
    engine.close()  # what is under way ends
    run = Run(seconds, engine.runtime.transfer.counts(), int(engine.device.copy.cost_done))
    return There(run, noting, machine(whole.store, rate, watched, whole.watched(stretches)))


class Whole:
    """An engine that holds all experts."""

    def __init__(self, folder: Path, rate: int | None, stretches: list[Part]):
        self._forced = Forced(open_engine(folder, LAYERS * EXPERTS, "lru", rate))
        self._forced.run(stretches[0].passes)
        self.store, self.close = self._forced.engine.store, self._forced.engine.close

    def watched(self, stretches: list[Part]) -> list[Watched]:
        """The first of the passes that costs are measured on."""
        return [watch(self._forced, stretches[1].passes)]


def simulated(machine: Machine, shape: Shape, policy: str, stretches: list[Part], noting: Noting | None = None) -> Run:
    repeating = Repeating(noting.answers, noting.rankings) if noting is not None else None
    all_passes = [one for part in stretches for one in part.passes]
    predictor = foreseen(all_passes) if policy == "duoserve" else None
    simulation = Simulation(shape, machine.costs, machine.link, Policy(policy), predictor=predictor, always=True,
                            decisions=repeating)  # fmt: skip
    seconds, near = [], nearest(stretches)
    for part, numbers in zip(stretches, near, strict=True):
        machine.costs.near(numbers)
        took = sum(simulation.run(one._replace(step=None)) for one in part.passes)
        if part.compared:
            seconds.append(took)
    simulation.device.spend(60.0)  # what is under way ends
    outcome = simulation.outcome()
    return Run(seconds, outcome.counts, outcome.moved_bytes)


def nearest(stretches: Sequence[Part]) -> list[list[int]]:
    """Of each stretch, which of those that costs are measured on are its neighbours, or itself."""
    found, last = [[0]], -1  # the warm-up's
    for part in stretches[1:]:
        last += not part.compared
        found.append([last, last + 1] if part.compared else [last])
    return found


class Tried(NamedTuple):
    """A real run, and the same simulated: with its costs, with its decisions too, and with the costs of lru."""

    there: Run
    free: Run
    again: Run
    by_lru: Run | None
    link: Link

    @property
    def hit_points(self) -> float:
        return 100 * (self.free.hit_rate - self.there.hit_rate)

    @property
    def held_points(self) -> float:
        return 100 * (self.free.held_rate - self.there.held_rate)

    @property
    def repeated(self) -> bool:
        return bool(self.again.counts == self.there.counts) and self.again.moved == self.there.moved


class Bench:
    """One link: an engine that holds all experts beside those to be compared, and the costs under lru by share."""

    def __init__(self, folder: Path, rate: int | None, args: argparse.Namespace):
        self._folder, self._rate, self._args = folder, rate, args
        self._stretches = parts(args.rounds, args.tokens)
        self._whole = Whole(folder, rate, self._stretches)
        self._by_lru: dict[float, Machine] = {}

    def cell(self, share: float, policy: str) -> dict[str, Any]:
        tried = [self._try(share, policy) for _ in range(self._args.runs)]
        ratio = {
            name: sum(run.total_s for run in runs) / sum(one.there.total_s for one in tried)
            for name, runs in {
                "ratio": [one.free for one in tried],
                "ratio_repeated": [one.again for one in tried],
                "ratio_by_lru": [one.by_lru for one in tried if one.by_lru is not None],
            }.items()
        }
        rounds = [s / r for one in tried for s, r in zip(one.free.seconds, one.there.seconds, strict=True)]
        hits = [100 * one.there.hit_rate for one in tried]
        return {
            "machine": self._rate or "none",
            "share": share,
            "policy": policy,
            "runs": len(tried),
            "real_s": [second for one in tried for second in one.there.seconds],
            "simulated_s": [second for one in tried for second in one.free.seconds],
            **ratio,
            "ratio_median": statistics.median(rounds),
            "hit_points": statistics.mean(one.hit_points for one in tried),
            "hit_points_by_run": [one.hit_points for one in tried],
            "real_hits": hits,
            "hit_spread_points": max(hits) - min(hits),
            "held_points": statistics.mean(one.held_points for one in tried),
            "bytes_ratio": sum(one.free.moved for one in tried) / sum(one.there.moved for one in tried),
            "repeated_exactly": all(one.repeated for one in tried),
            "counts": [one.there.counts._asdict() for one in tried],
            "simulated_counts": [one.free.counts._asdict() for one in tried],
            "link": [asdict(replace(one.link, spread=quantiles(one.link.spread))) for one in tried],
        }

    def _try(self, share: float, policy: str) -> Tried:
        shape = Shape((EXPERTS,) * LAYERS, (self._args.slab_bytes,) * LAYERS, round(share * LAYERS * EXPERTS))
        stretches = self._stretches
        there, noting, measured = real(self._folder, self._whole, self._rate, shape.slots, policy, stretches)
        if policy == "lru":
            self._by_lru[share] = measured
        free, again = (simulated(measured, shape, policy, stretches, n) for n in (None, noting))
        lru = self._by_lru.get(share)
        by_lru = simulated(lru, shape, policy, stretches) if lru is not None else None
        return Tried(there, free, again, by_lru, measured.link)

    def close(self) -> None:
        self._whole.close()


def quantiles(samples: Sequence[float]) -> tuple[float, ...]:
    """Ninths, for a person to look at."""
    if not samples:
        return ()
    ordered = sorted(samples)
    return tuple(round(ordered[int(share * (len(ordered) - 1))], 3) for share in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1))


def limit(args: argparse.Namespace) -> dict[str, float]:
    """Of a policy that knows the future, on a device that computes in no time: seconds over what the link needs."""
    passes = [one for one in course(1, 400, seed=2) if one.rows == 1]
    rate, found = 1e9, {}
    for share in args.shares:
        shape = Shape((EXPERTS,) * LAYERS, (args.slab_bytes,) * LAYERS, round(share * LAYERS * EXPERTS))
        future = Future(shape.experts, [list(one.chosen) for one in passes])
        outcome = simulate(shape, Nothing(), Link(rate), Policy.BELADY, passes, future=future)
        found[f"{share:g}"] = outcome.total_s / (fewest_misses(passes, shape.slots) * args.slab_bytes / rate)
    return found


class Nothing:
    launch_s = predict_s = 0.0

    def trunk_s(self, layer: int, rows: int, phase: Phase) -> float:
        return 0.0

    def expert_s(self, layer: int, rows: int) -> float:
        return 0.0

    def combine_s(self, layer: int, rows: int) -> float:
        return 0.0


def fewest_misses(passes: Sequence[Pass], slots: int) -> int:
    """Of any pool of that size (Belady: what is wanted last goes first)."""
    turns = [[(layer, e) for e in one] for p in passes for layer, one in enumerate(p.chosen)]
    uses: dict[tuple[int, int], list[int]] = defaultdict(list)
    for turn in reversed(range(len(turns))):
        for key in turns[turn]:
            uses[key].append(turn)
    held: set[tuple[int, int]] = set()
    missed = 0
    for keys in turns:
        for key in keys:
            uses[key].pop()
        for key in keys:
            if key in held:
                continue
            missed += 1
            if len(held) == slots:
                held.remove(max(held - set(keys), key=lambda k: uses[k][-1] if uses[k] else len(turns)))
            held.add(key)
    return missed


def accesses_per_s() -> dict[str, float]:
    """Simulated by each policy, of a model with 48 layers of 128 experts, 8 to a token, half of them resident. LFP moves 16
    experts for each that is asked for."""
    rng, layers, experts = random.Random(0), 48, 128
    skew = [1 / (e + 5) for e in range(experts)]
    chosen = [[_distinct(rng, skew, 8) for _ in range(layers)] for _ in range(120)]
    passes = [Pass(Phase.DECODE, 1, [counted(ids, experts) for ids in one]) for one in chosen]
    shape = Shape((experts,) * layers, (1 << 21,) * layers, layers * experts // 2)
    found = {}
    for policy in Policy:
        few = passes[: 10 if policy is Policy.LFP else None]
        asked = _oracle(few, experts) if policy in (Policy.DUOSERVE, Policy.PAPER, Policy.MIF) else None
        future = Future(shape.experts, [list(one.chosen) for one in few]) if policy is Policy.BELADY else None
        began = time.process_time()
        outcome = simulate(shape, Nothing(), Link(5e9), policy, few, predictor=asked, always=True, future=future)
        found[policy.value] = outcome.accesses / (time.process_time() - began)
    return found


def _oracle(passes: Sequence[Pass], experts: int) -> StatedPredictor:
    steps = [Step(number, Phase.DECODE, 1) for number in range(len(passes))]
    for step, one in zip(steps, passes, strict=True):
        step.routes = [Route(at, torch.tensor([list(ids)]), torch.empty(0)) for at, ids in enumerate(one.chosen)]
    return StatedPredictor(steps, [experts] * len(passes[0].chosen), first=True)


def _distinct(rng: random.Random, skew: list[float], n: int) -> set[int]:
    found: set[int] = set()
    while len(found) < n:
        found.add(rng.choices(range(len(skew)), skew)[0])
    return found


HEAD = f"{'link':>9s}{'share':>7s}  {'policy':12s}{'real s':>9s}{'clock':>8s}{'ratio':>7s}{'median':>7s}{'again':>7s}" \
       f"{'by lru':>7s}{'hits':>8s}{'spread':>8s}{'held':>8s}{'bytes':>8s}  again to the byte"  # fmt: skip


def line(name: str, found: dict[str, Any]) -> str:
    by_lru = f"{found['ratio_by_lru']:7.3f}" if found["ratio_by_lru"] else f"{'-':>7s}"
    spread = f"{found['hit_spread_points']:7.1f}p" if found["runs"] > 1 else f"{'-':>8s}"
    return (f"{name:>9s}{found['share']:7.0%}  {found['policy']:12s}{sum(found['real_s']):9.3f}"
            f"{sum(found['simulated_s']):8.3f}{found['ratio']:7.3f}{found['ratio_median']:7.3f}"
            f"{found['ratio_repeated']:7.3f}{by_lru}{found['hit_points']:+7.1f}p{spread}{found['held_points']:+7.1f}p"
            f"{found['bytes_ratio']:8.3f}  {found['repeated_exactly']}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machines", default="300MB,none")
    parser.add_argument("--shares", default="0.25,0.5,0.75")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--only", choices=("cells", "limits"))
    args = parser.parse_args()
    args.shares = [float(share) for share in args.shares.split(",")]
    args.folder.mkdir(parents=True, exist_ok=True)
    make_model(args.folder)
    args.slab_bytes = prepared(args.folder)
    about = {"rounds": args.rounds, "tokens": args.tokens, "machine": describe()}
    if args.only != "limits":
        compare(args, about)
    if args.only != "cells":
        limits, rates = limit(args), accesses_per_s()
        print("knowing the future, over the limit:", ", ".join(f"{x:.4f} at {share}" for share, x in limits.items()))
        seconds = ", ".join(f"{policy} {1e6 / rate:.1f}" for policy, rate in rates.items())
        print("a million accesses, seconds of processor:", seconds)
        print(json.dumps({"benchmark": "simulator-limits", "over_limit": limits, "accesses_per_s": rates, **about}))


def compare(args: argparse.Namespace, about: dict[str, Any]) -> None:
    """Real and simulated, cell by cell."""
    print(HEAD)
    for name in args.machines.split(","):
        bench = Bench(args.folder, None if name == "none" else parse_size(name, "link"), args)
        for share in args.shares:
            for policy in args.policies.split(","):
                found = bench.cell(share, policy)
                print(line(name, found))
                print(json.dumps({"benchmark": "simulator", **found, **about}), flush=True)
        bench.close()


def prepared(folder: Path) -> int:
    """Bytes of a slab, once the store is made."""
    engine = open_engine(folder, LAYERS * EXPERTS, "lru", None)
    engine.close()
    return int(engine.store.slab_bytes)


if __name__ == "__main__":
    main()
