"""The command `timeline`: where a recorded run's time went, as a table, a trace for Perfetto, and a picture. Knows the
command line; knows nothing of formats or colours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from duoserve import flags
from duoserve.columns import aligned
from duoserve.core import Refusal
from duoserve.lanes import Figures, Phase, figures, phases
from duoserve.runfile import Run, read_run

Recorded = Annotated[Path, typer.Argument(metavar="RUN", help="A file that `duoserve chat --timeline FILE` wrote.")]


def timeline(
    run: Recorded,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write Chrome trace JSON, for ui.perfetto.dev.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Draw a picture.")] = None,
    as_json: flags.AsJson = False,
    start: Annotated[float | None, typer.Option("--from", help="Look at what was later than this, ms.")] = None,
    end: Annotated[float | None, typer.Option("--to", help="Look at what was earlier than this, ms.")] = None,
    step: Annotated[int | None, typer.Option("--step", help="Look at this pass only, counted from 0.")] = None,
) -> None:
    """Show where a recorded run's time went: busy, stalled by cause, idle; each lane apart."""
    whole = read_run(run)
    chosen = start is not None or end is not None or step is not None
    found = _part(whole, start, end, step) if chosen else whole
    if out is not None:
        from duoserve.chrometrace import write_trace

        write_trace(out, found)
        print(out, file=sys.stderr)
    if png is not None:
        from duoserve.picture import draw

        draw(found, png, zoom=not chosen)
        print(png, file=sys.stderr)
    if as_json:
        print(json.dumps(to_json(found)))
    else:
        print("\n".join(table(found)))


def _part(run: Run, start: float | None, end: float | None, step: int | None) -> Run:
    """Between two times, or one pass."""
    if step is not None:
        if not 0 <= step < len(run.passes):
            raise Refusal("E_OPTION", f"--step {step} of {len(run.passes)} passes", "count from 0")
        span = run.passes[step]
        return run.between(span.start, span.end)
    first, last = (start or 0.0) / 1e3, run.seconds if end is None else end / 1e3
    if not 0 <= first < last or first >= run.seconds:
        what = f"from {1e3 * first:g} to {1e3 * last:g} ms of a run of {1e3 * run.seconds:g} ms"
        raise Refusal("E_OPTION", what, "give times within the run, the earlier one first")
    return run.between(first, min(last, run.seconds))


def to_json(run: Run) -> dict[str, object]:
    about = {"meta": run.meta, "machine": run.machine, "seconds": run.seconds, "cut": run.cut, "spans": len(run.spans)}
    tracks = [item.to_json() for item in figures(run)]
    return about | {"tracks": tracks, "phases": [phase.to_json() for phase in phases(run)]}


def table(run: Run) -> list[str]:
    """Lines for people."""
    facts = ", ".join(f"{name} {value}" for name, value in run.meta.items())
    lines = [f"{run.seconds:.3f} s recorded{', then no more fitted' if run.cut else ''}; {facts}".rstrip("; "), ""]
    lines += [_phase(phase) for phase in phases(run)]
    found = figures(run)
    causes = sorted({cause for item in found for cause in item.stall_s})
    rows = [["track", "busy s", *(f"stall: {cause}" for cause in causes), "idle", "unknown", "wall", "busy"]]
    rows += [_row(item, causes) for item in found]
    return [*lines, *([""] if lines[-1] else []), *aligned(rows, left=1)]


def _row(item: Figures, causes: list[str]) -> list[str]:
    stalls = [f"{item.stall_s[cause]:.3f}" if cause in item.stall_s else "-" for cause in causes]
    share = item.busy_s / item.wall_s if item.wall_s else 0.0
    seconds = (item.idle_s, item.unknown_s, item.wall_s)
    return [item.track, f"{item.busy_s:.3f}", *stalls, *(f"{s:.3f}" for s in seconds), f"{share:.1%}"]


def _phase(phase: Phase) -> str:
    stalls = ", ".join(f"{cause} {s / phase.seconds:.1%}" for cause, s in sorted(phase.stall_s.items()))
    waited = (
        f"stalled {sum(phase.stall_s.values()) / phase.seconds:.1%} of it ({stalls})" if stalls else "never stalled"
    )
    return f"{phase.name}: {phase.passes} passes, {1e3 * phase.median_s:.2f} ms the median one; compute {waited}"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(timeline)
