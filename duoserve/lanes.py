"""Where a recorded run's time went, track by track: busy, stalled by cause, idle, and what no span accounts for. Knows
spans; knows nothing of files or pictures. Imports no torch.

The model's track has no gaps: what none of its spans covers is unknown. A worker without a job is idle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from duoserve.runfile import Run
from duoserve.timeline import COMPUTE, MODEL, OUTSIDE, PASSES, QUICK, STALL, Span

ORDER = (COMPUTE, MODEL, "demand", "ahead", "disk", "predictor")  # of lanes; others follow


class Figures(NamedTuple):
    """Of one track, in seconds of `wall_s`. `overlap_s` was said by two spans; none should be."""

    track: str
    busy_s: float
    stall_s: dict[str, float]
    idle_s: float
    unknown_s: float
    overlap_s: float
    wall_s: float
    spans: int

    @property
    def stalled_s(self) -> float:
        return sum(self.stall_s.values())

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


def lane_of(track: str) -> str:
    """`demand 1` is of the lane `demand`."""
    return track.partition(" ")[0]


def by_track(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """Spans of each track, passes apart, lanes in their order."""
    found: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        if span.lane != PASSES:
            found[span.lane].append(span)
    return {track: found[track] for track in sorted(found, key=_place)}


def figures(run: Run) -> list[Figures]:
    """One for each track."""
    followed = {span.lane for span in run.spans if span.kind == OUTSIDE}
    return [_figures(track, spans, run.seconds, track in followed) for track, spans in by_track(run.spans).items()]


def _figures(track: str, spans: Sequence[Span], wall: float, followed: bool) -> Figures:
    busy = idle = 0.0
    stalls: dict[str, float] = defaultdict(float)
    for span in spans:
        length = span.end - span.start
        if span.kind == STALL:
            stalls[span.cause or "unnamed"] += length
        elif span.kind == OUTSIDE:
            idle += length
        else:
            busy += length
    covered = _covered(spans)
    overlap = busy + idle + sum(stalls.values()) - covered
    gaps = max(0.0, wall - covered)
    idle, unknown = (idle, gaps) if followed else (idle + gaps, 0.0)
    return Figures(track, busy, dict(stalls), idle, unknown, overlap, wall, len(spans))


def _covered(spans: Sequence[Span]) -> float:
    """Seconds that lie within at least one span."""
    covered = until = 0.0
    for span in spans:  # in order of their starts
        covered += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return covered


class Phase(NamedTuple):
    """Passes of one kind."""

    name: str
    passes: int
    median_s: float
    stall_s: dict[str, float]  # of the track that computes, in all of them
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


def phases(run: Run) -> list[Phase]:
    """Prefill and decode, as far as there are any."""
    found = []
    stalls = [span for span in run.spans if span.lane == COMPUTE and span.kind == STALL]
    for name in ("prefill", "decode"):
        passes = [span for span in run.passes if span.kind == name]
        if passes:
            lengths = [span.end - span.start for span in passes]
            found.append(Phase(name, len(passes), median(lengths), _within(stalls, passes), sum(lengths)))
    return found


def _within(stalls: Sequence[Span], passes: Sequence[Span]) -> dict[str, float]:
    """Seconds of stalls that lie in passes, by cause; both in order of their starts."""
    found: dict[str, float] = defaultdict(float)
    at = 0
    for stall in stalls:
        while at < len(passes) and passes[at].end <= stall.start:
            at += 1
        if at < len(passes) and passes[at].start <= stall.start:
            found[stall.cause or "unnamed"] += stall.end - stall.start
    return dict(found)


def _place(track: str) -> tuple[int, bool, str]:
    lane = lane_of(track)
    return (ORDER.index(lane) if lane in ORDER else len(ORDER), track == QUICK, track)
