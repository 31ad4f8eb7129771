"""The simulator against reality: the same passes through a real engine and through `ClockDevice`, whose costs were measured
on other passes just before and just after; and the limit that a policy which knows the future reaches.

    python -m benchmarks.simulator FOLDER [--machines 300MB,none] [--shares 0.25,0.5,0.75] [--rounds 3] [--tokens 24]

FOLDER takes a random-weight Mixtral (0.9 GB, made at first use) and its store. Routes are drawn from a skewed popularity
and forced, so that every row chooses the same; `duoserve` foresees them. A machine is a link that copies are slowed to, or
"none": the disk as it is. Measured on other routes:

    trunk, experts by rows, sums    spans of an engine that holds all experts
    hand-over of a copy             what scheduling takes longer where experts are missing (policy lru)
    company                         how much longer experts take while copies are under way
    waking                          from a copy's end until whoever waited for it goes on
    link                            single copies, and two at a time; of the disk, those of an engine with policy lru

Each cell: seconds of all measured passes, real and simulated, their ratio; by how much hits and bytes differ; and whether,
with the run's own decisions repeated, they agree to the byte. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import duoserve
from benchmarks.machine import describe
from duoserve.ahead import _likely
from duoserve.config import parse_size
from duoserve.core import Key, Phase, Policy, Step
from duoserve.decisions import Noting, Repeating
from duoserve.device import ThreadDevice, host_arena
from duoserve.future import Future
from duoserve.moe import OffloadedExperts
from duoserve.simulate import Foreseeing, Link, Pass, Shape, Simulation, counted, simulate
from duoserve.sizing import CACHE
from duoserve.store import Store
from duoserve.timeline import (
    COMBINE,
    COMPUTE,
    COPY,
    EXPERT,
    HEAD,
    PASSES,
    ROUTE,
    SCHEDULE,
    STALL,
    TRUNK,
    Span,
    Timeline,
)

MODEL = {
    "hidden_size": 1024, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "num_local_experts": 24, "num_experts_per_tok": 4, "vocab_size": 8192,
    "max_position_embeddings": 2048, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LAYERS, EXPERTS, CHOICES = MODEL["num_hidden_layers"], MODEL["num_local_experts"], MODEL["num_experts_per_tok"]
ROOM = 1024  # tokens of keys and values
PROMPT = 48
READS = 64  # of a link's measurement
POLICIES = ("on-demand", "lru", "lfp", "duoserve")


def make_model(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model("mixtral", **MODEL)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def course(rounds: int, tokens: int, seed: int) -> list[Pass]:
    """Prompts and their answers, by skewed routers that partly repeat what the token before chose."""
    rng = np.random.default_rng(seed)
    weight = 1 / (np.arange(EXPERTS) + 4.0)
    weights = [rng.permutation(weight) for _ in range(LAYERS)]
    passes: list[Pass] = []
    for _ in range(rounds):
        for number in range(tokens + 1):
            rows = PROMPT if number == 0 else 1
            step = Step(0, Phase.PREFILL if number == 0 else Phase.DECODE, rows)
            chosen = []
            for layer in range(LAYERS):
                noise = rng.gumbel(size=(rows, EXPERTS)) + np.log(weights[layer])
                ids_TK = np.argsort(-noise, axis=1)[:, :CHOICES]
                chosen.append(counted(ids_TK.ravel().tolist(), EXPERTS))
                step.inputs[layer] = torch.from_numpy(ids_TK.copy())  # the forced routes
            passes.append(Pass(step.phase, rows, chosen, step))
    return passes


class Forced:
    """A model whose routers choose what a course says."""

    def __init__(self, engine: Any):
        self.engine, self.passes = engine, list[Pass]()
        self.number = -1
        for module in engine.model.modules():
            if isinstance(module, OffloadedExperts):
                module.register_forward_pre_hook(self._redraw)

    def run(self, passes: Sequence[Pass]) -> list[float]:
        """Seconds of each pass."""
        first, seconds = len(self.passes), []
        self.passes.extend(passes)
        out: Any = None
        for number in range(first, len(self.passes)):
            self.number, one = number, self.passes[number]
            began = time.perf_counter()
            with torch.inference_mode():
                past = {} if one.phase is Phase.PREFILL else {CACHE: out[CACHE]}
                ids = torch.zeros((1, one.rows), dtype=torch.long)
                out = self.engine.model(input_ids=ids, use_cache=True, logits_to_keep=1, **past)
            seconds.append(time.perf_counter() - began)
        return seconds

    def _redraw(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, ids, weights = args
        step = self.passes[self.number].step
        assert step is not None, self.number
        return x, step.inputs[module._layer].to(ids), weights


class Known(Foreseeing):
    """Foresees a forced model's own course."""

    def __init__(self, forced: Forced):
        super().__init__(forced.passes, [EXPERTS] * LAYERS)
        self._forced = forced

    def rank(self, step: Step, layer: int) -> torch.Tensor:
        scores = torch.zeros(EXPERTS)
        scores[list(self._forced.passes[self._forced.number].chosen[layer])] = 1.0
        return scores


