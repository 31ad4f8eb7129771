"""A plan's timeline for people and for Perfetto: four lanes, AG, A2E, EG and E2A; and sweeps as lines. Knows tasks with
their times and rows of a sweep; plans nothing. Every figure is a simulation's, and every picture says so.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU has the Trace Event Format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dep_extension.schedule import Resource, Task
from duoserve.durable import replacing

matplotlib.use("Agg")
LANES = tuple(resource.value for resource in Resource)
NARROW = 0.004  # of the picture: bars that white edges would hide
SHOWN = 3  # layers of a long run: the middle ones, where it is periodic
_COLOURS = ["#2b6cb0", "#d97706", "#2f855a", "#b83280", "#6b46c1", "#0e7490", "#a16207", "#9b2c2c"]  # of micro-batches
_STYLE: Any = {"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110}


def events(tasks: Sequence[Task], title: str) -> Iterator[dict[str, Any]]:
    """Names of the lanes, then a complete event for each task, in microseconds."""
    yield _about("process_name", 0, {"name": f"{title} (simulated)"})
    for number, lane in enumerate(LANES, 1):
        yield _about("thread_name", number, {"name": lane})
        yield _about("thread_sort_index", number, {"sort_index": number})
    for task in tasks:
        start = round(1e9 * task.start)
        length = round(1e9 * task.end) - start
        if length < 1:  # readers count in whole nanoseconds
            continue
        args = {"layer": task.layer, "micro-batch": task.batch} | ({"chunk": task.chunk} if task.chunk >= 0 else {})
        name = f"{task.what} {'/'.join(str(n) for n in args.values())}"
        yield {"name": name, "cat": task.what, "ph": "X", "ts": start / 1e3, "dur": length / 1e3, "pid": 1,
               "tid": 1 + LANES.index(task.resource.value), "args": args}  # fmt: skip


def _about(name: str, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": 1, "tid": thread, "args": args}


def write_trace(path: Path, tasks: Sequence[Task], title: str) -> None:
    text = json.dumps(
        {"traceEvents": list(events(tasks, title)), "displayTimeUnit": "ms", "otherData": {"simulated": True}}
    )
    with replacing(path) as stream:
        stream.write(text.encode())


def draw(path: Path, tasks: Sequence[Task], title: str) -> None:
    """One PNG: lanes over time, a colour for each micro-batch; shared experts and counts hatched."""
    last = max(task.layer for task in tasks)
    first = max(0, (last + 1 - SHOWN) // 2)
    shown = [task for task in tasks if first <= task.layer < first + SHOWN]
    begin = min(task.start for task in shown)
    span = max(task.end for task in shown) - begin
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(14, 3.6), layout="constrained")
        ax = figure.subplots()
        for task in shown:
            aside, seconds = task.what in ("shared", "count"), task.end - task.start
            ax.broken_barh(
                [(1e3 * (task.start - begin), 1e3 * seconds)],
                (LANES.index(task.resource.value) - 0.4, 0.8),
                facecolor=_COLOURS[task.batch % len(_COLOURS)],
                edgecolor="white",
                linewidth=0.4 if seconds > NARROW * span else 0,
                alpha=0.55 if aside else 1,
                hatch="////" if aside else None,
            )
        ax.set(
            ylim=(len(LANES) - 0.4, -0.6), xlabel=f"ms, layers {first} to {min(last, first + SHOWN - 1)} of {last + 1}"
        )
        ax.set_yticks(range(len(LANES)), LANES)
        figure.suptitle(f"{title}: simulated", x=0.01, ha="left", fontweight="bold", fontsize=11.5)
        many = 1 + max(task.batch for task in shown)
        patches = [Patch(color=_COLOURS[i % len(_COLOURS)], label=f"micro-batch {i}") for i in range(many)]
        hatched = Patch(facecolor="#999999", edgecolor="white", hatch="////", label="shared experts, counts")
        figure.legend(handles=[*patches, hatched], loc="outside lower left", ncols=9, frameon=False, fontsize=9)
        _save(figure, path)


class Line(NamedTuple):
    """Of one way: points over x; None where it has no room."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]


def plot(
    path: Path, panels: Sequence[tuple[str, Sequence[Line]]], x: str, y: str, title: str, log: bool = False
) -> None:
    """One PNG: a panel beside the other, the same lines in each."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.2 + 4.2 * len(panels), 4.2), layout="constrained")
        for ax, (name, lines) in zip(
            figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
        ):
            for colour, line in zip(_COLOURS, lines, strict=False):
                known = [(at, value) for at, value in zip(line.xs, line.ys, strict=True) if value is not None]
                ax.plot(
                    *zip(*known, strict=True) if known else ([], []), "o-", color=colour, label=line.label, markersize=4
                )
            ax.set(xlabel=x, title=name)
            ax.grid(color="#e6e8eb")
            ax.set_axisbelow(True)
            if log:
                ax.set_xscale("log", base=2)
                ax.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        figure.axes[0].set_ylabel(y)
        figure.axes[0].legend(frameon=False, fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11.5)
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    with replacing(path) as stream:
        stream.write(buffer.getvalue())
