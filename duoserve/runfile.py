"""A recorded run as a file: what ran where, and its spans. Knows its own format, and bounds for what a stranger wrote; knows
nothing of lanes' figures or pictures. Imports no torch.

Spans are columns of whole numbers: times in nanoseconds since recording began, names as places in three lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duoserve.core import Refusal
from duoserve.durable import replacing
from duoserve.headers import read_json, shown
from duoserve.timeline import MOST, PASSES, Span, Timeline

KIND, VERSION = "duoserve-run", 1
MAX_SPANS = 2 * MOST  # a recording ends between passes, the last one may go beyond its bound
MAX_BYTES = 128 << 20
MAX_TEXT, MAX_NAMES, MAX_FACTS = 200, 256, 64
_COLUMNS = ("lane", "kind", "layer", "expert", "start", "length", "cause")
_NAMES = ("lane", "kind", "cause")
_MAX_ID, _MAX_NS = 1 << 20, 1 << 60
_REMEDY = "record one with `duoserve chat --timeline FILE`"


@dataclass(frozen=True)
class Run:
    """What was recorded in `seconds`; spans count theirs from 0, in order of their starts. `cut`: there was more."""

    seconds: float
    spans: list[Span]
    meta: dict[str, str]
    machine: dict[str, str]
    cut: bool = False

    @classmethod
    def of(cls, timeline: Timeline, meta: dict[str, str], machine: dict[str, str]) -> Run:
        """What was recorded until now, or until recording ended; spans that reach beyond it are cut off there."""
        found = timeline.spans()
        ended = timeline.ended if timeline.ended > timeline.began else max((s.end for s in found), default=0.0)
        spans = list(clipped(found, timeline.began, ended))
        return cls(ended - timeline.began, spans[:MAX_SPANS], meta, machine, timeline.full)

    @property
    def passes(self) -> list[Span]:
        """Whole forward passes; `kind` is the phase."""
        return [span for span in self.spans if span.lane == PASSES]

    def between(self, start: float, end: float) -> Run:
        """The same run, looked at from `start` to `end`."""
        return Run(end - start, list(clipped(self.spans, start, end)), self.meta, self.machine, self.cut)


def clipped(spans: Iterable[Span], start: float, end: float) -> Iterable[Span]:
    """What of each span lies between; times from `start` on."""
    for span in spans:
        if span.end >= start and span.start < end:
            yield span._replace(start=max(span.start, start) - start, end=min(span.end, end) - start)


def write_run(path: Path, run: Run) -> None:
    """Replace the file at once: a reader sees the old one or the new one."""
    names = {name: sorted({str(getattr(span, name) or "") for span in run.spans}) for name in _NAMES}
    at = {name: {word: i for i, word in enumerate(words)} for name, words in names.items()}
    columns: dict[str, list[int]] = {name: [at[name][getattr(s, name) or ""] for s in run.spans] for name in _NAMES}
    columns |= {"layer": [s.layer for s in run.spans], "expert": [s.expert for s in run.spans]}
    starts, ends = ([round(1e9 * getattr(s, name)) for s in run.spans] for name in ("start", "end"))
    columns |= {"start": starts, "length": [end - start for start, end in zip(starts, ends, strict=True)]}
    data = {"kind": KIND, "version": VERSION, "machine": run.machine, "meta": run.meta, "cut": run.cut}
    data |= {"ns": round(1e9 * run.seconds), "names": names, "spans": columns}
    with replacing(path) as stream:
        stream.write(json.dumps(data, separators=(",", ":")).encode())


def read_run(path: Path) -> Run:
    """The run in a file; refuses one that is damaged or of another make, whoever wrote it."""
    if not path.exists():
        raise Refusal("E_RUN", f"there is no {path}", _REMEDY, 3)
    try:
        data = read_json(path, _REMEDY, MAX_BYTES, len(_COLUMNS) * MAX_SPANS + 10_000)
    except Refusal as refusal:
        raise refusal.under("E_RUN") from refusal
    try:
        return _run(data)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what = shown(f"{type(error).__name__}: {error}")[1:-1]
        raise Refusal("E_RUN", f"{path} is no recorded run ({what})", _REMEDY, 5) from error


def _run(data: Any) -> Run:
    if not isinstance(data, dict) or data.get("kind") != KIND or data.get("version") != VERSION:
        raise ValueError(f"not {KIND!r} version {VERSION}")
    names = {name: _names(data["names"][name]) for name in _NAMES}
    columns = {name: _column(data["spans"][name]) for name in _COLUMNS}
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError("columns differ in length")
    if len(columns["lane"]) > MAX_SPANS:
        raise ValueError(f"{len(columns['lane']):,} spans")
    for name in _NAMES:
        _within(columns[name], 0, len(names[name]) - 1, name)
    for name in ("layer", "expert"):
        _within(columns[name], -1, _MAX_ID, name)
    seconds = _length(data["ns"]) / 1e9
    _within(columns["start"], 0, data["ns"], "start")
    _within(columns["length"], 0, data["ns"], "length")
    _within([s + n for s, n in zip(columns["start"], columns["length"], strict=True)], 0, data["ns"] + 1, "end")
    spans = [
        Span(
            names["lane"][lane], names["kind"][kind], layer, expert, start / 1e9, (start + length) / 1e9,
            names["cause"][cause] or None,
        )
        for lane, kind, layer, expert, start, length, cause in zip(
            *(columns[name] for name in _COLUMNS), strict=True
        )
    ]  # fmt: skip
    spans.sort(key=lambda span: span.start)
    return Run(seconds, spans, _facts(data["meta"]), _facts(data["machine"]), data["cut"] is True)


def _length(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_NS:
        raise ValueError(f"{str(value)[:40]} ns")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError("not a short text")
    return value


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) > MAX_NAMES:
        raise ValueError(f"not a list of up to {MAX_NAMES} names")
    return [_text(item) for item in value]


def _facts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_FACTS:
        raise ValueError(f"not up to {MAX_FACTS} facts")
    return {_text(name): _text(fact) for name, fact in value.items()}


def _column(value: Any) -> list[int]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise ValueError("a column is no list of whole numbers")
    return value


def _within(column: list[int], least: int, most: int, name: str) -> None:
    if column and not (least <= min(column) and max(column) <= most):
        raise ValueError(f"{name} beyond {least} to {most}")
