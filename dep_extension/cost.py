"""How long each part of a layer takes, as straight lines over the work in it (FinDEP, section "cost models"). Plain values
and arithmetic: knows no devices, no schedules and no files.

    t_gemm(x) = a + b x, x = m k n        t_attention(y) = a + b y, y = heads * batch * S^2 * (d_k + d_v)
    t_link(z) = a + b z, z = elements that one expert GPU receives or sends; fitted for each split (ag, eg) by itself

    one layer of one micro-batch of m_a samples of S tokens on each attention GPU:
    attention      4 projections and the attention itself
    shared         3 products for each shared expert
    count          the numbers of tokens, ahead of the tokens themselves: one small exchange (FinDEP's model leaves it out)
    a2e, e2a       m_e tokens of each local expert, one way and back
    expert         3 products of each local expert: the factor 3 is lost in the paper's printed coefficients and kept here
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Line(NamedTuple):
    """a + b x, in seconds."""

    a: float
    b: float

    def __call__(self, x: float) -> float:
        return self.a + self.b * x


class Split(NamedTuple):
    """GPUs that attend, and GPUs that hold experts."""

    ag: int
    eg: int


@dataclass(frozen=True)
class Model:
    """What the costs of a model depend on. Bytes are of weights, and of keys and values, as they lie in memory."""

    name: str
    layers: int
    hidden: int
    expert_hidden: int
    experts: int
    choices: int
    shared: int
    heads: int
    d_k: int
    d_v: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    kv_elements: int | None = None  # of a token in a layer; None: heads * (d_k + d_v)
    projections: int | None = None  # weights of a layer's attention; None: multi-head, as the paper counts them
    attending: int | None = None  # elements of a token while its layer attends; None: multi-head, each written once

    @property
    def expert_bytes(self) -> float:
        """Of one expert of one layer."""
        return 3 * self.hidden * self.expert_hidden * self.weight_bytes

    @property
    def attention_weights(self) -> int:
        """Of one layer."""
        if self.projections is not None:
            return self.projections
        return 2 * self.hidden * self.heads * (self.d_k + self.d_v)

    @property
    def trunk_bytes(self) -> float:
        """Of attention and shared experts of all layers."""
        shared = 3 * self.shared * self.hidden * self.expert_hidden
        return self.layers * self.weight_bytes * (self.attention_weights + shared)

    @property
    def token_kv_bytes(self) -> float:
        elements = self.heads * (self.d_k + self.d_v) if self.kv_elements is None else self.kv_elements
        return self.layers * elements * self.kv_bytes

    @property
    def token_waiting_bytes(self) -> float:
        """Of a token whose micro-batch is away at the experts, every micro-batch at once: its residual and normed states,
        the rows that went (kept until they are back, in case an expert GPU is lost), and room for those that come."""
        return (2 + 2 * self.choices) * self.hidden * self.weight_bytes

    @property
    def token_attending_bytes(self) -> float:
        """Of a token while its layer attends: queries, keys, values and what attention makes of them. Of one micro-batch at
        a time. Scores are none of it: kernels that write them take heads * length more, twice."""
        if self.attending is not None:
            return self.attending * self.weight_bytes
        return 2 * self.heads * (self.d_k + self.d_v) * self.weight_bytes


@dataclass(frozen=True)
class Machine:
    """Fitted costs, in seconds; `links` by split. `memory_bytes` of one GPU. `experts`: of one product for all experts of a
    GPU, x = experts m k n; None: a product for each of them, as the paper counts. `overlap`: how much slower compute runs
    beside a transfer (1: not at all). `count_s`: seconds of the exchange of counts. `both_ways`: how much longer an exchange
    takes while as much travels the other way (1: no longer; 2: the link carries no more than it does one way)."""

    name: str
    gpus: int
    memory_bytes: float
    gemm: Line
    attention: Line
    links: Mapping[Split, Line]
    count_s: float = 0.0
    overlap: float = 1.0
    source: str = ""
    experts: Line | None = None
    both_ways: float = 1.0

    def __post_init__(self) -> None:
        """ValueError where something is no cost: not finite, negative, or none at all."""
        lines = {"gemm": self.gemm, "attention": self.attention, "experts": self.experts or self.gemm}
        lines |= {f"link {tuple(at)}": x for at, x in self.links.items()}
        values = {f"{what}.{part}": getattr(line, part) for what, line in lines.items() for part in Line._fields}
        values |= {"memory_bytes": self.memory_bytes, "count_s": self.count_s}
        values |= {"overlap": self.overlap, "both_ways": self.both_ways}
        for what, value in values.items():
            least = 1.0 if what in ("memory_bytes", "overlap", "both_ways") else 0.0
            if not least <= value < math.inf:
                raise ValueError(f"{what} of machine {self.name!r} is {value}, a cost is finite and at least {least:g}")
        if self.gpus < 2 or not self.links:
            counted = f"{self.gpus} GPUs and {len(self.links)} links"
            raise ValueError(f"machine {self.name!r} has {counted}: two groups are at least 2 GPUs and 1 link")

    def link(self, split: Split) -> Line:
        """Of this split. Between fitted ones the line between their lines, by the share of GPUs that attend; beyond them a
        slope goes on rising where it rises, and is never below the nearest fitted one."""
        if split in self.links:
            return self.links[split]
        known = sorted((_share(at), line) for at, line in self.links.items())
        at = _share(split)
        right = min(max(1, sum(share < at for share, _ in known)), len(known) - 1)
        if right == 0:
            return known[0][1]
        (x0, low), (x1, high) = known[right - 1 : right + 1]
        w = (at - x0) / (x1 - x0) if x1 > x0 else 0.0
        inside = min(max(w, 0.0), 1.0)
        near = Line(*(p + inside * (q - p) for p, q in zip(low, high, strict=True)))
        return Line(near.a, max(near.b, low.b + w * (high.b - low.b)))


def _share(split: Split) -> float:
    return split.ag / (split.ag + split.eg)


class Durations(NamedTuple):
    """Seconds of the parts of one layer, for one micro-batch and one full chunk of it; `last` of its smaller last chunk."""

    attention: float
    shared: float
    counts: float
    a2e: float
    expert: float
    e2a: float
    last: tuple[float, float, float]  # a2e, expert, e2a


def attention_s(model: Model, machine: Machine, samples: int, length: int) -> float:
    """Of one layer: four projections and the attention itself, as the paper counts them."""
    m = model
    projections = 4 * machine.gemm.a + machine.gemm.b * samples * length * m.attention_weights
    return projections + machine.attention(m.heads * samples * length**2 * (m.d_k + m.d_v))


def shared_s(model: Model, machine: Machine, samples: int, length: int) -> float:
    if model.shared == 0:
        return 0.0
    return 3 * model.shared * machine.gemm(samples * length * model.hidden * model.expert_hidden)


def expert_line(model: Model, machine: Machine, held: int) -> Line:
    """Of a GPU that holds so many experts of a layer, in all the tokens that it gets."""
    macs = model.hidden * model.expert_hidden
    if machine.experts is not None:
        return Line(3 * machine.experts.a, 3 * machine.experts.b * macs)
    return Line(3 * held * machine.gemm.a, 3 * machine.gemm.b * macs)


def expert_s(model: Model, machine: Machine, split: Split, tokens: float) -> float:
    """`tokens` for each of a GPU's experts."""
    local = math.ceil(model.experts / split.eg)
    return expert_line(model, machine, local)(local * tokens)


