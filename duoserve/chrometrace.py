"""A recorded run in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open. Knows that format and spans.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duoserve.durable import replacing
from duoserve.lanes import by_track
from duoserve.runfile import Run
from duoserve.timeline import IN_FLIGHT, NONE, PASSES, PREDICTOR, SLOT, STALL, Span

PROCESS = 1
_COLOURS = {"demand": "terrible", IN_FLIGHT: "bad", SLOT: "vsync_highlight_color", PREDICTOR: "yellow"}  # of stalls


def write_trace(path: Path, run: Run) -> None:
    """One JSON file."""
    about = {"seconds": run.seconds, "cut": run.cut} | run.meta | run.machine
    text = json.dumps({"traceEvents": list(events(run)), "displayTimeUnit": "ms", "otherData": about})
    with replacing(path) as stream:
        stream.write(text.encode())


def events(run: Run) -> Iterator[dict[str, Any]]:
    """Names of the tracks, then a complete event for each span, in microseconds."""
    tracks = {PASSES: run.passes} | by_track(run.spans)
    yield _about("process_name", 0, {"name": f"duoserve {run.meta.get('model', '')}".strip()})
    for number, (track, spans) in enumerate(tracks.items(), 1):
        yield _about("thread_name", number, {"name": track})
        yield _about("thread_sort_index", number, {"sort_index": number})
        yield from (event for span in spans if (event := _event(span, number)) is not None)


def _about(name: str, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": PROCESS, "tid": thread, "args": args}


def _event(span: Span, thread: int) -> dict[str, Any] | None:
    """None for what took no nanosecond: readers count in whole ones."""
    start = round(1e9 * span.start)
    length = round(1e9 * span.end) - start
    if length < 1:
        return None
    args = {name: value for name in ("layer", "expert") if (value := getattr(span, name)) != NONE}
    event = {"name": _name(span), "cat": span.kind, "ph": "X", "ts": start / 1e3, "dur": length / 1e3}
    event |= {"pid": PROCESS, "tid": thread, "args": args | ({"cause": span.cause} if span.cause else {})}
    return event | ({"cname": _COLOURS[span.cause]} if span.kind == STALL and span.cause in _COLOURS else {})


def _name(span: Span) -> str:
    if span.kind == STALL:
        return f"stall: {span.cause}"
    where = "/".join(str(n) for n in (span.layer, span.expert) if n != NONE)
    return f"{span.kind} {where}".strip() if span.cause is None else f"{span.kind} {where} ({span.cause})"
