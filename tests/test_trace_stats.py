"""What is counted of a trace is what a brute force counts; its pictures are drawn."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from test_traces import CHOICES, EXPERTS, made_recorder, made_step

from traces import stats
from traces.plots import draw
from traces.store import Traces


def made_choices(seed: int, length: int) -> list[np.ndarray]:
    """By layer (S, K), with ids that mean "no expert" among them, and some experts far more often than others."""
    rng = np.random.default_rng(seed)
    found = []
    for e, k in zip(EXPERTS, CHOICES, strict=True):
        weights = np.arange(1, e + 2) ** 2.0
        rows = [rng.choice(e + 1, k, replace=False, p=weights / weights.sum()) for _ in range(length)]
        found.append(np.array(rows).reshape(length, k))
    return found


SEQUENCES = [made_choices(seed, length) for seed, length in enumerate((40, 1, 0, 75, 12))]


def measured() -> stats.Stats:
    found = stats.Stats(EXPERTS)
    pool = stats.LruDepths(found)
    for ids in SEQUENCES:
        found.add(ids)
        pool.add(ids)
    return found


def test_the_lru_curve_is_that_of_a_simulated_pool_at_every_size() -> None:
    found = measured()
    for slots in range(1, sum(EXPERTS) + 1):
        pool: OrderedDict[tuple[int, int], None] = OrderedDict()
        hits = asked = 0
        for ids in SEQUENCES:
            for row in range(len(ids[0])):
                for layer, ids_SK in enumerate(ids):
                    for e in ids_SK[row]:
                        if e >= EXPERTS[layer]:
                            continue
                        asked += 1
                        hits += (layer, int(e)) in pool
                        pool[layer, int(e)] = None
                        pool.move_to_end((layer, int(e)))
                        if len(pool) > slots:
                            pool.popitem(last=False)
        assert found.lru_N[slots - 1] == pytest.approx(hits / asked)
        assert found.lru(slots / sum(EXPERTS)) == pytest.approx(hits / asked)


def test_reuse_and_repetition_are_counted_as_by_hand() -> None:
    found = measured()
    distances: list[int] = []
    again = {1: [0, 0], 8: [0, 0]}
    for ids in SEQUENCES:
        for layer, ids_SK in enumerate(ids):
            for row, chosen in enumerate(ids_SK.tolist()):
                for e in (e for e in chosen if e < EXPERTS[layer]):
                    behind = [n for n in range(1, len(ids_SK) - row) if e in ids_SK[row + n]]
                    distances += behind[:1]
                    for within, counts in again.items():
                        if row + within < len(ids_SK):
                            counts[0] += bool(behind and behind[0] <= within)
                            counts[1] += 1
    assert np.trim_zeros(found.reuse_LN.sum(0), "b").tolist() == np.bincount(distances).tolist()
    assert found.reuse_median == sorted(distances)[(len(distances) + 1) // 2 - 1]
    assert found.repeated_A.tolist() == [a / b for a, b in again.values()]


def test_popularity_and_affinity_are_counted_as_by_hand() -> None:
    found = measured()
    chosen = np.zeros((3, 6), int)
    together = np.zeros((2, 6, 6), int)
    for ids in SEQUENCES:
        for row in range(len(ids[0])):
            sets = [[e for e in ids[layer][row] if e < EXPERTS[layer]] for layer in range(3)]
            for layer, some in enumerate(sets):
                for e in some:
                    chosen[layer, e] += 1
                    for f in sets[layer + 1] if layer < 2 else ():
                        together[layer, e, f] += 1
    assert np.array_equal(found.chosen_LE, chosen) and np.array_equal(found.together_LEE, together)
    needed = [next(n for n in range(1, 7) if sum(sorted(row)[-n:]) >= 0.9 * sum(row)) for row in chosen.tolist()]
    assert found.needed_L.tolist() == needed
    assert np.all(found.entropy_L < 1) and np.all(found.entropy_L > 0.3)


def test_uniform_routing_has_the_entropy_of_uniform_and_reuse_far_away_is_kept() -> None:
    found = stats.Stats([4])
    found.add([np.arange(4).repeat(500)[np.r_[0:2000]][:, None]])
    assert found.entropy_L[0] == pytest.approx(1) and found.needed_L[0] == 4
    far = stats.Stats([4])
    far.add([np.r_[0, np.ones(3000, int), 0][:, None]])
    assert far.reuse_LN[0, -1] == 1


def test_the_pictures_of_a_trace_with_prompts_alone_are_drawn(tmp_path: Path) -> None:
    watching = made_recorder(tmp_path / "t", hidden=False)
    watching(made_step(0, 0, 30))
    watching.close()
    found = stats.measure(Traces(tmp_path / "t"))
    assert found.decode.tokens == 0
    assert [p.suffix for p in draw(found, tmp_path / "plots")] == [".png"] * 6
    assert stats.table(found)[1] == ("tokens", "30", "-")
