"""A model's routers as plain values: how scores for choosing experts follow from a router's input. Knows how the families
spell it (softmax or sigmoid, biases, groups); knows nothing of experts, slots or predictors.

    softmax families   score = logits + bias                         Mixtral, Qwen, OLMoE, gpt-oss, DeepSeek-V2
    sigmoid families   score = sigmoid(logits) + correction          DeepSeek-V3, GLM-4-MoE, Kimi
    limited to groups  score = 0 outside the best groups             DeepSeek-V2 (best member), V3 (sum of the best two)

Whether that is what a family does is not believed but measured: a router applied to its own input must give the ids that
it gave (`predictor.evaluate`, "control").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

ROUTERS = "routers.safetensors"


class Router(NamedTuple):
    """One layer's: `weight_ED` in the dtype it multiplies in; `groups` of which `best` may be chosen from, 1 where none."""

    weight_ED: torch.Tensor
    bias_E: torch.Tensor | None = None
    correction_E: torch.Tensor | None = None
    sigmoid: bool = False
    groups: int = 1
    best: int = 1
    top: int = 1  # members of a group whose sum is the group's score

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, E) float32: what the router would choose the largest of, were `x_TD` its input."""
        bias = self.bias_E
        logits_TE = F.linear(x_TD.to(self.weight_ED.dtype), self.weight_ED, bias).float()
        scores_TE = logits_TE.sigmoid() if self.sigmoid else logits_TE
        if self.correction_E is not None:
            scores_TE = scores_TE + self.correction_E
        return self._limited(scores_TE) if self.groups > 1 else scores_TE

    def _limited(self, scores_TE: torch.Tensor) -> torch.Tensor:
        t, e = scores_TE.shape
        grouped = scores_TE.view(t, self.groups, e // self.groups)
        of_group = grouped.topk(self.top, dim=-1).values.sum(-1)
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, of_group.topk(self.best, dim=-1).indices, True)
        low = scores_TE.min(dim=-1, keepdim=True).values - 1  # below all, in their order
        span = (scores_TE - low).clamp(max=1e6)
        return torch.where(kept[:, :, None].expand_as(grouped).reshape(t, e), scores_TE, low - 1 / (1 + span))


def routers_of(model: Any, experts: list[str]) -> list[Router | None]:
    """The router of each MoE layer, named by its experts' module; None where the family keeps it in another shape."""
    return [_router(model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)) for name in experts]


def _router(block: nn.Module, experts: Any) -> Router | None:
    """The one module beside the experts with a matrix of a row per expert."""
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if module is experts or not isinstance(weight, torch.Tensor):
            continue
        if weight.ndim != 2 or weight.shape[0] != experts.num_experts:
            continue
        holders = (module, *(m for m in block.modules() if m is not experts and m is not module), block)
        correction = _first(holders, "e_score_correction_bias")
        correction = correction if isinstance(correction, torch.Tensor) else None
        groups, best = (_first(holders, a, b) for a, b in (("num_group", "n_group"), ("topk_group", "topk_group")))
        limited = isinstance(groups, int) and isinstance(best, int) and groups > 1 and best < groups
        return Router(
            weight.detach(),
            _tensor(module, "bias"),
            correction.detach().float() if correction is not None else None,
            correction is not None,
            groups if limited else 1,
            best if limited else 1,
            2 if limited and correction is not None else 1,
        )
    return None


def _tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    value = getattr(module, name, None)
    return value.detach() if isinstance(value, torch.Tensor) else None


def _first(modules: Any, *names: str) -> Any:
    return next((v for m in modules for n in names if (v := getattr(m, n, None)) is not None), None)


def routers_as_file(
    routers: list[Router | None], prefix: str = "router"
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file: the tensors by layer, the rest as metadata."""
    tensors: dict[str, torch.Tensor] = {}
    about = {f"{prefix}.layers": str(len(routers))}
    for layer, router in enumerate(routers):
        if router is None:
            continue
        for name in ("weight_ED", "bias_E", "correction_E"):
            value = getattr(router, name)
            if value is not None:
                tensors[f"{prefix}.{layer}.{name}"] = value.detach().cpu().contiguous().clone()
        rest = (int(router.sigmoid), router.groups, router.best, router.top)
        about[f"{prefix}.{layer}"] = " ".join(map(str, rest))
    return tensors, about


def load_routers(path: Path, prefix: str = "router") -> list[Router | None]:
    """What a file of `routers_as_file` says; KeyError or ValueError where the file is no such thing."""
    with safe_open(path, framework="pt") as file:
        about, names = file.metadata() or {}, set(file.keys())
        found: list[Router | None] = []
        for layer in range(int(about[f"{prefix}.layers"])):
            if f"{prefix}.{layer}" not in about:
                found.append(None)
                continue
            sigmoid, groups, best, top = map(int, about[f"{prefix}.{layer}"].split())
            parts = (f"{prefix}.{layer}.{name}" for name in ("weight_ED", "bias_E", "correction_E"))
            weight, bias, correction = (file.get_tensor(name) if name in names else None for name in parts)
            assert weight is not None, layer
            found.append(Router(weight, bias, correction, bool(sigmoid), groups, best, top))
        return found
