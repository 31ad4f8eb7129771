"""A disaggregated run gives what one process gives: any ratio, any cut, either order, over Gloo and in one thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dep_ranks
import numpy as np
import pytest
import toys
from dep_ranks import Plan

from dep_extension.partition import shares_after
from dep_extension.placement import placed

FAMILIES = ["mixtral", "deepseek_v2", "qwen2_moe", "qwen3_moe"]
SHARED = {"deepseek_v2", "qwen2_moe"}
CUTS = [  # ag, eg, r1, r2, order: A < E and A > E, experts that ranks do not divide, more ranks than a chunk has rows
    (1, 1, 1, 1, "ASAS"),
    (2, 2, 2, 2, "AASS"),
    (1, 3, 3, 4, "AASS"),
    (3, 1, 2, 3, "ASAS"),
    (2, 3, 4, 2, "AASS"),
    (3, 2, 1, 4, "ASAS"),
    (1, 4, 4, 1, "AASS"),
    (4, 2, 3, 2, "ASAS"),
    (2, 4, 2, 4, "AASS"),
    (1, 5, 2, 1, "AASS"),
]
IN_ONE_THREAD = [("mixtral", CUTS[2]), ("mixtral", CUTS[0]), ("deepseek_v2", CUTS[1]), ("deepseek_v2", CUTS[3]),
                 ("qwen2_moe", CUTS[2]), ("qwen2_moe", CUTS[3]), ("qwen3_moe", CUTS[1])]  # fmt: skip
IN_PROCESSES = {"mixtral": (1, 3, 6), "deepseek_v2": (2, 4), "qwen2_moe": (1, 5), "qwen3_moe": (2, 7)}


@pytest.fixture
def models(toy: Callable[..., Path], load: Any) -> Callable[[str], tuple[Any, Any]]:
    """Of a family: the stock model, and ours in one process."""
    return lambda family: (toys.stock(toy(family)), load(toy(family), dtype="float32").model)


@pytest.fixture
def plan_of(toy: Callable[..., Path], cache: Path) -> Callable[..., Plan]:
    return lambda family, cut, **more: Plan(str(toy(family)), str(cache), *cut, **more)


@pytest.mark.parametrize("family,cut", IN_ONE_THREAD, ids=str)
def test_ranks_in_one_thread_answer_as_one_process(family: str, cut: Any, models: Any, plan_of: Any) -> None:
    plan = plan_of(family, cut)
    found = dep_ranks.in_one_thread(plan)
    dep_ranks.check(plan, found, *models(family))
    for rank in found[: plan.ag]:
        assert (len(rank["at"]) > 0) == (family in SHARED) and rank["elsewhere"] == 0


def test_processes_answer_as_one_process(models: Any, plan_of: Any, tmp_path: Path) -> None:
    plans = [(family, plan_of(family, CUTS[k])) for family, cuts in IN_PROCESSES.items() for k in cuts]
    found = dep_ranks.in_processes([plan for _, plan in plans], tmp_path)
    both = {family: models(family) for family in IN_PROCESSES}
    for (family, plan), ranks in zip(plans, found, strict=True):
        dep_ranks.check(plan, ranks, *both[family])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_processes_answer_as_one_process_whatever_the_plan(
    family: str, models: Any, plan_of: Any, tmp_path: Path
) -> None:
    plans = [plan_of(family, cut) for cut in CUTS]
    for plan, ranks in zip(plans, dep_ranks.in_processes(plans, tmp_path), strict=True):
        dep_ranks.check(plan, ranks, *models(family))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_a_share_that_does_not_fit_its_slots_streams_from_the_store(family: str, models: Any, plan_of: Any) -> None:
    plan = plan_of(family, CUTS[1], slots=2)
    found = dep_ranks.in_one_thread(plan)
    dep_ranks.check(plan, found, *models(family))
    for rank in found[plan.ag :]:
        assert rank["slots"] == 2 < rank["share"] and rank["misses"] > rank["share"]


def test_rows_of_an_expert_on_several_ranks_are_shared_out(models: Any, plan_of: Any) -> None:
    plan = plan_of("qwen3_moe", (1, 3, 2, 2, "AASS"), replicas=3)
    found = dep_ranks.in_one_thread(plan)
    dep_ranks.check(plan, found, *models("qwen3_moe"))
    rows = [rank["rows"] for rank in found[plan.ag :]]
    assert max(rows) < 2 * min(rows), f"each holds everything, and one attention rank sends: {rows}"


@pytest.mark.parametrize("lost", [(), (0, 2)], ids=["placed", "after a loss"])
def test_experts_placed_by_their_loads_answer_as_one_process(lost: tuple[int, ...], models: Any, plan_of: Any) -> None:
    loads = np.array([[9, 1, 1, 1, 1, 1], [1, 1, 8, 7, 1, 0], [0, 0, 0, 0, 0, 1]])
    held = tuple(shares_after(layer, lost) for layer in placed(loads, 4, 3))
    assert sum(0 in one for one in held[0]) > 1 and len({len(one) for layer in held for one in layer}) > 1
    plan = plan_of("qwen3_moe", (2, 4 - len(lost), 2, 2, "AASS"), held=held)
    dep_ranks.check(plan, dep_ranks.in_one_thread(plan), *models("qwen3_moe"))


def test_expert_ranks_that_multiply_in_groups_answer_as_one_process(models: Any, plan_of: Any) -> None:
    plan = plan_of("mixtral", (1, 1, 2, 2, "ASAS"), grouped=True)
    found = dep_ranks.in_one_thread(plan)
    dep_ranks.check(plan, found, *models("mixtral"))
    passes = found[-1]["passes"]
    assert passes["grouped"] > 0 and passes["dense"] == 0, passes
