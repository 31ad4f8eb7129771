"""What it is worth to plan with measured loads: a plan that assumes balance and plans that saw the skew, all executed in the
simulator under skew that none of them saw. No GPU is here: every figure is a simulation's, none is measured.

python -m benchmarks.skew [--bed A] [--batch 32] [--length 2048] [--trace DIR]

Loads are of Zipf's law by its exponent, and of routes made with published habits (`traces/generate.py`) or of a trace; plans
see one draw, or the first half of the chunks, and are executed under another. Freedoms are added one by one: the cut and the
order on the blind plan's split, then copies of experts there, then the ratio too. Writes results/skew.jsonl and
docs/plots/skew.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe
from dep_extension import testbeds
from dep_extension.colocated import colocated
from dep_extension.imbalance import Loads, zipf
from dep_extension.ratio import best_plan
from dep_extension.solver import Cut, Plan, Problem, findep, scored
from duoserve.deppicture import Line, plot
from duoserve.depsubject import MADE, known_loads

HERE = Path(__file__).parent
CHUNKS = 64
EXPONENTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
BLIND, CUT, COPIES, ALL, TOGETHER = "assumes balance", "cut and order", "and copies", "and ratio", "colocated"
WAYS = (BLIND, CUT, COPIES, ALL, TOGETHER)


class Case(NamedTuple):
    """Loads that plans see, and others that they are executed under. `exponent`: None where they are of routes."""

    what: str
    exponent: float | None
    seen: Loads
    executed: Loads


def cases(model: str, experts: int, trace: str | None, asked: Any) -> Iterator[Case]:
    for exponent in EXPONENTS:
        seen, other = (zipf(experts, exponent, CHUNKS, seed) for seed in (0, 1))
        yield Case(f"Zipf {exponent:g}", exponent, seen, other)
    loads = known_loads(trace or MADE, model, asked)
    half = max(1, len(loads.loads_CE) // 2)
    yield Case(loads.source, None, Loads(loads.loads_CE[:half]), Loads(loads.loads_CE[-half:]))


def measured(problem: Problem, gpus: int, case: Case) -> dict[str, Any]:
    """Tokens per second of each way, executed."""
    blind = best_plan(problem, gpus, replicas=1)
    assert blind is not None, problem.model.name
    seeing = replace(problem, skew=case.seen)
    plans = {
        BLIND: blind,
        CUT: findep(seeing, blind.split),
        COPIES: best_plan(seeing, gpus, blind.split),
        ALL: best_plan(seeing, gpus),
    }
    rates = {name: None if plan is None else executed(problem, plan, case.executed) for name, plan in plans.items()}
    together = colocated(replace(problem, skew=case.executed), gpus)
    rates[TOGETHER] = max((one.tokens_per_s for one in together), default=None)
    cuts = {n: [*p.split, p.replicas, p.samples, p.r1, p.r2] for n, p in plans.items() if p is not None}
    about = {"loads": case.what, "exponent": case.exponent, "busiest_expert": case.executed.skew}
    return about | {"tokens_per_s": rates, "ag_eg_replicas_ma_r1_r2": cuts}


def executed(problem: Problem, plan: Plan, loads: Loads) -> float:
    at = replace(problem, skew=loads, replicas=plan.replicas)
    cut = Cut(plan.samples, plan.r1, plan.r2)
    return scored(at, plan.split, cut, plan.order, "").tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bed", default="A")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--trace")
    parser.add_argument("--models", nargs="*", default=testbeds.models())
    asked = parser.parse_args()
    machine, rows, panels = testbeds.named(asked.bed), [], []
    for name in asked.models:
        model = testbeds.model(name, asked.bed)
        problem = Problem(model, machine, asked.length, asked.batch)
        found = []
        for case in cases(name, model.experts, asked.trace, model):
            row = {"model": model.name, "machine": machine.name, "batch": asked.batch, "length": asked.length}
            row |= measured(problem, machine.gpus, case)
            found.append(row)
            gains = {
                way: rate and round(rate / row["tokens_per_s"][BLIND], 3) for way, rate in row["tokens_per_s"].items()
            }
            print(f"{model.name}, {case.what}, busiest {row['busiest_expert']:.2f}: {gains}", flush=True)
        rows += found
        panels.append((model.name, drawn(found)))
    about = {"simulated": True, "what": "skew"} | describe()
    lines = [json.dumps(row) for row in (about, *rows)]
    (HERE / "results" / "skew.jsonl").write_text("\n".join(lines) + "\n")
    title = f"Under skew, over a plan for balance: {asked.batch} x {asked.length} tokens on {machine.name}, simulated"
    plot(
        HERE.parent / "docs" / "plots" / "skew.png",
        panels,
        "exponent of Zipf's law",
        "tokens/s over the blind plan's",
        title,
    )


def drawn(rows: list[dict[str, Any]]) -> list[Line]:
    known = [row for row in rows if row["exponent"] is not None]
    return [
        Line(way, [row["exponent"] for row in known],
             [rate and rate / row["tokens_per_s"][BLIND] for row in known for rate in [row["tokens_per_s"][way]]])
        for way in WAYS
    ]  # fmt: skip


if __name__ == "__main__":
    main()
