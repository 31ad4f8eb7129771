"""What a table of kernels is worth end to end: a model with unquantised experts, computed one by one, by the measured table,
and grouped throughout, in one process and in turns.

python -m benchmarks.grouped [MODEL] [--budget half 4GiB] [--rounds 7] [--new 48] [--prompts 64 512] [--seconds 30]

MODEL: the demo if left out. Printed are medians over rounds, of figures and of each round's ratios to dense. Tokens of all
three are compared. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from duoserve.core import Kernels
from duoserve.engine import Engine, load
from duoserve.kernels import measured
from duoserve.sizing import CACHE

WAYS = ("dense", "table", "grouped")


class Always:
    """Grouped products, whatever was measured."""

    machine = "none: grouped throughout"

    def grouped(self, products: Sequence[tuple[int, int]], experts: int, dtype: str, tokens: int) -> bool:
        return True


def engines(args: argparse.Namespace, budget: str, table: Kernels) -> dict[str, Engine]:
    tables: dict[str, Kernels | None] = {"dense": None, "table": table, "grouped": Always()}
    options = {"format": "bf16", "dtype": args.dtype, "budget": budget, "threads": args.threads, "policy": args.policy}
    return {way: load(args.model, table=tables[way], ctx=max(args.prompts) + args.new, **options) for way in WAYS}


@torch.inference_mode()
def turn(engine: Engine, ids: torch.Tensor, new: int) -> tuple[float, float, list[int]]:
    """Seconds of a prompt, seconds of a token behind it, and the tokens."""
    began = time.perf_counter()
    out = engine.model(ids)
    token = out.logits[:, -1:].argmax(-1)
    read, found = time.perf_counter(), [int(token)]
    for _ in range(new):
        out = engine.model(token, **{CACHE: out[CACHE]})
        token = out.logits[:, -1:].argmax(-1)
        found.append(int(token))
    return read - began, (time.perf_counter() - read) / new, found


def compare(args: argparse.Namespace, budget: str, table: Kernels) -> list[dict[str, Any]]:
    opened = engines(args, budget, table)
    vocabulary = opened["dense"].model.config.get_text_config().vocab_size
    rows = []
    for length in args.prompts:
        ids = torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
        samples: dict[str, list[tuple[float, float, list[int]]]] = {way: [] for way in WAYS}
        for number in range(-1, args.rounds):
            for way in WAYS[number % 3 :] + WAYS[: number % 3]:  # nobody is always first
                took = turn(opened[way], ids, args.new)
                if number >= 0:
                    samples[way].append(took)
        row = {"budget": budget, "residency": opened["dense"].plan.residency, "prompt": length}
        rows.append(row | _row(samples) | {"passes": {way: opened[way].stats()["kernels"] for way in WAYS[1:]}})
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items() if name != "passes"), flush=True)
    for engine in opened.values():
        engine.close()
    return rows


def _row(samples: dict[str, list[tuple[float, float, list[int]]]]) -> dict[str, Any]:
    """Medians; ratios above 1 are quicker than dense in the same round."""
    row: dict[str, Any] = {}
    for i, name in enumerate(("prompt_s", "token_s")):
        for way in WAYS:
            row[f"{name}_{way}"] = round(statistics.median(float(s[i]) for s in samples[way]), 6)  # type: ignore[arg-type]
        for way in WAYS[1:]:
            ratios = [d[i] / s[i] for d, s in zip(samples["dense"], samples[way], strict=True)]  # type: ignore[operator]
            row[f"{name}_{way}_x"] = round(statistics.median(ratios), 3)
    row["same_tokens"] = all(s[2] == samples["dense"][0][2] for way in WAYS for s in samples[way])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--budget", nargs="+", default=["half", "4GiB"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--seconds", type=float, default=30.0, help="for measuring the table")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--policy", default="lru", help="nothing guessed, so that both ways move the same bytes")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    table = measured(args.model, args.dtype, "cpu", args.threads, args.seconds)
    rows = [row for budget in args.budget for row in compare(args, budget, table)]
    found = {
        "benchmark": "grouped",
        "model": args.model or "demo",
        "dtype": args.dtype,
        "run_on": describe(),
        "rows": rows,
    }
    (args.out / "grouped_demo.jsonl" if args.model is None else args.out / "grouped.jsonl").write_text(
        json.dumps(found) + "\n"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
