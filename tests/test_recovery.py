"""A killed expert rank changes no token: its experts are taken over, what was under way is sent again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import toys
from lossy import NOBODY, LossyWorld, Town, lived

from benchmarks.dep_faults import Job, generate, many_kills, scenes
from dep_extension.attention import Attention
from dep_extension.comm import Place, Role
from dep_extension.cost import Line, Machine, Model, Split
from dep_extension.executor import AttentionSide, Course, ExpertSide, open_store
from dep_extension.partition import shares, shares_after
from dep_extension.recovery import Company, solved_again
from dep_extension.schedule import Order
from dep_extension.solver import Problem, after_loss, findep
from dep_extension.walk import Itinerary
from dep_extension.world import Loss, World
from duoserve.config import EngineConfig
from duoserve.device import open_device

BOUND_S = 150.0


@pytest.fixture
def job(toy: Callable[..., Path], cache: Path) -> Callable[..., Job]:
    def make(family: str, ag: int, eg: int, replicas: int, generations: int) -> Job:
        return Job(str(toy(family)), str(cache), ag, eg, replicas, 2, 2, 2, 12, generations, True)

    return make


def check(found: dict[str, Any], kills: int) -> None:
    assert found["kills"] >= kills
    assert (found["hangs"], found["failed"], found["wrong_sequences"]) == (0, 0, 0), found


def test_a_killed_expert_rank_changes_no_token(job: Callable[..., Job]) -> None:
    found = many_kills(job("qwen3_moe", 1, 2, 1, 3), 1, seed=0, bound_s=BOUND_S)
    check(found, 1)
    assert found["each"][0]["taken_over"] > 0 and found["each"][0]["solved_s"] > 0


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


SAYS, AG, EG, NEW = 4, 2, 3, 3  # steps in words; ranks; tokens
LAYER = 10  # exchanges of one, of two micro-batches in two chunks


class Life:
    """Five ranks of a toy model in one thread: what all say, generate, say, generate again and report. Opened once."""

    def __init__(self, folder: Path, cache: Path, replicas: int = 1):
        self.opened = open_store(str(folder), EngineConfig.of(dtype="float32", cache_dir=str(cache)))
        self.devices = [open_device("cpu") for _ in range(AG + EG)]
        itinerary = Itinerary.of(len(self.opened.store.layers), 2, 2)
        self.course = Course(AG, EG, tuple(self.opened.shares(EG, replicas)), itinerary)
        places = [Place.of(rank, AG, EG) for rank in range(AG + EG)]
        self.sides: list[Any] = [
            (AttentionSide if place.role is Role.ATTENTION else ExpertSide)(self.opened, device, place, self.course)
            for place, device in zip(places, self.devices, strict=True)
        ]
        self.quiet = self.lived({})
        self.want = [rank[2] for rank in self.quiet[:AG]]
        self.sent = [self.sides[a].hub.rows_sent for a in range(AG)]

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.opened.store.close()

    def lived(self, dies: dict[int, int], replan: Any = None, absent: Loss = NOBODY) -> list[Any]:
        """Of each rank that lived its company, what it heard, and its tokens."""
        there = [rank for rank in range(AG + EG) if rank not in absent.ranks]
        town = Town(there, dies)
        worlds = [LossyWorld(town, rank, AG, absent) for rank in there]
        return lived(worlds, [partial(self._live, world, replan) for world in worlds])

    def _live(self, world: LossyWorld, replan: Any) -> Any:
        company, side = Company(cast(World, world), self.course, replan), self.sides[world.me]
        heard = [company.tell(f"{world.me} is here")]
        if isinstance(side, AttentionSide):
            side.hub.rows_sent = side.hub.rows_again = 0
            side.hub.batches.clear()
            side.follow(company.course)
        else:
            side.follow(company.course, world.place)
        company.side = side
        made = []
        for _ in range(2):
            if isinstance(side, AttentionSide):
                prompts = [toys.ids(2, 5 + 4 * i, seed=10 * world.me + i) for i in range(2)]
                made += company.attend([partial(generate, side.model, ids_BS, NEW) for ids_BS in prompts])
            else:
                company.serve()
            heard.append(company.tell(f"{world.me} was there"))
        heard.append(company.last_words(f"{world.me} ends"))
        return company, heard, made, world.ticks


@pytest.fixture(scope="module")
def life(toy: Callable[..., Path], cache: Path) -> Iterator[Life]:
    found = Life(toy("qwen2_moe"), cache)
    yield found
    found.close()


def moments(ticks: int) -> list[int]:
    """Of a life of so many exchanges: the first and the last, those around a walk's ends, and a layer's in a row."""
    half = (ticks - SAYS) // 2
    return [1, 2, *range(half // 2, half // 2 + LAYER), half + 1, half + 2, half + 3, ticks - 1, ticks]


@pytest.fixture
def under_way(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that had been sent when a rank was lost: all of their micro-batches, and those that were not back."""
    found, ours = [0, 0], Attention.share_out

    def share_out(hub: Any, *args: Any) -> None:
        for batch in [batch for batch in hub.batches if batch.arrival is not None and batch.sent]:
            found[0] += sum(map(len, batch.cut.index_C))
            found[1] += sum(len(batch.cut.index_C[chunk]) for chunk in batch.missing)
        ours(hub, *args)

    monkeypatch.setattr(Attention, "share_out", share_out)
    return found


