"""The simulator is the engine on another clock: the same passes choose the same slots, the same answers of the clock give
the same bytes, and no link carries more than it can.
"""

from __future__ import annotations

import random
import time
from typing import Any, cast

import pytest
import torch
from guessers import Dice, foreseeing

from duoserve.core import Key, Phase, Policy
from duoserve.decisions import Noting, Repeating
from duoserve.device import ThreadDevice
from duoserve.future import Future
from duoserve.moe import open_runtime
from duoserve.simulate import Driver, Link, Pass, Shape, Simulation, Slabs, counted, simulate
from duoserve.timeline import Timeline
from duoserve.transfer import HostTier

LAYERS, EXPERTS, CHOICES, SLAB = 6, 16, 3, 1 << 20
SHAPE = Shape((EXPERTS,) * LAYERS, (SLAB,) * LAYERS, slots=LAYERS * EXPERTS // 3)
TIERED = Shape(SHAPE.experts, SHAPE.slab_bytes, slots=12, host_slots=40)


class Stated:
    """Costs as stated, the same for all."""

    def __init__(self, trunk_s: float = 1e-3, expert_s: float = 2e-4, predict_s: float = 1e-4, launch_s: float = 0.0):
        self.trunk, self.expert, self.predict_s, self.launch_s = trunk_s, expert_s, predict_s, launch_s

    def trunk_s(self, layer: int, rows: int, phase: Phase) -> float:
        return self.trunk

    def expert_s(self, layer: int, rows: int) -> float:
        return self.expert

    def combine_s(self, layer: int, rows: int) -> float:
        return self.expert / 10


def recorded(prompt: int = 30, tokens: int = 40, seed: int = 0) -> list[Pass]:
    """A prompt and its answer from a skewed router."""
    rng = random.Random(seed)
    skew = [1 / (1 + e) for e in range(EXPERTS)]

    def one(rows: int) -> list[dict[int, int]]:
        return [counted((e for _ in range(rows) for e in set(rng.choices(range(EXPERTS), skew, k=CHOICES))), EXPERTS)
                for _ in range(LAYERS)]  # fmt: skip

    return [Pass(Phase.PREFILL, prompt, one(prompt)), *(Pass(Phase.DECODE, 1, one(1)) for _ in range(tokens))]


class Slow(Slabs):
    """A store whose reads take a time of their own each."""

    def __init__(self, shape: Shape, most_s: float):
        super().__init__(shape)
        self._most_s, self._rng = most_s, random.Random(1)

    def read_into(self, key: Key, buffer: torch.Tensor) -> None:
        time.sleep(self._most_s * self._rng.random())


class OnThreads(Driver):
    """The same passes on real threads, with real waiting."""

    def __init__(
        self, policy: Policy, shape: Shape, copy_s: float = 3e-4, predictor: Any = None, decisions: Any = None
    ):
        device, store = ThreadDevice(host_tier=shape.host_slots > 0), cast(Any, Slow(shape, copy_s))
        host = HostTier(device, store, shape.host_slots) if shape.host_slots else None
        super().__init__(open_runtime(device, store, shape.slots, policy, host), Stated(1e-4, 0.0), time.sleep)
        if predictor is not None:
            self.runtime.predict(predictor, always=True)
        if decisions is not None:
            self.runtime.decide(decisions)

    def all(self, passes: list[Pass]) -> tuple[Any, int]:
        """Counts and bytes moved, guesses that run on included."""
        for one in passes:
            self.run(one)
        self.runtime.device.close()
        return self.runtime.transfer.counts(), int(self.runtime.device.copy.cost_done)


def settled(simulation: Simulation, passes: list[Pass]) -> tuple[Any, int]:
    for one in passes:
        simulation.run(one)
    simulation.device.spend(1000.0)
    outcome = simulation.outcome()
    simulation.runtime.cache.check()
    return outcome.counts, outcome.moved_bytes


@pytest.mark.parametrize("policy", [Policy.ON_DEMAND, Policy.LRU])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_fetches_on_demand_hits_and_moves_the_same_on_any_clock(policy: Policy, asynchronous: bool) -> None:
    passes = recorded()
    real = OnThreads(policy, SHAPE).all(passes)
    assert settled(Simulation(SHAPE, Stated(), Link(1e9), policy, asynchronous=asynchronous), passes) == real


class Pondering(Dice):
    """Random rankings that take longer than the model's thread waits for."""

    def rank(self, step: Any, layer: int) -> torch.Tensor:
        time.sleep(1.5e-3)
        return super().rank(step, layer)


@pytest.mark.parametrize("shape", [SHAPE, TIERED], ids=["two tiers", "three tiers"])
@pytest.mark.parametrize("guesser", [None, Dice, Pondering], ids=["prompt only", "at once", "on a thread"])
def test_a_run_on_threads_is_repeated_to_the_byte(shape: Shape, guesser: Any) -> None:
    """Copies end when they like on threads; on a clock many times slower the same answers give the same counts and bytes."""
    passes, noting = recorded(), Noting()
    real = OnThreads(Policy.DUOSERVE, shape, 1e-3, guesser and guesser(EXPERTS), noting).all(passes)
    assert real[0].guesses > 0
    for link in (Link(2e7), Link(1e12)):
        repeating = Repeating(noting.answers, noting.rankings)
        simulation = Simulation(shape, Stated(), link, Policy.DUOSERVE, disk=link, predictor=guesser and guesser(EXPERTS),
                                always=True, decisions=repeating)  # fmt: skip
        assert settled(simulation, passes) == real
        assert repeating.over


@pytest.mark.parametrize("policy", [Policy.LFP, Policy.PAPER, Policy.MIF, Policy.BELADY])
def test_every_policy_is_repeated_to_the_byte(policy: Policy) -> None:
    passes, noting = recorded(), Noting()
    threads = OnThreads(policy, SHAPE, 1e-3, Dice(EXPERTS) if policy is Policy.PAPER else None, noting)
    future = Future(SHAPE.experts, [one.chosen for one in passes])
    if policy is Policy.BELADY:
        threads.runtime.foresee(future)
    real = threads.all(passes)
    repeating = Repeating(noting.answers, noting.rankings)
    simulation = Simulation(SHAPE, Stated(), Link(1e8), policy, always=True, decisions=repeating,
                            predictor=Dice(EXPERTS) if policy is Policy.PAPER else None)  # fmt: skip
    if policy is Policy.BELADY:
        simulation.runtime.foresee(future)
    assert settled(simulation, passes) == real and real[0].guesses > 0
    assert repeating.over


def test_without_a_recording_guesses_depend_on_the_clock() -> None:
    """So that the test above can fail."""
    passes = recorded()
    found = {settled(Simulation(SHAPE, Stated(), Link(rate), Policy.DUOSERVE, predictor=Dice(EXPERTS), always=True), passes)
             for rate in (2e7, 1e12)}  # fmt: skip
    assert len(found) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, TIERED], ids=["two tiers", "three tiers"])
