"""How one expert's tensors lie in one slab, and how to multiply by them there. Knows formats, shapes and bytes; knows
nothing of files, slots or models.

A slab holds the parts of all parameters of one expert one after the other, each part 64-byte aligned, the whole a
multiple of 4096 bytes. Matrices are stored (out, in) whatever the checkpoint's orientation. Formats:

    bf16   the matrix as it is (bfloat16, or the wider type that was asked for)
    int4   four bits in the order of torch's CPU kernel, scale and zero per group along K (int4.py)
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
from duoserve.int4 import Int4Weight, Scratch, group_of, int4_order, quantise, reorder

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
        (quantise if self.format == "int4" else _encode_nf4)(value, *into)
        return into

    def weights(self, slab: torch.Tensor, scratch: Scratch | None = None) -> dict[str, Weight | torch.Tensor]:
        """Views into `slab`: a Weight per matrix, a tensor per vector. They stay valid while the memory does."""
        scratch = scratch or Scratch()
        out: dict[str, Weight | torch.Tensor] = {}
        for param in self.params:
            views = [self._view(slab, part) for part in self.parts if part.param == param.name]
            out[param.name] = views[0] if not param.cols else self._weight(param, views, scratch)
        return out

    def reorder(self, slab: torch.Tensor, have: str) -> None:
        """Turn the int4 matrices of a slab that was packed in the order `have` into this CPU's, in place."""
        for part in self.parts:
            if self.format == "int4" and part.what == "packed":
                reorder(self._view(slab, part), have, int4_order())

    def _weight(self, param: Param, views: list[torch.Tensor], scratch: Scratch) -> Weight:
        if self.format == "int4":
            return Int4Weight(views[0], views[1], param.rows, param.cols, int4_order(), scratch)
        if self.format == "nf4":
            return Nf4Weight(views[0], views[1], param.rows, param.cols)
        return PlainWeight(views[0])

    @staticmethod
    def _view(slab: torch.Tensor, part: Part) -> torch.Tensor:
        return slab[part.offset : part.offset + part.n_bytes].view(getattr(torch, part.dtype)).view(part.shape)


def _parts(format: str, plain: str, param: Param) -> list[tuple[str, str, tuple[int, ...]]]:
    n, k = param.rows, param.cols
    if not k:
        return [("values", plain, (n,))]
    if format == "int4":
        rows, cols = _up(n, 16), _up(k, 32)
        return [("packed", "uint8", (rows, cols // 2)), ("scale_zero", "bfloat16", (cols // group_of(k), rows, 2))]
    if format == "nf4":
        blocks = -(-n * k // NF4_BLOCK)
        return [("packed", "uint8", (-(-n * k // 2),)), ("absmax", "float32", (blocks,))]
    if format != "bf16":
        raise ValueError(f"unknown format {format!r}")
    return [("values", plain, (n, k))]


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


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    n = getattr(torch, dtype).itemsize
    for side in shape:
        n *= side
    return n
