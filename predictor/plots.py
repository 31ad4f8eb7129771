"""Pictures of an evaluation, each readable without the text beside it. Knows reports; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter

from predictor.baselines import AlwaysWrong, Control, Oracle
from predictor.evaluate import Report

TRAINED, UNTRAINED, SOFT, INK = "#1f5fa8", "#9db4cc", "#d98324", "#222222"
LINES = ("#1f5fa8", "#d98324", "#2a8c6e", "#8d5aa5", "#b23b4a", "#6b7785", "#c2a200", "#4fa3c7")
MARKS = "osD^vPXd"


def draw(reports: Sequence[Report], folder: Path) -> list[Path]:
    """All pictures, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = (AlwaysWrong, Control, Oracle)
    real = [r for r in reports if r.layers and not isinstance(r.entry.predictor, bounds)]
    if not real:
        return []
    real.sort(key=lambda r: r.figures(r.compared)["slot_recall"])
    style: Any = {
        "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
        "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left", "figure.dpi": 110,
    }  # fmt: skip
    with plt.rc_context(style):
        found = [_by_predictor(real, folder), _by_layer(real, folder), _by_guesses(real, folder)]
        if len({domain for r in real for domain in r.domains()}) > 1:
            found.append(_by_domain(real, folder))
    return found


def _by_predictor(reports: list[Report], folder: Path) -> Path:
    figure, axes = plt.subplots(figsize=(8.6, 1.5 + 0.52 * len(reports)))
    figures = [r.figures(r.compared) for r in reports]
    y = list(range(len(reports)))
    first = [f["slot_recall"] for f in figures]
    colours = [TRAINED if r.entry.domains is not None else UNTRAINED for r in reports]
    axes.barh(y, first, 0.62, color=colours)
    axes.scatter([f["recall_k2"] for f in figures], y, 46, color=SOFT, zorder=3)
    for at, share, colour in zip(y, first, colours, strict=True):
        ink = "white" if colour == TRAINED else INK
        axes.text(max(share - 0.012, 0.08), at, f"{100 * share:.1f} %", va="center", ha="right", color=ink)
    axes.set_yticks(y, [r.name for r in reports])
    best = reports[-1]
    k = best.shape.choices[-1]
    axes.set_title(
        f"{_capital(best.name)} finds {100 * first[-1]:.0f} % of a layer's experts before its router speaks\n",
        color=INK,
    )
    axes.set_xlabel(f"share of the chosen experts found: bar, with {k} guesses; dot, with {k + 2}; light: not trained")
    _percent(axes.xaxis, axes.set_xlim)
    return _saved(figure, folder / "recall_by_predictor.png")


def _by_layer(reports: list[Report], folder: Path) -> Path:
    figure, axes = plt.subplots(figsize=(8.6, 4.8))
    best, shares_of = reports[-1], {}
    for at, report in enumerate(reversed(reports)):
        k = report.shape.choices
        shares = [report.at(n).figures(k[n], report.arrive)["slot_recall"] for n in report.layers]
        shares_of[report.name] = shares
        line = "-" if report.entry.domains is not None else "--"
        axes.plot(
            report.layers, shares, line, marker=MARKS[at % 8], color=LINES[at % 8], label=report.name, linewidth=1.8
        )
    axes.set_title(f"{_capital(best.name)} finds {_range(shares_of[best.name])} in every layer it covers\n", color=INK)
    axes.set_xlabel("MoE layer that is guessed")
    axes.set_ylabel("slot recall (first k guesses)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(axes.yaxis, axes.set_ylim)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _saved(figure, folder / "recall_by_layer.png")


def _by_guesses(reports: list[Report], folder: Path) -> Path:
    figure, axes = plt.subplots(figsize=(8.6, 4.8))
    k, most = reports[0].shape.choices[-1], 0
    for n, report in enumerate(reversed(reports)):
        curve = report.curve()[: 4 * k]
        most = max(most, len(curve))
        line = "-" if report.entry.domains is not None else "--"
        axes.plot(range(1, len(curve) + 1), curve, line, color=LINES[n % 8], label=report.name, linewidth=1.8)
    axes.axvline(k, color="#aaaaaa", linewidth=1)
    axes.text(k + 0.15, 0.02, f"k = {k}: as many as are chosen", color="#666666", fontsize=9.5)
    best, two_more = reports[-1].name, reports[-1].figures(reports[-1].compared)["recall_k2"]
    axes.set_title(f"Two guesses more than k: {best} finds {100 * two_more:.1f} %\n", color=INK)
    axes.set_xlabel("number of guesses per layer")
    axes.set_ylabel("share of the chosen experts among them")
    axes.set_xlim(1, max(most, 2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(axes.yaxis, axes.set_ylim)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _saved(figure, folder / "recall_by_guesses.png")


def _by_domain(reports: list[Report], folder: Path) -> Path:
    """Trained predictors in and out of their training domains; the others by the same division, where one was trained."""
    seen = next((r.entry.domains for r in reports if r.entry.domains is not None), None)
    domains = sorted({domain for r in reports for domain in r.domains()})
    if seen is None:
        sides = [(domain, [domain]) for domain in domains]
    else:
        sides = [("in the training's domains", [d for d in domains if d in seen])]
        sides.append(("another document set", [d for d in domains if d not in seen]))
        sides = [(name, of) for name, of in sides if of]
    figure, axes = plt.subplots(figsize=(8.6, 1.7 + 0.6 * len(reports)))
    high = 0.8 / len(sides)
    for n, (name, of) in enumerate(sides):
        shares = [r.figures(r.compared, of)["slot_recall"] for r in reports]
        y = [at + (len(sides) / 2 - n - 0.5) * high for at in range(len(reports))]
        colour = (TRAINED, SOFT)[n] if len(sides) == 2 else LINES[n % 8]
        axes.barh(
            y,
            shares,
            high * 0.94,
            color=colour,
            label=f"{name} ({', '.join(of) if len(of) < 4 else f'{len(of)} of them'})",
        )
        for at, share in zip(y, shares, strict=True):
            axes.text(share + 0.006, at, f"{100 * share:.1f}", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(reports)), [r.name for r in reports])
    axes.set_title("In and out of the text they were trained on\n", color=INK, pad=14)
    axes.set_xlabel("slot recall (first k guesses)")
    _percent(axes.xaxis, axes.set_xlim)
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2, frameon=False, fontsize=9.5)
    return _saved(figure, folder / "recall_by_domain.png")


def _percent(axis: Any, limits: Any) -> None:
    limits(0, 1.0)
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.grid(True, color="#e6e6e6", linewidth=0.8)
    axis.axes.set_axisbelow(True)


def _range(shares: list[float]) -> str:
    low, high = f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path