def test_the_same_run_twice_is_the_same(shape: Shape, asynchronous: bool) -> None:
    passes = recorded()
    runs = [
        simulate(shape, Stated(), Link(1e9), Policy.DUOSERVE, passes, disk=Link(1e9, 1e-5, 2, 6e8), always=True,
                 predictor=foreseeing(passes, shape.experts, 0.8), asynchronous=asynchronous)
        for _ in range(2)
    ]  # fmt: skip
    assert runs[0] == runs[1] and runs[0].counts.guesses > 0


def test_on_demand_takes_the_sum_of_its_parts() -> None:
    """Nothing overlaps: trunk, copies and experts add up to the second."""
    passes, costs, link = recorded(prompt=1, tokens=20), Stated(), Link(1e9)
    found = simulate(SHAPE, costs, link, Policy.ON_DEMAND, passes)
    expected = len(passes) * ((LAYERS + 1) * costs.trunk + LAYERS * costs.expert / 10)
    expected += found.accesses * costs.expert + found.counts.misses * SLAB / 1e9
    assert found.total_s == pytest.approx(expected) and found.moved_bytes == found.counts.misses * SLAB
    assert found.stalls["demand"] == pytest.approx(found.link_busy_s) == pytest.approx(found.moved_bytes / 1e9)


