"""How many GPUs should attend, and how often each expert should be there: every ratio that fits, beside the baselines and
beside expert parallelism without two groups. Knows the solver; knows no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from dep_extension.colocated import Colocated, colocated
from dep_extension.cost import Split
from dep_extension.partition import splits
from dep_extension.solver import Plan, Problem, findep, findep_of, interleaved, naive, pppipe

ALL_SPLITS = 64  # GPUs up to which every ratio is tried; beyond, GRID of them and then those around the best
GRID = 24


class Row(NamedTuple):
    """Of one ratio what each way reaches; None where it has no room."""

    split: Split
    replicas: int
    naive: Plan | None
    pppipe: Plan | None
    findep: Plan | None


@dataclass(frozen=True)
class Ways:
    """What can be reached, each way at its own best ratio and number of replicas; None or empty where it has no room."""

    findep: Plan
    naive: Plan | None
    pppipe: Plan | None
    colocated: list[Colocated]


def ways(problem: Problem, gpus: int, split: Split | None = None, replicas: int | None = None) -> Ways | None:
    """The best of each way, of the ratio and number of replicas asked for. None where the model fits no split."""
    found = best_plan(problem, gpus, split, replicas)
    if found is None:
        return None
    sites = [(other, one) for other in _near(problem, gpus, found, replicas) for one in _tried(other, gpus, split)]
    serial, ping_pong = (_best(solve(*site) for site in sites) for solve in (naive, pppipe))
    return Ways(found, serial, ping_pong, colocated(problem, gpus))


@dataclass(frozen=True)
class Comparison:
    """`plan`: FinDEP's of `ways`, with the best order of all. `rows`: every ratio that was tried, with its replicas."""

    plan: Plan
    ways: Ways
    rows: list[Row]


def compare(problem: Problem, gpus: int, split: Split | None = None, replicas: int | None = None) -> Comparison | None:
    """The best ratio and number of replicas, or those asked for, beside everything else. None where nothing fits."""
    found = ways(problem, gpus, split, replicas)
    if found is None:
        return None
    at = replace(problem, replicas=found.findep.replicas)
    return Comparison(interleaved(at, found.findep), found, rows_of(at, gpus, split))


def rows_of(problem: Problem, gpus: int, split: Split | None = None) -> list[Row]:
    """Of every ratio, with the problem's number of replicas."""
    tried = _tried(problem, gpus, split)
    return [Row(at, problem.replicas, *(solve(problem, at) for solve in (naive, pppipe, findep))) for at in tried]


def _tried(problem: Problem, gpus: int, split: Split | None) -> list[Split]:
    return [split] if split is not None else list(ratios(problem, gpus))


def _near(problem: Problem, gpus: int, found: Plan, replicas: int | None) -> list[Problem]:
    """With what numbers of replicas baselines are tried: all on few GPUs, on many the plan's and its neighbours."""
    many = numbers_of_replicas(problem, gpus) if replicas is None else [replicas]
    near = [r for r in many if gpus <= ALL_SPLITS or found.replicas / 2 <= r <= found.replicas * 2]
    return [replace(problem, replicas=r) for r in near]


def _best(plans: Iterable[Plan | None]) -> Plan | None:
    return max((plan for plan in plans if plan is not None), key=lambda plan: plan.tokens_per_s, default=None)


def best_plan(problem: Problem, gpus: int, split: Split | None = None, replicas: int | None = None) -> Plan | None:
    """FinDEP's over all ratios and numbers of replicas, where they are not given."""
    many = numbers_of_replicas(problem, gpus, split) if replicas is None else [replicas]
    if split is not None:
        return findep_of((replace(problem, replicas=r), split) for r in many if r <= split.eg)
    found = _best(findep_of((p, one) for one in ratios(p, gpus)) for p in (replace(problem, replicas=r) for r in many))
    if found is None or gpus <= ALL_SPLITS:
        return found
    near = replace(problem, replicas=found.replicas)
    return _best((found, findep_of((near, one) for one in _around(near, gpus, found.split))))


def numbers_of_replicas(problem: Problem, gpus: int, split: Split | None = None) -> list[int]:
    """Powers of two. One where loads are even and GPUs few: copies then cost launches and memory, and nothing is hot."""
    most = split.eg if split is not None else gpus - 1
    if problem.skew is None and most <= problem.model.experts:
        return [1]
    return [1 << k for k in range(most.bit_length()) if 1 << k <= most]


def ratios(problem: Problem, gpus: int) -> Iterator[Split]:
    """Those worth a look."""
    found = list(splits(problem.model, gpus, problem.replicas))
    if gpus <= ALL_SPLITS:
        yield from found
        return
    step = max(1.0, len(found) ** (1 / GRID))
    at = sorted({min(len(found) - 1, round(step**k) - 1) for k in range(GRID + 1)})
    even = {round(k * (len(found) - 1) / GRID) for k in range(GRID + 1)}
    yield from (found[i] for i in sorted({*at, *even}))


def _around(problem: Problem, gpus: int, split: Split) -> Iterator[Split]:
    """Within the grid's next neighbours of a split."""
    eg, tried = split.eg, sorted(one.eg for one in ratios(problem, gpus))
    low = max((n for n in tried if n < eg), default=eg)
    high = min((n for n in tried if n > eg), default=eg)
    step = max(1, (high - low) // GRID)
    yield from (Split(gpus - n, n) for n in range(low, high + 1, step))
