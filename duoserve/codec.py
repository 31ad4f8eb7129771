"""How one expert's tensors lie in one slab, and how to multiply by them there. Knows formats, shapes and bytes; knows
nothing of files, slots or models.

A slab holds the parts of all parameters of one expert one after the other, each part 64-byte aligned, the whole a
multiple of 4096 bytes. Matrices are stored (out, in) whatever the checkpoint's orientation. Formats:

    bf16   the matrix as it is (bfloat16, or the wider type that was asked for)
    int4   torch's CPU int4 order: tiles of 64 output rows, K-major, two rows a byte; scale and zero per group along K
    nf4    bitsandbytes NF4, blocks of 64 with one float32 maximum each
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from duoserve.core import Refusal

SLAB_ALIGN = 4096
PART_ALIGN = 64
ROWS_PER_CHUNK = 1 << 22  # elements quantised at a time, so that a large matrix needs little scratch
NF4_BLOCK = 64


class Weight(Protocol):
    """A matrix of shape (N, K) in some format."""

    def linear(self, x_MK: torch.Tensor) -> torch.Tensor:
        """x @ W.T in the dtype of x, shape (M, N)."""
        ...

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix itself, shape (N, K)."""
        ...


class Param(NamedTuple):
    """One expert's share of one parameter: a matrix (rows, cols) as stored here, or a vector with cols 0."""

    name: str
    rows: int
    cols: int


class Part(NamedTuple):
    """A stretch of the slab: `param` and what of it, with dtype by torch's name."""

    param: str
    what: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        return _n_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class PlainWeight:
    w_NK: torch.Tensor

    def linear(self, x_MK: torch.Tensor) -> torch.Tensor:
        return F.linear(x_MK, self.w_NK.to(x_MK.dtype))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.w_NK.to(dtype)


@dataclass(frozen=True)
class Int4Weight:
    """w = (q - 8) * scale + zero, with q in 0..15 and one (scale, zero) per group of `group` columns."""

    packed: torch.Tensor  # (Np, Kp / 2) uint8, in the order of torch's CPU kernel
    scale_zero: torch.Tensor  # (Kp / group, Np, 2) bfloat16
    rows: int
    cols: int
    group: int

    def linear(self, x_MK: torch.Tensor) -> torch.Tensor:
        if x_MK.device.type != "cpu":  # right, but slow: a kernel that reads the tiles themselves is still to come
            return F.linear(x_MK, self.dense(x_MK.dtype))
        padding = self.packed.shape[1] * 2 - self.cols
        x = F.pad(x_MK, (0, padding)) if padding else x_MK
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scale_zero.to(x.dtype))
        return y[:, : self.rows] if y.shape[1] != self.rows else y

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        n, k = self.packed.shape[0], self.packed.shape[1] * 2
        q_NK = _unpack_tiles(self.packed, n, k).to(torch.float32) - 8
        scale, zero = self.scale_zero.float().permute(2, 1, 0).repeat_interleave(self.group, dim=2)
        return (q_NK * scale + zero)[: self.rows, : self.cols].to(dtype)


@dataclass(frozen=True)
class Nf4Weight:
    packed: torch.Tensor  # (N * K / 2,) uint8
    absmax: torch.Tensor  # (N * K / 64,) float32
    rows: int
    cols: int

    def linear(self, x_MK: torch.Tensor) -> torch.Tensor:
        return F.linear(x_MK, self.dense(x_MK.dtype))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        nf4 = _bitsandbytes()
        code = nf4.get_4bit_type("nf4", device=self.packed.device, blocksize=NF4_BLOCK)
        state = nf4.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.rows * self.cols,)),  # flat: a block may cross rows
            code=code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        return nf4.dequantize_4bit(self.packed.view(-1, 1), state).view(self.rows, self.cols)


