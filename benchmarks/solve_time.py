"""How long a plan takes to find, on one core. Measured here, on whatever runs it.

python -m benchmarks.solve_time

The size that FinDEP states (64 layers, 8 micro-batches, 64 chunks) on one split, with balanced and with measured loads; then
the search over every ratio and number of copies on 8 to 4,096 GPUs. Prints and writes results/solve_time.jsonl.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from dep_extension import testbeds
from dep_extension.cost import Split
from dep_extension.imbalance import zipf
from dep_extension.ratio import best_plan
from dep_extension.solver import Plan, Problem, findep

RESULTS = Path(__file__).parent / "results" / "solve_time.jsonl"
REPEATS = 5


def timed(what: str, solve: Callable[[], Plan | None], repeats: int = REPEATS) -> dict[str, Any]:
    """Median and worst of several."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        plan = solve()
        seconds.append(time.perf_counter() - began)
    assert plan is not None, what
    cut = {"split": list(plan.split), "replicas": plan.replicas, "r1": plan.r1, "r2": plan.r2, "gap": plan.gap}
    return {"what": what, "median_s": statistics.median(seconds), "worst_s": max(seconds), "repeats": repeats} | cut


def main() -> None:
    deep = replace(testbeds.model("deepseek-v2", "A"), layers=64, kv_elements=64, weight_bytes=0.5)
    roomy = replace(testbeds.named("A"), memory_bytes=400e9)
    many = testbeds.model("deepseek-v2", "D")
    rows = [{"what": "solve time"} | describe()]
    for name, skew in (
        ("balanced", None),
        ("measured loads, 8 chunks", zipf(160, 0.8)),
        ("64 chunks", zipf(160, 0.8, 64)),
    ):
        problem = Problem(deep, roomy, 2048, max_r1=8, max_r2=64, skew=skew)
        rows.append(timed(f"64 layers, r1 8, r2 64, one split, {name}", lambda p=problem: findep(p, Split(2, 6))))
    for gpus in (8, 32, 256, 4096):
        for name, skew in (("balanced", None), ("measured loads", zipf(160, 0.8))):
            problem = Problem(many, replace(testbeds.named("D"), gpus=gpus), 4096, skew=skew)
            what = f"{gpus} GPUs, every ratio and number of copies, {name}"
            rows.append(timed(what, lambda p=problem, n=gpus: best_plan(p, n), 3))
    for row in rows:
        print(json.dumps(row), flush=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
