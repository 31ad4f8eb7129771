"""Weights as they are published in 8 and 4 bits, seen as plain tensors. Knows MXFP4 (gpt-oss) and FP8 with one scale per
block or per tensor (DeepSeek-V3, Qwen3 and others), and refuses every other quantisation by name; knows nothing of models.

A `Tensor` reads only the rows that are asked for, and dequantises at most `AT_ONCE` values at a time. FP8 values are
multiplied by their scales in float32 and rounded once, to what the reader wants; MXFP4 is exact in any float. What is not a
number in the file (FP8 has a NaN, and so may scales) is data like any other: it reaches the reader as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from duoserve.core import Refusal

AT_ONCE = 1 << 22  # 16 MiB of float32
_READ = ("fp8", "mxfp4")
_SAID = ("quantization_config", "compression_config")  # where a config says so, at any depth
_ORIGINAL = "use the bf16 original of this model, or one published in block-FP8 or MXFP4"
_AGAIN = "fetch a checkpoint that matches its config"
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # FP4: sign, two bits of exponent, one of mantissa
_FP4 = torch.tensor([*_HALF, *(-value for value in _HALF)])
_FP4_PAIRS = torch.stack((_FP4.repeat(16), _FP4.repeat_interleave(16)), dim=1)  # of each byte, the low half first
_E8M0_BIAS = 127


class Scheme(NamedTuple):
    """How a checkpoint is quantised. `block`: (rows, columns) that share an FP8 scale; None where a tensor has only one."""

    method: str
    block: tuple[int, int] | None = None


class Tensor(Protocol):
    """A tensor of a checkpoint, read piece by piece."""

    @property
    def dtype(self) -> str:
        """The safetensors dtype that holds its values."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int, wanted: torch.dtype | None = None) -> torch.Tensor:
        """`self[start:stop]`, in `wanted` or in `dtype`."""
        ...

    def whole(self, wanted: torch.dtype | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a safetensors file."""

    file: Any
    key: str

    @property
    def dtype(self) -> str:
        return str(self.file.get_slice(self.key).get_dtype())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.key).get_shape())

    def rows(self, start: int, stop: int, wanted: torch.dtype | None = None) -> torch.Tensor:
        return self.part((slice(start, stop),)).to(wanted)

    def whole(self, wanted: torch.dtype | None = None) -> torch.Tensor:
        return self.file.get_tensor(self.key).to(wanted)

    def part(self, at: tuple[slice, ...]) -> torch.Tensor:
        return self.file.get_slice(self.key)[at]


@dataclass(frozen=True)
class Fp8:
    """A matrix, or one matrix per expert, of FP8 values; each block of them shares a scale, the last ones may be smaller."""

    values: Stored
    scales: Stored
    block: tuple[int, int]
    dtype: str = "F32"  # four bits times a float32 scale fit nothing narrower

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def rows(self, start: int, stop: int, wanted: torch.dtype | None = None) -> torch.Tensor:
        out = torch.empty(stop - start, *self.shape[1:], dtype=wanted or torch.float32)
        if len(self.shape) == 2:
            self._fill(out, (), start, self._grid(()))
        else:
            for e in range(start, stop):
                self._fill(out[e - start], (slice(e, e + 1),), 0, self._grid((slice(e, e + 1),)))
        return out

    def whole(self, wanted: torch.dtype | None = None) -> torch.Tensor:
        return self.rows(0, self.shape[0], wanted)

    def _fill(self, out_RC: torch.Tensor, expert: tuple[slice, ...], first: int, grid: torch.Tensor) -> None:
        """Rows of one matrix, from `first` on, into `out_RC`."""
        n_rows, n_cols = out_RC.shape
        step = max(1, AT_ONCE // max(1, n_cols))
        for start in range(0, n_rows, step):
            stop = min(n_rows, start + step)
            values = self.values.part((*expert, slice(first + start, first + stop))).reshape(-1, n_cols)
            rows = torch.arange(first + start, first + stop) // self.block[0]
            out_RC[start:stop] = values.float() * grid[rows].repeat_interleave(self.block[1], dim=1)[:, :n_cols]

    def _grid(self, expert: tuple[slice, ...]) -> torch.Tensor:
        """The scales (blocks down, blocks across) of one matrix, as float32."""
        if math.prod(self.scales.shape) == 1:
            grid = self.scales.whole()
        else:
            grid = self.scales.part(expert) if expert else self.scales.whole()
        if grid.dtype == torch.uint8:
            grid = grid.view(torch.float8_e8m0fnu)
        return grid.float().reshape(grid.shape[-2:] if grid.ndim > 1 else (1, 1))


@dataclass(frozen=True)
class Mxfp4:
    """One matrix (in, out) per expert, whose columns are stored as groups of 32 FP4 values that share a power of two."""

    blocks: Stored  # (E, out, groups, 16): two values a byte
    scales: Stored  # (E, out, groups)
    dtype: str = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        n_experts, n_out, groups, pairs = self.blocks.shape
        return n_experts, groups * pairs * 2, n_out

    def rows(self, start: int, stop: int, wanted: torch.dtype | None = None) -> torch.Tensor:
        n_in, n_out = self.shape[1:]
        out = torch.empty(stop - start, n_in, n_out, dtype=wanted or torch.bfloat16)
        step = max(1, AT_ONCE // n_in)
        for e in range(start, stop):
            for first in range(0, n_out, step):
                at = slice(e, e + 1), slice(first, min(n_out, first + step))
                powers = self.scales.part(at)[0].int() - _E8M0_BIAS
                values = _FP4_PAIRS[self.blocks.part(at)[0].int()].flatten(2)
                out[e - start, :, at[1]] = torch.ldexp(values, powers[:, :, None]).flatten(1).T
        return out

    def whole(self, wanted: torch.dtype | None = None) -> torch.Tensor:
        return self.rows(0, self.shape[0], wanted)


def scheme(config: Mapping[str, Any]) -> Scheme | None:
    """How the checkpoint of this config.json is quantised, or None; refuses what is not read here."""
    said = [value for value in _said(config) if value is not None and value != {}]
    if not said:
        return None
    if any(value != said[0] for value in said):
        raise _refused(f"in {len(said)} ways that contradict each other")
    if not isinstance(said[0], dict):
        raise _refused(f"its {_SAID[0]} is a {type(said[0]).__name__}, not an object")
    method = said[0].get("quant_method")
    if method not in _READ:
        raise _refused(_name(said[0]))
    if method == "mxfp4":
        return Scheme(method)
    if said[0].get("expert_dtype", "fp8") != "fp8":
        raise _refused(f"fp8, with experts in {said[0]['expert_dtype']!r}")
    return Scheme(method, _block(said[0].get("weight_block_size", (128, 128))))


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model, not quantised."""
    kept = {name: value for name, value in config.items() if name not in _SAID}
    return {name: without(value) if isinstance(value, dict) else value for name, value in kept.items()}


def tensors(stored: Mapping[str, Stored], how: Scheme | None) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names that they have when not quantised; from headers alone."""
    seen: dict[str, Tensor] = dict(stored)
    if how and how.method == "mxfp4":
        _join_mxfp4(seen, stored)
    elif how:
        _join_fp8(seen, stored, how.block)
    for key, tensor in seen.items():
        if isinstance(tensor, Stored) and tensor.dtype.startswith(("F8", "F4", "F6")):
            scheme_ = f"{how.method} as its config has it" if how else "its config, which says nothing of it"
            raise _refused(f"{key} is stored as {tensor.dtype}, unlike {scheme_}")
    return seen


def _join_mxfp4(seen: dict[str, Tensor], stored: Mapping[str, Stored]) -> None:
    names = {key.removesuffix(end) for end in (_BLOCKS, _SCALES) for key in stored if key.endswith(end)}
    for name in sorted(names):
        blocks, scales = _both(name + _BLOCKS, name + _SCALES, stored)
        if len(blocks.shape) != 4 or blocks.shape[3] != 16 or blocks.dtype != "U8":
            raise _misshapen(blocks, "(experts, rows, groups, 16) of U8")
        if scales.shape != blocks.shape[:3] or scales.dtype != "U8":
            raise _misshapen(scales, f"{blocks.shape[:3]} of U8")
        seen[name] = Mxfp4(blocks, scales)
        del seen[name + _BLOCKS], seen[name + _SCALES]


def _join_fp8(seen: dict[str, Tensor], stored: Mapping[str, Stored], block: tuple[int, int] | None) -> None:
    names = {key for key, tensor in stored.items() if tensor.dtype == "F8_E4M3" and not key.endswith(_SCALE)}
    names |= {key.removesuffix(_SCALE) for key in stored if key.endswith(_SCALE)}
    for name in sorted(names):
        values, scales = _both(name, name + _SCALE, stored)
        if values.dtype != "F8_E4M3" or len(values.shape) not in (2, 3):
            raise _misshapen(values, "a matrix, or one per expert, of F8_E4M3")
        seen[name] = Fp8(values, scales, _shared(values, scales, block))
        del seen[name + _SCALE]


def _shared(values: Stored, scales: Stored, block: tuple[int, int] | None) -> tuple[int, int]:
    """The block that shares a scale: as configured, or the whole matrix where it has one scale."""
    *experts, n_rows, n_cols = values.shape
    if scales.dtype not in _SCALE_DTYPES:
        raise _misshapen(scales, f"one of {', '.join(_SCALE_DTYPES)}")
    if math.prod(scales.shape) == 1 or scales.shape == (*experts, 1, 1):
        return max(1, n_rows), max(1, n_cols)
    side = block or (max(1, n_rows), max(1, n_cols))
    want = (*experts, -(-n_rows // side[0]), -(-n_cols // side[1]))
    if scales.shape != want:
        raise _misshapen(scales, f"{want}, blocks of {side[0]} x {side[1]} in {values.shape}")
    return side


def _both(first: str, second: str, stored: Mapping[str, Stored]) -> tuple[Stored, Stored]:
    for there, missing in ((first, second), (second, first)):
        if missing not in stored:
            raise Refusal("E_CORRUPT", f"{there} has no {missing} beside it", _AGAIN, 5)
    return stored[first], stored[second]


def _misshapen(tensor: Stored, want: str) -> Refusal:
    return Refusal("E_CORRUPT", f"{tensor.key} has shape {tensor.shape} of {tensor.dtype}, should be {want}", _AGAIN, 5)


def _refused(how: str) -> Refusal:
    return Refusal("E_QUANTISED", f"the checkpoint is quantised already ({how})", _ORIGINAL)


def _said(config: Mapping[str, Any]) -> Iterator[Any]:
    for name, value in config.items():
        if name in _SAID:
            yield value
        elif isinstance(value, dict):
            yield from _said(value)


def _name(said: Mapping[str, Any]) -> str:
    if said.get("load_in_4bit") or said.get("load_in_8bit"):
        return "bitsandbytes"
    if "quant_method" not in said:
        return f"its {_SAID[0]} names no quant_method, only {', '.join(sorted(map(str, said)))}"[:120]
    return f"{said['quant_method']}"[:60]


def _block(said: Any) -> tuple[int, int] | None:
    if said is None:
        return None
    if not isinstance(said, (list, tuple)) or len(said) != 2 or any(type(n) is not int or n < 1 for n in said):
        raise _refused(f"fp8, with weight_block_size {str(said)[:60]}, not two positive integers")
    return said[0], said[1]
