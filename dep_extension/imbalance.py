"""What uneven routing costs: how much of a chunk the busiest expert GPU gets. Knows loads of experts and who holds which;
knows nothing of seconds, models or files.

A load is what an expert gets of a chunk's tokens, 1 where balanced. Measured chunks are rows: (chunks, experts). Where an
expert is on several GPUs its tokens are spread evenly over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dep_extension.partition import bounds

Held = tuple[tuple[int, ...], ...]  # ids of the experts of each expert GPU


@dataclass(frozen=True, eq=False)
class Loads:
    """Of each measured chunk, scaled so that a chunk's mean is 1. `source` says in words where they are from."""

    loads_CE: np.ndarray
    source: str = ""

    @classmethod
    def of(cls, rows: Iterable[Sequence[float]], source: str = "") -> Loads:
        """ValueError of one line where rows are not alike, not finite, negative or all zero."""
        given = [list(row) for row in rows]
        widths = {len(row) for row in given}
        if len(widths) != 1 or 0 in widths:
            raise ValueError(f"{len(given)} chunks of loads have {sorted(widths)[:8]} experts: give as many in each")
        loads_CE = np.array(given, dtype=float)
        means_C = loads_CE.mean(axis=1, keepdims=True)
        if not np.isfinite(loads_CE).all() or loads_CE.min() < 0 or means_C.min() <= 0:
            raise ValueError(f"loads from {loads_CE.min():g} to {loads_CE.max():g}: give finite ones, some above 0")
        return cls(loads_CE / means_C, source)

    @property
    def experts(self) -> int:
        return int(self.loads_CE.shape[1])

    @property
    def skew(self) -> float:
        """What the busiest expert of a chunk gets, on average over chunks."""
        return float(self.loads_CE.max(axis=1).mean())


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


@lru_cache(maxsize=1024)
def burden(loads: Loads | None, held: Held, experts: int) -> Burden:
    """What `held` does to these loads; None: all are 1."""
    copies_E = np.zeros(experts)
    for one in held:
        copies_E[list(one)] += 1
    loads_CE = np.ones((1, experts)) if loads is None else loads.loads_CE
    each_CE = loads_CE / np.maximum(copies_E, 1)
    most_C = np.max([each_CE[:, list(one)].sum(axis=1) for one in held], axis=0)
    return Burden(max(map(len, held)), most_C)


def counted(routes: Iterable[np.ndarray], experts: int, tokens: int, source: str = "") -> Loads:
    """Loads of routes, each (tokens, choices) ids of one layer: cut into chunks of `tokens`, a short rest left out."""
    rows = []
    for ids_TK in routes:
        for start in range(0, len(ids_TK) - tokens + 1, tokens):
            rows.append(np.bincount(ids_TK[start : start + tokens].ravel(), minlength=experts)[:experts].tolist())
    if not rows:
        raise ValueError(f"no layer has the {tokens} tokens that a chunk is counted over: give a longer trace")
    return Loads.of(rows, source)


def zipf(experts: int, exponent: float, chunks: int = 32, seed: int = 0) -> Loads:
    """Loads that fall as 1 / place ** exponent, in each chunk other experts first; 0 is balanced. Made, not measured."""
    falling_E = 1 / np.arange(1, experts + 1) ** exponent
    draw = np.random.default_rng(seed)
    return Loads.of([draw.permutation(falling_E).tolist() for _ in range(chunks)], f"made: Zipf {exponent:g}")
