"""A plan as a file: JSON that `duoserve dep plan --save` writes and the executor reads, whoever wrote it. Knows the form and
its bounds; knows nothing of how a plan is found or run.

    {"kind": "duoserve-dep-plan", "version": 1, "model": str, "machine": str, "plan": {the fields of Plan}}

"spare" and "held" are there where experts were placed by their loads; "held" has the experts of each rank, of each layer.

There may be "beside": what else was computed, for people and scripts; it is not read.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from dep_extension.cost import Split
from dep_extension.placement import Placement
from dep_extension.schedule import Turn, turns
from dep_extension.solver import Plan

KIND, VERSION = "duoserve-dep-plan", 1
PLACED = {"spare", "held"}
MAX_BYTES, MAX_TEXT = 1 << 23, 200
MAX_GPUS, MAX_CUT, MAX_TOKENS, MAX_S = 1 << 16, 1 << 12, 1 << 40, 1e9
_AGAIN = "make one with `duoserve dep plan --save FILE`"


class Saved(NamedTuple):
    """A plan, and what it was made for, in words."""

    plan: Plan
    model: str
    machine: str


def to_json(plan: Plan, model: str, machine: str) -> dict[str, Any]:
    about = {"kind": KIND, "version": VERSION, "model": model, "machine": machine}
    values = asdict(plan) | {"split": list(plan.split), "order": [list(turn) for turn in plan.order]}
    for name in PLACED:
        if values[name] is None:
            del values[name]
    return about | {"plan": values}


def save(plan: Plan, path: Path, model: str, machine: str) -> None:
    """Replace the file at once: a reader sees the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(to_json(plan, model, machine), allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


def load(path: Path) -> Plan:
    """ValueError of one line where the file is no plan that could be run."""
    return read(path).plan


def read(path: Path) -> Saved:
    """As `load`, with the names of its model and machine."""
    try:
        data = json.loads(_bytes(path), parse_constant=_refuse, object_pairs_hook=_once)
        if isinstance(data, dict):
            data.pop("beside", None)
        _only(data, {"kind", "version", "model", "machine", "plan"})
        if data["kind"] != KIND or data["version"] != VERSION or type(data["version"]) is not int:
            raise ValueError(f"is {_shown(data['kind'])} version {_shown(data['version'])}, not {KIND} {VERSION}")
        return Saved(_plan(data["plan"]), _text("model", data["model"]), _text("machine", data["machine"]))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:MAX_TEXT] or type(error).__name__
        raise ValueError(f"{path} is no plan ({reason}): {_AGAIN}") from error


def _bytes(path: Path) -> bytes:
    """Of a plain file of bounded size."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("no plain file")
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ValueError("there is no such file") from error
    except IsADirectoryError as error:
        raise ValueError("a folder") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"has more than the {MAX_BYTES:,} bytes that are read")
    return data


def _plan(data: Any) -> Plan:
    if isinstance(data, dict) and not PLACED & set(data):
        data = data | dict.fromkeys(PLACED)
    _only(data, {field.name for field in fields(Plan)})
    ag, eg = _list("split", data["split"], 2)
    r1 = _count("r1", data["r1"], MAX_CUT)
    seconds = {name: _number(name, data[name], MAX_S) for name in ("makespan_s", "bound_s", "exposed_s")}
    if not 0 < seconds["bound_s"] <= seconds["makespan_s"] * (1 + 1e-9):
        raise ValueError(f"bound_s {seconds['bound_s']:g} is not between 0 and makespan_s {seconds['makespan_s']:g}")
    if seconds["exposed_s"] > seconds["makespan_s"] * (1 + 1e-9):
        raise ValueError(f"exposed_s {seconds['exposed_s']:g} is more than makespan_s {seconds['makespan_s']:g}")
    eg = _count("split", eg, MAX_GPUS)
    return Plan(
        name=_text("name", data["name"]),
        split=Split(_count("split", ag, MAX_GPUS), eg),
        samples=_count("samples", data["samples"], MAX_TOKENS),
        r1=r1,
        r2=_count("r2", data["r2"], MAX_CUT),
        tokens=_count("tokens", data["tokens"], MAX_TOKENS),
        order=_order(data["order"], r1),
        tokens_per_s=_number("tokens_per_s", data["tokens_per_s"], 1e15),
        replicas=_count("replicas", data["replicas"], eg),
        spare=None if data["spare"] is None else _count("spare", data["spare"], MAX_CUT, least=0),
        held=None if data["held"] is None else _held(data["held"], eg),
        **seconds,
    )


def _order(value: Any, r1: int) -> tuple[Turn, ...]:
    """Each micro-batch attends once, and its shared experts follow."""
    found = []
    for turn in _list("order", value, 2 * r1):
        what, i = _list("a turn", turn, 2)
        if what not in ("A", "S"):
            raise ValueError(f"a turn is {_shown(what)}, not A or S")
        found.append((str(what), _count("a turn's micro-batch", i, r1 - 1, least=0)))
    return tuple(turns(found, r1))


def _held(value: Any, ranks: int) -> Placement:
    """Ids of experts, of each layer and rank; whether they are the model's is seen where the model is."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CUT:
        raise ValueError(f"held is {_shown(value)}, not 1 to {MAX_CUT:,} layers")
    layers = [[_ids(one) for one in _list("a layer of held", layer, ranks)] for layer in value]
    return tuple(map(tuple, layers))


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"experts of a rank are {_shown(value)}, not a list")
    found = tuple(_count("an expert", expert, MAX_CUT, least=0) for expert in value)
    if list(found) != sorted(set(found)):
        raise ValueError(f"experts of a rank are {_shown(value)}, not rising")
    return found


def _only(data: Any, names: set[str]) -> None:
    if not isinstance(data, dict) or set(data) != names:
        found = sorted(data)[:16] if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"has {_shown(found)}, not {sorted(names)}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A name twice is two readers that see two files."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{len(pairs)} names, {len(found)} of them different")
    return found


def _list(what: str, value: Any, n: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != n:
        raise ValueError(f"{what} is {_shown(value)}, not {n} values")
    return value


def _count(what: str, value: Any, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} {_shown(value)} is no whole number from {least} to {most:,}")
    return value


def _number(what: str, value: Any, most: float) -> float:
    if type(value) not in (int, float) or not (0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"{what} {_shown(value)} is not between 0 and {most:g}")
    return float(value)


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(f"{what} is no short text")
    return value


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # whole numbers of many digits, lists in lists
        return type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
