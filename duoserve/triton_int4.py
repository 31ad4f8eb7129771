"""Products with int4 matrices on a GPU, and unpacking them, in Triton. Knows one packed matrix as int4.py packs it; knows
nothing of slabs, slots or which device there is.

    tile of 64 rows, K-major                            one program
    k = 0   [ 32 bytes: low nibbles rows 0-31, high 32-63 ]   x_MK (16, group)  .  q (group, 32), twice: low and high
    k = 1   [ 32 bytes ]                                      sum += product * scale + (sum of x over the group) * zero
    ...

Decode reads each byte of a slab once and writes no unpacked weight: 4.5 bits a weight instead of the 37 that unpacking and a
dense product move. q - 8 is exact in every float, so a group's product is rounded only where it is summed, in float32. K is
cut into stretches by the matrix's shape alone, and summed in their order: a row's result depends on no other row.

Rows above MOST_ROWS are left to a dense product over the unpacked matrix (`unpack`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_ROWS = 64  # not measured on a GPU: four times what one tensor core instruction takes
ROWS = 16  # of x in one program
PROGRAMS = 512  # wanted for one matrix: a large GPU has some 130 multiprocessors
LEAST_GROUPS = 4  # of K in one program
COLUMNS = 64  # of K that one program unpacks


def linear(
    x_MK: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor, group: int, tile: int, halves: bool
) -> torch.Tensor:
    """x @ W.T in the dtype of x, shape (M, N), for a few rows; `packed` (N, K / 2) uint8 and `scale_zero` (K / group, N, 2)
    bfloat16 as in int4.py; `tile` rows a tile, its nibbles `halves` (n, n + tile / 2) or pairs (n, n + 1)."""
    m, k = x_MK.shape
    n, groups = packed.shape[0], k // group
    splits = max(1, min(PROGRAMS * tile // max(n, tile), groups // LEAST_GROUPS))
    each = -(-groups // splits)
    splits = -(-groups // each)
    parts_SMN = x_MK.new_empty(splits, m, n, dtype=torch.float32)
    for first, tiles, half, apart in _tilings(n, tile, halves):
        _product[(tiles, splits, triton.cdiv(m, ROWS))](
            x_MK, packed, scale_zero, parts_SMN, m, n, k, first, each,
            HALF=half, BLOCK=_block(half), APART=apart, GROUP=group, ROWS=ROWS,
        )  # fmt: skip
    return (parts_SMN[0] if splits == 1 else parts_SMN.sum(dim=0)).to(x_MK.dtype)


def unpack(
    into_Kn: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor, group: int, tile: int, halves: bool
) -> None:
    """Fill `into_Kn`, contiguous, with the columns of W.T that `packed` (n, K / 2) holds: whole tiles, or one narrower one.
    `scale_zero` (K / group, n, 2) is their part, with the strides that it has."""
    k, n = into_Kn.shape
    for first, tiles, half, apart in _tilings(n, tile, halves):
        _unpack[(tiles, triton.cdiv(k, COLUMNS))](
            packed, scale_zero, into_Kn, n, k, first, scale_zero.stride(0),
            HALF=half, BLOCK=_block(half), APART=apart, GROUP=group, COLUMNS=COLUMNS,
        )  # fmt: skip


def _tilings(n: int, tile: int, halves: bool) -> list[tuple[int, int, int, bool]]:
    """Whole tiles, then the narrower one: first row, how many, bytes per column, whether nibbles are half a tile apart."""
    whole = n // tile * tile
    return [(0, n // tile, tile // 2, halves)] * bool(whole) + [(whole, 1, (n - whole) // 2, False)] * (whole < n)


def _block(half: int) -> int:
    """Triton's widths are powers of two, and a product takes 16 at least."""
    return max(16, 1 << (half - 1).bit_length())


@triton.jit
def _rows_of(first, half: tl.constexpr, block: tl.constexpr, apart: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of this program's tile: its first row, and the rows of low and of high nibbles."""
    row = first + tl.program_id(0) * 2 * half
    j = tl.arange(0, block)
    low = row + j if apart else row + 2 * j
    high = low + half if apart else low + 1
    return row, j, low, high


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, packed, scale_zero, parts, m, n, k, first, each,
    HALF: tl.constexpr, BLOCK: tl.constexpr, APART: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, j, low, high = _rows_of(first, HALF, BLOCK, APART)
    i = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    tile = packed + row.to(tl.int64) * (k // 2)
    sum_low = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    sum_high = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    begin = tl.program_id(1) * each
    for g in range(begin, min(begin + each, k // GROUP)):
        column = g * GROUP + tl.arange(0, GROUP)
        bytes_ = tl.load(tile + column[:, None] * HALF + j[None, :], mask=j[None, :] < HALF, other=0)
        x_MG = tl.load(x + i[:, None].to(tl.int64) * k + column[None, :], mask=i[:, None] < m, other=0.0)
        x_M = tl.sum(x_MG.to(tl.float32), axis=1)
        at = scale_zero + g * n * 2
        q_low = ((bytes_ & 15).to(tl.int8) - 8).to(x_MG.dtype)
        q_high = ((bytes_ >> 4).to(tl.int8) - 8).to(x_MG.dtype)
        scale = tl.load(at + low * 2, mask=j < HALF, other=0.0).to(tl.float32)
        zero = tl.load(at + low * 2 + 1, mask=j < HALF, other=0.0).to(tl.float32)
        sum_low += tl.dot(x_MG, q_low, input_precision="ieee") * scale[None, :] + x_M[:, None] * zero[None, :]
        scale = tl.load(at + high * 2, mask=j < HALF, other=0.0).to(tl.float32)
        zero = tl.load(at + high * 2 + 1, mask=j < HALF, other=0.0).to(tl.float32)
        sum_high += tl.dot(x_MG, q_high, input_precision="ieee") * scale[None, :] + x_M[:, None] * zero[None, :]
    out = parts + (tl.program_id(1).to(tl.int64) * m + i[:, None]) * n
    fits = (i[:, None] < m) & (j[None, :] < HALF)
    tl.store(out + low[None, :], sum_low, mask=fits)
    tl.store(out + high[None, :], sum_high, mask=fits)


@triton.jit
def _unpack(  # type: ignore[no-untyped-def]
    packed, scale_zero, into, n, k, first, stride,
    HALF: tl.constexpr, BLOCK: tl.constexpr, APART: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, j, low, high = _rows_of(first, HALF, BLOCK, APART)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    fits = (column[:, None] < k) & (j[None, :] < HALF)
    bytes_ = tl.load(packed + row.to(tl.int64) * (k // 2) + column[:, None] * HALF + j[None, :], mask=fits, other=0)
    at = scale_zero + (column // GROUP).to(tl.int64)[:, None] * stride
    out = into + column[:, None].to(tl.int64) * n
    q = ((bytes_ & 15).to(tl.int8) - 8).to(tl.float32)
    scale = tl.load(at + low[None, :] * 2, mask=fits, other=0.0).to(tl.float32)
    zero = tl.load(at + low[None, :] * 2 + 1, mask=fits, other=0.0).to(tl.float32)
    tl.store(out + low[None, :], (q * scale + zero).to(into.dtype.element_ty), mask=fits)
    q = ((bytes_ >> 4).to(tl.int8) - 8).to(tl.float32)
    scale = tl.load(at + high[None, :] * 2, mask=fits, other=0.0).to(tl.float32)
    zero = tl.load(at + high[None, :] * 2 + 1, mask=fits, other=0.0).to(tl.float32)
    tl.store(out + high[None, :], (q * scale + zero).to(into.dtype.element_ty), mask=fits)
