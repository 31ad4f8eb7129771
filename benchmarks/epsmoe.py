"""EPS-MoE's tables beside its own model, whose constants are from its own layer times: kernel switch, pipeline, how many
stages, where they pay. No GPU is here: nothing of this is measured, every figure is computed from what the paper printed.

python -m benchmarks.epsmoe [--out FOLDER] [--plot FILE]     a second; writes epsmoe.md, epsmoe.jsonl and a picture

Knows how to say it; the arithmetic is `epsmoe_model.py`'s, the paper's figures are `epsmoe_paper.py`'s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.epsmoe_model import (
    FITTED,
    POINTS,
    TIME,
    V2_ROWS,
    Cell,
    all_cells,
    degrees,
    link_ms,
    overhead,
    product_ms,
    ratio_of,
    switched,
    threshold,
)
from benchmarks.epsmoe_paper import COLUMNS, LENGTHS_V2, SM_MS, THRESHOLD, V2, V2_GAIN
from benchmarks.machine import describe

matplotlib.use("Agg")
ABOUT = {
    "ablation": "One layer on 4 GPUs (ms). Rows 0 to 2 are where the constants come from.",
    "small m": "Two stages against one, per cent of the layer's time saved, 8 GPUs.",
    "DeepSeek-V2": "Prefill throughput against the paper's baseline, per cent more.",
    "Mixtral-8x7B": "Time to the first token, per cent less, 16 prompts.",
    "DBRX": "Time to the first token, per cent less; PN=1 is published as a range over cells.",
}


def report(cells: Sequence[Cell]) -> str:
    lines = [
        "# EPS-MoE's tables from its own layer times: computed, not measured",
        "",
        *_constants(),
        "",
        *_claims(cells),
    ]
    for table, about in ABOUT.items():
        some = [cell for cell in cells if cell.table == table]
        lines += ["", f"## {table}", "", about, "", *_table(some)]
    return "\n".join([*lines, "", *_degrees(), "", *_overheads(), "", *_sms(), ""])


def _constants() -> list[str]:
    k_o, b = overhead()
    return [
        "`python -m benchmarks.epsmoe` writes this file. One set of constants for every cell, from the ablation alone "
        f"(m = {FITTED.m}, o = {FITTED.o}). Its reading was settled while a few cells were worked by hand; nothing changed "
        "after the first run:",
        "",
        f"- both exchanges {link_ms(FITTED):.3f} ms: twice what FP8 saves, because it halves their bytes (rows 0, 1);",
        f"- grouped product {product_ms(FITTED, False):.3f} ms, dense {product_ms(FITTED, True):.3f} ms: the rest of rows 0 "
        "and 2;",
        f"- dense over grouped {ratio_of(1536):.3f} at o = 1536 and {ratio_of(15360):.3f} at 15360, straight in log o in "
        "between;",
        f"- n > 1 stages cost R(n) = {k_o:.4f} n + {b:.3f} ms: what rows 7 and 9 take beyond a perfect pipeline;",
        "- the ablation's layer is one product of all rows (ten times o takes ten times as long, and three products of that "
        "size would exceed the GPU's peak); an expert is gate and up as one product, then down;",
        "- other models' exchanges scale by the paper's volume formula with even routing, products by multiplications;",
        f"- not printed: rows of a DeepSeek-V2 pass. Assumed {V2_ROWS} per expert, the ablation's largest. Longer prompts "
        "add attention at the products' rate; the baseline's 100k tokens/s hold at 1K.",
        "",
        f"Reproduced: a time within {TIME:.0%}, a gain within {POINTS:g} points. Else the last column says what it takes.",
    ]


def _claims(cells: Sequence[Cell]) -> list[str]:
    of = {cell.cell: cell for cell in cells if cell.table == "DeepSeek-V2"}
    switch = [of[f"{length} tokens, PN=1"] for length in LENGTHS_V2]
    five = [of[f"{length} tokens, PN=5"] for length in LENGTHS_V2]
    more = [(b.paper - a.paper, b.ours - a.ours) for a, b in zip(switch, five, strict=True)]
    some = [cell for cell in cells if not cell.fitted]
    picks = list(degrees())
    right = sum(pick.rule == pick.printed for pick in picks)
    large = [pick for pick in picks if f"m={FITTED.m} " in pick.column]
    there = sum(pick.divisor == pick.printed for pick in large)
    least = all(of[f"{n} tokens, PN=20"].ours <= of[f"{n} tokens, PN=5"].ours for n in LENGTHS_V2)
    dbrx = next(cell for cell in cells if "as throughput" in cell.cell)
    return [
        "| claim | paper | ours | |",
        "|---|---|---|---|",
        f"| kernel switch on DeepSeek-V2, 1K to 8K | {_span([c.paper for c in switch])} % | "
        f"{_span([c.ours for c in switch])} % | {_count(switch)} |",
        f"| the same, were dense products at the ablation's widest ratio, {ratio_of(15360):.2f} | | "
        f"{_span([switched(length, ratio_of(15360)) for length in LENGTHS_V2])} % | not the constants |",
        f"| overlap on top (PN=5) | {_span([p for p, _ in more])} points | {_span([o for _, o in more])} points | |",
        f"| PN=20 no better than PN=5 | yes | {'yes' if least else 'no'} | |",
        f"| N* = sqrt(C / k_o) as a divisor of 20 is the best PN, m = {FITTED.m} | by test | {there} of {len(large)} | |",
        f"| its rule picks the best of PN = 1, 5, 20 in every dense column | by test | {right} of {len(picks)} | |",
        f"| two stages pay from | m = {THRESHOLD} | m = {threshold()} | {threshold() / THRESHOLD - 1:+.0%} |",
        f"| DBRX, same batch and length | +{dbrx.paper:.0f} % (printed +52 %) | +{dbrx.ours:.0f} % | {dbrx.verdict} |",
        f"| all cells that were not fitted | | | {_count(some)} |",
    ]


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def _count(cells: Sequence[Cell]) -> str:
    return f"{sum(cell.reproduced for cell in cells)} of {len(cells)} reproduced"


def _table(cells: Sequence[Cell]) -> list[str]:
    lines = ["| cell | paper | ours | verdict | what the paper's would take |", "|---|---:|---:|---|---|"]
    for cell in cells:
        digits = 3 if cell.unit == "ms" else 1
        takes = "" if cell.reproduced or cell.fitted else cell.takes
        paper = f"{cell.paper:.{digits}f}" if cell.low is None else f"{cell.low:.1f}-{cell.paper:.1f}"
        lines.append(f"| {cell.cell} | {paper} | {cell.ours:.{digits}f} | {cell.verdict} | {takes} |")
    return lines


def _degrees() -> list[str]:
    lines = [
        "## How many stages",
        "",
        "Dense rows of the ablation. N* is the paper's rule; then the best of 1, 5, 20 by that rule, by this model (which "
        "adds b) and as printed (FP8 has no dense row with one stage).",
        "",
        "| column | N* | divisor of 20 | by the rule | by the model | as printed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = ([d.column, f"{d.ideal:.1f}", d.divisor, d.rule, d.model, d.printed] for d in degrees())
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def _overheads() -> list[str]:
    lines = [
        "## What stages cost, column by column",
        "",
        "From each column's own rows 7 and 9: the paper's R(N) = k_o N + b is no constant of the machine, and where row 2 "
        "is slower than the pipelined rows (m = 1024, o = 1536) it is negative. No one set of constants holds in all.",
        "",
        "| column | k_o (ms) | b (ms) |",
        "|---|---:|---:|",
    ]
    each = ((column, *overhead(column)) for column in COLUMNS)
    return [*lines, *(f"| m={column.m} o={column.o} | {k_o:.4f} | {b:+.3f} |" for column, k_o, b in each)]


def _sms() -> list[str]:
    lines = ["## SMs left to products (the paper's figures, taken as data: rows 4 and 6)", "", "| SMs | " + " | ".join(
        f"m = {m} (ms)" for m in SM_MS) + " |", "|---:|" + "---:|" * len(SM_MS)]  # fmt: skip
    return [*lines, *(f"| {sm} | {' | '.join(f'{SM_MS[m][sm]:.3f}' for m in SM_MS)} |" for sm in SM_MS[3072])]


def draw(cells: Sequence[Cell], path: Path) -> None:
    """DeepSeek-V2's gains by length, ours as lines, the paper's as points."""
    of = {cell.cell: cell for cell in cells if cell.table == V2.name}
    figure = Figure(figsize=(8.2, 4.8), layout="constrained")
    axis = figure.subplots()
    for pn, colour in zip(V2_GAIN, ("#56606b", "#1b7f5c", "#c8792b"), strict=True):
        some = [of[f"{length} tokens, PN={pn}"] for length in LENGTHS_V2]
        label = "kernel switch alone" if pn == 1 else f"with {pn} stages"
        axis.plot(LENGTHS_V2, [c.ours for c in some], color=colour, label=f"{label}, from the ablation")
        axis.plot(LENGTHS_V2, [c.paper for c in some], "o", color=colour, label=f"{label}, as printed")
    axis.set_xscale("log", base=2)
    axis.set_xticks(LENGTHS_V2, [f"{length // 1024}K" for length in LENGTHS_V2])
    axis.set(xlabel="tokens of a prompt", ylabel="prefill throughput, % more", ylim=(0, None))
    short = sum(not cell.reproduced for cell in of.values())
    title = f"EPS-MoE on DeepSeek-V2: the ablation's layer times explain {len(of) - short} of {len(of)} printed gains"
    axis.set_title(title, fontsize=10.5, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8.5, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent.parent / "docs" / "plots" / "epsmoe.png")
    args = parser.parse_args()
    cells = all_cells()
    text = report(cells)
    (args.out / "epsmoe.md").write_text(text)
    rows = [cell._asdict() | {"verdict": cell.verdict} for cell in cells]
    about = {"benchmark": "epsmoe", "computed": True, "threshold_m": threshold(), "run_on": describe(), "cells": rows}
    (args.out / "epsmoe.jsonl").write_text(json.dumps(about) + "\n")
    draw(cells, args.plot)
    print(text)


if __name__ == "__main__":
    main()
