"""Four-bit matrices: quantising, the orders in which torch's CPU kernels want them, multiplying by them. Knows one matrix at
a time; knows nothing of slabs, files or devices.

    w = (q - 8) * scale + zero      q in 0..15; one bfloat16 (scale, zero) per group of 64 (or 32) columns

Packed, a matrix (N, K) is cut into tiles of rows, each tile K-major, two rows a byte. Tile and pairing follow the CPU that
packs; whatever is left below a whole tile is one narrower tile with its rows in pairs (n, n + 1):

    tile64   byte [k * 32 + n % 32], low nibble row n, high nibble row n + 32       AVX-512
    tile32   byte [k * 16 + n % 16], low nibble row n, high nibble row n + 16       AVX2
    pair32   byte [k * 16 + n // 2], low nibble row n, high nibble row n + 1        all other CPUs

native.py multiplies in bfloat16, any number of rows, where CPU and matrix are made for it. Elsewhere on a CPU torch's kernel
does, and on a GPU triton_int4.py, which are made for few rows of x: above `dense_rows` a stretch of the matrix is unpacked
into scratch memory and multiplied there. Which one is a choice by shape, type and processor alone, so that it is the same
whatever the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from duoserve import native

CHUNK = 1 << 20  # elements quantised at a time: they stay in a core's cache
SCRATCH_BYTES = 16 << 20  # 12 MiB and more are as fast (benchmarks/rows.py), 4 MiB a tenth slower
TILES = {"tile64": (64, True), "tile32": (32, True), "pair32": (32, False)}  # rows, halves (n, n + rows / 2) or pairs
ORDERS = tuple(TILES)
_WORK = 1.5  # bytes per weight of scratch beside the unpacked values: a byte each, and half of that for one nibble

# Rows of x from which unpacking wins, by what torch.backends.cpu calls the CPU; measured by benchmarks/rows.py. The kernel
# is fast in bfloat16 only, and with vector instructions only; without bfloat16 ones (AVX2) a dense product is slower still.
_DENSE_ROWS = {"AVX512": 48, "AVX2": 1 << 62}


class Scratch:
    """Room for one unpacked stretch of a matrix, used by one product after the other."""

    def __init__(self, memory: torch.Tensor | None = None):
        self._memory = memory  # (n,) uint8; without, each product takes its own
        self.n_bytes = SCRATCH_BYTES if memory is None else memory.numel()

    def take(self, n_bytes: int, device: torch.device) -> torch.Tensor:
        if self._memory is None or n_bytes > self._memory.numel():
            return torch.empty(n_bytes, dtype=torch.uint8, device=device)
        return self._memory[:n_bytes]


@dataclass(frozen=True)
class Int4Weight:
    """A packed matrix of `rows` x `cols`, padded to whole blocks of 16 rows and 32 columns."""

    packed: torch.Tensor  # (Np, Kp / 2) uint8
    scale_zero: torch.Tensor  # (Kp / group, Np, 2) bfloat16
    rows: int
    cols: int
    order: str
    scratch: Scratch

    @property
    def group(self) -> int:
        return group_of(self.cols)

    @cached_property
    def _padding(self) -> int:
        return self.packed.shape[1] * 2 - self.cols

    @cached_property
    def _product(self) -> native.Product | None:
        return native.product(self.packed, self.scale_zero, self.order, self.group)

    def linear(self, x_MK: torch.Tensor) -> torch.Tensor:
        """x @ W.T in the dtype of x, shape (M, rows)."""
        x = F.pad(x_MK, (0, self._padding)) if self._padding else x_MK.contiguous()
        if self._product is not None and x.dtype == torch.bfloat16:
            y = self._product(x)
            return y[:, : self.rows] if y.shape[1] != self.rows else y
        if x.shape[0] >= dense_rows(x.dtype, x.device.type):
            return self._unpacked_product(x)
        if x.device.type == "cuda":
            y = _gpu().linear(x, self.packed, self.scale_zero, self.group, *TILES[self.order])
            return y[:, : self.rows]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scale_zero)
        return y[:, : self.rows] if y.shape[1] != self.rows else y

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix itself, (rows, cols)."""
        w_NK = torch.empty(self.packed.shape[0], self.packed.shape[1] * 2, dtype=dtype, device=self.packed.device)
        for start, stop in self._stretches(dtype):
            w_NK[start:stop] = self._unpack(start, stop, dtype).T
        return w_NK[: self.rows, : self.cols]

    def _unpacked_product(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(x.shape[0], self.rows)
        for start, stop in self._stretches(x.dtype):
            w_Kn = self._unpack(start, stop, x.dtype)
            into = y[:, start:stop]
            if into.shape[1] == y.shape[1] == w_Kn.shape[1]:
                torch.mm(x, w_Kn, out=into)
            else:
                into.copy_((x @ w_Kn)[:, : into.shape[1]])
        return y

    def _stretches(self, dtype: torch.dtype) -> list[tuple[int, int]]:
        """Rows [start, stop) that are unpacked at a time: whole tiles as far as the scratch goes, then the narrow one."""
        n, k = self.packed.shape[0], self.packed.shape[1] * 2
        tile = TILES[self.order][0]
        whole = n // tile * tile
        most = max(tile, int(self.scratch.n_bytes / (k * (dtype.itemsize + _WORK))) // tile * tile)
        each = -(-whole // -(-whole // most) // tile) * tile if whole else tile  # equal stretches, no short last one
        stretches = [(start, min(start + each, whole)) for start in range(0, whole, each)]
        return stretches + ([(whole, n)] if whole < n else [])

    def _unpack(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Columns `start` to `stop` of W.T, in scratch memory: (K, stop - start)."""
        n, k = stop - start, self.packed.shape[1] * 2
        memory = self.scratch.take(int(n * k * (dtype.itemsize + _WORK)), self.packed.device)
        values, rest = memory[: n * k * dtype.itemsize].view(dtype), memory[n * k * dtype.itemsize :]
        if self.packed.device.type == "cuda" and _gpu() is not None:
            part = (self.packed[start:stop], self.scale_zero[:, start:stop], self.group)
            _gpu().unpack(values.view(k, n), *part, *TILES[self.order])
            return values.view(k, n)
        q_Kn = unpack(self.packed[start:stop], self.order, rest)
        w_GgN = values.view(k // self.group, self.group, n)
        w_GgN.copy_(q_Kn.sub_(8).view(w_GgN.shape))
        scale, zero = self.scale_zero[:, start:stop].permute(2, 0, 1).to(dtype).contiguous()
        torch.addcmul(zero[:, None], w_GgN, scale[:, None], out=w_GgN)
        return values.view(k, n)


def quantise(w_NK: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor) -> None:
    """Fill `packed` and `scale_zero` (zeroed, shapes as in `Int4Weight`) in this CPU's order."""
    n, k = w_NK.shape
    group, padded_k = group_of(k), packed.shape[1] * 2
    step = max(64, CHUNK // padded_k // 64 * 64)  # whole tiles of any order, so chunks pack as the whole would
    for start in range(0, n, step):
        stop = min(packed.shape[0], start + step)
        rows = w_NK[start:stop]
        chunk = rows.float() if rows.shape == (stop - start, padded_k) else _padded(rows, stop - start, padded_k)
        q_NK, scale_zero[:, start:stop] = _rounded(chunk, group)
        packed[start:stop] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK, 1).view(stop - start, -1)


def _padded(rows: torch.Tensor, n: int, k: int) -> torch.Tensor:
    chunk = torch.zeros(n, k)
    chunk[: rows.shape[0], : rows.shape[1]] = rows
    return chunk


def _rounded(w_NK: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest between each group's minimum and maximum, with the scale that will be used: the bfloat16 one."""
    n, k = w_NK.shape
    w_NGg = w_NK.view(n, k // group, group)
    low, high = w_NGg.aminmax(dim=2)
    scale_NG = ((high - low) / 15).clamp_min(1e-8).bfloat16()
    zero_NG = (low + 8 * scale_NG.float()).bfloat16()
    q_NGg = (w_NGg - zero_NG.float()[:, :, None]).div_(scale_NG.float()[:, :, None]).round_().add_(8).clamp_(0, 15)
    return q_NGg.view(n, k).to(torch.int32), torch.stack((scale_NG, zero_NG), dim=2).transpose(0, 1)


def unpack(packed: torch.Tensor, order: str, work: torch.Tensor | None = None) -> torch.Tensor:
    """The 4-bit values of whole tiles, or of one narrower tile, as an int8 view of (K, n); `work` takes 1.5 bytes each."""
    n, k = packed.shape[0], packed.shape[1] * 2
    tile, halves = TILES[order]
    if n % tile:
        tile, halves = n, False
    if work is None:
        work = torch.empty(n * k * 3 // 2, dtype=torch.uint8, device=packed.device)
    q_Kn, nibble = work[: n * k], work[n * k : n * k * 3 // 2].view(n // tile, k, tile // 2)
    pairs = q_Kn.view(k, n // tile, 2, tile // 2).transpose(2, 3) if halves else q_Kn.view(k, n // tile, tile // 2, 2)
    bytes_ = packed.view(n // tile, k, tile // 2)
    # one nibble at a time, in order first and then into place: half the time of doing both at once
    pairs[..., 0] = torch.bitwise_and(bytes_, 15, out=nibble).transpose(0, 1)
    pairs[..., 1] = torch.bitwise_right_shift(bytes_, 4, out=nibble).transpose(0, 1)
    return q_Kn.view(torch.int8).view(k, n)


def pack(q_KN: torch.Tensor, order: str) -> torch.Tensor:
    """What `unpack` undoes, for matrices of any number of rows (a multiple of 16): (N, K / 2) uint8."""
    k, n = q_KN.shape
    tile, halves = TILES[order]
    whole = n // tile * tile
    parts = [_packed(q_KN[:, :whole], tile, halves)] if whole else []
    parts += [_packed(q_KN[:, whole:], n - whole, False)] if whole < n else []
    return torch.cat(parts).view(n, k // 2)


def _packed(q_Kn: torch.Tensor, tile: int, halves: bool) -> torch.Tensor:
    k, n = q_Kn.shape
    q = q_Kn.to(torch.uint8).reshape(k, n // tile, *((2, tile // 2) if halves else (tile // 2, 2)))
    low, high = q.unbind(2 if halves else 3)
    return (low | high << 4).transpose(0, 1).reshape(-1)


def reorder(packed: torch.Tensor, have: str, want: str) -> None:
    """Repack a whole matrix (N, K / 2) in place."""
    if have == want:
        return
    tile = TILES[have][0]
    whole = packed.shape[0] // tile * tile
    parts = [unpack(part, have) for part in (packed[:whole], packed[whole:]) if part.shape[0]]
    packed.copy_(pack(torch.cat(parts, dim=1), want))


@cache
def int4_order() -> str:
    """The order in which torch's int4 kernel wants matrices on this CPU, asked of torch itself."""
    q_NK = torch.zeros(64, 32, dtype=torch.int32)
    q_NK[:, 0] = (
        torch.arange(64) % 16 ^ torch.arange(64) // 16
    )  # tells every row from its neighbours and from its halves
    found = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK, 1).view(64, 16)
    return next(order for order in TILES if torch.equal(pack(q_NK.T, order), found))


@cache
def _gpu() -> Any:
    """The GPU's kernels; None where there is no Triton, which torch brings with it wherever it brings CUDA."""
    if find_spec("triton") is None:
        return None
    from duoserve import triton_int4

    return triton_int4


def dense_rows(dtype: torch.dtype, device: str = "cpu") -> int:
    """Rows of x from which a matrix is unpacked first."""
    if device == "cuda" and _gpu() is not None:
        return int(_gpu().MOST_ROWS) + 1
    if dtype != torch.bfloat16 or device != "cpu":
        return 1
    return _DENSE_ROWS.get(torch.backends.cpu.get_cpu_capability(), 1)


def group_of(k: int) -> int:
    """Columns that share a scale."""
    return 64 if k % 64 == 0 else 32
