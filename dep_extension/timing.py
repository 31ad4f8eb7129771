"""What each process of a calibration does: times products, attention and exchanges, each size warmed up and then timed, all
ranks together. Started by calibrate.py, `python -m dep_extension.timing ORDER`; rank 0 says each line's points as JSON on
standard output. Knows torch and its process group; fits nothing and writes no file.

    work    x of a product: m k n; of attention: heads S^2 (d_k + d_v); of an exchange: elements that an expert rank gets
    rank    0 .. ag - 1 attend, ag .. ag + eg - 1 hold experts; those beyond a split wait for the next
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from dep_extension.kernel_choice import dense, grouped

WARM, TIMED = 10, 20  # runs of a size, as in the paper
ROWS = {"cpu": 1 << 12, "cuda": 1 << 17}  # of the largest product
ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}  # that the largest exchange brings to an expert rank
SIZES = 8  # of a line, evenly spaced
HEADER = 5  # numbers ahead of the counts: generation, round, layer, micro-batch, still going
PATIENCE = timedelta(seconds=120)
Run = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """Shapes that are timed, those of the model that is to be planned, and the longest of a line's runs in seconds."""

    hidden: int = 1024
    expert_hidden: int = 512
    experts: int = 4  # of a rank
    heads: int = 4
    head_dim: int = 64
    dtype: str = "float32"
    longest_s: float = 0.04

    def __post_init__(self) -> None:
        most = {
            "hidden": 1 << 16,
            "expert_hidden": 1 << 16,
            "experts": min(ROWS.values()) // SIZES,
            "heads": 1024,
            "head_dim": 1024,
        }
        for name, limit in (most | {"longest_s": 10}).items():
            if not 0 < getattr(self, name) <= limit:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: what is timed has more than 0 and at most {limit:,}"
                )
        weights = self.experts * self.hidden * self.expert_hidden
        if weights > 1 << 31:
            raise ValueError(f"{weights:,} weights of a rank's experts, at most {1 << 31:,} are timed: ask for fewer")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {self.dtype!r} is not timed: float32, bfloat16 or float16")


@dataclass(frozen=True)
class Order:
    """To one process: who it is, what to time, where the processes meet (a file that is not there yet)."""

    rank: int
    world: int
    meet: str
    device: str
    splits: tuple[tuple[int, int], ...]
    sizes: Sizes
    patience_s: int = 300

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Order:
        said = json.loads(text)
        splits = tuple((int(ag), int(eg)) for ag, eg in said.pop("splits"))
        return cls(splits=splits, sizes=Sizes(**said.pop("sizes")), **said)


