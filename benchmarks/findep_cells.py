"""The cells of FinDEP's tables, computed: what is assumed, and the plans that follow. Knows the solver and the paper's
figures; writes nothing.

Constants are those of `dep_extension/testbeds.json` and of the assumptions below, one set for all cells.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dep_extension import testbeds
from dep_extension.cost import Line, Split
from dep_extension.partition import splits
from dep_extension.schedule import Order
from dep_extension.solver import Cut, Plan, Problem, findep, naive, pppipe, scored

HERE = Path(__file__).parent
PAPER: dict[str, Any] = json.loads((HERE / "findep_paper.json").read_text())
CLOSE = 0.05  # of a ratio: then a cell follows
STEP = {"D": 4}  # of the splits that are tried on 32 GPUs: half a node more or less
BATCHES = (1, 2, 3, 4, 6, 8)  # samples for each attention GPU that are tried where a cell does not follow
LINKS = (0.25, 0.5, 2.0, 4.0)  # times the slope of links that are tried where no batch does


class Assumption(NamedTuple):
    """`tokens` of the batch of an attention GPU; None: as many samples as its memory holds. `exact`: projections as MLA and
    grouped heads have them, not multi-head. `grouped`: one launch for all experts of a GPU, not one for each. `counts`: the
    exchange of counts costs what an empty transfer costs. `link`: times the slope of every link."""

    title: str
    tokens: int | None = None
    exact: bool = False
    grouped: bool = False
    counts: bool = False
    link: float = 1.0

    def samples(self, length: int) -> int | None:
        return None if self.tokens is None else max(1, self.tokens // length)


PUBLISHED = Assumption("as published")
BOUNDED = Assumption("8,192 tokens", 8192)
TODAY = Assumption("8,192, grouped and exact", 8192, exact=True, grouped=True)
COUNTED = Assumption("8,192, counts priced", 8192, counts=True)
COLUMNS = (PUBLISHED, BOUNDED, TODAY)


class Cell(NamedTuple):
    """`paper`, `ours`: throughput of FinDEP over that of PPPipe; `ours` by column. `rates`: ours of FinDEP, tokens/ms."""

    table: str
    model: str
    length: int
    bed: str
    paper: float
    paper_rate: float
    ours: dict[str, float]
    rates: dict[str, float]
    needs: str

    @property
    def follows(self) -> bool:
        return close(self.ours[PUBLISHED.title], self.paper)

    @property
    def verdict(self) -> str:
        if self.follows:
            return "follows"
        return "less" if self.ours[PUBLISHED.title] < self.paper else "more"


def close(a: float, b: float) -> bool:
    return abs(a / b - 1) <= CLOSE


def problem(a: Assumption, model: str, bed: str, length: int, split: Split, samples: int | None) -> Problem:
    """`samples` for each attention GPU."""
    machine = testbeds.named(bed)
    if a.grouped:
        machine = replace(machine, experts=machine.gemm)
    if a.link != 1:
        slower = {at: Line(line.a, a.link * line.b) for at, line in machine.links.items()}
        machine = replace(machine, links=slower)
    if a.counts:
        machine = replace(machine, count_s=machine.link(split).a)
    cut_model = testbeds.model(model, bed, a.exact)
    return Problem(cut_model, machine, length, None if samples is None else samples * split.ag)


@cache
def best(
    solve: Callable[[Problem, Split], Plan | None],
    a: Assumption,
    model: str,
    bed: str,
    length: int,
    samples: int | None,
    only: Split | None = None,
) -> Plan:
    """Over all splits of the bed, or of `only` one."""
    machine = testbeds.named(bed)
    tried = [s for s in splits(testbeds.model(model, bed), machine.gpus) if s.ag % STEP.get(bed, 1) == 0]
    found = [solve(problem(a, model, bed, length, s, samples), s) for s in ([only] if only else tried)]
    return max((plan for plan in found if plan is not None), key=lambda plan: plan.tokens_per_s)


def offline(a: Assumption, model: str, bed: str, length: int, samples: int | None) -> tuple[Plan, Plan]:
    """PPPipe and FinDEP, each on its best split."""
    return tuple(best(solve, a, model, bed, length, samples) for solve in (pppipe, findep))  # type: ignore[return-value]


def online(a: Assumption, model: str, bed: str, length: int, samples: int | None) -> tuple[Plan, Plan]:
    """PPPipe cut as is best for the length it was tuned for, FinDEP solved anew; on the paper's split, both with the same
    samples."""
    split, tuned_for = Split(*PAPER["online"]["splits"][model][bed]), PAPER["online"]["tuned_for"]
    if samples is None:
        samples = held(a, model, bed, length, split)
    tuned = best(pppipe, a, model, bed, tuned_for, samples, split)
    asked = problem(a, model, bed, length, split, samples)
    static = scored(asked, split, Cut(tuned.samples, tuned.r1, 1), Order.ASAS, "PPPipe, static")
    return static, best(findep, a, model, bed, length, samples, split)


def held(a: Assumption, model: str, bed: str, length: int, split: Split) -> int:
    """Samples for each attention GPU that PPPipe's best cut holds."""
    roomy = best(pppipe, a, model, bed, length, a.samples(length), split)
    return roomy.samples * roomy.r1


