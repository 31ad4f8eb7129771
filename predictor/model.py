"""Trained predictors: their networks while they learn, and the same folded into a few products for serving. Knows weights
and features; knows no files, traces or training.

    HiddenHead, PreAttention   per layer: logits = W f + V silu(U f), where W began as the layer's own gate on what the
                               router `lead` layers before read (or on what enters the layer's attention)
    ExpertMLP                  DuoServe-MoE's: one network of 7 layers for all, from routing ids alone
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from duoserve.core import Step, When
from predictor.features import Feature, features, path, path_width, summed
from predictor.onerow import OneRow

WIDTHS = (2048, 1024, 512, 256, 128, 64)  # of ExpertMLP's hidden layers; the seventh layer gives the experts
DROPOUT = 0.1


class Shape(NamedTuple):
    """Of the model that a predictor is for."""

    fingerprint: str | None
    experts: tuple[int, ...]  # per MoE layer
    choices: tuple[int, ...]  # of experts, per token and MoE layer
    dim: int  # of a hidden state; 0 where unknown


class HeadNet(nn.Module):
    """One layer's head while it learns. `base_EN`: the gate as a matrix over the features."""

    def __init__(
        self, base_EN: torch.Tensor, base_E: torch.Tensor, units: int, mean_N: torch.Tensor, std_N: torch.Tensor
    ):
        super().__init__()
        e, n = base_EN.shape
        self.base_EN, self.base_E = nn.Buffer(base_EN), nn.Buffer(base_E)
        self.mean_N, self.std_N = nn.Buffer(mean_N), nn.Buffer(std_N)
        self.scale = nn.Parameter(torch.ones(()))
        self.linear, self.down, self.up = nn.Linear(n, e), nn.Linear(n, units), nn.Linear(units, e, bias=False)
        self.drop = nn.Dropout(DROPOUT)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(self.up.weight)

    def forward(self, x_TN: torch.Tensor) -> torch.Tensor:
        f_TN = (x_TN - self.mean_N) / self.std_N
        base_TE = F.linear(x_TN, self.base_EN, self.base_E) * self.scale
        return base_TE + self.linear(f_TN) + self.up(self.drop(F.silu(self.down(f_TN))))

    @torch.no_grad()
    def folded(self) -> dict[str, torch.Tensor]:
        """The same function of the raw features, as `Head` computes it."""
        w = torch.cat([self.linear.weight, self.down.weight]) / self.std_N
        b = torch.cat([self.linear.bias, self.down.bias]) - w @ self.mean_N
        e = self.base_EN.shape[0]
        w[:e] += self.base_EN * self.scale
        b[:e] += self.base_E * self.scale
        return {"in_weight": w, "in_bias": b, "out_weight": self.up.weight.detach().clone()}


class Head(NamedTuple):
    """One layer's, as it serves: features, (E + units, N), (E + units,), (E, units)."""

    wanted: tuple[Feature, ...]
    in_weight: torch.Tensor
    in_bias: torch.Tensor
    out_weight: torch.Tensor

    def scores(self, f_TN: torch.Tensor) -> torch.Tensor:
        e = self.out_weight.shape[0]
        z_TZ = F.linear(f_TN, self.in_weight, self.in_bias)
        return (z_TZ[:, :e] + F.linear(F.silu(z_TZ[:, e:]), self.out_weight)).sigmoid()

    def to(self, device: torch.device) -> Head:
        return Head(self.wanted, *(t.to(device) for t in self[1:]))


class Heads:
    """A head per layer, or none: HiddenHead and PreAttention, by their features."""

    def __init__(self, name: str, shape: Shape, lead: int, heads: Sequence[Head | None]):
        self.name, self.shape, self.lead, self.heads = name, shape, lead, list(heads)
        self.fingerprint = shape.fingerprint
        wanted = {f for head in heads if head is not None for f in head.wanted}
        self.wants = frozenset(f.wants for f in wanted if f.wants is not None)
        tensors = [t for head in heads if head is not None for t in head[1:]]
        self.n_params = sum(t.numel() for t in tensors)
        self.n_bytes = sum(t.numel() * t.element_size() for t in tensors)
        self._single: dict[int, OneRow] = {}
        self._when = [self._latest(layer) for layer in range(len(self.heads))]

    def when(self, layer: int) -> When | None:
        return self._when[layer] if 0 <= layer < len(self._when) else None

    @torch.inference_mode()
    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        head = self.heads[layer]
        assert head is not None, layer
        f_TN = features(step, head.wanted, self.shape.experts, self.shape.dim)
        if f_TN.device != head.in_weight.device:
            head = self.heads[layer] = head.to(f_TN.device)
        return head.scores(f_TN).cpu()

    @torch.inference_mode()
    def rank(self, step: Step, layer: int) -> torch.Tensor:
        if step.rows == 1 and _on_host(step):
            return self._one_row(layer).rank(step)
        return summed(step, self.rank_rows(step, layer))

    def observe(self, step: Step) -> None:
        pass

    def _one_row(self, layer: int) -> OneRow:
        if layer not in self._single:
            head = self.heads[layer]
            assert head is not None, layer
            self._single[layer] = OneRow(head.wanted, self.shape.experts, self.shape.dim, *head[1:])
        return self._single[layer]

    def _latest(self, layer: int) -> When | None:
        head = self.heads[layer]
        if head is None:
            return None
        if any(f == Feature("input", layer) for f in head.wanted):
            return When.INPUT
        return When.ROUTE


