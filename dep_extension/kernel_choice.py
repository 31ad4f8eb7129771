"""One grouped product for all experts of a GPU, or a dense one for each, and in how many stages (EPS-MoE, sections "expert
pipeline scheduler" and "GroupGemm or DenseGemm"). The choice is looked up in a table that was measured: where the two cross
depends on the machine, the shape and the dtype. Knows products and seconds; knows no ranks and no schedules.

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

KIND, VERSION = "duoserve-kernel-table", 1
MAX_BYTES, MAX_ROWS = 4 << 20, 100_000
TRIALS, WARM = 20, 10  # as FinDEP measures
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
        rows = [[*shape, [list(p) for p in points]] for shape, points in self.points.items()]
        path.write_text(
            json.dumps({"kind": KIND, "version": VERSION, "machine": self.machine, "shapes": rows}, indent=1)
        )

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
) -> Table:
    """Time both on `device`: the two take turns, so that a machine that drifts favours neither."""
    found: dict[Shape, tuple[Point, ...]] = {}
    for shape in shapes:
        points = []
        for many in sorted(set(tokens)):
            points.append(_measured(shape, many, device))
            say(shape, points[-1])
        found[shape] = tuple(points)
    return Table(machine, found)


def _measured(shape: Shape, tokens: int, device: str) -> Point:
    import torch

    dtype = getattr(torch, shape.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.experts * tokens, shape.k, generator=generator).to(device, dtype)
    w = torch.randn(shape.experts, shape.k, shape.n, generator=generator).to(device, dtype)
    ends = torch.arange(1, shape.experts + 1, dtype=torch.int32, device=device) * tokens
    runs: dict[Kernel, Callable[[], Any]] = {
        Kernel.GROUPED: lambda: grouped(x, w, ends),
        Kernel.DENSE: lambda: dense(x, w, [tokens] * shape.experts),
    }
    samples: dict[Kernel, list[float]] = {kernel: [] for kernel in Kernel}
    for trial in range(WARM + TRIALS):
        for kernel, run in runs.items():
            began = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if trial >= WARM:
                samples[kernel].append(time.perf_counter() - began)
        if trial == WARM and sum(map(sum, samples.values())) * TRIALS > MOST_S:
            break  # one trial says enough of what takes so long
    return Point(tokens, *(statistics.median(samples[kernel]) for kernel in (Kernel.GROUPED, Kernel.DENSE)))


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


def stages(communication_s: float, compute_s: float, overhead_s: float, local_experts: int) -> int:
    """Pipeline degree N* = sqrt(C / k_o) as a divisor of the local experts: C is what can be hidden, k_o what a stage costs.

    The divisor that saves most, C - C / N - k_o N, is taken; 1 where none saves anything.
    """
    hidden = min(communication_s, compute_s)
    divisors = [n for n in range(1, local_experts + 1) if local_experts % n == 0]
    saved = {n: hidden * (n - 1) / n - overhead_s * (n - 1) for n in divisors}
    return max(divisors, key=lambda n: (saved[n], -n))


def pays(
    communication: Callable[[float], float],
    compute: Callable[[float, float], float],
    tokens: int,
    experts: int,
    n: int,
    slack: tuple[float, float] = (0.32, 0.03),
) -> bool:
    """Whether n stages are worth it: neither part may grow by more than its slack when it is cut (the paper's e0 and e1).

    `communication(tokens)` and `compute(tokens, experts)` in seconds.
    """
    e0, e1 = slack
    cut_link = n * communication(tokens / n) <= (1 + e0) * communication(tokens)
    return cut_link and n * compute(tokens, experts / n) <= (1 + e1) * compute(tokens, experts)


def to_json(table: Table) -> dict[str, Any]:
    """As plain data, for an engine that imports nothing of this."""
    return {
        "machine": table.machine,
        "shapes": [shape._asdict() | {"crossover": table.crossover(shape)} for shape in table.points],
    }
