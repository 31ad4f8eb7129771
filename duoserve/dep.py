"""The commands `dep plan` and `dep simulate`: how to divide GPUs into those that attend and those that hold experts, and
what it comes to. Knows the command line and what to print: planning is `dep_extension`'s, names and files `depsubject.py`'s.
Every figure is a simulation's, none is measured.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duoserve.config import parse_size, size
from duoserve.core import Refusal
from duoserve.depcalibrate import calibrate, costs
from duoserve.depcopies import copies_json, copies_table
from duoserve.flags import check_targets
from duoserve.kernels import kernels

if TYPE_CHECKING:
    from dep_extension.colocated import Colocated
    from dep_extension.cost import Split
    from dep_extension.ratio import Comparison
    from dep_extension.solver import AfterLoss, Plan, Problem

MOST_GPUS, MOST_SAMPLES, MOST_LENGTH, MOST_SPARE = 4096, 1 << 20, 1 << 20, 4096

dep = typer.Typer(help="Divide GPUs into those that attend and those that hold experts, and see what it comes to.")
dep.command()(calibrate)
dep.command()(costs)

ModelName = Annotated[
    str | None,
    typer.Argument(help="A model by name, as for `simulate`; deepseek-v2, qwen3-235b-a22b; a folder; or the demo."),
]
MachineName = Annotated[
    str,
    typer.Option("--machine", "-m", help="A, B, C, D (FinDEP's), a file that was calibrated, or rtx4090, h200 ..."),
]
Skew = Annotated[
    str | None,
    typer.Option(
        help="Loads: a trace's folder, a file, routes (made by published habits), zipf:0.8 (hot ones change), settled:0.8."
    ),
]
LinkRate = Annotated[str | None, typer.Option(help="Bytes per second between GPUs of a derived machine, as 450GB.")]
Memory = Annotated[str | None, typer.Option(help="Of a GPU of a derived machine, as 80GB.")]


@dep.command()
def plan(
    model: ModelName = None,
    machine: MachineName = "A",
    gpus: Annotated[int, typer.Option(help="GPUs in all.")] = 8,
    batch: Annotated[int | None, typer.Option(help="Samples in all. Default: as many as fit.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 2048,
    ratio: Annotated[str | None, typer.Option(help="Attention to expert GPUs, as 3:5. Default: the best.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Expert GPUs that hold each expert. Default: the best.")] = None,
    spare: Annotated[
        int | None,
        typer.Option(
            help="Places of a layer on each expert GPU for copies of hot experts, by --skew. Default: the best."
        ),
    ] = None,
    max_r1: Annotated[int, typer.Option("--max-r1", help="Micro-batches at most.")] = 8,
    skew: Skew = None,
    link: LinkRate = None,
    memory: Memory = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the plan, for `python -m dep_extension --plan FILE`.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Draw its timeline.")] = None,
    perfetto: Annotated[Path | None, typer.Option(help="Write its timeline for ui.perfetto.dev.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: the plan, as --save writes it.")
    ] = False,
) -> None:
    """The best plan for a batch, beside every baseline, with its lower bound. Simulated: measures nothing."""
    from dep_extension.planfile import save as write_plan
    from dep_extension.planfile import to_json
    from dep_extension.ratio import Copying, compare
    from duoserve.depsubject import whose

    _check(gpus, batch, length, max_r1, replicas)
    split = _split(ratio, gpus)
    if spare is not None and (replicas is not None or skew is None or not 0 <= spare <= MOST_SPARE):
        what = f"--spare {spare}" + (f" with --replicas {replicas}" if replicas is not None else "")
        what += " without --skew" if skew is None else ""
        raise Refusal("E_OPTION", what, f"give 0 to {MOST_SPARE} places and loads to place by, or replicas alone")
    if split is not None and replicas is not None and replicas > split.eg:
        what = f"--replicas {replicas} on {split.eg} expert GPUs of --ratio {ratio}"
        raise Refusal("E_OPTION", what, "ask for no more replicas than expert GPUs")
    check_targets(save, png, perfetto)
    problem = _problem(model, machine, gpus, batch, length, max_r1, skew, link, memory)
    owner = whose(machine, problem.machine)
    found = compare(problem, gpus, split, Copying(replicas, spare))
    if found is None:
        raise _no_room(problem, gpus, split, replicas, spare)
    if save is not None:
        write_plan(found.plan, save, problem.model.name, problem.machine.name, problem)
    if png is not None or perfetto is not None:
        _pictures(problem, found.plan, png, perfetto)
    if as_json:
        beside = {"beside": _beside(problem, found) | {"machine": owner}}
        print(json.dumps(to_json(found.plan, problem.model.name, problem.machine.name, problem) | beside))
        return
    for what, says in table(problem, found, owner):
        print(f"{what:18s}{says}".rstrip())


def _check(gpus: int, batch: int | None, length: int, max_r1: int, replicas: int | None) -> None:
    asked = {
        "--gpus": (gpus, 2, MOST_GPUS),
        "--batch": (batch, 1, MOST_SAMPLES),
        "--length": (length, 1, MOST_LENGTH),
        "--max-r1": (max_r1, 1, 64),
        "--replicas": (replicas, 1, gpus - 1),
    }
    for name, (value, low, high) in asked.items():
        if value is not None and not low <= value <= high:
            raise Refusal("E_OPTION", f"{name} {value} is out of range", f"give one from {low} to {high:,}")


def _split(ratio: str | None, gpus: int) -> Split | None:
    from dep_extension.cost import Split

    if ratio is None:
        return None
    said = re.fullmatch(r"([1-9]\d{0,4}):([1-9]\d{0,4})", ratio)
    if said is None:
        raise Refusal("E_OPTION", f"--ratio {ratio[:40]!r} is no ratio of at least 1:1", "write it like 3:5")
    split = Split(int(said[1]), int(said[2]))
    if sum(split) != gpus:
        what = f"--ratio {ratio} is {sum(split)} GPUs, --gpus says {gpus}"
        raise Refusal("E_OPTION", what, "let the two add up")
    return split


def _problem(
    model: str | None, machine: str, gpus: int, batch: int | None, length: int, max_r1: int, skew: str | None,
    link: str | None, memory: str | None,
) -> Problem:  # fmt: skip
    from dep_extension.solver import Problem
    from duoserve.depsubject import known_loads, known_machine, known_model

    shape = known_model(model, machine)
    costs = known_machine(machine, shape, gpus, _rate(link), _room(memory))
    if gpus > costs.gpus:
        what = f"machine {costs.name} has {costs.gpus} GPUs, --gpus says {gpus}"
        raise Refusal("E_OPTION", what, "ask for no more, or see `duoserve dep simulate`")
    loads = known_loads(skew, model, shape) if skew is not None else None
    return Problem(shape, costs, length, batch, max_r1, skew=loads)


def _no_room(problem: Problem, gpus: int, split: Split | None, replicas: int | None, spare: int | None) -> Refusal:
    from dep_extension.partition import least, splits

    copies = replicas or 1
    tried = [split] if split is not None else list(splits(problem.model, gpus, copies))
    need = least(problem.model, tried, problem.length, problem.samples, problem.max_r1, copies, spare or 0)
    have = problem.machine.memory_bytes
    where = f"no split of {gpus} GPUs" if split is None else f"not {split.ag}:{split.eg}"
    what = f"{problem.model.name} fits {where} ({need.split.ag}:{need.split.eg} needs {size(need.n_bytes)} on a GPU"
    what += f" with {copies} copies of its experts" if copies > 1 else f" with {spare} spare places" if spare else ""
    what += f", one has {size(have)})"
    return Refusal("E_SPLIT", what, "use more GPUs, a smaller --batch or --length, or fewer --replicas or --spare", 4)


def _pictures(problem: Problem, plan: Plan, png: Path | None, perfetto: Path | None) -> None:
    from dep_extension.schedule import timeline
    from dep_extension.solver import Cut, as_planned, work_of
    from duoserve.deppicture import draw, write_trace

    tasks = timeline(work_of(as_planned(problem, plan), plan.split, Cut(plan.samples, plan.r1, plan.r2)), plan.order)
    title = f"{problem.model.name} on {problem.machine.name}, {plan.split.ag}:{plan.split.eg}"
    if png is not None:
        draw(png, tasks, title)
    if perfetto is not None:
        write_trace(perfetto, tasks, title)


def table(problem: Problem, found: Comparison, owner: str | None = None) -> Iterator[tuple[str, str]]:
    """Rows for people. `owner`: whose costs these are, where it matters."""
    plan, machine = found.plan, problem.machine
    yield "simulated", f"{problem.model.name} on {machine.name}: no measurement"
    yield "costs", textwrap.shorten(machine.source or "calibrated", 120, placeholder=" ...")
    if owner is not None:
        yield "machine", owner
    if problem.skew is not None:
        yield (
            "loads",
            f"{problem.skew.source}: the busiest expert of a chunk gets {problem.skew.skew:.2f} times its share",
        )
    yield "split", f"attention GPUs {plan.split.ag}, expert GPUs {plan.split.eg}, {_copies(plan)}"
    yield (
        "cut",
        f"r1 {plan.r1} micro-batches of m_a {plan.samples} samples a GPU; r2 {plan.r2} chunks of m_e {plan.tokens:,} tokens",
    )
    yield "order", _order(plan)
    yield "throughput", f"{plan.tokens_per_s:,.0f} tokens/s; one pass of {problem.length} tokens {_ms(plan.makespan_s)}"
    yield (
        "exposed",
        f"{_ms(plan.exposed_s)} of communication that nothing hides, {plan.exposed_s / plan.makespan_s:.1%}",
    )
    yield "lower bound", f"{_ms(plan.bound_s)} for any order of this cut: at most {max(0.0, plan.gap):.2%} to gain"
    yield from _losses(problem, plan)
    if problem.skew is not None:
        yield from copies_table(problem, found)
    yield from _ways(found)
    yield from _ratios(found)


def _losses(problem: Problem, plan: Plan) -> Iterator[tuple[str, str]]:
    """What goes on once an expert GPU is gone, with this plan's copies and with one more of each."""
    for what, less in after_one(problem, plan).items():
        if less is None:
            yield what, "the expert GPUs that are left have no room"
            continue
        split, n_bytes = less.plan.split, less.loaded * problem.model.expert_bytes
        load = f"{less.loaded:,} experts to load, {size(n_bytes)}" if less.loaded else "nothing to load"
        yield what, f"{split.ag}:{split.eg} goes on with {less.plan.tokens_per_s:,.0f} tokens/s; {load}"