def cells() -> Iterator[Cell]:
    for table, run, rows in (
        ("offline", offline, PAPER["offline"]),
        ("online", online, PAPER["online"]["cells"]),
    ):
        for model, lengths in rows.items():
            for length, beds in lengths.items():
                for bed, (before, after) in beds.items():
                    yield cell(table, run, model, int(length), bed, after / before, after)


Run = Callable[[Assumption, str, str, int, int | None], tuple[Plan, Plan]]


def cell(table: str, run: Run, model: str, length: int, bed: str, paper: float, rate: float) -> Cell:
    plans = {a.title: run(a, model, bed, length, a.samples(length)) for a in COLUMNS}
    ours = {title: gain(pair) for title, pair in plans.items()}
    rates = {title: after.tokens_per_s / 1e3 for title, (_, after) in plans.items()}
    needs = "" if close(ours[PUBLISHED.title], paper) else needed(run, model, length, bed, paper)
    return Cell(table, model, length, bed, paper, rate, ours, rates, needs)


def gain(plans: tuple[Plan, Plan]) -> float:
    before, after = plans
    return after.tokens_per_s / before.tokens_per_s


def needed(run: Run, model: str, length: int, bed: str, paper: float) -> str:
    """What comes nearest to the paper's cell: a batch, with the paper's costs or else today's; or else another link."""
    stages = [
        [(a, samples, f"{samples} a GPU{costs}") for samples in BATCHES]
        for a, costs in ((BOUNDED, ""), (TODAY, ", grouped and exact"))
    ]
    stages.append(
        [
            (
                a._replace(link=link),
                a.samples(length),
                f"{a.samples(length)} a GPU{costs}, link {1 / link:g} times as fast",
            )
            for a, costs in ((BOUNDED, ""), (TODAY, ", grouped and exact"))
            for link in LINKS
        ]
    )
    found: list[tuple[float, float, str]] = []
    for stage in stages:
        for a, samples, words in stage:
            ratio = gain(run(a, model, bed, length, samples))
            found.append((abs(math.log(ratio / paper)), ratio, words))
        if close(min(found)[1], paper):
            break
    _, ratio, which = min(found)
    return f"{which}: {ratio:.2f}" if close(ratio, paper) else f"{NONE}; nearest {which}: {ratio:.2f}"


NONE = "none tried"


def counted() -> float:
    """The most of FinDEP's throughput that the exchange of counts takes in an offline cell on A or B."""
    asked = [(m, bed, int(n)) for m, lengths in PAPER["offline"].items() for n in lengths for bed in "AB"]
    rates = [[offline(a, m, bed, n, a.samples(n))[1].tokens_per_s for a in (BOUNDED, COUNTED)] for m, bed, n in asked]
    return max(1 - priced / plain for plain, priced in rates)


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


