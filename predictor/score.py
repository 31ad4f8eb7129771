"""How good a ranking is: which of the guesses, likeliest first, were chosen. Knows scores and ids only."""

from __future__ import annotations

import torch


def hits(scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """(T, E) bool: whether the guess at each rank was among the experts chosen. Ties go to the lower expert."""
    t, e = scores_TE.shape
    chosen_TE = torch.zeros(t, e + 1, dtype=torch.bool).scatter_(1, ids_TK, True)[:, :e]
    order_TE = scores_TE.argsort(dim=1, descending=True, stable=True)
    return chosen_TE.gather(1, order_TE)


def slot_recall(scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> float:
    """The share of chosen experts that are among the first K guesses."""
    k, e = ids_TK.shape[1], scores_TE.shape[1]
    top_TK = scores_TE.topk(k, dim=1).indices
    found = (top_TK[:, :, None] == ids_TK[:, None, :]).any(dim=1)
    return float(found.sum() / (ids_TK < e).sum().clamp_min(1))