@dataclass(frozen=True)
class Layout:
    """Where each part lies; equal for all experts of a layer. `plain` is the dtype of whatever is not quantised."""

    format: str
    plain: str
    params: tuple[Param, ...]
    parts: tuple[Part, ...]
    slab_bytes: int

    @classmethod
    def of(cls, format: str, params: list[Param], plain: str = "bfloat16") -> Layout:
        parts, offset = [], 0
        for param in params:
            for what, dtype, shape in _parts(format, plain, param):
                parts.append(Part(param.name, what, dtype, shape, offset))
                offset = _up(offset + parts[-1].n_bytes, PART_ALIGN)
        return cls(format, plain, tuple(params), tuple(parts), _up(offset, SLAB_ALIGN))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Rebuild, and refuse a layout that this code would not have made: sizes and offsets are never taken on trust."""
        params = [Param(str(n), int(r), int(c)) for n, r, c in data["params"]]
        layout = cls.of(str(data["format"]), params, str(data["plain"]))
        if layout.to_json() != dict(data):
            raise Refusal("E_STORE", "the slab layout in the manifest contradicts itself", "convert the model again", 5)
        return layout

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["params"] = [list(p) for p in self.params]
        data["parts"] = [[p.param, p.what, p.dtype, list(p.shape), p.offset] for p in self.parts]
        return data

    def pieces(self, name: str, value: torch.Tensor) -> Iterator[torch.Tensor]:
        """The bytes of one parameter, shaped as in `params`, as uint8 tensors in the order in which they lie in the slab.

        They reach up to the next parameter, or to the slab's end: so the pieces of all parameters are the slab.
        """
        index = next(i for i, p in enumerate(self.params) if p.name == name)
        param = self.params[index]
        assert value.shape == ((param.rows, param.cols) if param.cols else (param.rows,)), (param, value.shape)
        parts = [part for part in self.parts if part.param == name]
        following = [part.offset for part in self.parts if part.offset > parts[-1].offset]
        ends = [*(part.offset for part in parts[1:]), *(following[:1] or [self.slab_bytes])]
        for part, end, tensor in zip(parts, ends, self._encoded(param, value, parts), strict=True):
            yield tensor.contiguous().flatten().view(torch.uint8)
            yield torch.zeros(end - part.offset - part.n_bytes, dtype=torch.uint8)

    def encode(self, name: str, value: torch.Tensor, slab: torch.Tensor) -> None:
        """Write one parameter into `slab` (slab_bytes,) uint8."""
        at = next(part.offset for part in self.parts if part.param == name)
        for piece in self.pieces(name, value):
            slab[at : at + piece.numel()] = piece
            at += piece.numel()

    def _encoded(self, param: Param, value: torch.Tensor, parts: list[Part]) -> list[torch.Tensor]:
        if not param.cols or self.format == "bf16":
            return [value.to(getattr(torch, self.plain))]
        into = [torch.zeros(part.shape, dtype=getattr(torch, part.dtype)) for part in parts]
        (_encode_int4 if self.format == "int4" else _encode_nf4)(value, *into)
        return into

    def weights(self, slab: torch.Tensor) -> dict[str, Weight | torch.Tensor]:
        """Views into `slab`: a Weight per matrix, a tensor per vector. They stay valid while the memory does."""
        out: dict[str, Weight | torch.Tensor] = {}
        for param in self.params:
            views = [self._view(slab, part) for part in self.parts if part.param == param.name]
            out[param.name] = views[0] if not param.cols else self._weight(param, views)
        return out

    def _weight(self, param: Param, views: list[torch.Tensor]) -> Weight:
        if self.format == "int4":
            return Int4Weight(views[0], views[1], param.rows, param.cols, _group(param.cols))
        if self.format == "nf4":
            return Nf4Weight(views[0], views[1], param.rows, param.cols)
        return PlainWeight(views[0])

    @staticmethod
    def _view(slab: torch.Tensor, part: Part) -> torch.Tensor:
        return slab[part.offset : part.offset + part.n_bytes].view(getattr(torch, part.dtype)).view(part.shape)


def int4_order() -> str:
    """The order in which torch's int4 kernel wants weights on this CPU; a store packed in another one cannot be read."""
    q_NK = torch.zeros(64, 32, dtype=torch.int32)
    q_NK[32, 0] = 1  # the high nibble of the very first byte where tiles are 64 rows wide
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK, 1)
    return "tile64" if int(packed.flatten()[0]) == 0x10 else "other"


