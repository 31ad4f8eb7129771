"""The compiled part (native.c): products with int4 matrices, and a row of a predictor's head, on CPUs with AVX-512 BF16.
Knows how to find and call it; everything works without it, only slower: it is built where `pip install` finds a C compiler,
and left out where not.

`DUOSERVE_NATIVE=0` leaves it alone. Products differ from torch's in rounding, so tokens may too: one machine, one answer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TILE = 64


class _Library(NamedTuple):
    linear: Callable[..., None]
    head: Callable[..., None]
    parallel: Any  # of the OpenMP runtime that torch uses, or None where that is another kind


def available() -> bool:
    """Whether a `Product` can be made on this machine."""
    return _library() is not None


class Product:
    """x @ W.T with one matrix packed as in int4.py, contiguous bfloat16 x (M, K) -> y (M, N). What does not change between
    calls is looked up once: a token makes a hundred of them."""

    __slots__ = ("_at", "_held", "_shape")

    def __init__(self, packed: torch.Tensor, scale_zero: torch.Tensor, group: int):
        self._held = packed, scale_zero  # their memory is read by address
        self._at = packed.data_ptr(), scale_zero.data_ptr()
        self._shape = packed.shape[0], packed.shape[1] * 2, group

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        library = _library()
        assert library is not None, self._shape
        n, k, group = self._shape
        m = x_MK.shape[0]
        threads = torch.get_num_threads() if library.parallel else 1
        y = x_MK.new_empty(m, n)
        room = torch.empty(m * k // group + threads * m * TILE)
        at = (x_MK.data_ptr(), *self._at, y.data_ptr(), room.data_ptr())
        library.linear(*at, m, n, k, group, threads, library.parallel)
        return y


def product(packed: torch.Tensor, scale_zero: torch.Tensor, order: str, group: int) -> Product | None:
    """None where this is not made for the matrix or the machine."""
    made = packed.device.type == "cpu" and packed.shape[0] % TILE == 0 and order == "tile64" and available()
    return Product(packed, scale_zero, group) if made else None


def head() -> Callable[..., None] | None:
    """`duoserve_head` of native.c, for addresses and sizes; it keeps the interpreter's lock. None where there is none."""
    library = _library()
    return library.head if library is not None else None


@cache
def _library() -> _Library | None:
    found = next(Path(__file__).parent.glob("_native*.so"), None)
    if found is None or os.environ.get("DUOSERVE_NATIVE") == "0" or _capability_is_lowered():
        return None
    library = ctypes.CDLL(os.fspath(found))
    if not library.duoserve_supported():
        return None
    library.duoserve_int4_linear.argtypes = (
        [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 4 + [ctypes.c_uint, ctypes.c_void_p]
    )
    library.duoserve_int4_linear.restype = None
    head = ctypes.PyDLL(os.fspath(found)).duoserve_head
    head.argtypes, head.restype = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 3, None
    return _Library(library.duoserve_int4_linear, head, _openmp())


def _capability_is_lowered() -> bool:
    """Whether torch was told to act as on a lesser CPU (ATEN_CPU_CAPABILITY): then so do we."""
    return torch.backends.cpu.get_cpu_capability() != "AVX512"


def _openmp() -> Any:
    """GOMP_parallel of the runtime that torch has loaded: a second one would bring threads that compete with torch's."""
    torch.ones(1 << 16).sum()  # loads it, if nothing has yet
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line.rpartition("/")[2]}
    for path in sorted(paths, key=lambda p: "torch" not in p):
        runtime = ctypes.CDLL(path)
        if hasattr(runtime, "GOMP_parallel"):
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p)
    return None
