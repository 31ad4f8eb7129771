"""How long a disaggregated run took, and how much of it nobody computed. Knows spans of work by rank; knows nothing of
models.

    attention rank 0   [ attention 0 ][ shared ][ attention 1 ]              [ attention 0 ]
    expert rank 0                        [ experts 0 ]    [ experts 1 ]
    exposed                                                            ^^^^^^  rows travel, or a thread waits for its core
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

WORK = ("attention", "shared", "expert")


class Load(NamedTuple):
    """What is timed: random prompts."""

    samples: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        return self.samples * (self.prompt_tokens + self.new_tokens - 1)


class Span(NamedTuple):
    """A stretch of one rank's time. Seconds of one clock: ranks of one machine share it."""

    what: str
    began: float
    ended: float


class Spans:
    """What a walk notes."""

    def __init__(self) -> None:
        self.found: list[Span] = []

    def __call__(self, what: str, layer: int, batch: int, chunk: int, began: float, ended: float) -> None:
        self.found.append(Span(what, began, ended))


class Times(NamedTuple):
    """Of one run, all ranks: from the first stretch of work to the end of the last; of that, how long nobody worked."""

    seconds: float
    exposed_s: float
    busy_s: list[float]  # of each rank


def times(spans: Sequence[Sequence[Span]]) -> Times:
    """`spans` of each rank."""
    work = [[span for span in one if span.what in WORK] for one in spans]
    both = [span for one in work for span in one]
    began, ended = min(span.began for span in both), max(span.ended for span in both)
    busy = [sum(span.ended - span.began for span in one) for one in work]
    return Times(ended - began, ended - began - _covered(both), busy)


class Trial(NamedTuple):
    """One run of a bench: by how many ranks it ended, and those (by their numbers at launch) that were lost in it."""

    times: Times
    ranks: int
    lost: tuple[int, ...]


def medians(trials: Sequence[Trial], tokens: int) -> dict[str, Any]:
    """Over the runs that lost nobody, of those the ones with the most ranks; null where there is none."""
    whole = [trial for trial in trials if not trial.lost]
    most = max((trial.ranks for trial in whole), default=0)
    runs = [trial.times for trial in whole if trial.ranks == most]
    seconds = statistics.median(run.seconds for run in runs) if runs else None
    return {
        "tokens_per_s": seconds and tokens / seconds,
        "seconds": seconds,
        "exposed_s": statistics.median(run.exposed_s for run in runs) if runs else None,
        "busy_s": [statistics.median(each) for each in zip(*(run.busy_s for run in runs), strict=True)],
        "runs_s": [run.seconds for run in runs],
        "trials": [
            {"seconds": trial.times.seconds, "ranks": trial.ranks, "lost": list(trial.lost),
             "counted": not trial.lost and trial.ranks == most}
            for trial in trials
        ],
    }  # fmt: skip


def _covered(spans: Iterable[Span]) -> float:
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.began):
        total += max(0.0, span.ended - max(span.began, until))
        until = max(until, span.ended)
    return total
