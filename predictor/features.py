"""What a predictor may look at, as numbers: the same functions for recorded prompts and for the pass that is running.
Knows Steps; knows no weights.

    hidden@l          what the router of layer l read                                     (T, D)
    input@l           what entered decoder layer l before its attention, at unit size     (T, D)
    route@l           the weights that the router of layer l gave, per expert             (T, E)
    before.hidden@l   the same of the token before                                        (T, D)
    before.route@l    the same of the token before                                        (T, E)

The token before is the row before it in its sequence; of a pass's first row, the last row of the pass before. What is not
known is zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from duoserve.core import Step

KINDS = ("hidden", "input", "route", "before.hidden", "before.route")
_SPELLED = re.compile(rf"({'|'.join(re.escape(kind) for kind in KINDS)})@(\d{{1,4}})")


class Feature(NamedTuple):
    """One kind of values, of one MoE layer."""

    kind: str
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Feature:
        match = _SPELLED.fullmatch(text)
        if match is None:
            raise ValueError(f"{text[:40]!r} is no feature, such as hidden@3; kinds: {', '.join(KINDS)}")
        return cls(match[1], int(match[2]))

    def width(self, experts: Sequence[int], dim: int) -> int:
        return experts[self.layer] if self.kind.endswith("route") else dim

    @property
    def wants(self) -> str | None:
        """What the engine must keep for it, as `Observer.wants` says."""
        return {"input": "inputs", "hidden": "hidden", "before.hidden": "hidden"}.get(self.kind)


def features(step: Step, wanted: Sequence[Feature], experts: Sequence[int], dim: int) -> torch.Tensor:
    """(T, sum of widths) float32, on the device that has the hidden states."""
    found = [_values(step, f, experts) for f in wanted]
    device = next((v.device for v in found if v is not None and v.device.type != "cpu"), torch.device("cpu"))
    filled = [
        v.to(device) if v is not None else torch.zeros(step.rows, f.width(experts, dim), device=device)
        for f, v in zip(wanted, found, strict=True)
    ]
    return torch.cat(filled, dim=1)


def multi_hot(ids_TK: torch.Tensor, values_TK: torch.Tensor | float, n: int) -> torch.Tensor:
    """(T, n) float32; an id of n means "no expert" and is left out."""
    out = torch.zeros(ids_TK.shape[0], n + 1)
    if isinstance(values_TK, torch.Tensor):
        out.scatter_(1, ids_TK, values_TK.float())
    else:
        out.scatter_(1, ids_TK, values_TK)
    return out[:, :n]


def route_weights(step: Step, layer: int, n: int) -> torch.Tensor | None:
    """(T, n): the router's weights, brought to a mean of 1 over the chosen, so that families compare; else None."""
    route = step.route(layer)
    if route is None:
        return None
    weights_TK = route.weights_TK.float().cpu()
    scale_T1 = weights_TK.shape[1] / weights_TK.sum(dim=1, keepdim=True).clamp_min(1e-6)
    return multi_hot(route.ids_TK, weights_TK * scale_T1, n)


def hidden(step: Step, layer: int) -> torch.Tensor | None:
    """(T, D) float32: what the layer's router read, where it was kept."""
    route = step.route(layer)
    return None if route is None or route.hidden_TD is None else route.hidden_TD.float()


def entered(step: Step, layer: int) -> torch.Tensor | None:
    """(T, D) float32: the decoder layer's input divided by its root mean square, as a norm without weights would."""
    x_TD = step.inputs.get(layer)
    if x_TD is None:
        return None
    x_TD = x_TD.float()
    return x_TD * torch.rsqrt(x_TD.square().mean(dim=1, keepdim=True) + 1e-6)


def before(step: Step, values: Callable[[Step], torch.Tensor | None]) -> torch.Tensor | None:
    """`values` (T, ...) of the token before each row; None where nothing is known of any."""
    former = step.previous
    theirs = values(former) if former is not None and former.batch == step.batch else None
    last = None if theirs is None else _by_sequence(theirs, step.batch)[:, -1]
    if step.rows == step.batch:
        return last
    own = values(step)
    if own is None and last is None:
        return None
    like = own if own is not None else last
    assert like is not None
    out = torch.zeros(step.batch, step.rows // step.batch, *like.shape[1:], dtype=like.dtype, device=like.device)
    if own is not None:
        out[:, 1:] = _by_sequence(own, step.batch)[:, :-1]
    if last is not None:
        out[:, 0] = last
    if step.padding_BS is not None:
        after_padding = torch.zeros_like(step.padding_BS)
        after_padding[:, 1:] = step.padding_BS[:, :-1]
        out[after_padding.to(out.device)] = 0
    return out.flatten(0, 1)


def _by_sequence(values: torch.Tensor, batch: int) -> torch.Tensor:
    return values.view(batch, -1, *values.shape[1:])


def _values(step: Step, feature: Feature, experts: Sequence[int]) -> torch.Tensor | None:
    kind, layer = feature
    if kind == "hidden":
        return hidden(step, layer)
    if kind == "input":
        return entered(step, layer)
    if kind == "route":
        return route_weights(step, layer, experts[layer])
    if kind == "before.hidden":
        return before(step, lambda s: hidden(s, layer))
    return before(step, lambda s: route_weights(s, layer, experts[layer]))


def real_rows(step: Step) -> torch.Tensor | None:
    """(T,) bool, True where a row is no padding; None where all are real."""
    return None if step.padding_BS is None else ~step.padding_BS.flatten()


def summed(step: Step, scores_TE: torch.Tensor) -> torch.Tensor:
    """(E,): over the rows that are no padding."""
    if scores_TE.shape[0] == 1:
        return scores_TE[0]
    real_T = real_rows(step)
    return scores_TE.sum(dim=0) if real_T is None else (scores_TE * real_T[:, None]).sum(dim=0)


def path(
    step: Step, layer: int, popularity_LE: torch.Tensor, affinity_LEE: torch.Tensor, lead: int, choices: int
) -> torch.Tensor:
    """ExpertMLP's state (DuoServe-MoE, "predictor") for one target layer, (T, L * E + E + choices * E) float32.

    Activation path: chosen experts of all layers up to layer - lead, multi-hot by layer, zero where not yet known; the
    target's popularity; for each expert chosen at layer - lead, in the router's order, how likely each of the target's
    then is. E is the largest layer's.
    """
    n_layers, e = popularity_LE.shape
    known_TLE = torch.zeros(step.rows, n_layers, e + 1)
    for route in step.routes:
        if route.layer <= layer - lead:
            known_TLE[:, route.layer].scatter_(1, route.ids_TK.clamp_max(e), 1.0)
    rows_TKE = torch.zeros(step.rows, choices, e)
    source = step.route(layer - lead)
    if source is not None:
        ids_TK = source.ids_TK[:, :choices]
        known = (ids_TK < e)[..., None]
        rows_TKE[:, : ids_TK.shape[1]] = affinity_LEE[layer - lead][ids_TK.clamp_max(e - 1)] * known
    popular_TE = popularity_LE[layer].expand(step.rows, e)
    return torch.cat([known_TLE[:, :, :e].flatten(1), popular_TE, rows_TKE.flatten(1)], dim=1)


def path_width(n_layers: int, e: int, choices: int) -> int:
    """Columns of `path`."""
    return (n_layers + 1 + choices) * e
