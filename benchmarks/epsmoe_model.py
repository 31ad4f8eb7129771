"""EPS-MoE's own model with constants from its own layer times: exchanges and products of a layer, stages, where they pay.
Knows what the paper printed (`epsmoe_paper.py`) and computes each of its cells; writes nothing.

One set of constants for every cell, read off the ablation's rows 0 to 2 and one column of rows 7 and 9 before anything was
compared. What the paper does not print (how many tokens a DeepSeek-V2 pass has) is assumed once, below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.epsmoe_paper import (
    ABLATION,
    ABLATION_GPUS,
    ABLATION_INPUT,
    COLUMNS,
    DBRX,
    DBRX_BATCH,
    DBRX_GAIN,
    DBRX_LENGTH,
    DBRX_LESS,
    DBRX_PRINTED_GAIN,
    DBRX_TTFT_S,
    E0,
    E1,
    LENGTHS_V2,
    MIXTRAL,
    MIXTRAL_BATCH,
    MIXTRAL_LENGTHS,
    MIXTRAL_LESS,
    MIXTRAL_TTFT_S,
    SM_MS,
    SMALL_M,
    SMALL_M_GPUS,
    V2,
    V2_GAIN,
    V2_TOKENS_PER_S,
    Column,
    Network,
    Row,
)

TIME, POINTS = 0.15, 3.0  # what counts as reproduced: share of a time, points of a gain
V2_ROWS = 3072  # per expert and pass: the ablation's largest, since the paper does not say
LOCAL = 20  # experts of a GPU: DeepSeek-V2's 160 on 8; the paper's PN are divisors of it
TABLE = Network("the ablation", ABLATION_INPUT, 1536, 160, 6, 1, ABLATION_GPUS, False, 0)


class Cell(NamedTuple):
    table: str
    cell: str
    paper: float
    ours: float
    unit: str  # "ms" or "%"
    takes: str  # what the paper's figure would need, where ours is not it
    fitted: bool = False
    low: float | None = None  # where the paper prints a range of cells up to `paper`

    @property
    def reproduced(self) -> bool:
        if self.low is not None and self.low <= self.ours <= self.paper:
            return True
        near = TIME * abs(self.paper) if self.unit == "ms" else POINTS
        return abs(self.ours - self.paper) <= near

    @property
    def verdict(self) -> str:
        return "fitted" if self.fitted else "reproduced" if self.reproduced else "short" if self._less else "over"

    @property
    def _less(self) -> bool:
        """A longer time is as much a shortfall as a smaller gain."""
        return (self.ours < self.paper) == (self.unit == "%")


# The constants


def link_ms(column: Column, fp8: bool = False) -> float:
    """Both exchanges of one layer. FP8 halves their bytes, so rows 0 and 1 differ by half of them; where the paper's row 1
    is the slower one (m = 256, o = 1536), the straight line through the other two of that width."""
    whole = 2 * (_ablation(0, column) - _ablation(1, column))
    if whole <= 0:
        whole = line(lambda m: link_ms(Column(m, column.o)))(column.m)
    return whole / 2 if fp8 else whole


def product_ms(column: Column, dense: bool) -> float:
    """What is left of rows 0 or 2 once the exchanges are taken away."""
    return _ablation(2 if dense else 0, column) - link_ms(column)


def line(of: Callable[[int], float]) -> Callable[[float], float]:
    """Through m = 1024 and 3072."""
    low, high = of(1024), of(3072)
    slope = (high - low) / (3072 - 1024)
    return lambda m: low + slope * (m - 1024)


def _ablation(row: int, column: Column) -> float:
    return ABLATION[row].ms[COLUMNS.index(column)]


FITTED = Column(3072, 1536)


def overhead(column: Column = FITTED) -> tuple[float, float]:
    """k_o and b of R(N) = k_o N + b, in ms: what rows 7 and 9 of a column take beyond a perfect pipeline."""
    five, twenty = (_ablation(row, column) - pipelined(link_ms(column), product_ms(column, True), n)
                    for row, n in ((7, 5), (9, 20)))  # fmt: skip
    k_o = (twenty - five) / 15
    return k_o, five - 5 * k_o


def ratio_of(width: float) -> float:
    """Dense over grouped by output width, at m = 3072: straight in the logarithm between the ablation's two, flat beyond."""
    narrow, wide = (product_ms(Column(3072, o), True) / product_ms(Column(3072, o), False) for o in (1536, 15360))
    at = min(1.0, max(0.0, math.log(width / 1536) / math.log(10)))
    return narrow + at * (wide - narrow)


# The model


def pipelined(link: float, product: float, n: int) -> float:
    """n stages on one GPU and one link, stage by stage: dispatches go first, a stage's rows return once it is multiplied."""
    half, each = link / 2 / n, product / n
    at_link = at_gpu = 0.0
    done = []
    for _ in range(n):
        at_link += half
        at_gpu = max(at_gpu, at_link) + each
        done.append(at_gpu)
    for ready in done:
        at_link = max(at_link, ready) + half
    return at_link


