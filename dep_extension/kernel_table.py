"""A table of kernels for one model on the machine at hand, within a given time. Knows products, seconds and what a machine
is called; knows no models and no ranks.

On a CPU a grouped product is a loop over experts in compiled code, on a GPU one launch; a dense one is a loop in Python.
What is measured has the memory order in which slabs hold matrices: (N, K), read as (K, N).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence

from dep_extension.kernel_choice import Point, Shape, Table, measure

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)  # of each expert
GROUP = 16  # experts at most, as EPS-MoE measured; a table answers for other numbers by the nearest
MOST_BYTES = 2 << 30  # of one operand
BUDGET_S = 100.0  # of arithmetic; with making operands a model takes under two minutes


def here(device: str = "cpu") -> str:
    """What a table must share with a machine to be believed there: times depend on threads as well."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{_processor()}, {capability}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def shapes_of(products: Sequence[tuple[int, int]], experts: int, top_k: int, dtype: str) -> list[Shape]:
    """What to measure of a layer with `products` (K, N): as many experts as one token takes, and as a prompt does."""
    import torch

    found, bytes_each = [], getattr(torch, dtype).itemsize
    for k, n in dict.fromkeys(products):
        room = max(1, MOST_BYTES // (k * n * bytes_each))
        for many in sorted({min(top_k, experts, room), min(GROUP, experts, room)}):
            found.append(Shape(k, n, many, dtype))
    return found


def table_for(
    shapes: Sequence[Shape],
    device: str = "cpu",
    tokens: Sequence[int] = TOKENS,
    budget_s: float = BUDGET_S,
    say: Callable[[Shape, Point], None] = lambda shape, point: None,
) -> Table:
    """Each shape gets an equal part of what is left of `budget_s`; numbers of tokens that take longer are left out."""
    points: dict[Shape, tuple[Point, ...]] = {}
    ends = time.perf_counter() + budget_s
    for i, shape in enumerate(shapes):
        share = max(0.0, ends - time.perf_counter()) / (len(shapes) - i)
        points |= measure([shape], tokens, "", device, say, share).points
    return Table(here(device), points)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        found = ""
    return (found or platform.processor() or platform.machine())[:120]
