"""Which ratio and how many copies: the search misses nothing, imbalance is what it should be, and the baseline without two
groups is priced by the same lines and executed by its own rules.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from dep_extension import testbeds
from dep_extension.colocated import ORDERS, Parts, colocated, parts_of, simulate
from dep_extension.cost import Split, attention_s, expert_s, shared_s
from dep_extension.imbalance import Loads, burden, burden_of_shares, counted, zipf
from dep_extension.partition import RESERVE, least, room, shares, splits
from dep_extension.ratio import Copying, best_plan, compare, numbers_of_replicas, ratios, ways
from dep_extension.schedule import Order, makespan, timeline
from dep_extension.solver import Cut, Problem, best_split, exposed_link_s, findep, naive, pppipe, scored, work_of

MODEL, MACHINE = testbeds.model("deepseek-v2", "A"), testbeds.named("A")


def test_the_burden_by_sums_is_that_of_the_shares_themselves() -> None:
    rng, draw = random.Random(1), np.random.default_rng(1)
    for _ in range(300):
        experts, ranks = rng.randint(1, 40), rng.randint(1, 20)
        replicas = rng.randint(1, ranks)
        loads = None if rng.random() < 0.2 else Loads.of((draw.random((3, experts)) + 1e-3).tolist())
        held = shares(experts, ranks, replicas)
        quick, slow = burden_of_shares(loads, experts, ranks, replicas), burden(loads, (held,), experts)
        assert quick.experts == slow.experts and np.allclose(quick.most_C, slow.most_C)


def test_a_burden_is_what_the_busiest_gpu_gets() -> None:
    hot = Loads.of([[8, 1, 1, 1, 1, 1, 1, 2]])  # mean 2
    assert burden(hot, (((0, 1), (2, 3), (4, 5), (6, 7)),)).most_C == pytest.approx([4.5])
    assert burden(hot, (((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 2, 3), (4, 5, 6, 7)),)).most_C == pytest.approx([2.75])
    assert burden(None, (((0, 1, 2), (3,)),), 4) == (3, pytest.approx([3.0]))
    assert burden(hot, (shares(8, 8, 8),)).most_C == pytest.approx([1.0]), "everybody has everything"


def test_loads_are_scaled_and_strange_ones_refused() -> None:
    assert Loads.of([[1, 3], [0, 5]]).loads_CE.tolist() == [[0.5, 1.5], [0.0, 2.0]]
    assert Loads.of([[1, 3]]).skew == 1.5 and zipf(8, 0.0).skew == 1.0 and zipf(8, 1.0).skew > 2
    for rows in ([], [[]], [[1, 2], [1]], [[1, -1]], [[0, 0]], [[1, float("nan")]], [[1, float("inf")]]):
        with pytest.raises(ValueError, match="give") as raised:
            Loads.of(rows)
        assert len(str(raised.value).splitlines()) == 1
    ids_TK = np.array([[0, 1], [0, 2], [0, 3], [3, 3], [1, 1]])
    assert counted([ids_TK], 4, 2).loads_CE.tolist() == [[2, 1, 1, 0], [1, 0, 0, 3]]
    with pytest.raises(ValueError, match="layer 0 has 5 of the 6 tokens of a chunk"):
        counted([ids_TK], 4, 6)
    with pytest.raises(ValueError, match=r"loads are of 4 experts, .* has 160"):
        Problem(MODEL, MACHINE, 1024, skew=Loads.of([[1] * 4]))


@pytest.mark.parametrize("gpus", [5, 8])
def test_the_search_over_ratios_is_as_good_as_solving_each(gpus: int) -> None:
    for skew in (None, zipf(160, 0.8)):
        problem = Problem(MODEL, MACHINE, 2048, 24, max_r1=4, skew=skew)
        found = best_plan(problem, gpus)
        each = [best_split(replace(problem, replicas=r), gpus) for r in numbers_of_replicas(problem, gpus)]
        best = max(plan.tokens_per_s for plan in each if plan is not None)
        assert found is not None and found.tokens_per_s >= 0.995 * best, "candidates are pooled, then simulated"


def test_many_gpus_are_searched_on_a_grid_and_around_its_best() -> None:
    problem = Problem(MODEL, replace(MACHINE, gpus=256), 2048, max_r1=2, max_r2=16)
    found = best_plan(problem, 96)
    assert found is not None
    at = replace(problem, replicas=found.replicas)
    all_ = list(splits(MODEL, 96, found.replicas))
    assert 20 <= len(list(ratios(at, 96))) < len(all_)
    some = [plan for split in all_[::12] if (plan := findep(at, split)) is not None]
    assert found.tokens_per_s >= 0.98 * max(plan.tokens_per_s for plan in some)
    skewed = best_plan(replace(problem, skew=zipf(160, 0.8)), 96)
    assert skewed is not None and skewed.replicas > found.replicas and skewed.tokens_per_s < found.tokens_per_s


def test_each_way_is_at_its_own_best_and_the_plan_at_least_as_good_as_the_baselines() -> None:
    problem = Problem(MODEL, MACHINE, 2048, max_r1=3, max_r2=16, skew=zipf(160, 0.6))
    found = compare(problem, 8)
    assert found is not None and found.ways.naive is not None and found.ways.pppipe is not None
    for row in found.rows:
        for best, one in (
            (found.ways.naive, row.naive),
            (found.ways.pppipe, row.pppipe),
            (found.ways.findep, row.findep),
        ):
            assert one is None or one.tokens_per_s <= best.tokens_per_s * (1 + 1e-9)
    ours = found.plan.tokens_per_s * (1 + 1e-9)
    assert found.ways.naive.tokens_per_s <= found.ways.pppipe.tokens_per_s <= ours
    asked = compare(problem, 8, Split(4, 4), Copying(replicas=1))
    assert asked is not None and asked.plan.split == Split(4, 4) and asked.plan.replicas == 1 and len(asked.rows) == 1
    assert ways(Problem(MODEL, replace(MACHINE, memory_bytes=5e9), 2048), 8) is None


def test_what_a_model_needs_at_least_is_what_room_asks_for() -> None:
    for batch in (None, 3, 40):
        need = least(MODEL, list(splits(MODEL, 8)), 2048, batch, 8)
        each = 1 if batch is None else -(-batch // need.split.ag)
        for factor, fits in ((0.999, False), (1.001, True)):
            found = room(MODEL, replace(MACHINE, memory_bytes=need.n_bytes * factor), need.split, 2048)
            r1 = min(8, each)
            assert (found is not None and found.holds(-(-each // r1), r1)) == fits or r1 * -(-each // r1) > each


def test_colocated_is_the_sum_of_its_parts_where_nothing_overlaps() -> None:
    problem = Problem(MODEL, MACHINE, 2048, 16)
    serial = colocated(problem, 8)[0]
    split = Split(8, 8)
    tokens = -(-16 * 2048 * 6 // 160)
    parts = parts_of(problem, 8, 2)
    assert parts.attention == attention_s(MODEL, MACHINE, 2, 2048) and parts.shared == shared_s(MODEL, MACHINE, 2, 2048)
    assert parts.expert == pytest.approx(expert_s(MODEL, MACHINE, split, tokens))
    assert parts.exchange == pytest.approx(MACHINE.link(split)(tokens * 20 * 5120 * 7 / 8))
    layer = parts.attention + max(parts.shared, parts.exchange) + parts.expert + parts.exchange
    assert serial.micro_batches == 1 and serial.makespan_s == pytest.approx(MODEL.layers * layer)
    assert serial.tokens_per_s == pytest.approx(16 * 2048 / serial.makespan_s)


def test_two_overlapped_micro_batches_keep_every_rule() -> None:
    rng = random.Random(2)
    for _ in range(300):
        parts = Parts(*(float(rng.randint(0, 20)) for _ in range(5)))
        layers = rng.randint(1, 6)
        for order in ORDERS:
            seconds, exposed = simulate(parts, layers, order)
            compute = 2 * layers * (parts.attention + parts.shared + parts.expert)
            link = 2 * layers * (2 * parts.exchange + parts.counts)
            alone = layers * (parts.attention + parts.counts + 2 * parts.exchange + parts.expert)
            assert max(compute, link, alone) <= seconds + 1e-9 <= compute + link + 1e-9
            assert -1e-9 <= exposed <= min(link, seconds - compute) + 1e-9
    hidden = simulate(Parts(10, 0, 0, 1, 10), 50, ORDERS[0])
    assert hidden == pytest.approx((50 * 40 + 1, 1)), "short exchanges are hidden but for the last"


def test_colocated_fits_memory_and_an_empty_micro_batch_is_none() -> None:
    roomy, tight = Problem(MODEL, MACHINE, 2048), Problem(MODEL, replace(MACHINE, memory_bytes=15e9), 2048)
    assert [one.micro_batches for one in colocated(roomy, 8)] == [1, 2] and colocated(tight, 8) == []
    assert [one.micro_batches for one in colocated(replace(roomy, samples=8), 8)] == [1]
    few = colocated(replace(roomy, machine=replace(MACHINE, memory_bytes=24e9)), 8)[0]
    assert few.samples < colocated(roomy, 8)[0].samples
    weights = MODEL.trunk_bytes + 20 * MODEL.layers * MODEL.expert_bytes
    kept = few.samples * 2048 * (MODEL.token_kv_bytes + MODEL.token_waiting_bytes)
    assert weights + kept <= RESERVE * 24e9


def test_copies_help_colocated_experts_under_skew() -> None:
    problem = Problem(MODEL, replace(MACHINE, memory_bytes=80e9), 2048, 16)
    even, skewed = colocated(problem, 8), colocated(replace(problem, skew=zipf(160, 1.2)), 8)
    assert (even[0].replicas, even[0].spare) == (1, None)
    assert skewed[0].replicas > 1 or skewed[0].spare, "whichever copies are best"
    often, once = (parts_of(replace(problem, skew=zipf(160, 1.2), replicas=r), 8, 2) for r in (8, 1))
    assert often.expert < once.expert


def test_a_baseline_is_the_best_of_all_its_cuts() -> None:
    problem, split = Problem(MODEL, MACHINE, 1024, 24, max_r1=6), Split(3, 5)
    glued = [(what, i) for i in range(6) for what in "AS"]
    rates = []
    for r1 in range(1, 7):
        cut = Cut(-(-8 // r1), r1, 1)
        rates.append(24 * 1024 / makespan(work_of(problem, split, cut), glued[: 2 * r1]))
    found, one = pppipe(problem, split), naive(problem, split)
    assert found is not None and found.tokens_per_s == pytest.approx(max(rates))
    assert one is not None and one.tokens_per_s == pytest.approx(rates[0])


def test_exposed_communication_is_what_the_timeline_shows() -> None:
    rng = random.Random(3)
    problem, split = Problem(MODEL, replace(MACHINE, count_s=1e-3), 1024), Split(2, 6)
    for _ in range(20):
        work = work_of(problem, split, Cut(rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 6)))
        order = rng.choice(list(Order))
        tasks = timeline(work, order)
        ends = sorted({t for task in tasks for t in (task.start, task.end)})
        exposed = 0.0
        for start, end in pairwise(ends):
            on = {task.resource.value for task in tasks if task.start <= (start + end) / 2 < task.end}
            exposed += (end - start) * (bool(on & {"A2E", "E2A"}) and not on & {"AG", "EG"})
        assert exposed_link_s(work, order) == pytest.approx(exposed, abs=1e-9)
    assert scored(problem, split, Cut(1, 1, 1), Order.ASAS, "").exposed_s > 0