def _on_host(step: Step) -> bool:
    """Whether what the step holds lies in host memory."""
    held = next((route.hidden_TD for route in step.routes if route.hidden_TD is not None), None)
    held = held if held is not None else next(iter(step.inputs.values()), None)
    return held is None or held.device.type == "cpu"


class MlpNet(nn.Module):
    """ExpertMLP while it learns: 7 fully connected layers; BatchNorm, ReLU and dropout behind all but the last."""

    def __init__(self, n_in: int, n_out: int, widths: Sequence[int] = WIDTHS):
        super().__init__()
        sides = [n_in, *widths]
        blocks = [
            nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(DROPOUT))
            for a, b in pairwise(sides)
        ]
        self.blocks, self.last = nn.Sequential(*blocks), nn.Linear(sides[-1], n_out)

    def forward(self, x_TN: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks(x_TN))

    @torch.no_grad()
    def folded(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Weights and biases in which BatchNorm is a scale and a shift of the linear before it."""
        found = []
        blocks: Any = self.blocks
        for block in blocks:
            linear, norm, *_ = block.children()
            gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            found.append((linear.weight * gain[:, None], (linear.bias - norm.running_mean) * gain + norm.bias))
        return [*found, (self.last.weight.detach().clone(), self.last.bias.detach().clone())]


class ExpertMLP:
    """One network for all layers but the first `lead`, from routing ids only; runs on the CPU."""

    def __init__(
        self,
        name: str,
        shape: Shape,
        lead: int,
        popularity_LE: torch.Tensor,
        affinity_LEE: torch.Tensor,
        linears: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ):
        self.name, self.shape, self.lead, self.fingerprint = name, shape, lead, shape.fingerprint
        self.popularity_LE, self.affinity_LEE, self.linears = popularity_LE, affinity_LEE, list(linears)
        self.wants: frozenset[str] = frozenset()
        tensors = [popularity_LE, affinity_LEE, *(t for pair in linears for t in pair)]
        self.n_params = sum(t.numel() for pair in linears for t in pair)
        self.n_bytes = sum(t.numel() * t.element_size() for t in tensors)

    def when(self, layer: int) -> When | None:
        return When.ROUTE if self.lead <= layer < len(self.shape.experts) else None

    @torch.inference_mode()
    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        x_TN = path(step, layer, self.popularity_LE, self.affinity_LEE, self.lead, max(self.shape.choices))
        for weight, bias in self.linears[:-1]:
            x_TN = F.linear(x_TN, weight, bias).relu_()
        return F.linear(x_TN, *self.linears[-1]).sigmoid()[:, : self.shape.experts[layer]]

    @torch.inference_mode()
    def rank(self, step: Step, layer: int) -> torch.Tensor:
        return summed(step, self.rank_rows(step, layer))

    def observe(self, step: Step) -> None:
        pass


def mlp_sides(shape: Shape, widths: Sequence[int] = WIDTHS) -> list[int]:
    """In, hidden and out widths of ExpertMLP for a model."""
    e = max(shape.experts)
    return [path_width(len(shape.experts), e, max(shape.choices)), *widths, e]


def head_features(layer: int, lead: int, inputs: bool) -> tuple[Feature, ...]:
    """Of HiddenHead: what is known once the router `lead` layers before has spoken. Layers before that are covered by
    what enters their own attention, where the trace has it.
    """
    source = layer - lead
    if source < 0:
        return preattention_features(layer) if inputs else ()
    seen = [Feature("hidden", source), *([Feature("input", source)] if inputs else []), Feature("route", source)]
    return (*seen, Feature("before.hidden", layer), Feature("before.route", layer))


def preattention_features(layer: int) -> tuple[Feature, ...]:
    """Of PreAttention: what enters the layer's own attention, and what its router said of the token before."""
    return (Feature("input", layer), Feature("before.hidden", layer), Feature("before.route", layer))
