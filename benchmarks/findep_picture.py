"""FinDEP's speed-up over sequence length, a panel a machine: the paper's and ours. Knows cells as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEDS = {"A": "A: 8 A6000, PCIe", "B": "B: 8 A10, PCIe", "C": "C: 8 H20, NVLink", "D": "D: 32 H20, network"}
COLOURS = {"deepseek-v2": "#5b8db8", "qwen3-235b-a22b": "#c8553d"}
STYLES = (("--", "v"), ("--", "s"), (":", "^"))


def draw(cells: Sequence[dict[str, Any]], titles: Sequence[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, len(BEDS), sharey=True)
    for axis, (bed, name) in zip(panels, BEDS.items(), strict=True):
        for model, colour in COLOURS.items():
            rows = sorted((c for c in cells if (c["bed"], c["model"]) == (bed, model)), key=lambda c: c["length"])
            x = [row["length"] for row in rows]
            axis.plot(
                x, [row["paper"] for row in rows], color=colour, linewidth=2.4, marker="o", label=f"paper, {model}"
            )
            for title, (line, mark) in zip(titles, STYLES, strict=True):
                y = [row["ours"][title] for row in rows]
                axis.plot(
                    x, y, color=colour, linestyle=line, marker=mark, linewidth=1.2, alpha=0.8, label=f"ours, {title}"
                )
        axis.set(title=name, xscale="log", xlabel="tokens of a sample")
        axis.set_xticks([1024, 2048, 4096, 8192], ["1024", "2048", "4096", "8192"])
        axis.minorticks_off()
        axis.axhline(1, color="#888888", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("FinDEP over the best PPPipe")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        "From published coefficients, simulated: the gain depends on how many tokens a GPU holds", x=0.01, ha="left"
    )
    figure.savefig(path, dpi=110)
