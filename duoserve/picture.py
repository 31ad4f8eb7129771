"""A recorded run as a picture: lanes over time, colours by layer and cause, stalls in front. Knows a run's spans and
figures; measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib
from matplotlib.colors import BoundaryNorm, Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from duoserve.durable import replacing
from duoserve.lanes import by_track, figures, lane_of, phases
from duoserve.runfile import Run
from duoserve.timeline import (
    COMBINE,
    COMPUTE,
    DEMAND,
    DISK,
    HEAD,
    IN_FLIGHT,
    MODEL,
    OUTSIDE,
    PREDICTOR,
    RANK,
    ROUTE,
    SCHEDULE,
    SLOT,
    STALL,
    TRUNK,
    WRONG,
    Span,
)  # fmt: skip

matplotlib.use("Agg")
TOKENS = 3  # decoded, shown where a run is long
_STYLE: Any = {
    "font.size": 10.5, "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0, "figure.dpi": 110, "hatch.linewidth": 0.6,
}  # fmt: skip
_STALLS = {
    DEMAND: "#d7301f",
    IN_FLIGHT: "#fd8d3c",
    SLOT: "#c51b8a",
    PREDICTOR: "#ffd92f",
    DISK: "#8c510a",
    COMPUTE: "#969696",
}
_OWN = {TRUNK: "#d5d9de", HEAD: "#b9c0c8", ROUTE: "#8d99a6", SCHEDULE: "#56606b", COMBINE: "#8d99a6", RANK: "#7b6fae"}
_NAMES = {
    DEMAND: "expert fetched since the router spoke", IN_FLIGHT: "guess still under way", SLOT: "no slot was free",
    PREDICTOR: "ranking on this thread", DISK: "disk read", COMPUTE: "experts computed elsewhere",
    TRUNK: "trunk (attention, norms, shared experts)", HEAD: "head", RANK: "ranking",
    ROUTE: "route read, rows grouped and summed", SCHEDULE: "scheduling",
}  # fmt: skip


class Panel(NamedTuple):
    """A part of a run and what it shows."""

    title: str
    start: float
    end: float


def draw(run: Run, path: Path, zoom: bool = True) -> None:
    """One PNG. `zoom`: of a long run a prompt and a few decoded tokens, else all of it."""
    panels = _panels(run) if zoom else [Panel("", 0.0, run.seconds)]
    tracks = by_track(run.spans)
    colours = _layer_colours(run)
    with matplotlib.rc_context(_STYLE):
        rows = _rows(list(tracks))
        figure = Figure(figsize=(14, 1.9 + len(panels) * (0.9 + 0.36 * (len(rows) + 1))), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        for ax, panel in zip(axes, panels, strict=True):
            _panel(ax, run.between(panel.start, panel.end), panel, rows, colours)
        figure.suptitle(_title(run), x=0.01, ha="left", fontweight="bold", fontsize=12.5)
        _legend(figure, run, panels)
        _layers(figure, axes, colours)
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
    with replacing(path) as stream:
        stream.write(buffer.getvalue())


def _panels(run: Run) -> list[Panel]:
    """The longest prompt, and decoded tokens that took as long as most."""
    prompts = [span for span in run.passes if span.kind == "prefill"]
    tokens = [span for span in run.passes if span.kind == "decode"]
    if not prompts and not tokens:
        return [Panel("all that was recorded", 0.0, run.seconds)]
    panels = []
    if prompts:
        longest = max(prompts, key=lambda span: span.end - span.start)
        panels.append(_shown(run, "prompt", longest.start, longest.end))
    if tokens:
        first = _typical(tokens)
        last = min(first + TOKENS, len(tokens)) - 1
        what = f"decoded tokens {first + 1} to {last + 1} of {len(tokens)}"
        panels.append(_shown(run, what, tokens[first].start, tokens[last].end))
    return panels


def _typical(tokens: Sequence[Span]) -> int:
    """The first of as many neighbours as are shown, in all as long as the median."""
    lengths = [span.end - span.start for span in tokens]
    sums = [sum(lengths[i : i + TOKENS]) for i in range(max(1, len(tokens) - TOKENS + 1))]
    usual = median(sums)
    return min(range(len(sums)), key=lambda i: abs(sums[i] - usual))


def _shown(run: Run, what: str, start: float, end: float) -> Panel:
    stalled = sum(
        min(s.end, end) - max(s.start, start)
        for s in run.spans
        if s.lane == COMPUTE and s.kind == STALL and s.end > start and s.start < end
    )
    return Panel(f"{what}: {1e3 * (end - start):,.1f} ms, {stalled / (end - start):.0%} of them stalled", start, end)


def _title(run: Run) -> str:
    facts = [run.meta[name] for name in ("model", "policy", "residency") if name in run.meta]
    said = []
    for phase in phases(run):
        waited = ", ".join(f"{cause} {s / phase.seconds:.0%}" for cause, s in sorted(phase.stall_s.items()))
        name = "a token" if phase.name == "decode" else "a prompt"
        said.append(f"{name} takes {1e3 * phase.median_s:,.1f} ms; stalled: {waited or 'never'}")
    return "\n".join([", ".join(facts), *said])


def _rows(tracks: list[str]) -> list[tuple[str, list[str]]]:
    """Rows from above: workers of the copy lanes and the disk have one each, others share their lane's."""
    rows: dict[str, list[str]] = {}
    for track in tracks:
        name = track if track[-1:].isdigit() else lane_of(track)
        rows.setdefault(name, []).append(track)
    return list(rows.items())


