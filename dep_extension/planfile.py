"""A plan as a file: JSON that `duoserve dep plan --save` writes and the executor reads, whoever wrote it. Knows the form and
its bounds; knows nothing of how a plan is found or run.

    {"kind": "duoserve-dep-plan", "version": 2, "model": str, "machine": str, "plan": {the fields of Plan},
     "problem": what it was solved for (`problemfile.py`), or null}

Files of version 1 have no "problem" and are read as well. There may be "beside": what else was computed, for people and
scripts; it is not read.

"spare" and "held" are there where experts were placed by their loads; "held" has the experts of each rank, of each layer.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from dep_extension.cost import Split
from dep_extension.placement import Placement
from dep_extension.plainjson import MAX_TEXT, count, number, only, read_json, several, shown, text, values, write_json
from dep_extension.problemfile import problem_from_json, problem_to_json
from dep_extension.schedule import Turn, turns
from dep_extension.solver import Plan, Problem, as_planned

KIND, VERSION = "duoserve-dep-plan", 2
PLACED = {"spare", "held"}
MAX_BYTES = 1 << 23
MAX_GPUS, MAX_CUT, MAX_TOKENS, MAX_S = 1 << 16, 1 << 12, 1 << 40, 1e9
_AGAIN = "make one with `duoserve dep plan --save FILE`"


class Saved(NamedTuple):
    """A plan, what it was made for in words, and the costs to solve it again, where the file has them."""

    plan: Plan
    model: str
    machine: str
    problem: Problem | None


def to_json(plan: Plan, model: str, machine: str, problem: Problem | None = None) -> dict[str, Any]:
    about = {"kind": KIND, "version": VERSION, "model": model, "machine": machine}
    fields_of = asdict(plan) | {"split": list(plan.split), "order": [list(turn) for turn in plan.order]}
    plain = {name: value for name, value in fields_of.items() if name not in PLACED or value is not None}
    return about | {"plan": plain, "problem": problem and problem_to_json(problem, plan.split)}


def save(plan: Plan, path: Path, model: str, machine: str, problem: Problem | None = None) -> None:
    """Replace the file at once: a reader sees the old one or the new one."""
    write_json(path, to_json(plan, model, machine, problem))


def load(path: Path) -> Plan:
    """ValueError of one line where the file is no plan that could be run."""
    return read(path).plan


def read(path: Path) -> Saved:
    """As `load`, with the names of its model and machine, and with its costs."""
    try:
        data = read_json(path, MAX_BYTES)
        if isinstance(data, dict):
            data.pop("beside", None)
        problem = _problem(data)
        only(data, {"kind", "version", "model", "machine", "plan"})
        found = _plan(data["plan"])
        if problem is not None:
            as_planned(problem, found)  # whether its copies can be solved for
        return Saved(found, text("model", data["model"]), text("machine", data["machine"]), problem)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:MAX_TEXT] or type(error).__name__
        raise ValueError(f"{path} is no plan ({reason}): {_AGAIN}") from error


def _problem(data: Any) -> Problem | None:
    """Taken out of it, as its version says; ValueError where there is no such version."""
    if not isinstance(data, dict) or not {"kind", "version"} <= set(data):
        return None  # what it has instead is said by whoever reads on
    version = data["version"]
    if data["kind"] != KIND or type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"is {shown(data['kind'])} version {shown(version)}, not {KIND} 1 to {VERSION}")
    if version == 1:
        return None
    if "problem" not in data:
        raise ValueError(f"has no problem, as version {VERSION} has")
    problem = data.pop("problem")
    return None if problem is None else problem_from_json(problem)


def _plan(data: Any) -> Plan:
    if isinstance(data, dict):
        data = dict.fromkeys(PLACED) | data
    only(data, {field.name for field in fields(Plan)})
    ag, eg = values("split", data["split"], 2)
    r1 = count("r1", data["r1"], MAX_CUT)
    seconds = {name: number(name, data[name], MAX_S) for name in ("makespan_s", "bound_s", "exposed_s")}
    if not 0 < seconds["bound_s"] <= seconds["makespan_s"] * (1 + 1e-9):
        raise ValueError(f"bound_s {seconds['bound_s']:g} is not between 0 and makespan_s {seconds['makespan_s']:g}")
    if seconds["exposed_s"] > seconds["makespan_s"] * (1 + 1e-9):
        raise ValueError(f"exposed_s {seconds['exposed_s']:g} is more than makespan_s {seconds['makespan_s']:g}")
    eg = count("split", eg, MAX_GPUS)
    return Plan(
        name=text("name", data["name"]),
        split=Split(count("split", ag, MAX_GPUS), eg),
        samples=count("samples", data["samples"], MAX_TOKENS),
        r1=r1,
        r2=count("r2", data["r2"], MAX_CUT),
        tokens=count("tokens", data["tokens"], MAX_TOKENS),
        order=_order(data["order"], r1),
        tokens_per_s=number("tokens_per_s", data["tokens_per_s"], 1e15),
        replicas=count("replicas", data["replicas"], eg),
        spare=None if data["spare"] is None else count("spare", data["spare"], MAX_CUT, least=0),
        held=None if data["held"] is None else _held(data["held"], eg),
        **seconds,
    )


def _order(value: Any, r1: int) -> tuple[Turn, ...]:
    """Each micro-batch attends once, and its shared experts follow."""
    found = []
    for turn in values("order", value, 2 * r1):
        what, i = values("a turn", turn, 2)
        if what not in ("A", "S"):
            raise ValueError(f"a turn is {shown(what)}, not A or S")
        found.append((str(what), count("a turn's micro-batch", i, r1 - 1, least=0)))
    return tuple(turns(found, r1))


def _held(value: Any, ranks: int) -> Placement:
    """Ids of experts, of each layer and rank; whether they are the model's is seen where the model is."""
    layers = [values("a layer of held", layer, ranks) for layer in several("held", value, MAX_CUT)]
    return tuple(tuple(map(_ids, layer)) for layer in layers)


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"experts of a rank are {shown(value)}, not a list")
    found = tuple(count("an expert", expert, MAX_CUT, least=0) for expert in value)
    if list(found) != sorted(set(found)):
        raise ValueError(f"experts of a rank are {shown(value)}, not rising")
    return found
