"""Rows of a micro-batch cut into chunks for the expert ranks, and how those that arrive are sorted. Knows experts, shares
and counts; knows nothing of models, weights or how rows travel.

    sorted by expert     | 0 0 0 | 1 1 | 2 2 2 2 |        ranks hold (0, 1) and (2), r2 = 2
    chunk 0              | 0 0 . | 1 . | 2 2 . . |        -> rank 0: 0 0 1   rank 1: 2 2
    chunk 1              | . . 0 | . 1 | . . 2 2 |        -> rank 0: 0 1     rank 1: 2 2

Rows of an expert that several ranks hold are cut once more, evenly among these: a plan counts on that.
After a loss only what is not back is cut again: into the chunks that were, or anew where there are more or fewer now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
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


Pieces = list[dict[int, torch.Tensor]]
"""Of each chunk, which of the sorted rows each expert gets."""


class Cut(NamedTuple):
    """Which of the sorted rows go in each chunk, by expert rank and there by expert; how many to each expert rank; counts
    (expert ranks, chunks, local experts)."""

    index_C: list[torch.Tensor]
    to_CE: list[list[int]]
    counts_ECL: torch.Tensor
    pieces_C: Pieces


def cut(spans: Mapping[int, tuple[int, int]], at: Seats, ranks: int, r2: int, most: int) -> Cut:
    """`spans`: the sorted rows of each expert; each is cut into `r2` parts of as many rows, the last smaller, and each of
    these evenly among those who hold the expert. `most`: the local experts of the rank that has most."""
    return seated(_pieces({expert: torch.arange(*span) for expert, span in spans.items()}, r2), at, ranks, most)


def cut_again(former: Cut, missing: Collection[int], at: Seats, ranks: int, r2: int, most: int) -> tuple[Cut, set[int]]:
    """Only the rows of the chunks in `missing`, and the chunks that now have some. Into as many chunks as before each row
    stays in its own, so that products are those they would have been."""
    pieces_C = [piece if chunk in missing else {} for chunk, piece in enumerate(former.pieces_C)]
    if r2 != len(pieces_C):
        pieces_C = _pieces(_together(pieces_C), r2)
    return seated(pieces_C, at, ranks, most), {chunk for chunk, piece in enumerate(pieces_C) if piece}


def seated(pieces_C: Pieces, at: Seats, ranks: int, most: int) -> Cut:
    """Chunks as they go to those who hold their experts."""
    counts_ECL = torch.zeros(ranks, len(pieces_C), most, dtype=torch.int64)
    index_C, to_CE = [], []
    for chunk, piece in enumerate(pieces_C):
        parts, to = [], [0] * ranks
        for (rank, local), index in sorted(_dealt(piece, at), key=_seat):
            parts.append(index)
            to[rank] += len(index)
            counts_ECL[rank, chunk, local] = len(index)
        index_C.append(torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64))
        to_CE.append(to)
    return Cut(index_C, to_CE, counts_ECL, pieces_C)


def _pieces(rows: Mapping[int, torch.Tensor], r2: int) -> Pieces:
    """Each expert's rows in `r2` parts, without those that are empty."""
    cuts = {expert: [_part(0, len(index), chunk, r2) for chunk in range(r2)] for expert, index in rows.items()}
    return [
        {
            expert: rows[expert][slice(*parts[chunk])]
            for expert, parts in cuts.items()
            if parts[chunk][0] < parts[chunk][1]
        }
        for chunk in range(r2)
    ]


def _together(pieces_C: Pieces) -> dict[int, torch.Tensor]:
    found: dict[int, list[torch.Tensor]] = {}
    for piece in pieces_C:
        for expert, index in piece.items():
            found.setdefault(expert, []).append(index)
    return {expert: torch.cat(parts) for expert, parts in found.items()}


def _dealt(piece: Mapping[int, torch.Tensor], at: Seats) -> Iterator[tuple[Seat, torch.Tensor]]:
    """Who gets which of a chunk's rows, nobody none."""
    for expert, index in piece.items():
        many = len(at[expert])
        ends = [len(index) * number // many for number in range(many + 1)]
        yield from ((seat, index[a:b]) for seat, (a, b) in zip(at[expert], pairwise(ends), strict=True) if a < b)


_seat = itemgetter(0)


def _part(start: int, stop: int, chunk: int, r2: int) -> tuple[int, int]:
    size = -(-(stop - start) // r2)
    return min(start + chunk * size, stop), min(start + (chunk + 1) * size, stop)


def arrived(counts_AL: torch.Tensor) -> torch.Tensor:
    """Of rows that came by attention rank and there by local expert: each one's local expert, (P, 1)."""
    ranks, experts = counts_AL.shape
    return torch.arange(experts).repeat(ranks).repeat_interleave(counts_AL.flatten())[:, None]
