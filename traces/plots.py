"""Pictures of a trace's figures, one claim each, readable without the text. Knows `stats.Measured`; measures nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from traces.stats import AGAIN, FARTHEST, Measured, Stats, both

matplotlib.use("Agg")
COLOURS = {"all rows": "#8a97a8", "decoded rows": "#c8553d"}
MOST_PAIRS = 9  # of neighbouring layers whose affinity is drawn
_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "figure.dpi": 110,
    "legend.frameon": False,
}


def draw(found: Measured, folder: Path) -> list[Path]:
    """Draw all pictures into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Measured], Figure]] = {
        "popularity": popularity,
        "affinity": affinity,
        "entropy": entropy,
        "reuse": reuse,
        "repeated": repeated,
        "lru": lru,
    }
    made = []
    with matplotlib.rc_context(_STYLE):
        for name, picture in pictures.items():
            made.append(folder / f"{name}.png")
            picture(found).savefig(made[-1], bbox_inches="tight")
    return made


def popularity(found: Measured) -> Figure:
    """How often each expert is chosen, over choosing all alike, the most popular first; and how many are needed."""
    name, stats = _main(found)
    share = -np.sort(-stats.share_LE, axis=1) * np.array(stats.experts)[:, None]
    share[np.arange(share.shape[1]) >= np.array(stats.experts)[:, None]] = np.nan
    figure, (left, right) = _figure(2, 11, 4.6, [3, 1])
    image = left.imshow(share, aspect="auto", cmap="YlOrRd", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=left, label="chosen, times the uniform share", pad=0.02)
    left.set(xlabel="experts of the layer, the most popular first", ylabel="MoE layer")
    left.grid(False)
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    needed = stats.needed_L
    middle, of = int(np.median(needed)), max(stats.experts)
    left.set_title(f"{middle} of {of} experts make 90 % of a layer's routing ({name}, median layer)")
    right.barh(np.arange(len(needed)), needed, color=COLOURS[name])
    right.axvline(of, color="#555555", linewidth=1, linestyle="--")
    right.text(of, -0.75, f"all {of}", ha="right", va="bottom", fontsize=9, color="#555555")
    right.set(xlabel="experts for 90 %", xlim=(0, of * 1.04), ylim=(len(needed) - 0.5, -0.5))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def affinity(found: Measured) -> Figure:
    """Which expert of the next layer follows which, for neighbouring layers."""
    name, stats = _main(found)
    matrices = stats.affinity_LEE
    pairs = np.unique(np.linspace(0, max(0, len(matrices) - 1), min(MOST_PAIRS, len(matrices))).astype(int))
    columns = max(1, min(3 if len(pairs) != 4 else 2, len(pairs)))
    rows = max(1, -(-len(pairs) // columns))
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08)
    figure = Figure(figsize=(3.4 * columns + 1.4, 3.2 * rows + 1.2), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False)
    top = float(np.quantile(matrices, 0.999)) if matrices.size and matrices.any() else 1.0
    image = None
    for at, axis in enumerate(axes.flat):
        axis.grid(False)
        if at >= len(pairs):
            axis.axis("off")
            continue
        layer = pairs[at]
        seen = matrices[layer][: stats.experts[layer], : stats.experts[layer + 1]]
        image = axis.imshow(seen, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
        axis.set_title(f"layer {layer} to {layer + 1}", fontsize=11, fontweight="normal", pad=5)
        axis.set_xlabel(f"expert of layer {layer + 1}", fontsize=9)
        axis.set_ylabel(f"expert of layer {layer}", fontsize=9)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(5, integer=True))
    if image is not None:
        bar = figure.colorbar(
            image, ax=axes, shrink=0.8, pad=0.02, label="share of its tokens that go on to the expert"
        )
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
    follower, popular = _mean(stats.follower_L), _mean(stats.popular_L[1:])
    claim = f"An expert's likeliest follower is chosen after it by {follower:.0%} of tokens,\n"
    claim += f"a layer's most popular expert by {popular:.0%} of all ({name})"
    figure.suptitle(claim, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def entropy(found: Measured) -> Figure:
    """Entropy of each layer's choices over that of choosing all alike."""
    figure, (axis,) = _figure(1, 9.5, 4.4)
    _bars(axis, found, lambda stats: stats.entropy_L)
    axis.set(xlabel="MoE layer", ylabel="entropy / uniform entropy", ylim=(0, 1.12))
    axis.axhline(1, color="#555555", linewidth=1, linestyle="--")
    axis.text(
        1, 1.01, "all experts alike", transform=axis.get_yaxis_transform(), ha="right", fontsize=9, color="#555555"
    )
    name, stats = _main(found)
    low, high = stats.entropy_L.min(), stats.entropy_L.max()
    axis.set_title(f"A layer's routing has {low:.0%} to {high:.0%} of uniform entropy ({name})")
    _legend(axis)
    return figure


def reuse(found: Measured) -> Figure:
    """Tokens until the same expert of the same layer is chosen again."""
    figure, (axis,) = _figure(1, 8.5, 4.6)
    edges = np.unique(np.r_[1:9, np.geomspace(9, FARTHEST, 22).astype(int)])
    for name, stats in both(found):
        counts = stats.reuse_LN.sum(0).astype(float)
        total = max(counts.sum(), 1)
        reached = np.cumsum(counts) / total
        axis.plot(
            edges,
            reached[edges],
            marker="o",
            markersize=4,
            color=COLOURS[name],
            label=f"{name} (median {_tokens(stats)})",
        )
    last = max(
        (int(np.flatnonzero(stats.reuse_LN.sum(0))[-1]) for _, stats in both(found) if stats.reuse_LN.any()), default=8
    )
    axis.set_xscale("log", base=2)
    axis.set_xlim(0.9, max(last, 8) * 1.1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, at: f"{x:g}"))
    axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axis.set(xlabel="tokens until the expert is chosen again", ylabel="share of the choices made again", ylim=(0, 1.03))
    name, stats = _main(found)
    axis.set_title(f"Half of the experts that come again do so within {_tokens(stats)} ({name})")
    _legend(axis, "lower right")
    return figure


def repeated(found: Measured) -> Figure:
    """What share of a token's experts the next tokens choose again, by layer."""
    figure, axes = _figure(len(AGAIN), 11, 4.4)
    for n, (axis, within) in enumerate(zip(axes, AGAIN, strict=True)):
        _bars(axis, found, partial(_repeated, n=n))
        chance = 1 - (1 - np.array(found.about.choices) / np.array(found.about.experts)) ** within
        for layer, share in enumerate(chance):
            axis.plot([layer - 0.45, layer + 0.45], [share, share], color="#222222", linewidth=1.4,
                      label="by chance" if not layer else None)  # fmt: skip
        axis.set(xlabel="MoE layer", ylim=(0, 1))
        axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axis.set_title(
            "by the next token" if within == 1 else f"within {within} tokens", fontsize=11, fontweight="normal"
        )
    axes[0].set_ylabel("share of choices made again")
    name, stats = _main(found)
    next_one, later = stats.repeated_A[0], stats.repeated_A[-1]
    claim = f"The next token repeats {next_one:.0%} of the experts, the next {AGAIN[-1]} tokens {later:.0%} ({name})"
    figure.suptitle(claim, x=0.01, ha="left", fontsize=13, fontweight="bold")
    _legend(axes[0])
    return figure


def lru(found: Measured) -> Figure:
    """Hit rate of one LRU pool over the share of experts that it holds."""
    figure, (axis,) = _figure(1, 8.5, 5)
    for name, stats in both(found):
        n = len(stats.depths_N)
        axis.plot(np.arange(1, n + 1) / n, stats.lru_N, color=COLOURS[name], linewidth=2.2, label=name)
    axis.plot([0, 1], [0, 1], color="#555555", linewidth=1, linestyle="--", label="experts chosen at random")
    name, stats = _main(found)
    at = found.about.residency if found.about.residency and found.about.residency < 1 else 0.5
    axis.plot([at], [stats.lru(at)], marker="o", color="#222222", zorder=5)
    axis.annotate(
        f"{at:.0%} resident: {stats.lru(at):.0%} hits",
        (at, stats.lru(at)),
        (-10, 10),
        textcoords="offset points",
        ha="right",
    )
    axis.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axis.set(xlabel="residency: share of all experts in the pool", ylabel="hit rate", xlim=(0, 1), ylim=(0, 1.02))
    axis.set_title(f"With {at:.0%} of the experts in one LRU pool, {stats.lru(at):.0%} of choices hit ({name})")
    _legend(axis, "upper left")
    return figure


def _main(found: Measured) -> tuple[str, Stats]:
    """Decoded rows, or all where none was decoded: what a title speaks of."""
    return ("decoded rows", found.decode) if found.decode.tokens else ("all rows", found.every)


def _figure(columns: int, width: float, height: float, ratios: list[int] | None = None) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, gridspec_kw={"width_ratios": ratios} if ratios else None)
    return figure, list(axes[0])


def _bars(axis: Any, found: Measured, of: Callable[[Stats], np.ndarray]) -> None:
    """A value per layer, the kinds of rows side by side."""
    some = list(both(found))
    width = 0.8 / max(1, len(some))
    for n, (name, stats) in enumerate(some):
        values = of(stats)
        axis.bar(
            np.arange(len(values)) + (n - (len(some) - 1) / 2) * width,
            values,
            width * 0.94,
            color=COLOURS[name],
            label=name,
        )
    axis.grid(axis="x", visible=False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axis: Any, where: str = "best") -> None:
    if where == "best":
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=3)
    else:
        axis.legend(loc=where)


def _tokens(stats: Stats) -> str:
    n = stats.reuse_median
    return "no token" if n is None else f"{n:.0f} token{'s' * (n != 1)}"


def _repeated(stats: Stats, n: int) -> np.ndarray:
    return stats.repeated_by_layer[:, n]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