class Measured:
    """Costs of this machine, means of all samples: slow moments are part of them, as they are of what is compared."""

    launch_s = 0.0

    def __init__(self) -> None:
        self.predict_s = 0.0
        self._between_s: dict[tuple[int, Phase], list[float]] = defaultdict(list)
        self._once_s: dict[tuple[int, Phase], list[float]] = defaultdict(list)
        self._rows_s: dict[int, list[float]] = defaultdict(list)

    def add(self, spans: list[Span], passes: Sequence[Pass], seconds: list[float]) -> None:
        """A run that held all experts: its spans, its passes, what each took."""
        for one, own, whole in zip(passes, by_pass(spans), seconds, strict=True):
            trunk, layer_s = defaultdict(float), defaultdict(float)
            for span in own:
                took = span.end - span.start
                if span.kind in (TRUNK, HEAD, ROUTE):
                    trunk[span.layer] += took
                elif span.kind in (SCHEDULE, COMBINE):
                    layer_s[span.layer] += took
                elif span.kind == EXPERT:
                    self._rows_s[one.chosen[span.layer][span.expert]].append(took)
            trunk[LAYERS] += whole - sum(span.end - span.start for span in own)
            for layer, took in trunk.items():
                self._between_s[layer, one.phase].append(took)
            for layer, took in layer_s.items():
                self._once_s[layer, one.phase].append(took)
        self._between = {at: statistics.mean(s) for at, s in self._between_s.items()}
        self._once = {at: statistics.mean(s) for at, s in self._once_s.items()}
        self._rows = sorted(self._rows_s)
        self._expert = [statistics.mean(self._rows_s[rows]) for rows in self._rows]

    def trunk_s(self, layer: int, rows: int, phase: Phase) -> float:
        return self._between[layer, phase]

    def expert_s(self, layer: int, rows: int) -> float:
        return float(np.interp(rows, self._rows, self._expert))

    def combine_s(self, layer: int, rows: int) -> float:
        return self._once[layer, Phase.DECODE if rows == 1 else Phase.PREFILL]


def by_pass(spans: list[Span]) -> Iterator[list[Span]]:
    """What the model's thread did in each pass."""
    passes = [span for span in spans if span.lane == PASSES]
    own = [span for span in spans if span.lane == COMPUTE]
    starts = [span.start for span in own]
    for one in passes:
        yield own[bisect(starts, one.start - 1e-9) : bisect(starts, one.end - 1e-9)]


class Machine(NamedTuple):
    """One link of this machine: what copies take, alone and in twos, and what they cost those who compute."""

    rate: int | None  # bytes/s that copies are slowed to
    link: Link
    costs: Measured


def open_engine(folder: Path, slots: int, policy: str, rate: int | None, **more: Any) -> Any:
    engine = duoserve.load(folder, cache_dir=str(folder / "cache"), slots=slots, budget="4GiB", ctx=ROOM, threads=1,
                           policy=policy, link=rate, **more)  # fmt: skip
    buffer = host_arena(engine.store.slab_bytes)
    for layer, expert in np.ndindex(LAYERS, EXPERTS):  # first reads also compute a checksum
        engine.store.read_into(Key(layer, expert), buffer)
    return engine


