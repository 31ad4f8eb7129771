"""A killed expert rank changes no token: its experts are taken over, what was under way is sent again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dep_faults import Job, many_kills, scenes
from dep_extension.cost import Line, Machine, Model, Split
from dep_extension.executor import Course
from dep_extension.partition import shares, shares_after
from dep_extension.recovery import solved_again
from dep_extension.solver import Problem, after_loss, findep
from dep_extension.walk import Itinerary

BOUND_S = 150.0


@pytest.fixture
def job(toy: Callable[..., Path], cache: Path) -> Callable[..., Job]:
    def make(family: str, ag: int, eg: int, replicas: int, generations: int) -> Job:
        return Job(str(toy(family)), str(cache), ag, eg, replicas, 2, 2, 2, 12, generations)

    return make


def check(found: dict[str, Any], kills: int) -> None:
    assert found["kills"] >= kills
    assert (found["hangs"], found["failed"], found["wrong_sequences"]) == (0, 0, 0), found


def test_a_killed_expert_rank_changes_no_token(job: Callable[..., Job]) -> None:
    found = many_kills(job("qwen3_moe", 1, 2, 1, 3), 1, seed=0, bound_s=BOUND_S)
    check(found, 1)
    assert found["each"][0]["taken_over"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_expert_ranks_killed_at_random_moments_change_no_token(job: Callable[..., Job], family: str) -> None:
    check(many_kills(job(family, 2, 4, 1, 5), 10, seed=1, bound_s=BOUND_S), 10)


@pytest.mark.slow
def test_with_replicas_the_first_loss_takes_nobody_over(job: Callable[..., Job]) -> None:
    found = many_kills(job("qwen3_moe", 2, 3, 2, 3), 5, seed=2, bound_s=BOUND_S)
    check(found, 5)
    assert [kill["taken_over"] for kill in found["each"]] == [0] * found["kills"]


@pytest.mark.slow
def test_a_lost_attention_rank_is_named_and_all_end(job: Callable[..., Job]) -> None:
    killed, stopped, outlived = scenes(job("mixtral", 2, 2, 1, 1), BOUND_S)
    for found in (killed, stopped):
        assert found["status"] == 1 and found["named"], found
    assert outlived["status"] == 0 and outlived["named"], outlived


def test_after_a_loss_the_solver_is_asked_again_and_micro_batches_stay() -> None:
    links = {Split(2, 3): Line(1e-4, 1e-9)}
    machine = Machine("some", 5, 48e9, Line(2e-4, 9e-14), Line(2e-4, 2e-14), links)
    model = Model("some", 4, 2048, 1024, 16, 4, 1, 16, 128, 128)
    problem = Problem(model, machine, length=512, samples=8)
    plan = findep(problem, Split(2, 3))
    assert plan is not None
    held = shares(16, 3)
    course = Course(2, 3, (held,) * 4, Itinerary.of(4, plan.r1, plan.r2, plan.order))
    left = Course(2, 2, (shares_after(held, [1]),) * 4, course.itinerary)
    again = after_loss(problem, plan, 1)
    assert again is not None
    found = solved_again(problem, plan)(left)
    assert (found.layers, found.r1, found.r2) == (4, plan.r1, again.r2)
    if again.r1 == plan.r1:
        assert found.turns == again.order
