"""Several experts as one grouped product, without copying a weight: slots lie in one arena at a constant stride, so that a
parameter of all slots is one operand. Knows tensors, slot numbers and a measured table; knows nothing of keys, caches or
order of arrival.

    slot        0        1        2        3
    arena   [ g | d ][ g | d ][ g | d ][ g | d ]     g of all slots: as_strided((4, K, N), (slab, 1, K), where g begins)
    rows     3 rows     none    2 rows     1 row     sorted by slot; a slot in between that is not asked for has none

Which of the two ways (EPS-MoE, section "GroupGemm or DenseGemm") follows from the route alone, how many experts it names and
how many rows each has on average, never from what is resident: an expert that arrives alone is a group of one. On a CPU
torch's grouped product is a loop over the same products as the dense ones, bit for bit (a test holds it to that), so a few
experts are multiplied one by one there. So tokens do not depend on the budget, whatever the table says; on a GPU they may
depend on the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch

from duoserve.codec import Layout
from duoserve.core import Kernels, Refusal
from duoserve.experts import Groups, Linear, Weights

GAP = 8  # slots without rows in a row that a product walks over: 2 us each on a CPU, where another product costs 20
FEW = (
    3  # experts from which a grouped product is quicker there than theirs one by one, with what it takes to describe it
)
STRIDE = 16  # bytes: grouped_mm takes rows whose lengths are multiples of it


@dataclass(frozen=True)
class GroupedWeight:
    """A matrix of each of G neighbouring slots; `ends_G` (int32): where each one's rows end."""

    w_GKN: torch.Tensor
    ends_G: torch.Tensor

    def linear(self, x_PK: torch.Tensor) -> torch.Tensor:
        """Each row by its slot's matrix: (P, N)."""
        return torch.nn.functional.grouped_mm(x_PK, self.w_GKN, offs=self.ends_G)


class Bank:
    """The parameters of one layout over all slots of `memory`: matrices (slots, K, N), vectors (slots, N). Views only."""

    def __init__(self, memory: torch.Tensor, slab_bytes: int, layout: Layout):
        self.matrices: dict[str, torch.Tensor] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        slots = memory.numel() // slab_bytes
        for part in layout.parts:
            flat = memory.view(getattr(torch, part.dtype))
            stride, at = slab_bytes // flat.itemsize, flat.storage_offset() + part.offset // flat.itemsize
            if len(part.shape) == 1:
                self.vectors[part.param] = flat.as_strided((slots, *part.shape), (stride, 1), at)
            else:
                n, k = part.shape
                self.matrices[part.param] = flat.as_strided((slots, k, n), (stride, 1, k), at)

    def weights(self, at: Sequence[Placed], device: torch.device) -> Weights:
        """As one expert's parameters, for the rows of these slots in turn, which must rise."""
        first, stop = at[0].slot, at[-1].slot + 1
        ends_G = torch.tensor(_ends(at), dtype=torch.int32).to(device)
        out: dict[str, Linear | torch.Tensor] = {
            name: GroupedWeight(w_SKN[first:stop], ends_G) for name, w_SKN in self.matrices.items()
        }
        if self.vectors:
            slot_P = np.repeat([one.slot for one in at], [one.stop - one.start for one in at])
            out |= {name: v_SN[torch.from_numpy(slot_P).to(device)] for name, v_SN in self.vectors.items()}
        return out


def _ends(at: Sequence[Placed]) -> list[int]:
    """Where the rows of each slot end, from the first to the last; those in between without rows end where they begin."""
    ends: list[int] = []
    first, total = at[0].slot, 0
    for one in at:
        if one.slot - first > len(ends):
            ends += [total] * (one.slot - first - len(ends))
        total += one.stop - one.start
        ends.append(total)
    return ends


class Placed(NamedTuple):
    """An expert's slot, its rows [start, stop) and its parameters by themselves."""

    slot: int
    start: int
    stop: int
    alone: Weights


