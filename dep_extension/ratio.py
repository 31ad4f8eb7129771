"""How many GPUs should attend, and how often each expert should be there: every ratio that fits, beside the baselines and
beside expert parallelism without two groups. Knows the solver; knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from dep_extension.colocated import Colocated, colocated, spares
from dep_extension.cost import Split
from dep_extension.partition import splits
from dep_extension.problem import Plan, Problem, as_planned
from dep_extension.solver import Site, findep, findep_of, interleaved, naive, naive_of, pppipe, pppipe_of

ALL_SPLITS = 64  # GPUs up to which every ratio is tried; beyond, GRID of them and then those around the best
GRID = 24
GAIN = 1.005  # times the tokens per second that more copies must bring
NEAR_SPLITS = 7  # ratios on either side of the best, for which experts are also placed by their loads


class Copying(NamedTuple):
    """How experts are copied: each on so many GPUs, or hot ones to so many spare places on each; None: whatever is best."""

    replicas: int | None = None
    spare: int | None = None


FREE = Copying()


class Row(NamedTuple):
    """Of one ratio what each way reaches; None where it has no room."""

    split: Split
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


def ways(problem: Problem, gpus: int, split: Split | None = None, copying: Copying = FREE) -> Ways | None:
    """The best of each way, of the ratio and the copies asked for. None where the model fits no split."""
    uniform = _uniform_best(problem, gpus, split, copying)
    placed = list(_placed(problem, gpus, split, copying, uniform))
    found = _worth(uniform, placed)
    if found is None:
        return None
    many = [] if uniform is None else _near(problem, gpus, uniform, copying)
    sites = [(other, one) for other in many for one in _tried(other, gpus, split)] + placed
    return Ways(found, naive_of(sites), pppipe_of(sites), colocated(problem, gpus, copying.spare))


@dataclass(frozen=True)
class Comparison:
    """`plan`: FinDEP's of `ways`, with the best order of all. `rows`: every ratio that was tried, with its replicas."""

    plan: Plan
    ways: Ways
    rows: list[Row]


def compare(problem: Problem, gpus: int, split: Split | None = None, copying: Copying = FREE) -> Comparison | None:
    """The best ratio and copies, or those asked for, beside everything else. None where nothing fits."""
    found = ways(problem, gpus, split, copying)
    if found is None:
        return None
    at = as_planned(problem, found.findep)
    return Comparison(interleaved(at, found.findep), found, rows_of(at, gpus, split))


def rows_of(problem: Problem, gpus: int, split: Split | None = None) -> list[Row]:
    """Of every ratio, with the problem's copies."""
    tried = _tried(problem, gpus, split)
    return [Row(at, *(solve(problem, at) for solve in (naive, pppipe, findep))) for at in tried]


def _tried(problem: Problem, gpus: int, split: Split | None) -> list[Split]:
    return [split] if split is not None else list(ratios(problem, gpus))


def _near(problem: Problem, gpus: int, found: Plan, copying: Copying) -> list[Problem]:
    """With what numbers of replicas baselines are tried: all on few GPUs, on many the plan's and its neighbours."""
    many = numbers_of_replicas(problem, gpus) if copying.replicas is None else [copying.replicas]
    near = [r for r in many if gpus <= ALL_SPLITS or found.replicas / 2 <= r <= found.replicas * 2]
    return [replace(problem, replicas=r) for r in near]


def _best(plans: Iterable[Plan | None]) -> Plan | None:
    return max((plan for plan in plans if plan is not None), key=lambda plan: plan.tokens_per_s, default=None)


def best_plan(problem: Problem, gpus: int, split: Split | None = None, copying: Copying = FREE) -> Plan | None:
    """FinDEP's over all ratios and ways to copy experts, where they are not given."""
    uniform = _uniform_best(problem, gpus, split, copying)
    return _worth(uniform, _placed(problem, gpus, split, copying, uniform))


def _worth(uniform: Plan | None, placed: Iterable[Site]) -> Plan | None:
    """Spare places are memory: more of them are taken only where they gain. Placing by loads alone takes none."""
    by_spare: dict[int, list[Site]] = {}
    for site in placed:
        by_spare.setdefault(site[0].spare or 0, []).append(site)
    best = None
    for _, sites in sorted(by_spare.items()):
        found = findep_of(sites)
        if found is not None and (best is None or found.tokens_per_s > best.tokens_per_s * GAIN):
            best = found
    return _best((best, uniform))


def _uniform_best(problem: Problem, gpus: int, split: Split | None, copying: Copying) -> Plan | None:
    """With every expert on as many GPUs."""
    if copying.spare is not None:
        return None
    many = numbers_of_replicas(problem, gpus, split) if copying.replicas is None else [copying.replicas]
    if split is not None:
        return findep_of((replace(problem, replicas=r), split) for r in many if r <= split.eg)
    found = _best(findep_of((p, one) for one in ratios(p, gpus)) for p in (replace(problem, replicas=r) for r in many))
    if found is None or gpus <= ALL_SPLITS:
        return found
    near = replace(problem, replicas=found.replicas)
    return _best((found, findep_of((near, one) for one in _around(near, gpus, found.split))))


def _placed(problem: Problem, gpus: int, split: Split | None, copying: Copying, uniform: Plan | None) -> Iterator[Site]:
    """With experts where their loads say, copies of hot ones in spare places; none where loads are not known. Around the
    best ratio of uniform copies: what is placed evenly needs no other one by far."""
    if problem.skew is None or copying.replicas is not None:
        return
    tried = _tried(problem, gpus, split)
    if uniform is not None and len(tried) > 2 * NEAR_SPLITS:
        near = sorted(tried, key=lambda one: abs(math.log(one.eg / uniform.split.eg)))
        tried = [uniform.split, *(one for one in near[: 2 * NEAR_SPLITS] if one != uniform.split)]
    for one in tried:
        for spare in spares(problem, one.eg) if copying.spare is None else [copying.spare]:
            yield replace(problem, spare=spare), one


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
