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
    """Whether `linear` can be called on this machine."""
    return _library() is not None


def linear(
    x_MK: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor, order: str, group: int
) -> torch.Tensor | None:
    """x @ W.T, shape (M, N), for bfloat16 x and a matrix packed as in int4.py; None where this is not made for it."""
    library = _library()
    m, k = x_MK.shape
    n = packed.shape[0]
    if library is None or n % TILE or order != "tile64" or x_MK.dtype != torch.bfloat16:
        return None
    threads = torch.get_num_threads() if library.parallel else 1
    y = x_MK.new_empty(m, n)
    room = torch.empty(m * k // group + threads * m * TILE)
    pointers = [t.data_ptr() for t in (x_MK, packed, scale_zero, y, room)]
    library.linear(*pointers, m, n, k, group, threads, library.parallel)
    return y


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
