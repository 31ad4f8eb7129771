"""What uneven routing costs: how much of a chunk the busiest expert GPU gets. Knows loads of experts and who holds which;
knows nothing of seconds, models or files.

A load is what an expert gets of a chunk's tokens, 1 where balanced. Measured chunks are rows: (chunks, experts). Where an
expert is on several GPUs its tokens are spread evenly over them (`rows.cut`).

Experts that are placed by loads are judged by others, which their placement has not seen: of each layer by the chunks of
odd number once they are placed by the even ones, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dep_extension.partition import bounds
from dep_extension.placement import Held, Placement, placed

HOT_SEED = 2412  # of which experts are hot in `settled`, whatever is drawn of them


@dataclass(frozen=True, eq=False)
class Loads:
    """Of each measured chunk, scaled so that a chunk's mean is 1. `source` says in words where they are from; `layer_C` from
    which layer each chunk is, counted from 0 without gaps."""

    loads_CE: np.ndarray
    layer_C: np.ndarray
    source: str = ""

    @classmethod
    def of(cls, rows: Iterable[Sequence[float]], source: str = "", layers: Sequence[int] | None = None) -> Loads:
        """`layers`: of each row; None: all are of one. ValueError of one line where rows are not alike, not finite, negative
        or all zero, or a layer has none."""
        given = [list(row) for row in rows]
        widths = {len(row) for row in given}
        if len(widths) != 1 or 0 in widths:
            raise ValueError(f"{len(given)} chunks of loads have {sorted(widths)[:8]} experts: give as many in each")
        loads_CE = np.array(given, dtype=float)
        means_C = loads_CE.mean(axis=1, keepdims=True)
        if not np.isfinite(loads_CE).all() or loads_CE.min() < 0 or means_C.min() <= 0:
            raise ValueError(f"loads from {loads_CE.min():g} to {loads_CE.max():g}: give finite ones, some above 0")
        layer_C = np.zeros(len(given), dtype=int) if layers is None else np.array(layers, dtype=int)
        if len(layer_C) != len(given) or set(layer_C.tolist()) != set(range(int(layer_C.max()) + 1)):
            seen = sorted(set(layer_C.tolist()))[:8]
            raise ValueError(f"{len(given)} chunks are of the layers {seen}: give each chunk's, from 0 without gaps")
        return cls(loads_CE / means_C, layer_C, source)

    @property
    def layers(self) -> int:
        return int(self.layer_C.max()) + 1

    @property
    def experts(self) -> int:
        return int(self.loads_CE.shape[1])

    @property
    def skew(self) -> float:
        """What the busiest expert of a chunk gets, on average over chunks."""
        return float(self.loads_CE.max(axis=1).mean())

    @property
    def judged_apart(self) -> bool:
        """Whether each layer has chunks to be placed by and others to be judged by."""
        return int(np.bincount(self.layer_C).min()) > 1

    def place(self, ranks: int, places: int, chunks_N: np.ndarray | None = None) -> Placement:
        """By the mean over all chunks of each layer, or over those of these numbers."""
        at = np.arange(len(self.layer_C)) if chunks_N is None else chunks_N
        mean_LE = [self.loads_CE[at[self.layer_C[at] == layer]].mean(axis=0) for layer in range(self.layers)]
        return placed(np.array(mean_LE), ranks, places)

    def only(self, chunks_N: np.ndarray) -> Loads:
        """The chunks of these numbers, some of each layer."""
        return Loads(self.loads_CE[chunks_N], self.layer_C[chunks_N], self.source)

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of chunks: every other one of each layer, and the rest."""
        odd_C = np.zeros(len(self.layer_C), dtype=bool)
        for layer in range(self.layers):
            odd_C[np.flatnonzero(self.layer_C == layer)[1::2]] = True
        return np.flatnonzero(~odd_C), np.flatnonzero(odd_C)


class Burden(NamedTuple):
    """Of the fullest GPU how many experts it holds, and of the busiest one, for each measured chunk, how much it gets: as
    many times what an expert gets that is alone and balanced."""

    experts: int
    most_C: np.ndarray


@lru_cache(maxsize=4096)
def burden_of_shares(loads: Loads | None, experts: int, ranks: int, replicas: int) -> Burden:
    """As `burden` of `partition.shares`, by sums over runs of experts: thousands of GPUs in a moment."""
    ends = bounds(experts, ranks, replicas)
    fullest = max(b - a for a, b in pairwise(ends))
    if loads is None:
        return Burden(fullest, np.array([fullest / replicas]))
    upto_CS = np.cumsum(np.tile(loads.loads_CE, replicas), axis=1)
    upto_CS = np.concatenate([np.zeros((len(upto_CS), 1)), upto_CS], axis=1)
    return Burden(fullest, np.diff(upto_CS[:, ends], axis=1).max(axis=1) / replicas)


