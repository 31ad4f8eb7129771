"""Grouped against dense products of experts on this machine, for the shapes of known models (EPS-MoE, section "GroupGemm or
DenseGemm"), and where the two cross.

python -m benchmarks.crossover [--models demo qwen3-30b-a3b deepseek-v2-lite mixtral-8x7b] [--dtypes bfloat16 float32]
                               [--seconds 18] [--threads N] [--out FOLDER] [--plot FILE]

Each model and dtype gets `--seconds`; where memory or time does not reach, fewer experts or fewer tokens are measured, and
the file says how many. Writes crossover.jsonl (one line per model and dtype) and a picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from benchmarks.machine import describe
from dep_extension.kernel_choice import Shape, Table, to_json
from dep_extension.kernel_table import TOKENS
from duoserve.kernels import lines, measured

matplotlib.use("Agg")
MODELS = ("demo", "qwen3-30b-a3b", "deepseek-v2-lite", "mixtral-8x7b")
DTYPES = ("bfloat16", "float32")
COLOURS = ("#1b7f5c", "#c8792b", "#3b5ba5", "#a33f5a")


class Found(NamedTuple):
    model: str
    dtype: str
    table: Table


def measure(models: Sequence[str], dtypes: Sequence[str], seconds: float, threads: int | None) -> list[Found]:
    found = []
    for model in models:
        for dtype in dtypes:
            table = measured(None if model == "demo" else model, dtype, "cpu", threads, seconds)
            found.append(Found(model, dtype, table))
            print(f"{model}\n" + "\n".join(lines(table)), flush=True)
    return found


def draw(found: Sequence[Found], path: Path) -> None:
    """Dense over grouped time by tokens: above 1 grouped is quicker."""
    dtypes = list(dict.fromkeys(one.dtype for one in found))
    models = list(dict.fromkeys(one.model for one in found))
    figure = Figure(figsize=(2.6 + 2.9 * len(models), 2.9 * len(dtypes) + 1.1), layout="constrained")
    panels = figure.subplots(len(dtypes), len(models), squeeze=False, sharex=True, sharey="row")
    for one in found:
        axis = panels[dtypes.index(one.dtype)][models.index(one.model)]
        for colour, (shape, points) in zip(COLOURS, one.table.points.items(), strict=False):
            ratios = [point.dense / point.grouped for point in points]
            axis.plot([point.tokens for point in points], ratios, "o-", color=colour, ms=3, label=_label(shape))
        axis.axhline(1, color="#56606b", lw=0.8)
        axis.set_xscale("log", base=4)
        axis.set_xticks(TOKENS, [str(tokens) for tokens in TOKENS])
        axis.set_title(f"{one.model}, {one.dtype}", fontsize=9.5, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    for axis in panels[-1]:
        axis.set_xlabel("tokens of each expert")
    for row in panels:
        row[0].set_ylabel("dense / grouped time")
    figure.suptitle(f"{claim(found)}\n{found[0].table.machine}", fontsize=10.5, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def claim(found: Sequence[Found]) -> str:
    """In one sentence, over all points."""
    ratios = [p.dense / p.grouped for one in found for points in one.table.points.values() for p in points]
    clear = [ratio for ratio in ratios if abs(ratio - 1) >= 0.05]
    grouped = sum(ratio > 1 for ratio in clear)
    ties = len(ratios) - len(clear)
    return (
        f"Measured: grouped quicker at {grouped} of {len(ratios)} points (up to {max(ratios):.2f}x), dense at "
        f"{len(clear) - grouped} (up to {1 / min(ratios):.2f}x), within 5 % at {ties}"
    )


def _label(shape: Shape) -> str:
    return f"{shape.experts} x ({shape.k}, {shape.n})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=18.0, help="for each model and dtype")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent.parent / "docs" / "plots" / "crossover.png")
    args = parser.parse_args()
    found = measure(args.models, args.dtypes, args.seconds, args.threads)
    about: dict[str, Any] = {"benchmark": "crossover", "run_on": describe(), "claim": claim(found)}
    rows = [about | {"model": one.model, "dtype": one.dtype} | to_json(one.table) for one in found]
    (args.out / "crossover.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(found, args.plot)
    print(claim(found))


if __name__ == "__main__":
    main()
