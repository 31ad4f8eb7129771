"""A sweep of `duoserve dep simulate`: GPUs, lengths, skew and links, every combination solved anew. Knows the grid, its
table and its picture; knows no command line, and no names of models or machines.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dep_extension.cost import Line, Machine, Model, Split
from dep_extension.imbalance import zipf
from dep_extension.ratio import Row, Ways, rows_of, ways
from dep_extension.solver import Plan, Problem, as_planned
from duoserve.core import Refusal
from duoserve.flags import check_targets

MOST_CELLS = 512
_BOUNDS = {"gpus": (2, 4096), "length": (1, 1 << 20), "skew": (0.0, 4.0), "link-speed": (1e-3, 1e3)}
_WAYS = ("naive", "PPPipe", "colocated", "FinDEP")
_NAMES = {"gpus": "GPUs", "length": "tokens of a sample", "skew": "exponent of Zipf's law", "link_speed": "link speed"}


@dataclass(frozen=True)
class Grid:
    """Values of what varies."""

    gpus: Sequence[int]
    length: Sequence[int]
    skew: Sequence[float]
    link_speed: Sequence[float]

    @classmethod
    def read(cls, gpus: str, length: str, skew: str, link_speed: str) -> Grid:
        """Of lists as they are typed."""
        grid = cls(
            [int(n) for n in _numbers("gpus", gpus)],
            [int(n) for n in _numbers("length", length)],
            _numbers("skew", skew),
            _numbers("link-speed", link_speed),
        )
        if len(list(grid.cells())) > MOST_CELLS:
            what = f"{len(list(grid.cells())):,} combinations are asked for, at most {MOST_CELLS} are solved"
            raise Refusal("E_OPTION", what, "give fewer values")
        return grid

    def cells(self) -> Iterator[tuple[int, int, float, float]]:
        return itertools.product(self.gpus, self.length, self.skew, self.link_speed)

    @property
    def varying(self) -> list[str]:
        return [name for name in _NAMES if len(getattr(self, name)) > 1]


def _numbers(name: str, text: str) -> list[float]:
    """Different ones, rising."""
    low, high = _BOUNDS[name]
    found = set()
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (isinstance(low, int) and value != int(value)):
            raise Refusal(
                "E_OPTION", f"--{name} {word[:20]!r} is out of range", f"give numbers from {low:g} to {high:,}"
            )
        found.add(value)
    return sorted(found)


class Cell(NamedTuple):
    """One combination; `found` is None where the model fits no split. `rows`: every ratio, where asked for."""

    gpus: int
    length: int
    skew: float
    link_speed: float
    found: Ways | None
    rows: list[Row]

    def rate(self, way: str) -> float | None:
        """Tokens per second of one GPU."""
        if self.found is None:
            return None
        best = max((one.tokens_per_s for one in self.found.colocated), default=None)
        plans = {"naive": self.found.naive, "PPPipe": self.found.pppipe, "FinDEP": self.found.findep}
        rate = best if way == "colocated" else (plan.tokens_per_s if (plan := plans[way]) is not None else None)
        return None if rate is None else rate / self.gpus


@dataclass(frozen=True)
class Faster(Mapping[Split, Line]):
    """The same links, their slopes divided."""

    links: Mapping[Split, Line]
    times: float

    def __getitem__(self, split: Split) -> Line:
        a, b = self.links[split]
        return Line(a, b / self.times)

    def __contains__(self, split: object) -> bool:
        return split in self.links

    def __iter__(self) -> Iterator[Split]:
        return iter(self.links)

    def __len__(self) -> int:
        return len(self.links)


def swept(
    grid: Grid, model: Model, machine: Machine, batch: int | None, max_r1: int, ratios: bool = False
) -> Iterator[Cell]:
    """Every combination, in order, as it is solved."""
    for gpus, length, skew, speed in grid.cells():
        links = machine.links if speed == 1 else Faster(machine.links, speed)
        costs = replace(machine, gpus=max(gpus, machine.gpus), links=links)
        loads = zipf(model.experts, skew) if skew else None
        problem = Problem(model, costs, length, batch, max_r1, skew=loads)
        found = ways(problem, gpus)
        at = None if found is None else as_planned(problem, found.findep)
        yield Cell(gpus, length, skew, speed, found, rows_of(at, gpus) if ratios and at is not None else [])


def lines(cell: Cell, as_json: bool, first: bool) -> Iterator[str]:
    """What is printed of a cell, headed where it is the first."""
    if as_json:
        yield json.dumps(to_json(cell))
        return
    if first:
        heads = "".join(f"{way:>12s}" for way in _WAYS) + f"{'ratio':>12s}{'copies':>9s}"
        yield f"{'GPUs':>5s}{'length':>8s}{'skew':>6s}{'link':>6s}{heads}   tokens/s a GPU, simulated"
    about = f"{cell.gpus:5d}{cell.length:8d}{cell.skew:6g}{cell.link_speed:6g}"
    if cell.found is None:
        yield f"{about}   no room"
        return
    plan = cell.found.findep
    rates = "".join(f"{rate:12,.1f}" if (rate := cell.rate(way)) is not None else f"{'-':>12s}" for way in _WAYS)
    yield f"{about}{rates}{f'{plan.split.ag}:{plan.split.eg}':>12s}{_copies(plan):>9s}"
    for row in cell.rows:
        each = [None if p is None else p.tokens_per_s / cell.gpus for p in (row.naive, row.pppipe, row.findep)]
        cells = [f"{'-':>12s}" if rate is None else f"{rate:12,.1f}" for rate in each]
        cells.insert(2, " " * 12)
        yield f"{'':25s}{''.join(cells)}{f'{row.split.ag}:{row.split.eg}':>12s}"


def _copies(plan: Plan) -> str:
    """Replicas of each expert, or places for copies of hot ones."""
    return f"x{plan.replicas}" if plan.spare is None else f"+{plan.spare}"


def to_json(cell: Cell) -> dict[str, Any]:
    about = {
        "simulated": True,
        "gpus": cell.gpus,
        "length": cell.length,
        "skew": cell.skew,
        "link_speed": cell.link_speed,
    }
    rates = {way.lower(): cell.rate(way) for way in _WAYS}
    if cell.found is None:
        return about | {"fits": False, "tokens_per_s_per_gpu": rates}
    plan = cell.found.findep
    cut = {
        "split": list(plan.split),
        "replicas": plan.replicas,
        "spare": plan.spare,
        "samples": plan.samples,
        "r1": plan.r1,
        "r2": plan.r2,
    }
    rows = [
        {"split": list(row.split)}
        | {way: plan and plan.tokens_per_s for way, plan in zip(("naive", "pppipe", "findep"), row[1:], strict=True)}
        for row in cell.rows
    ]
    more = {"gap": plan.gap, "exposed_s": plan.exposed_s, "makespan_s": plan.makespan_s}
    return (
        about | {"fits": True, "tokens_per_s_per_gpu": rates, "plan": cut | more} | ({"ratios": rows} if rows else {})
    )


def check_picture(grid: Grid, path: Path) -> None:
    check_targets(path)
    if len(grid.varying) not in (1, 2):
        raise Refusal(
            "E_OPTION", f"{len(grid.varying)} things vary, 1 or 2 can be drawn", "give fewer lists, or no --png"
        )


def draw(path: Path, grid: Grid, cells: Sequence[Cell], title: str) -> None:
    """Lines over what has the most values, a panel for each value of what else varies."""
    from duoserve.deppicture import Line as Drawn
    from duoserve.deppicture import plot

    across = max(grid.varying, key=lambda name: len(getattr(grid, name)))
    other = next((name for name in grid.varying if name != across), None)
    panels = []
    for value in getattr(grid, other) if other else [None]:
        shown = [cell for cell in cells if other is None or getattr(cell, other) == value]
        xs = [getattr(cell, across) for cell in shown]
        drawn = [Drawn(way, xs, [cell.rate(way) for cell in shown]) for way in _WAYS]
        panels.append((f"{_NAMES[other]}: {value:g}" if other else "", drawn))
    plot(path, panels, _NAMES[across], "tokens/s a GPU", f"{title}: simulated", log=across != "skew")
