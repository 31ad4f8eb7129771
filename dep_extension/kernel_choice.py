"""One grouped product for all experts of a GPU, or a dense one for each (EPS-MoE, section "GroupGemm or DenseGemm"). The
choice is looked up in a table that was measured: where the two cross depends on the machine, the shape and the dtype. Knows
products and seconds; knows no ranks and no schedules.

    grouped   (E tokens, K) x (E, K, N), rows sorted by expert: one launch
    dense     (tokens, K) x (K, N) for each expert
"""

from __future__ import annotations

import json
import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dep_extension.plainjson import write_json

KIND, VERSION = "duoserve-kernel-table", 1
MAX_BYTES, MAX_ROWS = 4 << 20, 100_000
TRIALS = 20  # after half as many that warm up, as FinDEP measures
MOST_S = 8.0  # for one point


class Kernel(Enum):
    GROUPED = "grouped"
    DENSE = "dense"


class Shape(NamedTuple):
    """Of one product: K x N for each of `experts`."""

    k: int
    n: int
    experts: int
    dtype: str


class Point(NamedTuple):
    """Seconds with so many tokens for each expert: medians."""

    tokens: int
    grouped: float
    dense: float


@dataclass(frozen=True)
class Table:
    """What one machine takes. Between measured numbers of tokens times are interpolated, beyond them the ends decide."""

    machine: str
    points: dict[Shape, tuple[Point, ...]]

    def seconds(self, kernel: Kernel, shape: Shape, tokens: int) -> float:
        points = self._of(shape)
        return _between([(p.tokens, getattr(p, kernel.value)) for p in points], max(1, tokens))

    def choose(self, shape: Shape, tokens: int) -> Kernel:
        """The quicker one."""
        return min(Kernel, key=lambda kernel: self.seconds(kernel, shape, tokens))

    def grouped(self, products: Sequence[tuple[int, int]], experts: int, dtype: str, tokens: int) -> bool:
        """Whether `experts` with `tokens` rows each are quicker as groups, over all their `products` (K, N) together."""
        shapes = [self.nearest(Shape(k, n, experts, dtype)) for k, n in products]
        total = {
            kernel: sum(self.seconds(kernel, shape, tokens) / shape.experts for shape in shapes) for kernel in Kernel
        }
        return total[Kernel.GROUPED] <= total[Kernel.DENSE]

    def nearest(self, shape: Shape) -> Shape:
        """The measured one of these sides and this dtype whose number of experts is nearest, in proportion."""
        alike = [have for have in self.points if have._replace(experts=0) == shape._replace(experts=0)]
        if not alike:
            self._of(shape)
        return min(alike, key=lambda have: abs(math.log(have.experts / shape.experts)))

    def crossover(self, shape: Shape) -> int | None:
        """The least measured number of tokens from which dense products stay the quicker ones; None: they never are."""
        found = None
        for point in reversed(self._of(shape)):
            if point.dense > point.grouped:
                break
            found = point.tokens
        return found

    def _of(self, shape: Shape) -> tuple[Point, ...]:
        if shape not in self.points:
            known = ", ".join(f"{s.k}x{s.n} x {s.experts} {s.dtype}" for s in list(self.points)[:8])
            what = f"{shape.k}x{shape.n} x {shape.experts} {shape.dtype}"
            have = f"the table of {self.machine} has {len(self.points)} shapes (such as {known})"
            raise ValueError(f"{have}, not {what}: measure it")
        return self.points[shape]

    def save(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        rows = [[*shape, [list(p) for p in points]] for shape, points in self.points.items()]
        write_json(path, {"kind": KIND, "version": VERSION, "machine": self.machine, "shapes": rows}, indent=1)

    @classmethod
    def load(cls, path: Path, machine: str | None = None) -> Table:
        """ValueError of one line where the file is not such a table, or is of another machine."""
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{path} has {size:,} bytes, a table at most {MAX_BYTES:,}: measure it again")
        try:
            data = json.loads(path.read_text(), parse_constant=_refuse)
            if (data["kind"], data["version"]) != (KIND, VERSION) or len(data["shapes"]) > MAX_ROWS:
                raise ValueError(f"is {data['kind']!r} version {data['version']!r}")
            points = {Shape(int(k), int(n), int(e), str(d)): _points(rows) for k, n, e, d, rows in data["shapes"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no table of kernels ({str(error)[:80]}): measure it again") from error
        if machine is not None and data["machine"] != machine:
            raise ValueError(f"{path} was measured on {data['machine']!r}, this is {machine!r}: measure it here")
        return cls(str(data["machine"]), points)


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number of seconds")


def _points(rows: Any) -> tuple[Point, ...]:
    points = tuple(Point(int(tokens), float(grouped), float(dense)) for tokens, grouped, dense in rows)
    if not points or any(a.tokens >= b.tokens for a, b in pairwise(points)):
        raise ValueError("numbers of tokens do not rise")
    if any(p.tokens < 1 or not 0 < p.grouped < 1e3 or not 0 < p.dense < 1e3 for p in points):
        raise ValueError("a time is not between 0 and 1000 s")
    return points


def _between(points: Sequence[tuple[int, float]], at: float) -> float:
    """Straight lines between points in logarithms of both."""
    i = bisect_left([x for x, _ in points], at)
    if i < len(points) and points[i][0] == at:
        return points[i][1]
    if i == 0:
        return points[0][1]
    if i == len(points):
        return points[-1][1] * at / points[-1][0]  # more tokens of a full machine: in proportion
    (x0, y0), (x1, y1) = points[i - 1 : i + 1]
    share = math.log(at / x0) / math.log(x1 / x0)
    return float(y0 * (y1 / y0) ** share)


def measure(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    machine: str,
    device: str = "cpu",
    say: Callable[[Shape, Point], None] = lambda shape, point: None,
    budget_s: float | None = None,
) -> Table:
    """Time both on `device`: the two take turns, so that a machine that drifts favours neither.

    `budget_s` for each shape: the largest numbers of tokens are left out where they would take longer.
    """
    found: dict[Shape, tuple[Point, ...]] = {}
    for shape in shapes:
        points: list[Point] = []
        w_EKN = _weights(shape, device)
        ordered = sorted(set(tokens))
        for i, many in enumerate(ordered):
            left = None if budget_s is None else budget_s / (len(ordered) - i)
            began = time.perf_counter()
            if points and left is not None and _pair_s(points[-1], many) > left:
                break
            points.append(_measured(w_EKN, many, left if left is not None else MOST_S))
            say(shape, points[-1])
            budget_s = None if budget_s is None else budget_s - (time.perf_counter() - began)
        found[shape] = tuple(points)
    return Table(machine, found)


def _pair_s(last: Point, tokens: int) -> float:
    """What both take at most with more tokens: in proportion."""
    return (last.grouped + last.dense) * tokens / last.tokens


def _weights(shape: Shape, device: str) -> Any:
    """Each expert (N, K) in memory and read as (K, N), as a slab holds it. A short random block again and again: what is
    multiplied makes no difference to the time, drawing so many numbers would."""
    import torch

    w_ENK = torch.empty(shape.experts, shape.n, shape.k, dtype=getattr(torch, shape.dtype), device=device)
    flat, block = w_ENK.view(-1), torch.randn(65536, generator=torch.Generator().manual_seed(0)).to(device, w_ENK.dtype)
    for start in range(0, flat.numel(), block.numel()):
        piece = flat[start : start + block.numel()]
        piece.copy_(block[: piece.numel()])
    return w_ENK.transpose(1, 2)


def _measured(w_EKN: Any, tokens: int, most_s: float) -> Point:
    """Medians over up to TRIALS, as many as `most_s` allows, after half as many that are not counted."""
    import torch

    experts, k, _ = w_EKN.shape
    device = w_EKN.device
    x = torch.randn(experts * tokens, k, generator=torch.Generator().manual_seed(0)).to(device, w_EKN.dtype)
    ends = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * tokens
    runs: dict[Kernel, Callable[[], Any]] = {
        Kernel.GROUPED: lambda: grouped(x, w_EKN, ends),
        Kernel.DENSE: lambda: dense(x, w_EKN, [tokens] * experts),
    }
    first = {kernel: _timed(run, device) for kernel, run in runs.items()}
    trials = max(1, min(TRIALS, int(most_s / sum(first.values()) / 1.5)))
    samples: dict[Kernel, list[float]] = {kernel: [] for kernel in Kernel}
    for trial in range(-(trials // 2), trials):
        for kernel, run in runs.items():
            took = _timed(run, device)
            if trial >= 0:
                samples[kernel].append(took)
    return Point(tokens, *(statistics.median(samples[kernel]) for kernel in (Kernel.GROUPED, Kernel.DENSE)))


def _timed(run: Callable[[], Any], device: Any) -> float:
    began = time.perf_counter()
    run()
    if device.type != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - began


def grouped(x_PK: Any, w_EKN: Any, ends_E: Any) -> Any:
    """y (P, N) of rows sorted by expert; `ends_E`: where each expert's rows end, int32."""
    import torch

    return torch.nn.functional.grouped_mm(x_PK, w_EKN, offs=ends_E)


def dense(x_PK: Any, w_EKN: Any, counts_E: Sequence[int]) -> Any:
    """The same, an expert at a time."""
    import torch

    out = x_PK.new_empty(x_PK.shape[0], w_EKN.shape[2])
    start = 0
    for expert, count in enumerate(counts_E):
        if count:
            torch.mm(x_PK[start : start + count], w_EKN[expert], out=out[start : start + count])
        start += count
    return out


def multiply(x_PK: Any, w_EKN: Any, counts_E: Sequence[int], table: Table | None = None) -> Any:
    """y (P, N): rows sorted by expert, `counts_E` of them for each, each row by its expert's matrix; in whichever way
    `table` found quicker for so many experts that have rows. Without a table one by one.

    ValueError of one line where the table has no such shape.
    """
    import torch

    busy = sum(1 for count in counts_E if count)
    _, k, n = w_EKN.shape
    dtype = str(x_PK.dtype).removeprefix("torch.")
    if table is None or not busy or not table.grouped([(k, n)], busy, dtype, -(-x_PK.shape[0] // busy)):
        return dense(x_PK, w_EKN, counts_E)
    ends_E = torch.tensor(counts_E, dtype=torch.int32).cumsum(0).to(torch.int32)
    return grouped(x_PK, w_EKN, ends_E.to(x_PK.device))


def to_json(table: Table) -> dict[str, Any]:
    """As plain data, to be printed."""
    return {
        "machine": table.machine,
        "shapes": [
            shape._asdict() | {"crossover": table.crossover(shape), "points": [p._asdict() for p in points]}
            for shape, points in table.points.items()
        ],
    }
