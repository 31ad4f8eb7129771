"""What it is worth to plan with measured loads: a plan that assumes balance and plans that saw the skew, all executed in the
simulator under skew that none of them saw. No GPU is here: every figure is a simulation's, none is measured.

python -m benchmarks.skew [--bed A] [--gpus 8] [--batch 32] [--length 2048] [--trace DIR]

Loads are of Zipf's law by its exponent, with the same hot experts throughout or others in each chunk, and of routes made
with published habits (`traces/generate.py`) or of a trace; plans see one draw, or every other chunk, and are executed under
another. Freedoms are added one by one, on the blind plan's split: the cut and the order; every expert twice; experts placed
by their loads without a copy, with copies of the hot ones in a quarter of the memory of two of each, and in as much memory;
then the ratio too. Writes results/skew.jsonl and docs/plots/skew.png; of another bed than A, with its name.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe
from dep_extension import testbeds
from dep_extension.colocated import colocated
from dep_extension.imbalance import Loads, settled, zipf
from dep_extension.ratio import Copying, best_plan
from dep_extension.solver import Cut, Plan, Problem, findep, scored
from duoserve.deppicture import Line, plot
from duoserve.depsubject import MADE, known_loads

HERE = Path(__file__).parent
CHUNKS = 64
TOKENS = 8192  # of a chunk of settled loads: four samples
EXPONENTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
STAYING, MOVING = "the same hot experts throughout", "others in each chunk"
BLIND, CUT, TWICE, PLACED = "assumes balance", "cut and order", "each twice", "placed, no copies"
QUARTER, HOT, ALL, TOGETHER = "hot only, 1/4 of that memory", "hot only, that memory", "and ratio", "colocated"
WAYS = (BLIND, CUT, TWICE, PLACED, QUARTER, HOT, ALL, TOGETHER)


class Case(NamedTuple):
    """Loads that plans see, and others that they are executed under. `exponent`: None where they are of routes."""

    what: str
    exponent: float | None
    seen: Loads
    executed: Loads


def cases(model: str, experts: int, trace: str | None, asked: Any) -> Iterator[Case]:
    for exponent in EXPONENTS:
        yield Case(STAYING, exponent, *(settled(experts, exponent, TOKENS, seed=seed) for seed in (0, 1)))
    for exponent in EXPONENTS:
        yield Case(MOVING, exponent, *(zipf(experts, exponent, CHUNKS, seed) for seed in (0, 1)))
    loads = known_loads(trace or MADE, model, asked)
    yield Case(loads.source, None, *(loads.only(chunks_N) for chunks_N in loads.halves()))


def measured(problem: Problem, gpus: int, case: Case) -> dict[str, Any]:
    """Tokens per second of each way, executed."""
    blind = best_plan(problem, gpus, copying=Copying(replicas=1))
    assert blind is not None, problem.model.name
    seeing, split, experts = replace(problem, skew=case.seen), blind.split, problem.model.experts
    spare = min(experts, math.ceil(2 * experts / split.eg)) - math.ceil(experts / split.eg)
    plans = {
        BLIND: blind,
        CUT: findep(seeing, split),
        TWICE: findep(replace(seeing, replicas=2), split) if split.eg > 1 else None,
        PLACED: findep(replace(seeing, spare=0), split),
        QUARTER: findep(replace(seeing, spare=spare // 4), split),
        HOT: findep(replace(seeing, spare=spare), split),
        ALL: best_plan(seeing, gpus),
    }
    rates = {name: None if plan is None else executed(problem, plan, case.executed) for name, plan in plans.items()}
    together = colocated(replace(problem, skew=case.executed), gpus)
    rates[TOGETHER] = max((one.tokens_per_s for one in together), default=None)
    cuts = {n: [*p.split, p.replicas, p.spare, p.samples, p.r1, p.r2] for n, p in plans.items() if p is not None}
    about = {"loads": case.what, "exponent": case.exponent, "busiest_expert": case.executed.skew}
    share = math.ceil(experts / split.eg)
    about |= {
        "experts_on_a_gpu": {TWICE: share + spare, PLACED: share, QUARTER: share + spare // 4, HOT: share + spare}
    }
    return about | {"tokens_per_s": rates, "ag_eg_replicas_spare_ma_r1_r2": cuts}


def executed(problem: Problem, plan: Plan, loads: Loads) -> float:
    at = replace(problem, skew=loads, replicas=plan.replicas, held=plan.held)
    cut = Cut(plan.samples, plan.r1, plan.r2)
    return scored(at, plan.split, cut, plan.order, "").tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bed", default="A")
    parser.add_argument("--gpus", type=int, help="as many as the bed has, if left out")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--trace")
    parser.add_argument("--models", nargs="*", default=testbeds.models())
    asked = parser.parse_args()
    machine, rows, panels = testbeds.named(asked.bed), [], []
    gpus = asked.gpus or machine.gpus
    for name in asked.models:
        model = testbeds.model(name, asked.bed)
        problem = Problem(model, machine, asked.length, asked.batch)
        found = []
        for case in cases(name, model.experts, asked.trace, model):
            row = {
                "model": model.name,
                "machine": machine.name,
                "gpus": gpus,
                "batch": asked.batch,
                "length": asked.length,
            }
            row |= measured(problem, gpus, case)
            found.append(row)
            gains = {
                way: rate and round(rate / row["tokens_per_s"][BLIND], 3) for way, rate in row["tokens_per_s"].items()
            }
            print(
                f"{model.name}, {case.what} {case.exponent}, busiest {row['busiest_expert']:.2f}: {gains}", flush=True
            )
        rows += found
        panels += [(f"{model.name}\n{what}", drawn(found, what)) for what in (STAYING, MOVING)]
    about = {"simulated": True, "what": "skew"} | describe()
    lines = [json.dumps(row) for row in (about, *rows)]
    name = "skew" if asked.bed == "A" else f"skew_{asked.bed}"
    (HERE / "results" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    title = f"Under skew, over a plan for balance: {asked.batch} x {asked.length} tokens on {machine.name}, simulated"
    plot(
        HERE.parent / "docs" / "plots" / f"{name}.png",
        panels,
        "exponent of Zipf's law",
        "tokens/s over the blind plan's",
        title,
    )


def drawn(rows: list[dict[str, Any]], what: str) -> list[Line]:
    known = [row for row in rows if row["loads"] == what]
    return [
        Line(way, [row["exponent"] for row in known],
             [rate and rate / row["tokens_per_s"][BLIND] for row in known for rate in [row["tokens_per_s"][way]]])
        for way in WAYS
    ]  # fmt: skip


if __name__ == "__main__":
    main()
