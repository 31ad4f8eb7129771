"""What a plan was solved for, as plain JSON within a plan's file: with it a run solves the plan again where it loses ranks.
Knows the form and its bounds; knows nothing of how a plan is found.

    {"model": {the fields of Model}, "machine": {the fields of Machine but its source; a line is [a, b], "experts" one or
     null, "links": [[ag, eg, a, b], ...]}, "length", "samples", "max_r1", "max_r2",
     "loads": null or {"layers": [of each measured chunk], "chunks": [[a number for each expert], ...]}}

Links are those that losses can lead to: of as many attention ranks, and of expert ranks from one to all.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import numpy as np

from dep_extension.cost import Line, Machine, Model, Split
from dep_extension.imbalance import Loads
from dep_extension.plainjson import count, number, only, several, text, values
from dep_extension.problem import Problem

MAX_GPUS, MAX_CUT, MAX_SIZE, MAX_S, MAX_BYTES = 1 << 16, 1 << 12, 1 << 40, 1e9, 1e18
MAX_EXPERTS = 1 << 12
MAX_CHUNKS, MOST_CHUNKS = 128, 1 << 12  # measured loads: as many are written, of each layer one at least
COUNTS = ("layers", "hidden", "expert_hidden", "experts", "choices", "heads", "d_k", "d_v")
PROBLEM = {"model", "machine", "length", "samples", "max_r1", "max_r2", "loads"}
SCALES = [field.name for field in fields(Machine) if field.type == "float"]
MACHINE = {field.name for field in fields(Machine)} - {"source"}


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


def _loads_to_json(loads: Loads) -> dict[str, Any]:
    """Of every layer as many chunks, the more the fewer layers there are."""
    each = max(1, MAX_CHUNKS // loads.layers)
    found = [_thinned(np.flatnonzero(loads.layer_C == layer), each) for layer in range(loads.layers)]
    kept = np.concatenate(found)
    return {"layers": loads.layer_C[kept].tolist(), "chunks": loads.loads_CE[kept].tolist()}


def _machine_to_json(machine: Machine, split: Split) -> dict[str, Any]:
    plain = {name: getattr(machine, name) for name in ("name", "gpus", *SCALES)}
    lines = {name: list(getattr(machine, name)) for name in ("gemm", "attention")}
    experts = None if machine.experts is None else list(machine.experts)
    splits = [Split(split.ag, eg) for eg in range(1, split.eg + 1)]
    return plain | lines | {"experts": experts, "links": [[*at, *machine.link(at)] for at in splits]}


def _thinned(chunks_N: np.ndarray, most: int) -> np.ndarray:
    if len(chunks_N) <= most:
        return chunks_N
    return chunks_N[np.linspace(0, len(chunks_N) - 1, most).astype(int)]


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
    scales: dict[str, Any] = {name: number(name, data[name], MAX_BYTES) for name in SCALES}
    return Machine(
        name=text("machine's name", data["name"]),
        gpus=count("gpus", data["gpus"], MAX_GPUS),
        gemm=_line("gemm", data["gemm"]),
        attention=_line("attention", data["attention"]),
        links=links,
        experts=None if data["experts"] is None else _line("experts", data["experts"]),
        **scales,
    )


def _line(what: str, value: Any) -> Line:
    a, b = values(what, value, 2)
    return Line(number(what, a, MAX_S), number(what, b, MAX_S))


def _loads(value: Any) -> Loads:
    only(value, {"layers", "chunks"})
    rows = [several("a chunk's loads", row, MAX_EXPERTS) for row in several("loads", value["chunks"], MOST_CHUNKS)]
    layers = [count("a layer", layer, MOST_CHUNKS, least=0) for layer in values("layers", value["layers"], len(rows))]
    return Loads.of([[number("a load", each, MAX_S) for each in row] for row in rows], "of the plan's file", layers)
