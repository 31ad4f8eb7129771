"""Every policy answers alike; each does what it is named for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from guessers import Dice
from test_ahead import greedy
from test_hazards import EXPERTS, LAYERS, folder  # noqa: F401  (the numbered store)

from duoserve.cache import ExpertCache, Keep
from duoserve.core import Key, Phase, Policy, Step
from duoserve.decisions import Noting, Repeating
from duoserve.device import ThreadDevice
from duoserve.future import NEVER, Future
from duoserve.moe import Runtime, Work, open_runtime
from duoserve.simulate import Link, Pass, Shape, simulate
from duoserve.store import Store

FEW: dict[str, Any] = {"max_new_tokens": 6}
Passes = list[list[list[int]]]  # of each pass, of each layer, the experts chosen


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_logits_are_bit_identical_whatever_the_policy(toy: Any, load: Any, family: str) -> None:
    """One sequence and three, one of them padded. Two slots, and half of the experts, by family and policy in turn."""
    ids, checkpoint = toys.ids(batch=3), toy(family)
    ids[1, :4], mask = 0, torch.ones_like(ids)
    mask[1, :4] = 0

    def answers(engine: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [greedy(engine, ids[:1], **FEW), greedy(engine, ids, attention_mask=mask, **FEW)]

    whole = load(checkpoint, budget="1GiB")
    assert whole.plan.slots == whole.plan.experts
    steps: list[Step] = []
    whole.runtime.observers.append(steps.append)
    want = answers(whole)
    experts = [layer.n_experts for layer in whole.store.layers]
    first = ("min", "half") if family in ("mixtral", "gpt_oss") else ("half", "min")
    for policy, budget in zip(("lfp", "mif", "belady", "duoserve-paper"), (*first, *first[::-1]), strict=True):
        engine = load(checkpoint, budget=budget, policy=policy, future=Future.of(steps, experts))
        for guesser in (None, Dice(experts[0])) if policy in ("mif", "duoserve-paper") else (None,):
            engine.predict(guesser)
            for (tokens, logits), (same_tokens, same_logits) in zip(want, answers(engine), strict=True):
                assert torch.equal(tokens, same_tokens) and torch.equal(logits, same_logits), (policy, budget)
        engine.runtime.cache.check()
        assert policy != "belady" or engine.stats()["prediction"]["turns_otherwise"] == 0


# Schedules alone: the runtime as it is, over the numbered store, with nothing to compute


@pytest.fixture
def runtimes(folder: Path) -> Iterator[Any]:  # noqa: F811
    """`runtimes(slots, policy)`."""
    opened: list[tuple[ThreadDevice, Store]] = []

    def make(slots: int, policy: Policy) -> Runtime:
        opened.append((ThreadDevice(), Store(folder)))
        return open_runtime(*opened[-1], slots, policy)

    yield make
    for device, store in opened:
        device.close()
        store.close()


def run(runtime: Runtime, passes: Passes, prompts: int = 0) -> None:
    """The first `prompts` passes as prompts, the others as decode; one row for each expert."""
    for number, layers in enumerate(passes):
        rows = 20 if number < prompts else 1
        runtime.begin(Step(number, Phase.PREFILL if number < prompts else Phase.DECODE, rows))
        for layer, experts in enumerate(layers):
            runtime.enter(layer, torch.empty(0))
            runtime.bring(layer, rows, dict.fromkeys(experts, 1), lambda slot: Work(int), Work(int))
        runtime.finish()
    runtime.cache.check()


class Costs:
    """Of a virtual machine: something."""

    launch_s, predict_s = 0.0, 1e-5

    def trunk_s(self, layer: int, rows: int, phase: Phase) -> float:
        return 3e-5

    def expert_s(self, layer: int, rows: int) -> float:
        return 1e-5

    def combine_s(self, layer: int, rows: int) -> float:
        return 1e-6


def as_passes(passes: Passes, prompts: int) -> Iterator[Pass]:
    for number, layers in enumerate(passes):
        phase, rows = (Phase.PREFILL, 20) if number < prompts else (Phase.DECODE, 1)
        yield Pass(phase, rows, [dict.fromkeys(experts, 1) for experts in layers])


def random_passes(rng: random.Random, n: int, most: int) -> Passes:
    """Skewed as routers are: some experts of a layer are chosen often."""
    weights = [[rng.random() ** 3 + 0.01 for _ in range(EXPERTS)] for _ in range(LAYERS)]
    return [[sorted({*rng.choices(range(EXPERTS), w, k=rng.randint(1, most))}) for w in weights] for _ in range(n)]


def moved(runtime: Runtime) -> int:
    """Slabs that have crossed, once nothing is under way."""
    copy = runtime.device.copy
    while any(not slot.ready.done for slot in runtime.cache.slots if slot.ready is not None):
        pass
    return int(copy.cost_done) // runtime.transfer.slab_bytes


@pytest.mark.parametrize("policy, asks", [(Policy.LFP, False), (Policy.MIF, False), (Policy.MIF, True),
                                          (Policy.PAPER, True), (Policy.BELADY, False)])  # fmt: skip
@pytest.mark.parametrize("slots", [2, 5, 17])
def test_a_recorded_run_repeats_itself_in_virtual_time(runtimes: Any, policy: Policy, asks: bool, slots: int) -> None:
    passes = random_passes(random.Random(slots), 30, 4)
    runtime, noting = runtimes(slots, policy), Noting()
    runtime.decide(noting)
    if asks:
        runtime.predict(Dice(EXPERTS))
    future = Future([EXPERTS] * LAYERS, passes) if policy is Policy.BELADY else None
    if future is not None:
        runtime.foresee(future)
    run(runtime, passes, prompts=3)
    slab, n_moved = runtime.transfer.slab_bytes, moved(runtime)
    shape = Shape((EXPERTS,) * LAYERS, (slab,) * LAYERS, slots)
    outcome = simulate(
        shape, Costs(), Link(1e9), policy, list(as_passes(passes, 3)), predictor=Dice(EXPERTS) if asks else None,
        decisions=(repeating := Repeating(noting.answers, noting.rankings)), future=future,
    )  # fmt: skip
    assert repeating.over and outcome.counts == runtime.transfer.counts()
    assert n_moved - len(runtime.cache.slots) <= outcome.moved_bytes / slab <= n_moved  # some are under way at the end


def test_lfp_moves_whole_layers_whatever_is_chosen(runtimes: Any) -> None:
    """Room for two layers of three: every pass moves every layer, one layer ahead, that of the pass after next as well."""
    runtime = runtimes(2 * EXPERTS, Policy.LFP)
    passes = random_passes(random.Random(0), 30, 3)
    run(runtime, passes, prompts=3)
    counts = runtime.transfer.counts()
    assert moved(runtime) == (30 * LAYERS + 1) * EXPERTS
    assert counts.misses == 0 and counts.guesses == moved(runtime)
    whole = runtimes(LAYERS * EXPERTS, Policy.LFP)
    run(whole, passes, prompts=3)
    assert moved(whole) == LAYERS * EXPERTS  # what is there does not travel again


@pytest.mark.parametrize("slots", [2, 5, EXPERTS, EXPERTS + 3])
def test_lfp_with_less_room_fetches_what_fits_and_what_was_chosen(runtimes: Any, slots: int) -> None:
    runtime = runtimes(slots, Policy.LFP)
    run(runtime, random_passes(random.Random(slots), 40, 5), prompts=5)
    counts = runtime.transfer.counts()
    assert counts.guesses > 0 and (slots >= EXPERTS) == (counts.misses == 0), counts


def test_as_published_no_more_than_its_slots_are_held_and_the_predictors_choice_is_fetched(runtimes: Any) -> None:
    runtime = runtimes(3, Policy.PAPER)
    runtime.predict(Dice(EXPERTS))
    run(runtime, random_passes(random.Random(0), 40, 3), prompts=2)
    counts = runtime.transfer.counts()
    assert len(runtime.cache.slots) == 3 and counts.wrong > 0
    assert moved(runtime) == counts.misses + counts.guesses  # none is taken back


def test_as_published_top_k_slots_can_be_asked_for(toy: Any, load: Any) -> None:
    engine = load(toy("qwen3_moe", num_experts_per_tok=3), budget="half", policy="duoserve-paper", slots="top-k")
    assert engine.plan.slots == len(engine.runtime.cache.slots) == 3
    assert load(toy("qwen3_moe"), budget="half", slots=4).plan.slots == 4
    assert load(toy("qwen3_moe"), budget="min", slots=400).plan.slots == 2


def test_mif_fetches_what_a_request_like_this_one_chose(runtimes: Any) -> None:
    """Two kinds of requests take turns. Once each was seen, the first layers of a prompt tell which it is."""
    kinds = [[[0, 1], [2, 3], [4, 5]], [[6, 7], [0, 1], [2, 3]]]
    found = {}
    for policy in (Policy.LRU, Policy.MIF):
        runtime = runtimes(4, policy)
        for number in range(12):
            if number == 4:
                before = runtime.transfer.counts()
            run(runtime, [kinds[number % 2]] * 3, prompts=1)
            moved(runtime)
        after = runtime.transfer.counts()
        found[policy] = after.misses - before.misses
    assert runtime.ahead.stats()["requests"] == 11
    assert found[Policy.MIF] < 0.5 * found[Policy.LRU], found


def test_mif_asks_a_predictor_where_there_is_one(runtimes: Any) -> None:
    runtime = runtimes(5, Policy.MIF)
    dice = Dice(EXPERTS)
    runtime.predict(dice)
    run(runtime, random_passes(random.Random(1), 20, 2), prompts=1)
    assert dice.observed == 20 and runtime.ahead.stats()["predictor"] == "dice"
    assert runtime.transfer.counts().guesses > 0


# The future


def test_the_future_says_when_each_expert_is_next() -> None:
    future = Future([3, 2], [[[0, 2], [1]], [[2], [0, 1]], [[0], [1]]])
    assert future.turns == 6 and future.soonest.tolist() == [0, NEVER, 0, 3, 1]
    turns = [tuple(a.tolist() for a in future.between(turn, turn + 1)) for turn in range(7)]
    assert turns[:3] == [([0, 2], [4, 2]), ([4], [3]), ([2], [NEVER])]
    assert turns[3:] == [([3, 4], [NEVER, 5]), ([0], [NEVER]), ([4], [NEVER]), ([], [])]
    assert future.between(1, 4)[0].tolist() == [4, 2, 3, 4] and not len(future.between(4, 2)[0])


def fewest_misses(passes: Passes, n_slots: int) -> int:
    """By trying every choice: the experts of a turn must be there together."""
    turns = [{(layer, e) for e in experts} for layers in passes for layer, experts in enumerate(layers)]
    states: dict[frozenset[Any], int] = {frozenset(): 0}
    for wanted in turns:
        found: dict[frozenset[Any], int] = {}
        for held, misses in states.items():
            others, room = sorted(held - wanted), n_slots - len(wanted)
            for kept in itertools.combinations(others, min(room, len(others))):
                state, count = frozenset(kept) | wanted, misses + len(wanted - held)
                found[state] = min(count, found.get(state, count))
        states = found
    return min(states.values())


def misses(runtime: Runtime, passes: Passes) -> int:
    if runtime.policy is Policy.BELADY:
        runtime.foresee(Future([EXPERTS] * LAYERS, passes))
    run(runtime, passes)
    return runtime.transfer.counts().misses


@pytest.mark.parametrize("seed", range(12))
def test_belady_without_its_prefetch_misses_as_seldom_as_can_be(runtimes: Any, seed: int) -> None:
    rng = random.Random(seed)
    passes, slots = random_passes(rng, 5, 2), rng.randint(2, 6)
    runtime = runtimes(slots, Policy.BELADY)
    runtime.transfer.guess = lambda key, over: None
    assert misses(runtime, passes) == fewest_misses(passes, slots)


@pytest.mark.parametrize("seed", range(8))
def test_belady_misses_no_more_than_lru_and_its_prefetch_moves_no_more_than_it_must(runtimes: Any, seed: int) -> None:
    rng = random.Random(seed)
    passes, slots = random_passes(rng, 60, 1 + seed % 4), rng.randint(4, 20)
    demand = runtimes(slots, Policy.BELADY)
    demand.transfer.guess = lambda key, over: None
    fewest, lru = misses(demand, passes), misses(runtimes(slots, Policy.LRU), passes)
    runtime = runtimes(slots, Policy.BELADY)
    found = misses(runtime, passes)
    assert found < fewest <= lru
    assert found + runtime.transfer.counts().guesses == fewest == moved(runtime)


def test_a_pool_that_is_told_keeps_what_is_worth_most() -> None:
    cache = ExpertCache(2, [2, 2], Keep.TOLD)
    cache.appraise(np.array([1.0, 4.0, 3.0, 2.0]))
    assert cache.wanted() == Key(0, 1)
    for key in (Key(0, 0), Key(0, 1)):
        slot = cache.claim(key)
        assert slot is not None
        cache.unpin(slot)
    offer = cache.offer()
    assert offer is not None and offer.key == Key(0, 0)
    assert cache.wanted() == Key(1, 0) and cache.outranks(Key(1, 0), offer)
    cache.appraise(np.array([5.0]), np.array([0]))
    assert not cache.outranks(Key(1, 0), offer) and cache.offer().key == Key(0, 1)  # type: ignore[union-attr]
