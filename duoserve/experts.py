"""The arithmetic of routed experts over slots: gather, gate/up, activation, down, weight, sum. Knows tensors only; knows
nothing of slots, caches or order of arrival.

Rows are sorted by expert, each expert writes its own stretch, and each token's K contributions are summed in the router's
order at the end: the result does not depend on which expert was computed first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch


class Linear(Protocol):
    """A matrix (N, K) in some format, or one for each stretch of rows."""

    def linear(self, x_MK: torch.Tensor) -> torch.Tensor:
        """x @ W.T in the dtype of x, shape (M, N)."""
        ...


Weights = Mapping[str, Linear | torch.Tensor]


class Groups(NamedTuple):
    """The (token, choice) pairs of one layer, sorted by expert. P = T * K pairs, those that chose no expert last."""

    x_PD: torch.Tensor
    order_P: torch.Tensor | None  # pair index of each row; None where rows are pairs, as of a single token
    spans: dict[int, tuple[int, int]]  # expert -> rows [start, stop)
    out_PD: torch.Tensor


def group(x_TD: torch.Tensor, ids_TK: torch.Tensor, n_experts: int) -> Groups:
    """Gather the rows of each expert; `ids_TK` on the host, an id of `n_experts` means no expert."""
    t, k = ids_TK.shape
    if t == 1 and (spans := _token_spans(ids_TK[0].tolist(), n_experts)) is not None:
        return Groups(x_TD.expand(k, -1), None, spans, _room(x_TD, k, len(spans) == k))
    ids, order = torch.sort(ids_TK.reshape(-1), stable=True)
    spans = _spans(ids, n_experts)
    order_P = order.to(x_TD.device)
    rows = max((stop for _, stop in spans.values()), default=0)
    return Groups(x_TD[order_P // k], order_P, spans, _room(x_TD, t * k, rows == t * k))


def combine(groups: Groups, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weigh and sum each token's K contributions in the router's order: y_TD."""
    t, k = weights_TK.shape
    out_PD = groups.out_PD
    if groups.order_P is not None:
        out_PD = torch.empty_like(groups.out_PD)
        out_PD[groups.order_P] = groups.out_PD
    return (out_PD.view(t, k, -1) * weights_TK[:, :, None]).sum(dim=1).to(dtype)


def _token_spans(ids: list[int], n_experts: int) -> dict[int, tuple[int, int]] | None:
    """One token's choices as they stand: no sorting needed, unless an expert was chosen twice."""
    spans = {e: (i, i + 1) for i, e in enumerate(ids) if e < n_experts}
    return spans if len(spans) == sum(e < n_experts for e in ids) else None


def _spans(ids: torch.Tensor, n_experts: int) -> dict[int, tuple[int, int]]:
    experts, counts = torch.unique_consecutive(ids, return_counts=True)
    spans, start = {}, 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        if expert < n_experts:
            spans[expert] = (start, start + count)
        start += count
    return spans


def _room(x_TD: torch.Tensor, rows: int, all_written: bool) -> torch.Tensor:
    shape = (rows, x_TD.shape[1])
    return x_TD.new_empty(shape) if all_written else x_TD.new_zeros(shape)


def expert_function(module: Any) -> Callable[[torch.Tensor, Weights], torch.Tensor]:
    """How one expert of `module` (a stock experts module, on meta) computes: (x_MD, its weights) -> y_MD, unweighted.

    Gate, clamps, biases and post norm are the module's own, so that no family needs code here.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    activate = module._apply_gate if module.has_gate else module.act_fn
    has_norm = getattr(module, "has_post_expert_norm", False)  # transformers 5.17 has no such flag

    def run(x_MD: torch.Tensor, weights: Weights) -> torch.Tensor:
        h = _linear(x_MD, weights, up_name, module.has_bias)
        y = _linear(activate(h), weights, "down_proj", module.has_bias)
        return module.post_expert_norm(y) if has_norm else y

    return run


def _linear(x: torch.Tensor, weights: Weights, name: str, has_bias: bool) -> torch.Tensor:
    matrix = weights[name]
    assert not isinstance(matrix, torch.Tensor), name
    y = matrix.linear(x)
    if has_bias:
        bias = weights[f"{name}_bias"]
        assert isinstance(bias, torch.Tensor), name
        y = y + bias.to(y.dtype)
    return y
