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
from dep_extension.partition import largest_r1, largest_samples, room, splits
from dep_extension.schedule import Order, makespan
from dep_extension.solver import (
    Cut,
    Problem,
    after_loss,
    best_split,
    findep,
    interleaved,
    naive,
    pppipe,
    scored,
    skewed,
    work_of,
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
@pytest.mark.parametrize("samples", [None, 24])
def test_the_plan_is_the_best_of_all_cuts_and_both_orders(model: Model, samples: int | None) -> None:
    split = Split(2, 6)
    machine = replace(PAPER, memory_bytes=20e9 if model is DEEPSEEK else 24e9)
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
    for strength in (1.5, 3.0):
        loads = tuple(tuple(strength if g == c % 6 else (6 - strength) / 5 for g in range(6)) for c in range(8))
        blind, seeing = problem(), problem(skew=loads)
        assumed, known = findep(blind, split), findep(seeing, split)
        assert assumed is not None and known is not None
        cut = Cut(assumed.samples, assumed.r1, assumed.r2)
        executed = scored(seeing, split, cut, assumed.order, "")
        assert executed.makespan_s > assumed.makespan_s
        assert known.tokens_per_s >= executed.tokens_per_s * (1 - 1e-9)
    even = work_of(blind, split, Cut(1, 2, 3))
    assert np.allclose(skewed(even, np.array([[1.0, 2.0]])).expert_IJ, 2 * even.expert_IJ)


def test_a_lost_expert_gpu_is_planned_around() -> None:
    asked = problem()
    plan = findep(asked, Split(2, 6))
    assert plan is not None
    less = after_loss(asked, plan)
    assert less is not None and less.split == Split(2, 5) and less.tokens_per_s < plan.tokens_per_s
    assert after_loss(asked, plan, 6) is None


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