@pytest.mark.parametrize("policy", list(Policy))
def test_no_run_is_quicker_than_its_link_or_its_compute(policy: Policy) -> None:
    passes, costs = recorded(), Stated()
    asks = policy in (Policy.DUOSERVE, Policy.PAPER, Policy.MIF)
    guesser = foreseeing(passes, SHAPE.experts) if asks else None
    found = simulate(SHAPE, costs, Link(2e9), policy, passes, predictor=guesser, always=True)
    compute = len(passes) * (LAYERS + 1) * costs.trunk + found.accesses * costs.expert
    assert found.total_s >= max(compute, found.link_busy_s) and found.link_busy_s >= found.moved_bytes / 2e9 - 1e-9


def test_a_ranking_that_takes_long_comes_too_late() -> None:
    passes = recorded(prompt=1)
    quick, slow = (simulate(SHAPE, Stated(predict_s=s), Link(4e9), Policy.DUOSERVE, passes, always=True,
                            predictor=foreseeing(passes, SHAPE.experts)) for s in (1e-5, 5e-3))  # fmt: skip
    assert quick.counts.ready + quick.counts.late > 100 > slow.counts.ready + slow.counts.late
    assert slow.prediction is not None and slow.prediction["rankings_too_late"] > 100


def test_busy_and_stalled_make_up_the_time_of_the_model() -> None:
    passes, timeline = recorded(), Timeline()
    found = simulate(SHAPE, Stated(), Link(1e9), Policy.DUOSERVE, passes, always=True, timeline=timeline,
                     predictor=foreseeing(passes, SHAPE.experts))  # fmt: skip
    spans = [span for span in timeline.spans() if span.lane == "compute"]
    assert sum(span.end - span.start for span in spans) == pytest.approx(found.total_s)
    stalled = sum(span.end - span.start for span in spans if span.kind == "stall")
    assert stalled == pytest.approx(sum(found.stalls.values())) and stalled > 0


def fewest_misses(passes: list[Pass], slots: int) -> int:
    """Of a pool that knows the future (Belady, MIN): what is wanted last goes first. Written anew, as a check."""
    turns = [[(layer, e) for e in one] for p in passes for layer, one in enumerate(p.chosen)]
    uses: dict[tuple[int, int], list[int]] = {}
    for turn, keys in enumerate(turns):
        for key in keys:
            uses.setdefault(key, []).append(turn)
    held: set[tuple[int, int]] = set()
    missed = 0
    for keys in turns:
        for key in keys:
            uses[key].pop(0)
        for key in keys:
            if key not in held:
                missed += 1
                if len(held) == slots:
                    others = held - set(keys)
                    held.remove(max(others, key=lambda k: uses[k][0] if uses[k] else len(turns)))
                held.add(key)
    return missed


@pytest.mark.parametrize("slots", [10, 32, 60])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_who_knows_the_future_reaches_the_limit_of_the_link(slots: int, asynchronous: bool) -> None:
    """With a device that computes in no time, the fewest bytes that can be moved take as long as the link needs for them."""
    passes = recorded(prompt=1, tokens=150)
    shape, costs, link = Shape(SHAPE.experts, SHAPE.slab_bytes, slots), Stated(0.0, 0.0, 0.0), Link(1e9)
    limit = fewest_misses(passes, slots) * SLAB / 1e9
    future = Future(shape.experts, [one.chosen for one in passes])
    found = simulate(shape, costs, link, Policy.BELADY, passes, asynchronous=asynchronous, future=future)
    assert limit * (1 - 1e-9) <= found.total_s <= 1.03 * limit
    lru = simulate(shape, costs, link, Policy.LRU, passes, asynchronous=asynchronous)
    assert lru.total_s > 1.2 * found.total_s