def _parts(format: str, plain: str, param: Param) -> list[tuple[str, str, tuple[int, ...]]]:
    n, k = param.rows, param.cols
    if not k:
        return [("values", plain, (n,))]
    if format == "int4":
        rows, cols, group = _up(n, 16), _up(k, 32), _group(k)
        return [("packed", "uint8", (rows, cols // 2)), ("scale_zero", "bfloat16", (cols // group, rows, 2))]
    if format == "nf4":
        blocks = -(-n * k // NF4_BLOCK)
        return [("packed", "uint8", (-(-n * k // 2),)), ("absmax", "float32", (blocks,))]
    if format != "bf16":
        raise ValueError(f"unknown format {format!r}")
    return [("values", plain, (n, k))]


def _encode_int4(w_NK: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor) -> None:
    n, k = w_NK.shape
    group, padded_k = _group(k), packed.shape[1] * 2
    step = max(64, ROWS_PER_CHUNK // padded_k // 64 * 64)  # whole tiles, so chunks pack as the whole would
    for start in range(0, n, step):
        stop = min(packed.shape[0], start + step)
        chunk = torch.zeros(stop - start, padded_k)
        rows = w_NK[start:stop]
        chunk[: rows.shape[0], :k] = rows
        q_NK, scale_zero[:, start:stop] = _quantise(chunk, group)
        packed[start:stop] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK, 1).view(stop - start, -1)


def _quantise(w_NK: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest between each group's minimum and maximum, with the scale that will be used: the bfloat16 one."""
    n, k = w_NK.shape
    w_NGg = w_NK.view(n, k // group, group)
    low, high = w_NGg.aminmax(dim=2)
    scale_NG = ((high - low) / 15).clamp_min(1e-8).bfloat16()
    zero_NG = (low + 8 * scale_NG.float()).bfloat16()
    q_NGg = w_NGg.sub_(zero_NG.float()[:, :, None]).div_(scale_NG.float()[:, :, None]).round_().add_(8).clamp_(0, 15)
    return q_NGg.view(n, k).to(torch.int32), torch.stack((scale_NG, zero_NG), dim=2).transpose(0, 1)


def _unpack_tiles(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The 4-bit values (n, k) behind torch's CPU order: whole tiles of 64 rows, then one narrower tile in pairs."""
    whole = n // 64 * 64
    tiles = packed[:whole].reshape(-1, k, 32)
    wide = torch.stack((tiles & 15, tiles >> 4), dim=1).transpose(2, 3).reshape(whole, k)
    if whole == n:
        return wide
    tail = packed[whole:].reshape(k, (n - whole) // 2)
    narrow = torch.stack((tail & 15, tail >> 4), dim=2).reshape(k, n - whole).T
    return torch.cat((wide, narrow))


def _encode_nf4(w_NK: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    nf4 = _bitsandbytes()
    flat = w_NK.reshape(-1)
    for start in range(0, flat.numel(), ROWS_PER_CHUNK):  # a multiple of the block
        chunk = flat[start : start + ROWS_PER_CHUNK].float()
        q, state = nf4.quantize_4bit(chunk, blocksize=NF4_BLOCK, quant_type="nf4")
        packed[start // 2 : start // 2 + q.numel()] = q.view(-1)
        absmax[start // NF4_BLOCK : start // NF4_BLOCK + state.absmax.numel()] = state.absmax


@cache
def _bitsandbytes() -> Any:
    """bitsandbytes' functional module, without its note about an optional CPU kernel that would have to be downloaded."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise Refusal(
            "E_NF4", "format nf4 needs bitsandbytes, which is not installed", "pip install bitsandbytes"
        ) from error
    finally:
        log.setLevel(level)
    return functional


def _group(k: int) -> int:
    return 64 if k % 64 == 0 else 32


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    n = getattr(torch, dtype).itemsize
    for side in shape:
        n *= side
    return n