def after_one(problem: Problem, plan: Plan) -> dict[str, AfterLoss | None]:
    """Of the first expert GPU, by what is lost then: the plan as it is, and with one more copy of each where that fits."""
    from dep_extension.solver import as_planned, findep, survived

    found = {"one lost": survived(as_planned(problem, plan), plan)}
    if plan.spare is None and plan.replicas < plan.split.eg:
        more = replace(problem, replicas=plan.replicas + 1)
        before = findep(more, plan.split)
        if before is not None:
            found[f"with {more.replicas} copies"] = survived(more, before)
    return found


def _ways(found: Comparison) -> Iterator[tuple[str, str]]:
    """Each at its own best ratio, over the plan's throughput."""
    yield "", ""
    yield "way", f"{'tokens/s':>12s}{'of plan':>9s}{'exposed':>14s}  at"
    best = found.plan.tokens_per_s
    plans = [
        ("naive DEP", found.ways.naive),
        ("PPPipe", found.ways.pppipe),
        ("FinDEP", found.ways.findep),
        ("free order", found.plan),
    ]
    for name, one in plans:
        if one is not None:
            at = f"{one.split.ag}:{one.split.eg}, r1 {one.r1}, r2 {one.r2}"
            yield name, f"{one.tokens_per_s:12,.0f}{one.tokens_per_s / best:9.3f}{_ms(one.exposed_s):>14s}  {at}"
    for other in found.ways.colocated:
        at = f"{other.gpus} GPUs, {other.micro_batches} x {other.samples} samples, {_copies(other)}"
        name = "colocated" if other.micro_batches == 1 else "colocated, two"
        yield name, f"{other.tokens_per_s:12,.0f}{other.tokens_per_s / best:9.3f}{_ms(other.exposed_s):>14s}  {at}"
    if not found.ways.colocated:
        yield "colocated", "has no room"
    if any(other.tokens_per_s > best for other in found.ways.colocated):
        yield "", "expert parallelism without two groups is the faster one here"