def three_chunks(course: Course) -> Itinerary:
    """Instead of two, and another order."""
    return Itinerary.of(course.itinerary.layers, course.itinerary.r1, 3, Order.AASS)


def outlive(life: Life, under_way: list[int], killed: int, moment: int, replan: Any) -> int:
    """Tokens are the same, every row is sent once, and again only what was missing; how many rows that spared."""
    under_way[:] = [0, 0]
    found = life.lived({killed: moment}, replan)
    where = f"rank {killed} at {moment}"
    assert [rank[2] for rank in found[:AG]] == life.want, where
    assert [one.ranks for one in found[0][0].outages] == [(killed,)], where
    hubs = [life.sides[a].hub for a in range(AG)]
    assert [hub.rows_sent - hub.rows_again for hub in hubs] == life.sent, where
    whole, missing = under_way
    assert sum(hub.rows_again for hub in hubs) == missing, where
    assert found[0][1][-1] == [f"{rank} ends" for rank in range(AG + EG) if found[rank] is not None], where
    return whole - missing


def test_a_rank_lost_at_any_step_changes_no_token_and_only_missing_chunks_go_again(
    life: Life, under_way: list[int]
) -> None:
    spared = [
        outlive(life, under_way, AG + k % EG, moment, [None, three_chunks][k % 2])
        for k, moment in enumerate(moments(life.quiet[-1][3]))
    ]
    assert min(spared) >= 0 < max(spared), "at some moment something was back"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_lost_at_every_exchange_changes_no_token(life: Life, under_way: list[int]) -> None:
    """One of the three, whichever's turn it is."""
    for moment in range(1, life.quiet[-1][3] + 1):
        outlive(life, under_way, AG + moment % EG, moment, [None, three_chunks][moment // EG % 2])


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
    assert found.digest == solved_again(problem, plan)(left).digest
    assert (found.layers, found.r1, found.r2) == (4, plan.r1, again.r2)
    if again.r1 == plan.r1:
        assert found.turns == again.order


def test_two_losses_one_in_the_recovery_from_the_other_are_outlived(life: Life) -> None:
    for moment in (40, 41):
        found = life.lived({AG: 40, AG + 1: moment + 2})
        assert [rank[2] for rank in found[:AG]] == life.want
        assert sorted(r for one in found[0][0].outages for r in one.ranks) == [AG, AG + 1]
        assert [len(held) for held in found[AG + 2][0].course.held(0)] == [6] * 3, "all are the last one's"


def test_a_rank_that_never_came_is_outlived_as_one_that_is_lost(life: Life) -> None:
    found = life.lived({}, absent=Loss((AG + 1,), (1,)))
    assert [rank[2] for rank in found[:AG]] == life.want
    company = found[0][0]
    assert [(one.ranks, one.cut["eg"]) for one in company.outages] == [((AG + 1,), EG - 1)]
    assert [sorted(e for held in shares for e in held) for shares in company.course.shares_L] == [list(range(6))] * 3


def test_ranks_that_solve_differently_walk_the_order_they_were_launched_with(life: Life) -> None:
    drawn = iter(range(2, 10))
    found = life.lived({AG: 30}, lambda course: Itinerary.of(course.itinerary.layers, 2, next(drawn)))
    assert [rank[2] for rank in found[:AG]] == life.want
    assert {rank[0].course.itinerary.digest for rank in found if rank} == {life.course.itinerary.digest}