class Wave:
    """The rows of several experts, to be computed on the compute stream."""

    __slots__ = ("at", "bank", "expert", "few", "groups")

    def __init__(self, expert: Callable[..., torch.Tensor], groups: Groups, bank: Bank, at: Sequence[Placed]):
        self.expert, self.groups, self.bank, self.at = expert, groups, bank, at
        self.few = FEW if groups.x_PD.device.type == "cpu" else 1

    def __call__(self) -> None:
        for stretch in stretches(self.at):
            if len(stretch) < self.few:
                for one in stretch:
                    x_MD = self.groups.x_PD[one.start : one.stop]
                    self.groups.out_PD[one.start : one.stop] = self.expert(x_MD, one.alone)
            else:
                self._together(stretch)

    def _together(self, at: Sequence[Placed]) -> None:
        out_PD, device = self.groups.out_PD, self.groups.x_PD.device
        rows = _rows(at, device)
        x_PD = self.groups.x_PD[rows]
        if x_PD.stride(0) == 0:  # one token, all of whose rows are one
            x_PD = torch.empty_like(x_PD, memory_format=torch.contiguous_format).copy_(x_PD)
        out_PD[rows] = self.expert(x_PD, self.bank.weights(at, device))


def stretches(at: Sequence[Placed]) -> Iterator[Sequence[Placed]]:
    """By slot, cut where more than GAP slots in a row have nothing to do."""
    ordered, begun = sorted(at, key=_slot), 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i].slot - ordered[i - 1].slot > GAP + 1:
            yield ordered[begun:i]
            begun = i


_slot = attrgetter("slot")


def _rows(at: Sequence[Placed], device: torch.device) -> slice | torch.Tensor:
    """Of all in turn: a slice where each begins where the one before ended."""
    if all(a.stop == b.start for a, b in pairwise(at)):
        return slice(at[0].start, at[-1].stop)
    return torch.from_numpy(np.concatenate([np.arange(one.start, one.stop) for one in at])).to(device)


def unfit(layout: Layout, dtype: torch.dtype) -> str | None:
    """Why experts of this layout cannot be computed as groups; None where they can."""
    name = str(dtype).removeprefix("torch.")
    if layout.format != "bf16":
        return f"experts are {layout.format}, and a grouped product wants plain numbers"
    if layout.plain != name:
        return f"experts are kept in {layout.plain} and computed in {name}"
    odd = [part for part in layout.parts if len(part.shape) == 2 and part.shape[1] * dtype.itemsize % STRIDE]
    if odd:
        return f"a row of {odd[0].param} has {odd[0].shape[1] * dtype.itemsize} bytes, no multiple of {STRIDE}"
    return None


class Grouping:
    """Which passes compute a layer's experts as groups, by `kernels`; and over which memory. `layouts`: of each layer;
    `experts`: how many each has.

    Raises Refusal where the table lacks a shape of this model.
    """

    def __init__(
        self,
        kernels: Kernels,
        dtype: torch.dtype,
        layouts: Sequence[Layout],
        experts: Sequence[int],
        memory: torch.Tensor,
        slab_bytes: int,
    ):
        self.kernels = kernels
        self.passes = {"grouped": 0, "dense": 0}  # of layers
        self._dtype, self._layouts = str(dtype).removeprefix("torch."), layouts
        reasons = {layout: unfit(layout, dtype) for layout in dict.fromkeys(layouts)}
        self.why = next((why for why in reasons.values() if why is not None), None)
        self._banks = {layout: Bank(memory, slab_bytes, layout) for layout, why in reasons.items() if why is None}
        self._quicker = lru_cache(4096)(self._asked)
        for layout, many in zip(layouts, experts, strict=True):
            if layout in self._banks:
                self._quicker(layout, many, 1)

    def of(self, layer: int, groups: Groups) -> Bank | None:
        """What this pass computes the layer's groups over; None: one expert after the other."""
        layout, spans = self._layouts[layer], groups.spans.values()
        bank = self._banks.get(layout)
        if bank is not None and spans:
            rows = sum(stop - start for start, stop in spans)
            bank = bank if self._quicker(layout, len(spans), -(-rows // len(spans))) else None
        self.passes["grouped" if bank is not None else "dense"] += 1
        return bank

    def stats(self) -> dict[str, object]:
        """JSON-ready: passes of layers by how they were computed, and `why` where groups cannot be at all."""
        return {"table": self.kernels.machine, **self.passes, "why": self.why}

    def _asked(self, layout: Layout, experts: int, tokens: int) -> bool:
        products = tuple((cols, rows) for _, rows, cols in layout.params if cols)
        try:
            return self.kernels.grouped(products, experts, self._dtype, tokens)
        except ValueError as error:
            remedy = "run `duoserve dep kernels MODEL --save FILE` for this model"
            raise Refusal("E_KERNELS", str(error), remedy, 3) from error
