"""What a contender of a benchmark notes of itself while it answers, and the lines in which it is asked. Knows clocks, /proc
and JSON lines; knows nothing of models. Imports no torch: a peer that needs none must not pay for it under a cap.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from duoserve.contest import Contender


class Counts(NamedTuple):
    """Since loading. `moved` and `busy_s` of the link; `read` from disk by this process, whoever asked."""

    hits: int = 0
    in_flight: int = 0
    misses: int = 0
    moved: int = 0
    busy_s: float = 0.0
    read: int = 0

    def since(self, before: Counts) -> dict[str, float]:
        return {name: now - then for name, now, then in zip(self._fields, self, before, strict=True)}


class Clock:
    """Notes when tokens came, and what was counted when the first had come; counting is in nobody's time."""

    def __init__(self, counts: Callable[[], Counts]):
        self._counts = counts
        self._before = self._at_first = counts()
        self._steps = 0
        self._began = self._first = self._resumed = self._latest = time.perf_counter()

    def tick(self) -> None:
        """A token is there (of each sequence)."""
        self._latest = time.perf_counter()
        self._steps += 1
        if self._steps == 1:
            self._first, self._at_first = self._latest, self._counts()
            self._resumed = time.perf_counter()

    def figures(self) -> dict[str, Any]:
        """Of the request: seconds, and counts of prefill and decode."""
        after = self._counts()
        decode_s = self._latest - self._resumed if self._steps > 1 else 0.0
        return {
            "ttft_s": self._first - self._began,
            "decode_s": decode_s,
            "e2e_s": self._first - self._began + decode_s,
            "steps": self._steps - 1,
            "prefill": self._at_first.since(self._before),
            "decode": after.since(self._at_first),
        }


def read_bytes() -> int:
    """From disk, page faults included; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


def peak_rss() -> int:
    """Bytes, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


class Answers(Protocol):
    """A contender that loads and answers."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]: ...

    def close(self) -> None: ...


def attend(opened: Callable[[Contender, Path], Answers]) -> None:
    """Answer the lines of stdin until it ends: first who takes part, then requests. `opened` gets a folder to write in."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints elsewhere
    contender = Contender(**json.loads(sys.stdin.readline()))
    if contender.scratch is not None:
        Path(contender.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=contender.scratch, prefix="duoserve-bench-") as scratch:
        service = opened(contender, Path(scratch))
        for line in sys.stdin:
            try:
                found = service.answer(json.loads(line))
            except Exception as error:  # becomes a row that says so
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), file=answers, flush=True)
        service.close()
