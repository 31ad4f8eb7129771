"""The arithmetic, against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys

from duoserve.experts import combine, group

E = 6


def by_hand(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Expert e multiplies by e + 1; an id of E adds nothing."""
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for k in range(ids.shape[1]):
            if ids[t, k] < E:
                y[t] += weights[t, k] * (ids[t, k] + 1) * x[t]
    return y


@pytest.mark.parametrize(
    "ids", [[[0, 5]], [[3, 6]], [[6, 6]], [[2, 2]], [[0, 1], [1, 0], [6, 3], [6, 6]], [[4, 4], [0, 5]]], ids=str
)
@pytest.mark.parametrize("reverse", [False, True])
def test_rows_reach_their_experts_and_skipped_ones_add_nothing(ids: Any, reverse: bool) -> None:
    ids = torch.tensor(ids)
    x, weights = torch.randn(len(ids), 8), torch.rand(ids.shape)
    groups = group(x, ids, E)
    for e, (start, stop) in sorted(groups.spans.items(), reverse=reverse):
        groups.out_PD[start:stop] = (e + 1) * groups.x_PD[start:stop]
    torch.testing.assert_close(combine(groups, weights, x.dtype), by_hand(x, ids, weights))


def test_dense_prompts_fetch_the_next_layer_ahead(toy: Any, load: Any) -> None:
    engine = load(toy("qwen3_moe"), budget="half")
    with torch.no_grad():
        engine.model(toys.ids(4, 40))
    stats = engine.stats()
    assert stats["guesses"] > 0 and stats["hits"] + stats["in_flight"] >= stats["guesses"] / 2
    assert stats["bytes_moved"] == (stats["misses"] + stats["guesses"]) * engine.store.slab_bytes
