"""Shared experts at their own turn, while the rows of the routed ones are on their way. Knows modules of a MoE block and
which micro-batch runs; knows nothing of exchanges.

Families call them before the router (qwen2_moe) or after the experts (deepseek_v2). So the child of a block is wrapped as a
module that remembers, and no forward is copied:

    called before    returns a promise, filled at the turn; should the model read it earlier, then at that moment
    called after     returns what was computed at the turn from the block's input, if that is what it is called with
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

NAME, NOT = "shared_expert", "gate"  # how the children are called that this is about, and what else is


class Shared:
    """The wrapped children of one model, and what each micro-batch has under way. `poison`: unfilled buffers hold NaN."""

    def __init__(self, poison: bool = False) -> None:
        self.poison = poison
        self.at_their_turn: list[str] = []  # names of what was wrapped
        self.elsewhere = 0  # calls whose input was not the block's, and promises that were read before their turn
        self._children: dict[int, list[_Remembering]] = {}  # by MoE layer
        self._inputs: dict[tuple[int, int], torch.Tensor] = {}  # of a block, by micro-batch and layer
        self._running: int | None = None
        self._layer: dict[int, int] = {}  # that each micro-batch has come to, until its turn is over
        self._asked: dict[int, list[tuple[_Remembering, _Promise]]] = {}
        self._made: dict[
            tuple[int, int], tuple[torch.Tensor, torch.Tensor]
        ] = {}  # input and output, by batch and child

    def wrap(self, model: nn.Module, experts: str, layer: int) -> None:
        """Find by structure what stands beside the experts module `experts` and is shared; wrap it."""
        name = experts.rpartition(".")[0]
        block = model.get_submodule(name)
        found = [(n, c) for n, c in block.named_children() if n.startswith(NAME) and NOT not in n]
        for child_name, child in found:
            wrapped = _Remembering(child, layer, self)
            setattr(block, child_name, wrapped)
            self._children.setdefault(layer, []).append(wrapped)
            self.at_their_turn.append(f"{name}.{child_name}")
        if found:
            block.register_forward_pre_hook(
                lambda module, args, kwargs: self._enters(layer, args, kwargs), with_kwargs=True
            )

    @contextmanager
    def running(self, batch: int) -> Iterator[None]:
        """Micro-batch `batch` runs now. What it was promised must be there before it reads it."""
        self.fill(batch)
        self._running = batch
        try:
            yield
        finally:
            self._running = None

    def arrived(self, batch: int, layer: int) -> None:
        """Its next turn is this layer's."""
        self._layer[batch] = layer

    def fill(self, batch: int) -> None:
        """The turn of a micro-batch's shared experts; once for each layer it comes to."""
        layer = self._layer.pop(batch, None)
        if layer is None:
            return
        asked = self._asked.pop(batch, [])
        for _, promise in asked:
            promise.keep()
        entered = self._inputs.pop((batch, layer), None)
        if entered is None:
            return
        for child in self._children[layer]:
            if child.after and child not in [c for c, _ in asked]:
                self._made[batch, id(child)] = entered, child.inner(entered)

    def call(self, child: _Remembering, x: torch.Tensor) -> torch.Tensor:
        """What the model gets."""
        batch = self._running
        if batch is None:
            return child.inner(x)
        made = self._made.pop((batch, id(child)), None)
        if made is not None:
            return self._kept(child, x, *made)
        if (batch, child.layer) in self._inputs:  # the experts of this layer were not asked yet
            promise = _Promise(child.inner, x, self)
            self._asked.setdefault(batch, []).append((child, promise))
            return promise.tensor
        return child.inner(x)

    def _kept(self, child: _Remembering, x: torch.Tensor, read: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() == read.data_ptr() and x.numel() == read.numel():
            return out.view(*x.shape[:-1], out.shape[-1])
        child.after = False
        self.elsewhere += 1
        return child.inner(x)

    def _enters(self, layer: int, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if self._running is not None and isinstance(x, torch.Tensor):
            self._inputs[self._running, layer] = x


class _Promise:
    """The output of `inner(x)`, of the shape of `x`, computed later into `tensor`."""

    def __init__(self, inner: Any, x: torch.Tensor, shared: Shared):
        self._inner, self._x, self._shared = inner, x, shared
        self._out = torch.full_like(x, float("nan")) if shared.poison else torch.empty_like(x)
        self.tensor: torch.Tensor = self._out.as_subclass(_Promised)
        self.tensor.promise = self  # type: ignore[attr-defined]
        self._kept = False

    def keep(self) -> None:
        if not self._kept:
            made = self._inner(self._x)
            assert made.shape == self._out.shape, f"a shared expert makes {made.shape} of {self._x.shape}"
            self._out.copy_(made)
            self._kept = True

    def read(self) -> torch.Tensor:
        if not self._kept:
            self._shared.elsewhere += 1
            self.keep()
        return self._out


class _Promised(torch.Tensor):
    """A tensor that is filled, at the latest, when something is computed with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            promise = x.__dict__.get("promise") if isinstance(x, cls) else None
            return promise.read() if promise is not None else x

        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class _Remembering(nn.Module):
    """Stands for a shared expert. `after`: whether it is worth computing beforehand where the model has not asked yet."""

    def __init__(self, inner: Any, layer: int, shared: Shared):
        super().__init__()
        self.inner, self.layer, self.after = inner, layer, True
        self._shared = [shared]  # in a list, so that it is no submodule's business

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._shared[0].call(self, x)