def layer(link: float, product: float, n: int) -> float:
    k_o, b = overhead()
    return pipelined(link, product, n) + (k_o * n + b if n > 1 else 0.0)


def reached(net: Network) -> float:
    """GPUs that a token's experts lie on, on average, under even routing (the paper's g)."""
    local = net.experts // net.gpus
    missed = math.comb(net.experts - local, net.top_k) / math.comb(net.experts, net.top_k)
    return net.gpus * (1 - missed)


def volume(net: Network, tokens: float) -> float:
    """Of the exchanges, per GPU: g (P / D^2) (D - 1), P = tokens x hidden (the paper's section on parallel strategies)."""
    return reached(net) * tokens * net.hidden / net.gpus**2 * (net.gpus - 1)


def times(net: Network, tokens: float) -> tuple[float, float, float]:
    """Link, grouped and dense ms of one layer, scaled from the ablation by volume and by multiplications per GPU."""
    table_tokens = FITTED.m * TABLE.experts / TABLE.top_k
    link = link_ms(FITTED) * volume(net, tokens) / volume(TABLE, table_tokens)
    per = product_ms(FITTED, False) / (table_tokens * TABLE.top_k / TABLE.gpus * ABLATION_INPUT * FITTED.o)
    rows = tokens * net.top_k / net.gpus
    up, down = (per * rows * net.hidden * net.inner * many for many in (2, 1))  # gate and up are one product
    return link, up + down, up * ratio_of(2 * net.inner) + down * ratio_of(net.hidden)


def less_by_parallel(net: Network, tokens: float) -> float:
    """ms of a layer that attention cut by heads with experts whole saves over cutting both: 2 (P/D)(D-1) against
    (P/D)(D-1) + g (P/D^2)(D-1)."""
    link, _, _ = times(net, tokens)
    whole = tokens * net.hidden / net.gpus * (net.gpus - 1)
    return link / volume(net, tokens) * (whole - volume(net, tokens))


# The tables


def ablation() -> Iterator[Cell]:
    for number, row in enumerate(ABLATION):
        if row.pn == 1:
            continue
        for column in COLUMNS:
            ours = predicted(row, column)
            paper = row.ms[COLUMNS.index(column)]
            name = f"{number}: PN={row.pn} {'dense' if row.dense else 'grouped'}{' FP8' if row.fp8 else ''}"
            name += f"{f' {row.sm} SM' if row.sm else ''}, m={column.m} o={column.o}"
            fitted = number in (7, 9) and column == FITTED
            yield Cell("ablation", name, paper, ours, "ms", f"{paper - ours:+.2f} ms of product or overhead", fitted)


def predicted(row: Row, column: Column) -> float:
    found = layer(link_ms(column, row.fp8), product_ms(column, row.dense), row.pn)
    return found * (sm_factor(column.m) if row.sm == 116 else 1.0)


def sm_factor(m: int) -> float:
    """Of 116 SMs against 132: straight in log m between the two sizes of the paper's table."""
    small, large = (SM_MS[size][116] / SM_MS[size][132] for size in (192, 3072))
    return small + (large - small) * min(1.0, math.log(m / 192) / math.log(3072 / 192))


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


class Degree(NamedTuple):
    """Of a column: N* = sqrt(C / k_o), as a divisor of 20; the best of those that the paper printed by the rule, by the
    model (which adds b), and as printed."""

    column: str
    ideal: float
    divisor: int
    rule: int
    model: int
    printed: int


def degrees() -> Iterator[Degree]:
    """Dense rows; FP8 has none with one stage."""
    k_o, _ = overhead()
    for fp8, rows in ((False, (2, 7, 9)), (True, (None, 8, 10))):
        for column in COLUMNS:
            link, product = link_ms(column, fp8), product_ms(column, True)
            measured = {n: _ablation(row, column) for n, row in zip((1, 5, 20), rows, strict=True) if row is not None}
            model = {n: layer(link, product, n) for n in measured}
            ideal = math.sqrt(min(link, product) / k_o)
            found = stages(link, product, k_o, LOCAL)
            name = f"m={column.m} o={column.o}{' FP8' if fp8 else ''}"
            saved = {n: min(link, product) * (n - 1) / n - k_o * (n - 1) for n in measured}
            best = max(saved, key=lambda n: saved[n])
            yield Degree(
                name, ideal, found, best, min(model, key=lambda n: model[n]), min(measured, key=lambda n: measured[n])
            )


def threshold() -> int:
    """Rows per expert from which two stages pay by the paper's rule, with the ablation's straight lines."""
    link = line(lambda m: link_ms(Column(m, 1536)))
    product = line(lambda m: product_ms(Column(m, 1536), False))
    for m in range(100, 20000, 10):
        if pays(link, lambda tokens, experts: product(tokens) * experts / LOCAL, m, LOCAL, 2, (E0, E1)):
            return m
    raise ValueError("two stages never pay")


