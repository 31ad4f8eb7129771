"""Plans for disaggregated experts: what is chosen is the best of what there is, fits memory, and is at least what the
baselines reach.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from dep_extension.cost import Line, Machine, Model, Split, chunks, durations, expert_s, tokens_per_expert
from dep_extension.imbalance import Loads, zipf
from dep_extension.partition import largest_r1, largest_samples, room, splits
from dep_extension.schedule import Order, Work, makespan, timeline
from dep_extension.solver import (
    Cut,
    Plan,
    Problem,
    after_loss,
    best_split,
    findep,
    interleaved,
    naive,
    pppipe,
    scored,
    survived,
    work_of,
    works_of,
)

# Coefficients as FinDEP prints them (its Fig. 7), taken as milliseconds
LINKS = {Split(1, 7): (0.10, 9.61e-7), Split(2, 6): (0.01, 1.28e-6), Split(4, 4): (0.37, 2.55e-6)}
PAPER = Machine(
    "paper",
    8,
    48e9,
    Line(0.17e-3, 8.59e-14),
    Line(0.15e-3, 1.54e-14),
    {split: Line(a * 1e-3, b * 1e-3) for split, (a, b) in LINKS.items()},
)
DEEPSEEK = Model("DeepSeek-V2, 8 layers", 8, 5120, 1536, 160, 6, 2, 128, 192, 128, kv_elements=576)
QWEN = Model("Qwen3-235B, 12 layers", 12, 4096, 1536, 128, 8, 0, 64, 128, 128, kv_elements=1024)


def problem(model: Model = DEEPSEEK, length: int = 2048, **options: object) -> Problem:
    return Problem(model, PAPER, length, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [DEEPSEEK, QWEN], ids=lambda m: m.name)
@pytest.mark.parametrize(("samples", "both_ways"), [(None, 1.0), (24, 1.0), (24, 2.0)])
def test_the_plan_is_the_best_of_all_cuts_and_both_orders(model: Model, samples: int | None, both_ways: float) -> None:
    split = Split(2, 6)
    machine = replace(PAPER, memory_bytes=20e9 if model is DEEPSEEK else 24e9, both_ways=both_ways)
    asked = Problem(model, machine, 1024, samples, max_r1=4, max_r2=12)
    found, fits = findep(asked, split), room(model, machine, split, 1024)
    assert found is not None and fits is not None
    best = 0.0
    for m_a in range(1, largest_samples(fits) + 1):
        for r1 in range(1, 5):
            if fits.holds(m_a, r1) and (samples is None or m_a == math.ceil(samples / 2 / r1)):
                done = (2 * m_a * r1 if samples is None else samples) * 1024
                for r2 in range(1, 13):
                    work = work_of(asked, split, Cut(m_a, r1, r2))
                    best = max(best, done / min(makespan(work, order) for order in Order))
    assert found.tokens_per_s >= 0.995 * best  # chunks are whole tokens, the search is of exact shares


@pytest.mark.parametrize("model", [DEEPSEEK, QWEN], ids=lambda m: m.name)
@pytest.mark.parametrize("length", [1024, 4096])
def test_it_is_never_worse_than_the_baselines(model: Model, length: int) -> None:
    for split in LINKS:
        asked = problem(model, length)
        plans = [solve(asked, split) for solve in (naive, pppipe, findep)]
        if plans[0] is None:
            assert plans == [None] * 3
            continue
        serial, ping_pong, ours = (plan.tokens_per_s for plan in plans if plan is not None)
        assert serial <= ping_pong * (1 + 1e-9) <= ours * (1 + 1e-6)
        assert all(plan is not None and plan.gap >= -1e-12 for plan in plans)


def test_throughput_rises_with_samples_and_with_micro_batches() -> None:
    asked, split = problem(), Split(2, 6)
    for r1 in (1, 2, 4):
        rates = [
            max(scored(asked, split, Cut(m, r1, r2), o, "").tokens_per_s for r2 in (1, 2, 4, 8) for o in Order)
            for m in (1, 2, 4)
        ]
        assert rates == sorted(rates)
    for m in (1, 2):
        rates = [
            max(scored(asked, split, Cut(m, r1, r2), o, "").tokens_per_s for r2 in (1, 2, 4, 8) for o in Order)
            for r1 in (1, 2, 3, 4)
        ]
        assert rates == sorted(rates)


def test_every_token_is_in_one_chunk() -> None:
    for tokens in (1, 7, 64, 1000):
        for r2 in (1, 2, 3, 64):
            many, size, last = chunks(tokens, r2)
            assert (many - 1) * size + last == tokens and 0 < last <= size and many <= r2
    split = Split(3, 5)
    assert tokens_per_expert(DEEPSEEK, split, 2, 100) == math.ceil(2 * 3 * 6 * 100 / 160)


def test_an_expert_product_counts_three_times() -> None:
    one = PAPER.gemm(10 * DEEPSEEK.hidden * DEEPSEEK.expert_hidden)
    assert expert_s(DEEPSEEK, PAPER, Split(4, 4), 10) == pytest.approx(3 * 40 * one)


def test_the_exchange_of_counts_is_paid_for_once_a_micro_batch() -> None:
    slow = replace(PAPER, count_s=5e-3)
    split, cut = Split(2, 6), Cut(1, 2, 4)
    plain, priced = (work_of(Problem(DEEPSEEK, machine, 2048), split, cut) for machine in (PAPER, slow))
    assert priced.count == 5e-3 and durations(DEEPSEEK, slow, split, 1, 2048, 4)[1].counts == 5e-3
    assert makespan(priced, Order.AASS) > makespan(plain, Order.AASS)


def test_memory_bounds_what_is_planned() -> None:
    small = replace(PAPER, memory_bytes=30e9)
    split = Split(2, 6)
    fits = room(DEEPSEEK, small, split, 2048)
    assert fits is not None
    plan = findep(Problem(DEEPSEEK, small, 2048), split)
    assert plan is not None and fits.holds(plan.samples, plan.r1)
    assert not fits.holds(plan.samples, largest_r1(fits, plan.samples) + 1)
    tiny = replace(PAPER, memory_bytes=1e9)
    assert room(DEEPSEEK, tiny, split, 2048) is None and findep(Problem(DEEPSEEK, tiny, 2048), split) is None
    assert best_split(Problem(DEEPSEEK, tiny, 2048)) is None


def test_the_best_ratio_is_the_best_of_all_ratios() -> None:
    asked = problem()
    found = best_split(asked)
    rates = [plan.tokens_per_s for split in splits(DEEPSEEK, 8) if (plan := findep(asked, split)) is not None]
    assert found is not None and found.tokens_per_s == max(rates)


def test_all_orders_are_at_least_as_good_as_two() -> None:
    asked = problem(length=1024, max_r1=4)
    plan = findep(asked, Split(4, 4))
    assert plan is not None
    free = interleaved(asked, plan)
    assert free.makespan_s <= plan.makespan_s and free.bound_s <= free.makespan_s * (1 + 1e-12)


def test_a_plan_for_measured_skew_beats_one_that_assumes_balance() -> None:
    split = Split(2, 6)
    for exponent in (0.5, 1.0):
        blind, seeing = problem(), problem(skew=zipf(160, exponent))
        assumed, known = findep(blind, split), findep(seeing, split)
        assert assumed is not None and known is not None
        cut = Cut(assumed.samples, assumed.r1, assumed.r2)
        executed = scored(seeing, split, cut, assumed.order, "")
        assert executed.makespan_s > assumed.makespan_s
        assert known.tokens_per_s >= executed.tokens_per_s * (1 - 1e-9) or not fits(seeing, split, assumed)


def fits(asked: Problem, split: Split, plan: Plan) -> bool:
    found = asked.room(split)
    return found is not None and found.holds(plan.samples, plan.r1)


def test_a_plan_is_judged_by_several_draws_of_the_measured_chunks() -> None:
    split, cut = Split(4, 4), Cut(1, 4, 8)
    two = Loads.of([[1.0] * 160, [1.0] * 80 + [2.0] * 40 + [0.0] * 40])
    works = works_of(problem(skew=two), split, cut)
    seen = {round(float(seconds), 9) for work in works for seconds in work.expert_IJ[:, :-1].ravel()}
    assert len(works) > 1 and len(seen) == 2, "chunks are the measured ones"
    assert len({work.expert_IJ.tobytes() for work in works}) == len(works), "in another order each time"
    plan = scored(problem(skew=two), split, cut, Order.AASS, "")
    assert plan.makespan_s == pytest.approx(np.mean([makespan(work, Order.AASS) for work in works]))
    assert plan.bound_s <= plan.makespan_s and len(works_of(problem(), split, cut)) == 1


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_even_loads_cost_what_balanced_experts_cost(replicas: int) -> None:
    split, cut = Split(4, 4), Cut(1, 2, 3)
    even = Loads.of([[1.0] * 160] * 5)
    plain, seen = (work_of(problem(skew=skew), split, cut) for skew in (None, even))
    assert np.allclose(plain.expert_IJ, seen.expert_IJ) and np.allclose(plain.a2e_IJ, seen.a2e_IJ)
    more = work_of(problem(skew=even, replicas=replicas), split, cut)
    launches = 3 * (replicas - 1) * 40 * PAPER.gemm.a
    assert np.allclose(more.expert_IJ, seen.expert_IJ + launches), "the same tokens in more, smaller products"


def test_a_chunk_takes_as_long_as_its_busiest_gpu() -> None:
    split, cut = Split(4, 4), Cut(1, 1, 2)
    hot = Loads.of([[1.0] * 80 + [2.0] * 40 + [0.0] * 40])
    work = work_of(problem(length=8192, skew=hot), split, cut)
    last = chunks(tokens_per_expert(DEEPSEEK, split, 1, 8192), 2)[2]
    assert work.expert_IJ[0, 1] == pytest.approx(expert_s(DEEPSEEK, PAPER, split, 2 * last))
    assert work.a2e_IJ[0, 1] == work.e2a_IJ[0, 1] == pytest.approx(PAPER.link(split)(2 * last * 40 * 5120))
    shared = work_of(problem(length=8192, skew=hot, replicas=2), split, cut)
    assert shared.expert_IJ[0, 1] < work.expert_IJ[0, 1], "a copy takes half of what is hot"


def test_replicas_pay_under_skew_and_must_fit() -> None:
    split, roomy = Split(4, 4), replace(PAPER, memory_bytes=200e9)
    few, many = (
        findep(Problem(DEEPSEEK, roomy, 2048, skew=zipf(160, 1.2), samples=8, replicas=r), split) for r in (1, 2)
    )
    assert few is not None and many is not None and many.replicas == 2
    assert many.tokens_per_s > few.tokens_per_s
    tight = replace(PAPER, memory_bytes=30e9)
    assert findep(Problem(DEEPSEEK, tight, 2048), split) is not None
    assert findep(Problem(DEEPSEEK, tight, 2048, replicas=2), split) is None


def test_a_lost_expert_gpu_is_planned_around_with_and_without_replicas() -> None:
    asked = Problem(DEEPSEEK, replace(PAPER, memory_bytes=80e9), 2048, samples=16)
    for replicas, loaded in ((1, 8 * 40), (2, 0)):
        mine = replace(asked, replicas=replicas)
        plan = findep(mine, Split(4, 4))
        assert plan is not None
        less = survived(mine, plan, (1,))
        assert less is not None and less.plan.split == Split(4, 3) and less.loaded == loaded
        assert less.plan.tokens_per_s < plan.tokens_per_s and less.plan.replicas == replicas
        assert after_loss(mine, plan, 1) is not None and after_loss(mine, plan, 4) is None
        assert len(less.held) == 8 and all({e for one in held for e in one} == set(range(160)) for held in less.held)
        assert survived(mine, plan, range(4)) is None
        twice = survived(replace(mine, held=less.held), less.plan, (0,))
        assert twice is not None and twice.plan.split == Split(4, 2)
    full = replace(asked, machine=replace(PAPER, memory_bytes=18e9))
    plan = findep(full, Split(1, 7))
    assert plan is not None and survived(full, plan, range(4)) is None, "three GPUs have no room for all experts"


def test_a_long_run_takes_as_long_as_its_timeline_says() -> None:
    """Layers become alike, and are then counted instead of simulated."""
    draw = np.random.default_rng(5)
    for _ in range(15):
        r1, r2, layers = int(draw.integers(1, 5)), int(draw.integers(1, 5)), int(draw.integers(1, 70))
        parts = [draw.integers(0, 30, size) * 1e-3 for size in (r1, r1, (r1, r2), (r1, r2), (r1, r2))]
        work = Work(layers, parts[0], parts[1], 1e-3 * float(draw.integers(0, 3)), *parts[2:])
        for order in Order:
            ends = [task.end for task in timeline(work, order)]
            assert makespan(work, order) == pytest.approx(max(ends, default=0.0), rel=1e-9)


def test_many_micro_batches_are_ordered_in_bounded_time() -> None:
    asked, split = problem(length=64, samples=128, max_r1=64), Split(2, 6)
    plan = scored(asked, split, Cut(1, 64, 1), Order.ASAS, "")
    free = interleaved(asked, replace(plan, bound_s=plan.makespan_s / 2))
    assert free.makespan_s <= plan.makespan_s
    assert interleaved(asked, replace(plan, bound_s=plan.makespan_s)) == replace(plan, bound_s=plan.makespan_s)


def test_sixty_four_layers_are_solved(record_property: object) -> None:
    deep = replace(DEEPSEEK, layers=64, kv_elements=64, weight_bytes=0.5)
    big = Problem(deep, replace(PAPER, memory_bytes=400e9), 2048)
    began = time.perf_counter()
    plan = findep(big, Split(2, 6))
    assert plan is not None and plan.r2 <= 64
    record_property("solve_s", time.perf_counter() - began)  # type: ignore[operator]


def test_nothing_to_plan_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="0 samples of 2048 tokens are nothing to plan for"):
        problem(samples=0)