@lru_cache(maxsize=4096)
def burden_of_places(loads: Loads, ranks: int, places: int) -> Burden:
    """Of experts that are placed by these loads, at most `places` on a rank; judged apart where there are chunks enough."""
    one, other = loads.halves()
    if not loads.judged_apart:
        return burden(loads, loads.place(ranks, places))
    most_C, fullest = np.empty(len(loads.layer_C)), 0
    for seen, judged in ((one, other), (other, one)):
        placement = loads.place(ranks, places, seen)
        most_C[judged] = _most(loads.loads_CE[judged], loads.layer_C[judged], placement)
        fullest = max(fullest, _fullest(placement))
    return Burden(fullest, most_C)


def burden(loads: Loads | None, placement: Placement, experts: int | None = None) -> Burden:
    """What `placement` does to these loads; None: all of so many experts are 1."""
    if loads is not None:
        return Burden(_fullest(placement), _most(loads.loads_CE, loads.layer_C, placement))
    assert experts is not None, "loads, or how many are balanced"
    layer_C = np.arange(len(placement))
    return Burden(_fullest(placement), _most(np.ones((len(layer_C), experts)), layer_C, placement))


def _fullest(placement: Placement) -> int:
    """Experts of a layer, on average over layers, on the rank that has most: whole ones, since memory is planned by it."""
    counts_LR = np.array([[len(one) for one in held] for held in placement])
    return math.ceil(counts_LR.sum(axis=0).max() / len(placement))


def _most(loads_CE: np.ndarray, layer_C: np.ndarray, placement: Placement) -> np.ndarray:
    """What the busiest rank gets of each chunk."""
    most_C = np.empty(len(layer_C))
    for layer in np.unique(layer_C):
        part_RE = _parts(placement[layer % len(placement)], loads_CE.shape[1])
        most_C[layer_C == layer] = (loads_CE[layer_C == layer] @ part_RE.T).max(axis=1)
    return most_C


def _parts(held: Held, experts: int) -> np.ndarray:
    """What part of each expert's tokens each rank gets."""
    here_RE = np.zeros((len(held), experts))
    for rank, one in enumerate(held):
        here_RE[rank, list(one)] = 1
    return here_RE / np.maximum(here_RE.sum(axis=0), 1)


def counted(routes: Iterable[np.ndarray], experts: int, tokens: int, source: str = "") -> Loads:
    """Loads of routes, each (tokens, choices) ids of one layer: cut into chunks of `tokens`, a short rest left out.

    ValueError of one line where a layer has no chunk."""
    rows, layers = [], []
    for layer, ids_TK in enumerate(routes):
        if len(ids_TK) < tokens:
            raise ValueError(f"layer {layer} has {len(ids_TK)} of the {tokens} tokens of a chunk: give a longer trace")
        for start in range(0, len(ids_TK) - tokens + 1, tokens):
            rows.append(np.bincount(ids_TK[start : start + tokens].ravel(), minlength=experts)[:experts].tolist())
            layers.append(layer)
    return Loads.of(rows, source, layers)


def zipf(experts: int, exponent: float, chunks: int = 32, seed: int = 0) -> Loads:
    """Loads that fall as 1 / place ** exponent, in each chunk other experts first; 0 is balanced. Made, not measured: what
    is hot changes from chunk to chunk, so that nothing can be placed by it."""
    falling_E = 1 / np.arange(1, experts + 1) ** exponent
    draw = np.random.default_rng(seed)
    return Loads.of([draw.permutation(falling_E).tolist() for _ in range(chunks)], f"made: Zipf {exponent:g}")


def settled(experts: int, exponent: float, tokens: int, layers: int = 4, chunks: int = 16, seed: int = 0) -> Loads:
    """As `zipf`, but each layer has its own hot experts, which stay: chunks differ as so many draws of them do. Made, not
    measured."""
    share_E = 1 / np.arange(1, experts + 1) ** exponent
    fixed, draw = np.random.default_rng(HOT_SEED), np.random.default_rng(seed)
    share_LE = [fixed.permutation(share_E / share_E.sum()) for _ in range(layers)]
    rows = [draw.multinomial(tokens, share_E).tolist() for share_E in share_LE for _ in range(chunks)]
    of = [layer for layer in range(layers) for _ in range(chunks)]
    return Loads.of(rows, f"made: Zipf {exponent:g}, the same hot experts throughout", of)