def small() -> Iterator[Cell]:
    """Gain of two stages in ratio: the table's own layer is another (fewer milliseconds than the ablation's lines give)."""
    link, product = (
        line(of) for of in (lambda m: link_ms(Column(m, 1536)), lambda m: product_ms(Column(m, 1536), False))
    )
    more = TABLE._replace(gpus=SMALL_M_GPUS)
    by_link = volume(more, 1.0) / volume(TABLE, 1.0)
    for m, (base, two) in SMALL_M.items():
        c, g = link(m) * by_link, product(m) * TABLE.gpus / SMALL_M_GPUS
        ours = 100 * (1 - layer(c, g, 2) / (c + g))
        left = min(c, g) / 2 - (1 - two / base) * (c + g)
        takes = f"two stages costing {left:.2f} ms, not {overhead()[0] * 2 + overhead()[1]:.2f}"
        yield Cell("small m", f"m={m}, PN=2", 100 * (1 - two / base), ours, "%", takes)


def deepseek() -> Iterator[Cell]:
    tokens = V2_ROWS * V2.experts / V2.top_k
    link, grouped, dense = times(V2, tokens)
    for i, length in enumerate(LENGTHS_V2):
        base = _base_ms(length, tokens, grouped)
        for pn, gains in V2_GAIN.items():
            saved = link + grouped - layer(link, dense, pn)
            wanted = base * (1 - 1 / (1 + gains[i] / 100))
            takes = _takes(link, grouped, dense, pn, wanted)
            yield Cell(
                "DeepSeek-V2", f"{length} tokens, PN={pn}", gains[i], 100 * (base / (base - saved) - 1), "%", takes
            )


def switched(length: int, ratio: float) -> float:
    """Per cent that the kernel switch alone gains on DeepSeek-V2, were dense products `ratio` of grouped ones."""
    tokens = V2_ROWS * V2.experts / V2.top_k
    _, grouped, _ = times(V2, tokens)
    base = _base_ms(length, tokens, grouped)
    return 100 * (base / (base - grouped * (1 - ratio)) - 1)


def _base_ms(length: int, tokens: float, grouped: float) -> float:
    """Of a DeepSeek-V2 layer under the paper's baseline. The headline's throughput is of the shortest length."""
    first = 1e3 * tokens / V2_TOKENS_PER_S / V2.layers
    return first + grouped * V2.attention_flops * (length - LENGTHS_V2[0]) / 2 / _expert_flops(V2)


def _expert_flops(net: Network) -> float:
    """Multiplications of a token."""
    return 3.0 * net.top_k * net.hidden * net.inner


def _takes(link: float, grouped: float, dense: float, pn: int, wanted: float) -> str:
    """`wanted`: ms to be saved. One stage: a quicker dense product; several: cheaper stages on top of ours."""
    if pn == 1:
        return f"dense products in {(grouped - wanted) / grouped:.2f} of the grouped time, not {dense / grouped:.2f}"
    left = link + grouped - wanted - pipelined(link, dense, pn)
    return f"{pn} stages costing {left:+.2f} ms a layer, not {overhead()[0] * pn + overhead()[1]:.2f}"


def mixtral() -> Iterator[Cell]:
    for i, (length, ttft) in enumerate(zip(MIXTRAL_LENGTHS, MIXTRAL_TTFT_S, strict=True)):
        tokens, base = MIXTRAL_BATCH * length, 1e3 * ttft / MIXTRAL.layers
        for name, less in MIXTRAL_LESS.items():
            yield _less("Mixtral-8x7B", MIXTRAL, f"{length} tokens, {name}", name, tokens, base, less[i])


def _less(table: str, net: Network, cell: str, name: str, tokens: float, base: float, paper: float) -> Cell:
    """Per cent less time to the first token; `base` ms of a layer."""
    link, grouped, dense = times(net, tokens)
    parallel = less_by_parallel(net, tokens)
    if name == "TP+EP":
        needs = f"links {paper / 100 * base / parallel:.1f} times as slow as the ablation's"
        return Cell(table, cell, paper, 100 * parallel / base, "%", needs)
    pn = int(name.removeprefix("PN="))
    saved = parallel + link + grouped - layer(link, dense, pn)
    return Cell(table, cell, paper, 100 * saved / base, "%",
                _takes(link, grouped, dense, pn, paper / 100 * base - parallel))  # fmt: skip


def dbrx() -> Iterator[Cell]:
    tokens, base = DBRX_BATCH * DBRX_LENGTH, 1e3 * DBRX_TTFT_S / DBRX.layers
    for name, (least, most) in DBRX_LESS.items():
        cell = _less("DBRX", DBRX, f"{DBRX_BATCH} x {DBRX_LENGTH} tokens, {name}", name, tokens, base, most)
        yield cell._replace(low=least if name == "PN=1" else None)
    two = _less("DBRX", DBRX, "", "PN=2", tokens, base, DBRX_LESS["PN=2"][1])
    gain = 100 * (1 / (1 - two.ours / 100) - 1)
    yield Cell("DBRX", f"as throughput, same batch and length (printed: +{DBRX_PRINTED_GAIN} %)", DBRX_GAIN, gain, "%",
               f"{two.takes}; +{DBRX_PRINTED_GAIN} % compares two operating points")  # fmt: skip


def all_cells() -> list[Cell]:
    return [*ablation(), *small(), *deepseek(), *mixtral(), *dbrx()]
