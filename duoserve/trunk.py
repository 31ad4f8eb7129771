"""What stays resident: its linears and head in four bits where asked, all of it in one stretch of device memory. Knows
modules and slabs; knows nothing of experts, files or prompts.

Quantised are `nn.Linear` modules: attention, shared experts, dense layers, the head. Not: embeddings (rows are looked up),
norms, convolutions, whatever decides discretely (routers, gates, indexers), and matrices of fewer than 16 rows.
"""

from __future__ import annotations

import re
from typing import cast

import torch
from torch import nn

from duoserve.checkpoint import replace_module
from duoserve.codec import Layout, Param, Weight
from duoserve.device import Device
from duoserve.int4 import Scratch

ALIGN = 64
SMALLEST = 16  # rows
_DECIDES = re.compile(r"(^|\.)(gate|\w*router\w*|\w*indexer\w*|\w*_gate)(\.|$)")


class QuantisedLinear(nn.Module):
    """A linear whose matrix and bias lie in a slab of its own: x (..., in) -> (..., out). Inference only.

    `weight` is the dense matrix, made anew at each access: for models that look at it.
    """

    slab: torch.Tensor

    def __init__(self, like: nn.Linear, format: str, scratch: Scratch):
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        params = [Param("weight", like.out_features, like.in_features)]
        params += [Param("bias", like.out_features, 0)] if like.bias is not None else []
        self._dtype = like.weight.dtype
        self._weight: Weight | None = None  # until it is filled
        self._bias: torch.Tensor | None = None
        self._scratch = scratch
        self.layout = Layout.of(format, params, str(self._dtype).removeprefix("torch."))
        self.register_buffer("slab", torch.empty(self.layout.slab_bytes, dtype=torch.uint8, device="meta"), False)

    def fill(self, like: nn.Linear, into: torch.Tensor) -> None:
        """Quantise `like`, on the host, into `into` (slab_bytes,) uint8, on the device."""
        slab = into if into.device.type == "cpu" else torch.empty(self.layout.slab_bytes, dtype=torch.uint8)
        for name in (p.name for p in self.layout.params):
            self.layout.encode(name, getattr(like, name).detach(), slab)
        into.copy_(slab)
        self.slab = into
        views = self.layout.weights(into, self._scratch)
        self._weight, self._bias = cast(Weight, views["weight"]), cast("torch.Tensor | None", views.get("bias"))

    @property
    def weight(self) -> torch.Tensor:
        if self._weight is None:
            return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")
        return self._weight.dense(self._dtype)

    @property
    def bias(self) -> torch.Tensor | None:
        return self._bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._weight
        if weight is None:  # only shapes are wanted
            return x.new_empty(*x.shape[:-1], self.out_features)
        y = weight.linear(x.reshape(-1, self.in_features))
        if self._bias is not None:
            y = y + self._bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.layout.format}"


def quantise_linears(
    model: nn.Module, format: str, n_experts: set[int], scratch: Scratch | None = None
) -> list[tuple[QuantisedLinear, nn.Linear]]:
    """Put a QuantisedLinear, still empty, in the place of each linear that may be held in four bits; returns both.

    `n_experts` are the widths that routers have. With `format` "bf16" nothing is replaced.
    """
    if format == "bf16":
        return []
    pairs = [
        (name, QuantisedLinear(module, format, scratch or Scratch()), module)
        for name, module in model.named_modules()
        if _is_quantisable(name, module, n_experts)
    ]
    for name, new, _ in pairs:
        replace_module(model, name, new)
    return [(new, old) for _, new, old in pairs]


def _is_quantisable(name: str, module: nn.Module, n_experts: set[int]) -> bool:
    if type(module) is not nn.Linear or _DECIDES.search(name):
        return False
    return module.out_features >= SMALLEST and module.out_features not in n_experts


def settle(model: nn.Module, linears: list[tuple[QuantisedLinear, nn.Linear]], device: Device) -> None:
    """Move a loaded trunk, which may lie in a mapped file, into one stretch of the device's memory, quantising on the way.

    Only one linear at a time takes memory beside that.
    """
    tensors = _tensors(model)
    sizes = [t.numel() * t.element_size() for t in tensors] + [new.layout.slab_bytes for new, _ in linears]
    memory = iter(device.arena(sum(_up(n) for n in sizes)).split([_up(n) for n in sizes]))
    with torch.no_grad():
        for tensor, n, room in zip(tensors, sizes, memory, strict=False):
            there = room[:n].view(tensor.dtype).view(tensor.shape)
            there.copy_(tensor)
            tensor.data = there
        for (new, old), room in zip(linears, memory, strict=True):
            new.fill(old, room[: new.layout.slab_bytes])
            del old.weight  # the mapped file, or a converted copy, is free to go


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers that hold something, tied ones once."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.is_meta and t.numel()}
    return list(held.values())


def _up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN
