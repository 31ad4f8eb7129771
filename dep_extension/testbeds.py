"""The machines and models of FinDEP's figures, as costs: what is published as it is printed, the rest by one rule. The
numbers, and where each is from, are in testbeds.json. Knows no schedules and measures nothing.

    published    GEMM, attention, and the links of (1, 7), (2, 6) and (4, 4), in milliseconds, on one of the machines
    derived      on another machine every slope b in inverse proportion to its data sheet's rate, of arithmetic or of the
                 link; every launch a as it is
                 on another split the line between the two published ones, by the share of GPUs that attend; beyond (4, 4)
                 in proportion (`cost.Machine.link`)
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from dep_extension.cost import Line, Machine, Model, Split


def names() -> list[str]:
    return list(_data()["beds"])


def named(name: str) -> Machine:
    """A test bed by its letter in the paper. ValueError of one line where there is none of that name."""
    data = _data()
    bed = _known(data["beds"], name, "test bed")
    fits, fitted = data["fits"], data["beds"][data["fits"]["bed"]]
    compute, link = fitted["tflops"] / bed["tflops"], fitted["link_gb_s"] / bed["link_gb_s"]
    scale = bed["gpus"] / fitted["gpus"]
    unit = fits["unit_s"]
    links = {Split(round(at["ag"] * scale), round(at["eg"] * scale)): _line(at, unit, link) for at in fits["links"]}
    return Machine(
        name=f"{name}: {bed['gpus']} x {bed['gpu']}",
        gpus=bed["gpus"],
        memory_bytes=bed["memory_gb"] * 1e9,
        gemm=_line(fits["gemm"], unit, compute),
        attention=_line(fits["attention"], unit, compute),
        links=links,
        source=source(name),
    )


def source(name: str) -> str:
    """In a sentence, where the bed's constants are from."""
    data = _data()
    bed = _known(data["beds"], name, "test bed")
    if name == data["fits"]["bed"]:
        return f"published: {data['fits']['source']}; its machine is {data['fits']['bed_source']}"
    facts = "; ".join(f"{what}: {where}" for what, where in bed["sources"].items())
    return f"derived from the fits of {data['fits']['bed']} by rates of data sheets ({facts})"


def models() -> list[str]:
    return list(_data()["models"])


def model(name: str, bed: str, exact: bool = False) -> Model:
    """One of the paper's models, cut to the layers that it ran on that bed. ValueError of one line where there is none.

    `exact`: the projections as MLA and grouped heads have them; else as the paper counts them, multi-head.
    """
    data = _known(_data()["models"], name, "model")
    layers = _known(data["layers"], bed, "test bed")
    projections = data["projections"] if exact else None
    return Model(name=f"{name}, {layers} layers", layers=layers, projections=projections, **data["shape"])


def _line(fit: dict[str, float], unit: float, slower: float) -> Line:
    return Line(fit["a"] * unit, fit["b"] * unit * slower)


def _known(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ValueError(f"no {what} is named {name!r}: there are {', '.join(table)}")
    return table[name]


@cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((files("dep_extension") / "testbeds.json").read_text(encoding="utf-8"))
    return found