def link_s(model: Model, machine: Machine, split: Split, tokens: float) -> float:
    return machine.link(split)(model.experts / split.eg * tokens * model.hidden)


def tokens_per_expert(model: Model, split: Split, samples: int, length: int) -> int:
    """Of one micro-batch, were routing balanced: whole tokens, rounded up (somebody gets them)."""
    return math.ceil(samples * split.ag * model.choices * length / model.experts)


def chunks(tokens: int, r2: int) -> tuple[int, int, int]:
    """`tokens` of each expert in at most r2 chunks of whole tokens: how many, and the sizes of each and of the last."""
    size = math.ceil(tokens / r2)
    many = math.ceil(tokens / size)
    return many, size, tokens - (many - 1) * size


def durations(
    model: Model, machine: Machine, split: Split, samples: int, length: int, r2: int
) -> tuple[int, Durations]:
    """Of a layer with micro-batches of `samples` on each attention GPU; first the number of chunks that r2 comes to."""
    many, size, last = chunks(tokens_per_expert(model, split, samples, length), r2)
    a2e, expert = (cost(model, machine, split, size) for cost in (link_s, expert_s))
    rest = link_s(model, machine, split, last)
    return many, Durations(
        attention_s(model, machine, samples, length) * machine.overlap,
        shared_s(model, machine, samples, length) * machine.overlap,
        machine.count_s,
        a2e,
        expert * machine.overlap,
        a2e,
        (rest, expert_s(model, machine, split, last) * machine.overlap, rest),
    )