class Exposed(NamedTuple):
    """Milliseconds of unhidden communication: naive, PPPipe, FinDEP. `samples` for each attention GPU, the same for all."""

    title: str
    split: Split
    samples: int
    length: int
    paper: tuple[float, ...]
    ours: tuple[float, ...]

    @property
    def off(self) -> float:
        """Mean square of the logarithms of ours over the paper's."""
        pairs = zip(self.ours, self.paper, strict=True)
        return sum(math.log(max(ours, 1e-3) / paper) ** 2 for ours, paper in pairs) / len(self.paper)


def exposed() -> list[Exposed]:
    """DeepSeek-V2 on A, on the split that the paper uses there online; then the batch and split, one for all lengths, that
    come nearest to the paper's figures."""
    model, bed = "deepseek-v2", "A"
    split = Split(*PAPER["online"]["splits"][model][bed])
    found = []
    for a in (PUBLISHED, BOUNDED, TODAY):
        found += [unhidden(a, split, held(a, model, bed, n, split), n) for n in LENGTHS]
    tried = [
        [unhidden(a, Split(ag, 8 - ag), samples, n) for n in LENGTHS]
        for a in (BOUNDED, TODAY)
        for ag in (1, 2, 3, 4)
        for samples in BATCHES
    ]
    nearest = min(tried, key=lambda rows: sum(row.off for row in rows))
    return [*found, *(row._replace(title="nearest of those tried") for row in nearest)]


LENGTHS = [int(length) for length in PAPER["exposed_ms"]]


def unhidden(a: Assumption, split: Split, samples: int, length: int) -> Exposed:
    plans = [best(solve, a, "deepseek-v2", "A", length, samples, split) for solve in (pppipe, findep)]
    ours = (naively(a, split, samples, length), *(plan.exposed_s for plan in plans))
    paper = tuple(PAPER["exposed_ms"][str(length)])
    return Exposed(a.title, split, samples, length, paper, tuple(1e3 * seconds for seconds in ours))


def naively(a: Assumption, split: Split, samples: int, length: int) -> float:
    """Of naive DEP, one after the other where an expert GPU has no room for all rows at once."""
    for passes in range(1, samples + 1):
        each = math.ceil(samples / passes)
        plan = naive(problem(a, "deepseek-v2", "A", length, split, each), split)
        if plan is not None:
            return passes * plan.exposed_s
    raise ValueError(f"not one sample of {length} tokens fits {split}")


class Monotone(NamedTuple):
    """Throughput over that of one sample in one micro-batch."""

    varied: str
    title: str
    bed: str
    length: int
    paper: tuple[float, ...]
    ours: tuple[float, ...]


def monotone() -> list[Monotone]:
    """Two layers of DeepSeek-V2: samples in one micro-batch, then micro-batches of one sample."""
    steps, found = PAPER["monotone"]["steps"], []
    for varied in ("m_a", "r1"):
        for bed, lengths in PAPER["monotone"][varied].items():
            split = Split(*PAPER["monotone"]["splits"][bed])
            for length, paper in lengths.items():
                for a in (PUBLISHED, TODAY):
                    rates = [rate(a, bed, int(length), split, varied, step) for step in steps]
                    scaled = [tuple(value / row[0] for value in row) for row in (paper, rates)]
                    found.append(Monotone(varied, a.title, bed, int(length), *scaled))
    return found


def rate(a: Assumption, bed: str, length: int, split: Split, varied: str, step: int) -> float:
    asked = problem(a, "deepseek-v2", bed, length, split, None)
    asked = replace(asked, model=replace(asked.model, layers=2))
    samples, r1 = (step, 1) if varied == "m_a" else (1, step)
    cuts = [Cut(samples, r1, r2) for r2 in range(1, 33)]
    return max(scored(asked, split, cut, order, "").tokens_per_s for cut in cuts for order in Order)