class Gauge:
    """Two engines, sampled before and after each run to be compared: one holds all experts, the other half of them."""

    def __init__(self, folder: Path, rate: int | None, args: argparse.Namespace):
        self.rate = rate
        self._passes = course(1, args.tokens, seed=99)
        self._all = Forced(open_engine(folder, LAYERS * EXPERTS, "lru", rate))
        self._half = Forced(open_engine(folder, LAYERS * EXPERTS // 2, "lru", rate))
        for forced in (self._all, self._half):
            forced.run(self._passes)
        self.reset()

    def reset(self) -> None:
        self._costs = Measured()
        self._links: list[Link] = []
        self._missing: list[tuple[list[Span], int]] = []

    def sample(self) -> None:
        spans, seconds, _ = self._recorded(self._all)
        self._costs.add(spans, self._passes, seconds)
        spans, _, misses = self._recorded(self._half)
        self._missing.append((spans, misses))
        self._links.append(_link(self._all.engine.store, self.rate))
        self._costs.predict_s = _ranking_s(self._passes)

    def machine(self) -> Machine:
        """What was sampled since the reset."""
        links = np.mean([(link.bytes_per_s, link.latency_s, link.alone or 0) for link in self._links], axis=0)
        link = Link(float(links[0]), float(links[1]), alone=float(links[2]) or None)
        if self.rate is None:
            link = self._disk(link)
        link = replace(link, latency_s=link.latency_s + self._waking())
        return Machine(self.rate, replace(link, **self._beside()), self._costs)

    def close(self) -> None:
        for forced in (self._all, self._half):
            forced.engine.close()

    def _recorded(self, forced: Forced) -> tuple[list[Span], list[float], int]:
        runtime, timeline = forced.engine.runtime, Timeline()
        before = runtime.transfer.counts().misses
        runtime.record(timeline)
        seconds = forced.run(self._passes)
        runtime.record(None)
        return timeline.spans(), seconds, runtime.transfer.counts().misses - before

    def _waking(self) -> float:
        """From the end of a copy until whoever waited for it goes on: median."""
        late = []
        for spans, _ in self._missing:
            ends: dict[tuple[int, int], list[float]] = {}
            for copy in (span for span in spans if span.kind == COPY):
                ends.setdefault((copy.layer, copy.expert), []).append(copy.end)
            for stall in (span for span in spans if span.kind == STALL and span.lane == COMPUTE):
                late += [
                    stall.end - e for e in ends.get((stall.layer, stall.expert), ()) if stall.start < e <= stall.end
                ]
        return statistics.median(late) if late else 0.0

    def _disk(self, idle: Link) -> Link:
        """The disk as those copies found it: what is read often comes faster than what an idle link's test reads once."""
        slab, alone, moved, busy = self._half.engine.store.slab_bytes, [], 0, 0.0
        for spans, _ in self._missing:
            copies = sorted((span for span in spans if span.kind == COPY), key=lambda span: span.start)
            near = {n: copies[max(0, n - 4) : n + 5] for n in range(len(copies))}
            crowd = [n for n, c in enumerate(copies) if any(_meet(c, other) for other in near[n])]
            alone += [c.end - c.start for n, c in enumerate(copies) if n not in set(crowd)]
            moved += slab * len(crowd)
            busy += _covered(Span("", "", 0, 0, 0.0, float("inf"), ""), [copies[n] for n in crowd])
        together = moved / busy if busy else idle.bytes_per_s
        single = slab / statistics.median(alone) if alone else idle.alone or together
        return replace(idle, bytes_per_s=together, alone=min(single, together))

    def _beside(self) -> dict[str, float]:
        """What copies cost those who compute."""
        costs, alone_s, beside_s, scheduled_s = self._costs, 0.0, 0.0, 0.0
        for spans, _ in self._missing:
            copies = [span for span in spans if span.kind == COPY]
            for one, own in zip(self._passes, by_pass(spans), strict=True):
                for span in own:
                    took = span.end - span.start
                    if span.kind == EXPERT:
                        shared = _covered(span, copies)
                        alone_s += costs.expert_s(span.layer, one.chosen[span.layer][span.expert]) - (took - shared)
                        beside_s += shared
                    elif span.kind in (SCHEDULE, COMBINE):
                        scheduled_s += took
                scheduled_s -= sum(costs.combine_s(layer, one.rows) for layer in range(LAYERS))
        company = min(3.0, max(1.0, beside_s / max(alone_s, 1e-9)))
        return {"submit_s": max(0.0, scheduled_s / sum(n for _, n in self._missing)), "company": company}


def _meet(a: Span, b: Span) -> bool:
    """Whether two copies were under way at the same time."""
    return a is not b and a.start < b.end and b.start < a.end


def _covered(span: Span, copies: list[Span]) -> float:
    """Seconds of a span with a copy under way."""
    covered, until = 0.0, span.start
    for copy in copies:  # in order of their starts
        end = min(copy.end, span.end)
        covered += max(0.0, end - max(copy.start, until))
        until = max(until, end)
    return covered


def _ranking_s(passes: Sequence[Pass]) -> float:
    predictor, step = Foreseeing(passes, [EXPERTS] * LAYERS), Step(1, Phase.DECODE, 1)
    took = []
    for _ in range(200):
        began = time.perf_counter()
        _likely(predictor.rank(step, 1), CHOICES)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def _link(store: Store, rate: int | None) -> Link:
    """What copies take with nothing else to do."""
    device = ThreadDevice(link=rate)
    slabs = [host_arena(store.slab_bytes).zero_() for _ in range(4)]
    rng = random.Random(0)

    def read(n: int) -> Any:
        key = Key(rng.randrange(LAYERS), rng.randrange(EXPERTS))
        return device.copy.submit(lambda: store.read_into(key, slabs[n % 4]), cost=store.slab_bytes)

    alone = []
    for n in range(READS):
        began = time.perf_counter()
        read(n).wait()
        alone.append(time.perf_counter() - began)
    began = time.perf_counter()
    for event in [read(n) for n in range(READS)]:
        event.wait()
    together = READS * store.slab_bytes / (time.perf_counter() - began)
    device.close()
    alone_s = statistics.median(alone)
    if rate is None:
        return Link(together, alone=min(together, store.slab_bytes / alone_s))
    return Link(together, latency_s=max(0.0, alone_s - store.slab_bytes / together))


class Run(NamedTuple):
    """One policy on one pool: what measured passes took, and counts and bytes of all."""

    seconds: float
    counts: Any
    moved: int

    @property
    def hit_rate(self) -> float:
        return self.counts.hits / (self.counts.hits + self.counts.in_flight + self.counts.misses)


def real(folder: Path, gauge: Gauge, slots: int, policy: str, passes: list[Pass], warm: int) -> tuple[Run, Noting]:
    engine = open_engine(folder, slots, policy, gauge.rate)
    forced, noting = Forced(engine), Noting()
    engine.runtime.decide(noting)
    if policy == "duoserve":
        engine.predict(Known(forced), always=True)
    forced.run(passes[:warm])
    gauge.reset()
    gauge.sample()
    seconds = forced.run(passes[warm:])
    gauge.sample()
    engine.close()  # what is under way ends
    return Run(sum(seconds), engine.runtime.transfer.counts(), int(engine.device.copy.cost_done)), noting


def simulated(machine: Machine, shape: Shape, policy: str, passes: list[Pass], warm: int, noting: Noting | None) -> Run:
    repeating = Repeating(noting.answers, noting.rankings) if noting is not None else None
    foreseeing = Foreseeing(passes, shape.experts) if policy == "duoserve" else None
    simulation = Simulation(shape, machine.costs, machine.link, Policy(policy), predictor=foreseeing, always=True,
                            decisions=repeating)  # fmt: skip
    seconds = sum([simulation.run(one._replace(step=None)) for one in passes][warm:])
    simulation.device.spend(60.0)  # what is under way ends
    outcome = simulation.outcome()
    return Run(seconds, outcome.counts, outcome.moved_bytes)


def cell(folder: Path, gauge: Gauge, share: float, policy: str, args: argparse.Namespace) -> dict[str, Any]:
    shape = Shape((EXPERTS,) * LAYERS, (args.slab_bytes,) * LAYERS, round(share * LAYERS * EXPERTS))
    passes, warm = course(args.rounds + 1, args.tokens, seed=1), args.tokens + 1
    there, noting = real(folder, gauge, shape.slots, policy, passes, warm)
    machine = gauge.machine()
    free, repeated = (simulated(machine, shape, policy, passes, warm, n) for n in (None, noting))
    return {
        "machine": machine.rate or "none",
        "share": share,
        "policy": policy,
        "real_s": there.seconds,
        "simulated_s": free.seconds,
        "ratio": free.seconds / there.seconds,
        "repeated_ratio": repeated.seconds / there.seconds,
        "hit_points": 100 * (free.hit_rate - there.hit_rate),
        "bytes_ratio": free.moved / there.moved,
        "repeated_exactly": repeated.counts == there.counts and repeated.moved == there.moved,
        "counts": there.counts._asdict(),
        "link": asdict(machine.link),
    }


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


def accesses_per_s() -> float:
    """Simulated, of a model with 48 layers of 128 experts, 8 to a token, half of them resident, policy duoserve."""
    rng, layers, experts = random.Random(0), 48, 128
    skew = [1 / (e + 5) for e in range(experts)]
    passes = [
        Pass(Phase.DECODE, 1, [counted(_distinct(rng, skew, 8), experts) for _ in range(layers)]) for _ in range(120)
    ]
    shape = Shape((experts,) * layers, (1 << 21,) * layers, layers * experts // 2)
    began = time.perf_counter()
    outcome = simulate(shape, Nothing(), Link(5e9), Policy.DUOSERVE, passes)
    return outcome.accesses / (time.perf_counter() - began)


def _distinct(rng: random.Random, skew: list[float], n: int) -> set[int]:
    found: set[int] = set()
    while len(found) < n:
        found.add(rng.choices(range(len(skew)), skew)[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machines", default="300MB,none")
    parser.add_argument("--shares", default="0.25,0.5,0.75")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    args.shares = [float(share) for share in args.shares.split(",")]
    args.folder.mkdir(parents=True, exist_ok=True)
    make_model(args.folder)
    args.slab_bytes = prepared(args.folder)
    cells = []
    print(f"{'link':>9s}{'share':>7s}  {'policy':12s}{'real s':>9s}{'clock':>8s}{'ratio':>7s}{'again':>7s}"
          f"{'hits':>8s}{'bytes':>8s}  again to the byte")  # fmt: skip
    for name in args.machines.split(","):
        rate = None if name == "none" else parse_size(name, "link")
        gauge = Gauge(args.folder, rate, args)
        for share in args.shares:
            for policy in args.policies.split(","):
                found = cell(args.folder, gauge, share, policy, args)
                cells.append(found)
                print(f"{name:>9s}{share:7.0%}  {policy:12s}{found['real_s']:9.3f}{found['simulated_s']:8.3f}"
                      f"{found['ratio']:7.3f}{found['repeated_ratio']:7.3f}{found['hit_points']:+7.1f}p"
                      f"{found['bytes_ratio']:8.3f}  {found['repeated_exactly']}", flush=True)  # fmt: skip
        gauge.close()
    limits, rate = limit(args), accesses_per_s()
    print("knowing the future, over the limit:", ", ".join(f"{x:.4f} at {share}" for share, x in limits.items()))
    print(f"{rate:,.0f} accesses/s simulated: a million in {1e6 / rate:.1f} s")
    about = {"rounds": args.rounds, "tokens": args.tokens, "machine": describe()}
    figures = {"cells": cells, "over_limit": limits, "accesses_per_s": rate}
    print(json.dumps({"benchmark": "simulator", **figures, **about}))


def prepared(folder: Path) -> int:
    """Bytes of a slab, once the store is made."""
    engine = open_engine(folder, LAYERS * EXPERTS, "lru", None)
    engine.close()
    return int(engine.store.slab_bytes)


if __name__ == "__main__":
    main()
