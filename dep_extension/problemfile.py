"""What a plan was solved for, as plain JSON within a plan's file: with it a run solves the plan again where it loses ranks.
Knows the form and its bounds; knows nothing of how a plan is found.

    {"model": {the fields of Model}, "machine": {"name", "gpus", "memory_bytes", "count_s", "overlap", "both_ways",
     "gemm": [a, b], "attention": [a, b], "experts": [a, b] or null, "links": [[ag, eg, a, b], ...]}, "length", "samples",
     "max_r1", "max_r2", "loads": null or [[layer, a number for each expert], ...] of measured chunks}

Links are those that losses can lead to: of as many attention ranks, and of expert ranks from one to all.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import numpy as np

from dep_extension.cost import Line, Machine, Model, Split
from dep_extension.imbalance import Loads
from dep_extension.plainjson import count, number, only, several, text, values
from dep_extension.solver import Problem

MAX_GPUS, MAX_CUT, MAX_SIZE, MAX_S, MAX_BYTES = 1 << 16, 1 << 12, 1 << 40, 1e9, 1e18
MAX_EXPERTS, MAX_CHUNKS = 1 << 12, 1 << 12
MAX_LOADS = 1 << 17  # numbers that are written: of each layer every so many-th chunk, where there are more
COUNTS = ("layers", "hidden", "expert_hidden", "experts", "choices", "heads", "d_k", "d_v")
PROBLEM = {"model", "machine", "length", "samples", "max_r1", "max_r2", "loads"}
MACHINE = {"name", "gpus", "memory_bytes", "gemm", "attention", "links", "count_s", "overlap", "both_ways", "experts"}


def problem_to_json(problem: Problem, split: Split) -> dict[str, Any]:
    """What runs with this split may need."""
    sizes = {name: getattr(problem, name) for name in ("length", "samples", "max_r1", "max_r2")}
    loads = None if problem.skew is None else _loads_to_json(problem.skew)
    return {
        "model": asdict(problem.model),
        "machine": _machine_to_json(problem.machine, split),
        **sizes,
        "loads": loads,
    }


def _machine_to_json(machine: Machine, split: Split) -> dict[str, Any]:
    plain = {
        name: getattr(machine, name) for name in ("name", "gpus", "memory_bytes", "count_s", "overlap", "both_ways")
    }
    lines = {name: list(getattr(machine, name)) for name in ("gemm", "attention")}
    experts = None if machine.experts is None else list(machine.experts)
    splits = [Split(split.ag, eg) for eg in range(1, split.eg + 1)]
    return plain | lines | {"experts": experts, "links": [[*at, *machine.link(at)] for at in splits]}


def _loads_to_json(loads: Loads) -> list[list[float]]:
    each = max(1, min(MAX_CHUNKS, MAX_LOADS // loads.experts) // loads.layers)
    found: list[list[float]] = []
    for layer in range(loads.layers):
        at = np.flatnonzero(loads.layer_C == layer)
        kept = at if len(at) <= each else at[np.linspace(0, len(at) - 1, each).astype(int)]
        found += [[layer, *row] for row in loads.loads_CE[kept].tolist()]
    return found


def problem_from_json(data: Any) -> Problem:
    """ValueError of one line where it is none."""
    only(data, PROBLEM)
    model = _model(data["model"])
    samples = None if data["samples"] is None else count("samples", data["samples"], MAX_SIZE)
    skew = None if data["loads"] is None else _loads(data["loads"])
    length, max_r1 = count("length", data["length"], MAX_SIZE), count("max_r1", data["max_r1"], MAX_CUT)
    return Problem(
        model, _machine(data["machine"]), length, samples, max_r1, count("max_r2", data["max_r2"], MAX_CUT), skew=skew
    )


def _model(data: Any) -> Model:
    only(data, {field.name for field in fields(Model)})
    sizes: dict[str, Any] = {name: count(name, data[name], MAX_SIZE) for name in COUNTS}
    for name in ("kv_elements", "projections", "attending"):
        sizes[name] = None if data[name] is None else count(name, data[name], MAX_SIZE)
    return Model(
        name=text("model's name", data["name"]),
        shared=count("shared", data["shared"], MAX_SIZE, least=0),
        weight_bytes=number("weight_bytes", data["weight_bytes"], 64),
        kv_bytes=number("kv_bytes", data["kv_bytes"], 64),
        **sizes,
    )


def _machine(data: Any) -> Machine:
    only(data, MACHINE)
    links: dict[Split, Line] = {}
    for row in several("links", data["links"], MAX_GPUS):
        ag, eg, *line = values("a link", row, 4)
        links[Split(count("ag", ag, MAX_GPUS), count("eg", eg, MAX_GPUS))] = _line("a link", line)
    return Machine(
        name=text("machine's name", data["name"]),
        gpus=count("gpus", data["gpus"], MAX_GPUS),
        memory_bytes=number("memory_bytes", data["memory_bytes"], MAX_BYTES),
        gemm=_line("gemm", data["gemm"]),
        attention=_line("attention", data["attention"]),
        links=links,
        count_s=number("count_s", data["count_s"], MAX_S),
        overlap=number("overlap", data["overlap"], MAX_S),
        both_ways=number("both_ways", data["both_ways"], MAX_S),
        experts=None if data["experts"] is None else _line("experts", data["experts"]),
    )


def _line(what: str, value: Any) -> Line:
    a, b = values(what, value, 2)
    return Line(number(what, a, MAX_S), number(what, b, MAX_S))


def _loads(value: Any) -> Loads:
    rows = [several("a chunk's loads", row, MAX_EXPERTS + 1) for row in several("loads", value, MAX_CHUNKS)]
    layers = [count("a chunk's layer", row[0], MAX_CUT, least=0) for row in rows]
    return Loads.of([[number("a load", each, MAX_S) for each in row[1:]] for row in rows], "of the plan's file", layers)
