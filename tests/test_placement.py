"""Where experts go by their loads: everything is somewhere, nothing twice on a rank, nobody holds too much, and what is hot
is shared; judged by loads that were not seen; as a plan that is saved and can be walked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dep_extension import planfile, testbeds
from dep_extension.cost import Split
from dep_extension.executor import open_store
from dep_extension.imbalance import Loads, burden, burden_of_places, burden_of_shares, settled, zipf
from dep_extension.partition import shares_after
from dep_extension.placement import Placement, checked, placed, repeated
from dep_extension.ratio import Copying, best_plan
from dep_extension.running import Cutting
from dep_extension.solver import Problem, findep, survived
from duoserve import cli
from duoserve.config import EngineConfig

MODEL, MACHINE = testbeds.model("deepseek-v2", "A"), testbeds.named("A")


def cases(many: int, seed: int) -> list[tuple[np.ndarray, int, int]]:
    """Loads of some layers, some of them zero or alike; ranks; places on each, sometimes just enough."""
    rng, draw, found = random.Random(seed), np.random.default_rng(seed), []
    for _ in range(many):
        experts, ranks, layers = rng.randint(1, 30), rng.randint(1, 9), rng.randint(1, 3)
        load_LE = draw.lognormal(0, 1.5, (layers, experts)) * (draw.random((layers, experts)) > 0.2)
        found.append((load_LE, ranks, -(-experts // ranks) + rng.choice([0, 0, 1, 5])))
    return found


def test_every_expert_is_placed_nowhere_twice_and_no_rank_has_more_than_its_places() -> None:
    for load_LE, ranks, places in cases(500, seed=1):
        placement = placed(load_LE, ranks, places)
        assert checked(placement, [load_LE.shape[1]] * len(load_LE), ranks) == placement
        assert max(len(one) for held in placement for one in held) <= places
        assert all(list(one) == sorted(one) for held in placement for one in held)


def test_what_is_hot_is_copied_and_nobody_gets_much_more_than_others() -> None:
    load_LE = np.array([[40.0, 4, 4, 4, 4, 4, 4, 4, 4, 0]])
    (held,) = placed(load_LE, 4, 4)
    copies = [sum(expert in one for one in held) for expert in range(10)]
    assert copies[0] == 4 and copies[9] == 1 and sum(copies) == 16
    loads = Loads.of(load_LE.tolist())
    assert burden(loads, (held,)).most_C[0] < 1.1 * 10 / 4 < 0.5 * burden_of_shares(loads, 10, 4, 1).most_C[0]
    hot = settled(160, 0.8, 8192)
    for ranks in (5, 20):
        twice, once = burden_of_shares(hot, 160, ranks, 2), burden_of_shares(hot, 160, ranks, 1)
        few, same = (burden_of_places(hot, ranks, 160 // ranks + spare) for spare in (1, 160 // ranks))
        assert same.experts == twice.experts and same.most_C.mean() < twice.most_C.mean() < once.most_C.mean()
        assert few.experts == once.experts + 1 and few.most_C.mean() < twice.most_C.mean(), (
            "for a fraction of the memory"
        )


def test_survivors_of_a_placement_hold_what_they_held_and_everything() -> None:
    rng = random.Random(2)
    for load_LE, ranks, places in cases(300, seed=3):
        gone = set(rng.sample(range(ranks), rng.randint(0, ranks - 1)))
        before = placed(load_LE, ranks, places)
        after = tuple(shares_after(held, gone) for held in before)
        checked(after, [load_LE.shape[1]] * len(load_LE), ranks - len(gone))
        for old, new in zip(before, after, strict=True):
            kept = [set(one) for rank, one in enumerate(old) if rank not in gone]
            assert all(mine <= set(now) for mine, now in zip(kept, new, strict=True))


def test_a_placement_is_judged_by_loads_it_has_not_seen() -> None:
    turns = Loads.of([[9, 1, 1, 1], [1, 9, 1, 1]])
    assert turns.judged_apart and turns.place(2, 2, np.array([0])) == (((0, 3), (1, 2)),)
    assert burden_of_places(turns, 2, 2).most_C == pytest.approx([10 / 3, 10 / 3]), "what is hot then sits with another"
    assert burden(turns, turns.place(2, 2)).most_C == pytest.approx([10 / 3, 10 / 3])
    alone = Loads.of([[9, 1, 1, 1]])
    assert not alone.judged_apart and burden_of_places(alone, 2, 2).most_C == pytest.approx([10 / 3])
    of_two = Loads.of([[9, 1, 1, 1], [1, 1, 1, 9]], layers=[0, 1])
    assert of_two.layers == 2 and not of_two.judged_apart
    assert of_two.place(4, 2)[0] != of_two.place(4, 2)[1], "each layer has its own"
    seen, rest = settled(8, 1.0, 512, layers=2, chunks=5).halves()
    assert seen.tolist() == [0, 2, 4, 5, 7, 9] and rest.tolist() == [1, 3, 6, 8]
    with pytest.raises(
        ValueError, match=r"2 chunks are of the layers \[0, 2\]: give each chunk's, from 0 without gaps"
    ):
        Loads.of([[1, 1], [1, 1]], layers=[0, 2])


def test_hot_copies_are_planned_where_they_gain_and_cost_little() -> None:
    loads, split = settled(160, 0.8, 8192, chunks=6), Split(3, 5)
    problem = Problem(MODEL, MACHINE, 2048, 32, max_r1=4, max_r2=8, skew=loads)
    hot = best_plan(problem, 8, split)
    once, twice = (best_plan(problem, 8, split, Copying(replicas=r)) for r in (1, 2))
    assert hot is not None and once is not None and twice is not None
    assert hot.tokens_per_s > 1.02 * twice.tokens_per_s > 1.02 * once.tokens_per_s
    assert hot.spare is not None and hot.held is not None and len(hot.held) == MODEL.layers
    assert max(len(one) for held in hot.held for one in held) <= 32 + hot.spare < 64, "in less memory than two of each"
    less = survived(replace(problem, spare=hot.spare), hot)
    assert less is not None and less.plan.split == Split(3, 4) and less.plan.held == less.held
    assert less.loaded == sum(
        len(set().union(*new) - set().union(*old[1:])) for old, new in zip(hot.held, less.held, strict=True)
    )
    other = replace(problem, skew=zipf(160, 0.8, chunks=6))
    moving, uniform = best_plan(other, 8, split), findep(replace(other, replicas=2), split)
    assert moving is not None and uniform is not None and moving.tokens_per_s >= uniform.tokens_per_s


def test_spare_places_need_loads_and_room() -> None:
    skew = settled(160, 0.8, 8192)
    for options in ({"spare": 1}, {"spare": 1, "skew": skew, "replicas": 2}, {"spare": -1, "skew": skew}):
        with pytest.raises(ValueError, match="give loads, and at least 0 places or replicas") as raised:
            Problem(MODEL, MACHINE, 2048, **options)  # type: ignore[arg-type]
        assert len(str(raised.value).splitlines()) == 1
    tight = replace(MACHINE, memory_bytes=20e9)
    assert findep(Problem(MODEL, tight, 2048, skew=skew, spare=0), Split(3, 5)) is not None
    assert findep(Problem(MODEL, tight, 2048, skew=skew, spare=20), Split(3, 5)) is None
    with pytest.raises(ValueError, match="4 experts on 1 ranks of 3 places: give at least a place for each"):
        placed(np.ones((1, 4)), 1, 3)


HELD: Placement = (((0, 1), (1, 2)), ((0, 1, 2), ()))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: checked(HELD, [3], 2), "placed for 2 layers, the model has 1"),
        (lambda: checked(HELD, [3, 3], 3), "layer 0 are placed on 2 ranks, there are 3"),
        (lambda: checked(HELD, [3, 4], 2), "layer 1 has 4 experts, 3 of them are placed and 0 others"),
        (lambda: checked(HELD, [3, 2], 2), "layer 1 has 2 experts, 2 of them are placed and 1 others"),
        (lambda: checked((((0, 0, 1),),), [2], 1), "a rank holds an expert of layer 0 twice"),
    ],
)
def test_a_placement_of_another_model_is_refused_in_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        call()
    assert len(str(raised.value).splitlines()) == 1 and str(raised.value).endswith(": plan it anew")
    assert repeated(HELD, 3) == (HELD[0], HELD[1], HELD[0])


def test_a_saved_plan_places_experts_on_the_ranks_that_walk_it(
    toy: Callable[..., Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, loads, saved = toy("qwen3_moe"), tmp_path / "loads.json", tmp_path / "plan.json"
    rows = [[60, 1, 1, 1, 1, 1], [50, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 60], [1, 1, 1, 1, 1, 50]]
    text = {"kind": "duoserve-dep-loads", "version": 1, "loads": rows, "layers": [0, 0, 1, 1]}
    loads.write_text(json.dumps(text))
    options = (
        "--gpus",
        "5",
        "--ratio",
        "2:3",
        "--batch",
        "8",
        "--skew",
        str(loads),
        "--spare",
        "1",
        "--save",
        str(saved),
    )
    monkeypatch.setattr("sys.argv", ["duoserve", "dep", "plan", str(folder), "-m", "A", *options])
    assert cli._guarded() == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    for word in (
        "experts placed by loads, 1 spare places",
        "each 2 times",
        "placed, 0 spare",
        "of the first layer experts 0 x3",
    ):
        assert word in said, (word, said)
    plan = planfile.load(saved)
    assert plan.held is not None and plan.spare == 1
    opened = open_store(str(folder), EngineConfig.of(dtype="float32", cache_dir=str(cache)))
    try:
        course = Cutting(plan=saved).settled(5).course(opened)
        assert course.shares_L == plan.held and all(0 in one for one in plan.held[0])
        assert all(5 in one for one in plan.held[1]) and len(course.shares_L) == len(opened.store.layers)
        uniform = Cutting(plan=saved, replicas=1).settled(5).course(opened)
        assert sum(map(len, uniform.shares_L[0])) == 6, "what is asked for by name is done"
    finally:
        opened.store.close()


def test_the_placement_of_a_file_is_bounded_and_rising(tmp_path: Path) -> None:
    problem = Problem(MODEL, MACHINE, 2048, 8, max_r1=1, skew=settled(160, 0.8, 8192), spare=1)
    plan = findep(problem, Split(4, 4))
    assert plan is not None
    path = tmp_path / "plan.json"
    planfile.save(plan, path, "m", "m")
    assert planfile.load(path) == plan
    data = json.loads(path.read_text())
    harms: list[tuple[Any, str]] = [
        ([], r"held is \[\], not 1 to"), ([[[0]]], r"a layer of held is .* not 4 values"),
        ([[[0], [1], [2], 3]], "experts of a rank are 3, not a list"),
        ([[[0], [1], [2], [4, 3]]], r"experts of a rank are \[4, 3\], not rising"),
        ([[[0], [1], [2], [3, 3]]], "not rising"), ([[[0], [1], [2], [-1]]], "an expert -1 is no whole number from 0"),
    ]  # fmt: skip
    for held, says in harms:
        path.write_text(json.dumps(data | {"plan": data["plan"] | {"held": held}}))
        with pytest.raises(ValueError, match=says) as raised:
            planfile.load(path)
        assert len(str(raised.value).splitlines()) == 1