def _ratios(found: Comparison) -> Iterator[tuple[str, str]]:
    yield "", ""
    yield "ratio", f"{'naive':>12s}{'PPPipe':>12s}{'FinDEP':>12s}   tokens/s"
    for row in found.rows:
        cells = [f"{p.tokens_per_s:12,.0f}" if p is not None else f"{'no room':>12s}" for p in row[1:]]
        yield f"{row.split.ag}:{row.split.eg}", "".join(cells)
    for other in found.ways.colocated:
        yield f"all {other.gpus}", f"{other.tokens_per_s:12,.0f}   {other.name}"


def _order(plan: Plan) -> str:
    from dep_extension.schedule import Order, turns

    for order in Order:
        if list(plan.order) == turns(order, plan.r1):
            return order.value
    return " ".join(f"{what}{i}" for what, i in plan.order)


def _copies(at: Plan | Colocated) -> str:
    if at.spare is not None:
        return f"experts placed by loads, {at.spare} spare places" if at.spare else "experts placed by loads"
    return "each expert once" if at.replicas == 1 else f"each expert on {at.replicas} of them"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _beside(problem: Problem, found: Comparison) -> dict[str, Any]:
    plans = {"naive": found.ways.naive, "pppipe": found.ways.pppipe, "findep": found.ways.findep}
    rows = [
        {"split": list(row.split)}
        | {name: plan and plan.tokens_per_s for name, plan in zip(plans, row[1:], strict=True)}
        for row in found.rows
    ]
    return {
        "simulated": True, "costs": problem.machine.source, "length": problem.length, "batch": problem.samples,
        "loads": problem.skew and problem.skew.source, "gap": found.plan.gap,
        "copies": copies_json(problem, found),
        **{name: plan and _figures(plan) for name, plan in plans.items()},
        "after_one_lost": {
            what: less and {"split": list(less.plan.split), "tokens_per_s": less.plan.tokens_per_s, "loaded": less.loaded}
            for what, less in after_one(problem, found.plan).items()
        },
        "colocated": [asdict(other) for other in found.ways.colocated], "ratios": rows,
    }  # fmt: skip