class _LayerColours(NamedTuple):
    """Cool colours: the warm ones are for stalls."""

    n: int
    map: Colormap

    def of(self, layer: int) -> Any:
        return self.map((layer + 0.5) / self.n) if 0 <= layer < self.n else "#aaaaaa"


def _layer_colours(run: Run) -> _LayerColours:
    n = 1 + max((span.layer for span in run.spans if span.kind in ("expert", "copy", "read")), default=0)
    cool = ["#08306b", "#2171b5", "#41b6c4", "#7fcdbb", "#238b45", "#00441b"]
    return _LayerColours(n, LinearSegmentedColormap.from_list("layers", cool, N=256))


def _panel(ax: Any, run: Run, panel: Panel, rows: list[tuple[str, list[str]]], colours: _LayerColours) -> None:
    tracks, found = by_track(run.spans), {item.track: item for item in figures(run)}
    ticks, top = [], 0.0
    for name, members in rows:
        height = 1.7 if name in (COMPUTE, MODEL) else 0.8
        for track in members:
            _bars(ax, tracks.get(track, []), top, height, colours)
        known = [found[track] for track in members if track in found]
        share = sum(item.busy_s for item in known) / run.seconds
        stalled = sum(item.stalled_s for item in known) / run.seconds
        said = f"{share:.0%} busy" + (f", {stalled:.0%} stalled" if stalled >= 0.005 else "")
        ax.text(1.005, top + height / 2, said, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
        ticks.append((top + height / 2, name))
        top += height + 0.2
    ax.set(xlim=(0, 1e3 * run.seconds), ylim=(top, -0.1), title=panel.title)
    ax.set_xlabel(f"ms since {1e3 * panel.start:,.1f} ms of the recording" if panel.start else "ms")
    ax.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
    ax.grid(axis="x", color="#e6e8eb", zorder=0)
    ax.set_axisbelow(True)


def _bars(ax: Any, spans: Sequence[Span], top: float, height: float, colours: _LayerColours) -> None:
    """Guesses that nobody needed are hatched; stalls stand out by their colour and reach beyond the lane."""
    plain = [s for s in spans if s.kind not in (STALL, OUTSIDE) and s.cause != WRONG]
    wrong = [s for s in spans if s.cause == WRONG]
    stalls = [s for s in spans if s.kind == STALL]
    for group, more in ((plain, {}), (wrong, {"hatch": "xxxx", "edgecolor": "white"})):
        faces = [_OWN.get(s.kind) or colours.of(s.layer) for s in group]
        ax.broken_barh(_ranges(group), (top, height), facecolors=faces, linewidth=0, zorder=2, **more)
    faces = [_STALLS.get(s.cause or "", "#000000") for s in stalls]
    ax.broken_barh(_ranges(stalls), (top - 0.06, height + 0.12), facecolors=faces, linewidth=0, zorder=3)


def _ranges(spans: Sequence[Span]) -> list[tuple[float, float]]:
    return [(1e3 * span.start, 1e3 * (span.end - span.start)) for span in spans]


def _legend(figure: Figure, run: Run, panels: Sequence[Panel]) -> None:
    """Only what is there."""
    shown = [s for s in run.spans if any(s.end > p.start and s.start < p.end for p in panels)]
    causes, kinds = {s.cause for s in shown if s.kind == STALL}, {s.kind for s in shown}
    patches = [Patch(color=colour, label=f"stall: {_NAMES[c]}") for c, colour in _STALLS.items() if c in causes]
    kept = [kind for kind in (TRUNK, HEAD, ROUTE, SCHEDULE, RANK) if kind in kinds]
    patches += [Patch(color=_OWN[kind], label=_NAMES[kind]) for kind in kept]
    if any(s.cause == WRONG for s in shown):
        patches.append(Patch(facecolor="#41b6c4", edgecolor="white", hatch="xxxx", label="guess that nobody needed"))
    figure.legend(handles=patches, loc="outside lower left", ncols=5, frameon=False, fontsize=9)


def _layers(figure: Figure, axes: Any, colours: _LayerColours) -> None:
    """Which colour is which layer: of the experts computed and the slabs copied."""
    norm = BoundaryNorm([i - 0.5 for i in range(colours.n + 1)], 256)
    scale = matplotlib.cm.ScalarMappable(norm, colours.map)
    bar = figure.colorbar(scale, ax=list(axes), pad=0.09, fraction=0.02, aspect=30)
    step = max(1, colours.n // 8)
    bar.set_ticks(list(range(0, colours.n, step)))
    bar.ax.tick_params(length=0)
    bar.set_label("experts and copies: MoE layer")
    bar.outline.set_visible(False)