class Bench:
    """One rank's device, clock and words."""

    def __init__(self, order: Order):
        self.order, self.sizes = order, order.sizes
        self.device = torch.device(f"cuda:{order.rank}" if order.device == "cuda" else "cpu")
        self.dtype: torch.dtype = getattr(torch, order.sizes.dtype)

    def new(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float32).to(self.device, self.dtype)

    def settle(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.accelerator.synchronize()

    def seconds(self, runs: Sequence[Run], before: Run = lambda: None, settled: bool = True) -> list[list[float]]:
        """Of each run, each time it counts. The runs take turns, so that a machine that drifts bends no line. `settled`:
        what was done before a run is over when it begins."""
        found: list[list[float]] = [[] for _ in runs]
        for trial in range(WARM + TIMED):
            for run, samples in zip(runs, found, strict=True):
                before()
                if settled:
                    self.settle()
                began = time.perf_counter()
                run()
                self.settle()
                if trial >= WARM:
                    samples.append(time.perf_counter() - began)
        return found

    def medians(self, runs: Sequence[Run]) -> list[float]:
        return [statistics.median(samples) for samples in self.seconds(runs)]

    def say(self, line: str, points: Iterable[tuple[float, float]]) -> None:
        if self.order.rank == 0:
            print(json.dumps({"line": line, "points": list(points)}), flush=True)


def products(bench: Bench) -> None:
    """One product of m rows, then one of m rows for each of a rank's experts by whichever kernel is the quicker."""
    s, rows = bench.sizes, ROWS[bench.order.device]
    x, w = bench.new(rows, s.hidden), bench.new(s.hidden, s.expert_hidden)

    def one(m: int) -> None:
        x[:m] @ w

    steps = _steps(bench, one, rows)
    took = bench.medians([partial(one, m) for m in steps])
    bench.say("gemm", [(float(m * s.hidden * s.expert_hidden), y) for m, y in zip(steps, took, strict=True)])
    w_EKN = bench.new(s.experts, s.hidden, s.expert_hidden)
    ends = torch.arange(1, s.experts + 1, dtype=torch.int32, device=bench.device)

    def apart(m: int) -> None:
        dense(x[: m * s.experts], w_EKN, [m] * s.experts)

    def together(m: int) -> None:
        grouped(x[: m * s.experts], w_EKN, ends * m)

    steps = _steps(bench, apart, rows // s.experts)
    ways = [bench.medians([partial(way, m) for m in steps]) for way in (apart, together)]
    work = [float(s.experts * m * s.hidden * s.expert_hidden) for m in steps]
    bench.say("experts", list(zip(work, map(min, *ways), strict=True)))


def attention(bench: Bench) -> None:
    """Causal, of one sample; lengths whose squares are evenly spaced."""
    s = bench.sizes

    def attend(length: int) -> Run:
        q, k, v = (bench.new(1, s.heads, length, s.head_dim) for _ in range(3))
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)

    longest = 64
    while longest < 1 << 14 and 4 * _once(bench, attend(longest)) < 4 * s.longest_s:  # long: the square has to rule
        longest *= 2
    lengths = [round(longest * (part / SIZES) ** 0.5) for part in range(1, SIZES + 1)]
    took = bench.medians([attend(length) for length in lengths])
    bench.say("attention", [(float(s.heads * n**2 * 2 * s.head_dim), y) for n, y in zip(lengths, took, strict=True)])


def _steps(bench: Bench, run: Callable[[int], Any], most: int) -> list[int]:
    """Evenly spaced numbers of rows: the last takes at most as long as the longest run may."""
    m = SIZES
    while 2 * m <= most and _once(bench, partial(run, 2 * m)) <= bench.sizes.longest_s:
        m *= 2
    return [max(1, m * part // SIZES) for part in range(1, SIZES + 1)]


def _once(bench: Bench, run: Run) -> float:
    """The quickest of a few runs: whatever else the machine does makes none quicker."""
    run()
    found = []
    for _ in range(3):
        bench.settle()
        began = time.perf_counter()
        run()
        bench.settle()
        found.append(time.perf_counter() - began)
    return min(found)


class Exchange:
    """Rows between attention and expert ranks of one split: `all_to_all_single`, nothing to one's own kind."""

    def __init__(self, bench: Bench, group: Any, split: tuple[int, int]):
        self.bench, self.group, (self.ag, self.eg) = bench, group, split
        self.attends = bench.order.rank < self.ag

    def parts(self, each: int, sends: bool) -> list[int]:
        """Elements to or from each rank, `each` for a pair."""
        ranks = range(self.ag + self.eg)
        return [each if sends and (rank < self.ag) != self.attends else 0 for rank in ranks]

    def rows(self, each: int, forth: bool, dtype: torch.dtype | None = None) -> Callable[..., Any]:
        """An exchange of `each` elements a pair; `forth`: from attention to experts."""
        sends = self.attends == forth
        out, into = self.parts(each, not sends), self.parts(each, sends)
        kind = self.bench.dtype if dtype is None else dtype
        source = torch.ones(sum(into), dtype=kind, device=self.bench.device)
        target = torch.empty(sum(out), dtype=kind, device=self.bench.device)

        def run(async_op: bool = False) -> Any:
            return dist.all_to_all_single(target, source, out, into, group=self.group, async_op=async_op)

        return run

    def slowest(self, found: list[float]) -> list[float]:
        """Of all ranks of the split, run by run."""
        seconds = torch.tensor(found, dtype=torch.float64, device=self.bench.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group=self.group)
        return seconds.tolist()

    def medians(self, runs: Sequence[Run], before: Run | None = None, settled: bool = True) -> list[float]:
        """Of each run, over its times the slowest rank's."""
        every = self.bench.seconds(runs, self.meet if before is None else before, settled)
        return [statistics.median(self.slowest(samples)) for samples in every]

    def meet(self) -> None:
        dist.barrier(group=self.group)


def exchanges(bench: Bench, groups: tuple[Any, Any], split: tuple[int, int]) -> None:
    """Both directions of one split, the counts ahead of them, how much slower they are at once, and a product beside them.
    As in a run, each direction has a group of its own."""
    of, back, name = Exchange(bench, groups[0], split), Exchange(bench, groups[1], split), f"{split[0]}:{split[1]}"
    most = _elements(bench, of)
    pairs = [max(1, most * part // SIZES // of.ag) for part in range(1, SIZES + 1)]
    for way, forth in (("a2e", True), ("e2a", False)):
        took = of.medians([of.rows(each, forth) for each in pairs])
        bench.say(f"{way} {name}", [(float(each * of.ag), y) for each, y in zip(pairs, took, strict=True)])
    counts = of.rows(2 * bench.sizes.experts + HEADER, True, torch.int64)
    bench.say(f"counts {name}", [(0.0, y) for y in of.medians([counts])])
    bench.say(f"both {name}", [_both_ways(of, of.rows(pairs[-1], True), back.rows(pairs[-1], False))])
    bench.say(f"beside {name}", [_beside(bench, of, of.rows(pairs[-1], True))])


def _elements(bench: Bench, of: Exchange) -> int:
    """That the longest exchange brings to an expert rank: every rank comes to the same."""
    many = 1 << 12
    while 2 * many <= ELEMENTS[bench.order.device]:
        each = max(1, 2 * many // of.ag)
        if max(of.slowest([_once(bench, of.rows(each, True))])) > bench.sizes.longest_s:
            break
        many *= 2
    return many


def _both_ways(of: Exchange, forth: Callable[..., Any], back: Callable[..., Any]) -> tuple[float, float]:
    """Seconds of the longest exchange alone, and while as much travels the other way."""

    def both() -> None:
        for work in [way(async_op=True) for way in (forth, back)]:
            work.wait()

    alone, together = of.medians([forth, both])
    return alone, together


def _beside(bench: Bench, of: Exchange, travel: Callable[..., Any]) -> tuple[float, float]:
    """Seconds of a product alone, and while the longest exchange is on its way."""
    s = bench.sizes
    x, w = bench.new(128, s.hidden), bench.new(s.hidden, s.expert_hidden)
    on_the_way: list[Any] = []

    def product() -> None:
        x @ w

    def send() -> None:
        while on_the_way:
            on_the_way.pop().wait()
        of.meet()
        on_the_way.append(travel(async_op=True))

    (alone,) = of.medians([product])
    found = bench.seconds([product], send, settled=False)[0]
    on_the_way.pop().wait()
    return alone, statistics.median(of.slowest(found))


def main(text: str) -> None:
    order = Order.of(text)
    signal.alarm(order.patience_s)  # whatever becomes of the others, and of who started this
    torch.set_num_threads(1)
    if order.device == "cuda":
        torch.accelerator.set_device_index(order.rank)
    bench = Bench(order)
    backend = "nccl" if order.device == "cuda" else "gloo"
    meet = Path(order.meet).as_uri()
    dist.init_process_group(backend, init_method=meet, rank=order.rank, world_size=order.world, timeout=PATIENCE)
    ranks = {split: list(range(sum(split))) for split in order.splits}
    groups = {split: (dist.new_group(ranks[split]), dist.new_group(ranks[split])) for split in order.splits}
    if order.rank == 0:
        products(bench)
        attention(bench)
    for split, pair in groups.items():
        if order.rank < sum(split):
            exchanges(bench, pair, split)
        dist.barrier()  # a split at a time
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
