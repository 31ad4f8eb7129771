"""Several experts as one grouped product, without copying a weight: slots lie in one arena at a constant stride, so that a
parameter of all slots is one operand. Knows tensors, slot numbers and a measured table; knows nothing of keys, caches or
order of arrival.

    slot        0        1        2        3
    arena   [ g | d ][ g | d ][ g | d ][ g | d ]     g of all slots: as_strided((4, K, N), (slab, 1, K), where g begins)
    rows     3 rows     none    2 rows     1 row     sorted by slot; a slot in between that is not asked for has none

Which of the two ways (EPS-MoE, section "GroupGemm or DenseGemm") follows from the route alone, how many experts it names and
how many rows each has on average, never from what is resident: an expert that arrives alone is a group of one. So tokens do
not depend on the budget, whatever the table says; they may depend on the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from duoserve.codec import Layout
from duoserve.core import Kernels, Refusal
from duoserve.experts import Groups, Linear

GAP = 8  # slots without rows that a product skips more cheaply than a second product begins (2 us each, 10 to 20 us)
STRIDE = 16  # bytes: grouped_mm takes rows whose lengths are multiples of it

Span = tuple[int, int]  # rows [start, stop)


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

    def weights(self, first: int, counts_G: np.ndarray, device: torch.device) -> Mapping[str, Linear | torch.Tensor]:
        """As one expert's parameters, for rows sorted by slot: slot `first` + g has `counts_G[g]` of them."""
        ends_G = torch.from_numpy(counts_G.cumsum(dtype=np.int32)).to(device)
        stop = first + len(counts_G)
        out: dict[str, Linear | torch.Tensor] = {
            name: GroupedWeight(w_SKN[first:stop], ends_G) for name, w_SKN in self.matrices.items()
        }
        if self.vectors:
            slot_P = torch.from_numpy(np.repeat(np.arange(first, stop), counts_G)).to(device)
            out |= {name: v_SN[slot_P] for name, v_SN in self.vectors.items()}
        return out


class Wave:
    """The rows of several experts, to be computed on the compute stream. `at`: slot and rows of each."""

    __slots__ = ("at", "bank", "expert", "groups")

    def __init__(self, expert: Callable[..., torch.Tensor], groups: Groups, bank: Bank, at: Sequence[tuple[int, Span]]):
        self.expert, self.groups, self.bank, self.at = expert, groups, bank, at

    def __call__(self) -> None:
        for stretch in stretches(self.at):
            self._compute(stretch)

    def _compute(self, stretch: Sequence[tuple[int, Span]]) -> None:
        first, last = stretch[0][0], stretch[-1][0]
        counts_G = np.zeros(last - first + 1, dtype=np.int64)
        for slot, (start, stop) in stretch:
            counts_G[slot - first] = stop - start
        out_PD, device = self.groups.out_PD, self.groups.x_PD.device
        rows = _rows([span for _, span in stretch], device)
        x_PD = self.groups.x_PD[rows]
        if x_PD.stride(0) == 0:  # one token, all of whose rows are one
            x_PD = torch.empty_like(x_PD, memory_format=torch.contiguous_format).copy_(x_PD)
        out_PD[rows] = self.expert(x_PD, self.bank.weights(first, counts_G, device))


def stretches(at: Sequence[tuple[int, Span]]) -> Iterator[Sequence[tuple[int, Span]]]:
    """By slot, cut where more than GAP slots in a row have nothing to do."""
    ordered, begun = sorted(at), 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i][0] - ordered[i - 1][0] > GAP + 1:
            yield ordered[begun:i]
            begun = i


def _rows(spans: Sequence[Span], device: torch.device) -> slice | torch.Tensor:
    """Of all spans in turn: a slice where each begins where the one before ended."""
    if all(a[1] == b[0] for a, b in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return torch.from_numpy(np.concatenate([np.arange(start, stop) for start, stop in spans])).to(device)


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
