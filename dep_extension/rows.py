"""Rows of a micro-batch cut into chunks for the expert ranks, and how those that arrive are sorted. Knows experts, shares
and counts; knows nothing of models, weights or how rows travel.

    sorted by expert     | 0 0 0 | 1 1 | 2 2 2 2 |        ranks hold (0, 1) and (2), r2 = 2
    chunk 0              | 0 0 . | 1 . | 2 2 . . |        -> rank 0: 0 0 1   rank 1: 2 2
    chunk 1              | . . 0 | . 1 | . . 2 2 |        -> rank 0: 0 1     rank 1: 2 2

Rows of an expert that several ranks hold are cut once more, evenly among these: a plan counts on that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch


class Seat(NamedTuple):
    """Where an expert is computed: the expert rank, and its number among that rank's own."""

    rank: int
    local: int


Shares = Sequence[Sequence[int]]  # the experts of each expert rank, of one layer


Seats = Mapping[int, Sequence[Seat]]


def seats(shares: Shares, sender: int) -> Seats:
    """Where attention rank `sender` sends the rows of each expert: to every rank that holds it, in an order of its own, so
    that the first of few rows do not all go to the same ranks."""
    held: dict[int, list[Seat]] = {}
    for rank, experts in enumerate(shares):
        for local, expert in enumerate(experts):
            held.setdefault(expert, []).append(Seat(rank, local))
    return {expert: _turned(choices, sender + expert) for expert, choices in held.items()}


def _turned(choices: list[Seat], by: int) -> list[Seat]:
    first = by % len(choices)
    return choices[first:] + choices[:first]


class Cut(NamedTuple):
    """Which of the sorted rows go in each chunk, by expert rank and there by expert; how many to each expert rank; counts
    (expert ranks, chunks, local experts)."""

    index_C: list[torch.Tensor]
    to_CE: list[list[int]]
    counts_ECL: torch.Tensor


def cut(spans: Mapping[int, tuple[int, int]], at: Seats, ranks: int, r2: int, most: int) -> Cut:
    """`spans`: the sorted rows of each expert; each is cut into `r2` parts of as many rows, the last smaller, and each of
    these evenly among those who hold the expert. `most`: the local experts of the rank that has most."""
    counts_ECL = torch.zeros(ranks, r2, most, dtype=torch.int64)
    index_C, to_CE = [], []
    for chunk in range(r2):
        parts, to = [], [0] * ranks
        for (rank, local), begin, end in sorted(_dealt(spans, at, chunk, r2)):
            parts.append(torch.arange(begin, end))
            to[rank] += end - begin
            counts_ECL[rank, chunk, local] = end - begin
        index_C.append(torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64))
        to_CE.append(to)
    return Cut(index_C, to_CE, counts_ECL)


def _dealt(spans: Mapping[int, tuple[int, int]], at: Seats, chunk: int, r2: int) -> Iterator[tuple[Seat, int, int]]:
    """Who gets which of a chunk's rows, nobody none."""
    for expert, span in spans.items():
        start, stop = _part(*span, chunk, r2)
        many = len(at[expert])
        ends = [start + (stop - start) * number // many for number in range(many + 1)]
        yield from ((seat, a, b) for seat, (a, b) in zip(at[expert], pairwise(ends), strict=True) if a < b)


def _part(start: int, stop: int, chunk: int, r2: int) -> tuple[int, int]:
    size = -(-(stop - start) // r2)
    return min(start + chunk * size, stop), min(start + (chunk + 1) * size, stop)


def arrived(counts_AL: torch.Tensor) -> torch.Tensor:
    """Of rows that came by attention rank and there by local expert: each one's local expert, (P, 1)."""
    ranks, experts = counts_AL.shape
    return torch.arange(experts).repeat(ranks).repeat_interleave(counts_AL.flatten())[:, None]