def _figures(plan: Plan) -> dict[str, Any]:
    names = ("samples", "r1", "r2", "replicas", "spare", "makespan_s", "bound_s", "exposed_s", "tokens_per_s")
    return {"split": list(plan.split), "order": _order(plan)} | {name: getattr(plan, name) for name in names}


@dep.command()
def simulate(
    model: ModelName = None,
    machine: MachineName = "A",
    gpus: Annotated[str, typer.Option(help="GPUs in all, several with commas, up to 4096.")] = "8",
    length: Annotated[str, typer.Option(help="Tokens of a sample, several with commas.")] = "1024,2048,4096,8192",
    skew: Annotated[str, typer.Option(help="Exponents of Zipf's law over experts, several with commas.")] = "0",
    link_speed: Annotated[str, typer.Option(help="Links so many times as fast, several with commas.")] = "1",
    batch: Annotated[int | None, typer.Option(help="Samples in all. Default: as many as fit.")] = None,
    max_r1: Annotated[int, typer.Option("--max-r1", help="Micro-batches at most.")] = 8,
    link: LinkRate = None,
    memory: Memory = None,
    ratios: Annotated[bool, typer.Option("--ratios", help="Every ratio of each, not the best alone.")] = False,
    png: Annotated[Path | None, typer.Option("--png", help="Draw it over one or two of the things that vary.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Sweep GPUs, lengths, skew and links, each way at its best. More GPUs than the machine has are as if joined alike."""
    from duoserve import depsweep
    from duoserve.depsubject import known_machine, known_model

    grid = depsweep.Grid.read(gpus, length, skew, link_speed)
    _check(max(2, min(grid.gpus)), batch, min(grid.length), max_r1, None)
    if png is not None:
        depsweep.check_picture(grid, png)
    shape = known_model(model, machine)
    costs = known_machine(machine, shape, max(grid.gpus), _rate(link), _room(memory))
    cells = []
    for cell in depsweep.swept(grid, shape, costs, batch, max_r1, ratios):
        cells.append(cell)
        for line in depsweep.lines(cell, as_json, first=len(cells) == 1):
            print(line, flush=True)
    if png is not None:
        depsweep.draw(png, grid, cells, f"{shape.name} on {costs.name}")


def _rate(link: str | None) -> float | None:
    return None if link is None else _above_nothing(parse_size(link, "link"), link, "--link")


def _room(memory: str | None) -> float | None:
    return None if memory is None else _above_nothing(parse_size(memory, "memory"), memory, "--memory")


def _above_nothing(value: int, text: str, what: str) -> float:
    if value < 1:
        raise Refusal("E_OPTION", f"{what} {text} is {value} bytes", "give at least 1")
    return float(value)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    dep.command()(kernels)
    app.add_typer(dep, name="dep")
