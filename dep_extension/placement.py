"""Where experts go once their loads were measured: the hot ones several times, and all so that no rank gets much more than
another. Knows loads and places; knows nothing of seconds, models or files.

The idea is EPLB's (DeepSeek-V3, section 3.4, "redundant experts"; github.com/deepseek-ai/EPLB): copies go, one after the
other, to whatever has the largest load per copy; then the heaviest go first, each to the rank that has least so far. Unlike
there no rank holds an expert twice, which would split its rows for nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

Held = tuple[tuple[int, ...], ...]  # ids of the experts of each expert rank, rising, of one layer
Placement = tuple[Held, ...]  # of each layer; where a model has more layers, they take turns


def placed(load_LE: np.ndarray, ranks: int, places: int) -> Placement:
    """Of each layer who holds which experts: each at least once, none twice on a rank, at most `places` on each of `ranks`.
    `load_LE`: what each expert gets, in any unit, finite and at least 0.

    ValueError where there are fewer places than experts.
    """
    return tuple(_packed(load_E, _copies(load_E, ranks, places), ranks, places) for load_E in load_LE)


def _copies(load_E: np.ndarray, ranks: int, places: int) -> list[int]:
    """How often each expert is there: the place that is left goes to the largest load per copy, the first of alike ones.
    One that gets nothing, or is everywhere, gets no more."""
    left = ranks * places - len(load_E)
    if ranks < 1 or left < 0:
        raise ValueError(f"{len(load_E)} experts on {ranks} ranks of {places} places: give at least a place for each")
    found = [1] * len(load_E)
    waiting = [(-float(load), expert) for expert, load in enumerate(load_E) if load > 0 and ranks > 1]
    heapq.heapify(waiting)
    while left and waiting:
        _, expert = heapq.heappop(waiting)
        found[expert] += 1
        left -= 1
        if found[expert] < ranks:
            heapq.heappush(waiting, (-float(load_E[expert]) / found[expert], expert))
    return found


def _packed(load_E: np.ndarray, copies_E: Sequence[int], ranks: int, places: int) -> Held:
    """The largest loads per copy first, all copies of an expert at once, on the ranks with the least load that have a place.
    Copies for which no rank is left are not made: each expert has at least one, since there are places for all."""
    open_ = [(0.0, rank) for rank in range(ranks)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    each_E = load_E / np.array(copies_E)
    for expert in np.lexsort((np.arange(len(load_E)), -each_E)).tolist():
        here = [heapq.heappop(open_) for _ in range(min(copies_E[expert], len(open_)))]
        for load, rank in here:
            held[rank].append(expert)
            if len(held[rank]) < places:
                heapq.heappush(open_, (load + float(load_E[expert]) / len(here), rank))
    return tuple(tuple(sorted(one)) for one in held)


def repeated(placement: Placement, layers: int) -> Placement:
    """For so many layers: those that were measured, in turn."""
    return tuple(placement[layer % len(placement)] for layer in range(layers))


def checked(placement: Placement, experts_L: Sequence[int], ranks: int) -> Placement:
    """As it is, for a model with so many experts in each layer. ValueError of one line where it is of another model, or of
    another number of ranks, or where an expert is nowhere or twice on a rank."""
    if len(placement) != len(experts_L):
        raise ValueError(
            f"experts are placed for {len(placement)} layers, the model has {len(experts_L)}: plan it anew"
        )
    for layer, (held, experts) in enumerate(zip(placement, experts_L, strict=True)):
        here = set().union(*held) if held else set()
        if len(held) != ranks:
            raise ValueError(
                f"experts of layer {layer} are placed on {len(held)} ranks, there are {ranks}: plan it anew"
            )
        if here != set(range(experts)):
            what = f"layer {layer} has {experts} experts, {len(here & set(range(experts)))} of them are placed"
            raise ValueError(f"{what} and {len(here - set(range(experts)))} others: plan it anew")
        if any(len(set(one)) < len(one) for one in held):
            raise ValueError(f"a rank holds an expert of layer {layer} twice: plan it anew")
    return placement
