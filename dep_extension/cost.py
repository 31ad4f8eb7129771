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

    @property
    def expert_bytes(self) -> float:
        """Of one expert of one layer."""
        return 3 * self.hidden * self.expert_hidden * self.weight_bytes

    @property
    def trunk_bytes(self) -> float:
        """Of attention and shared experts of all layers."""
        attention = 2 * self.hidden * self.heads * (self.d_k + self.d_v)
        return self.layers * self.weight_bytes * (attention + 3 * self.shared * self.hidden * self.expert_hidden)

    @property
    def token_kv_bytes(self) -> float:
        elements = self.heads * (self.d_k + self.d_v) if self.kv_elements is None else self.kv_elements
        return self.layers * elements * self.kv_bytes


@dataclass(frozen=True)
class Machine:
    """Fitted costs, in seconds; `links` by split. `memory_bytes` of one GPU. `overlap`: how much slower compute runs beside
    a transfer (1: not at all). `count_s`: seconds of the exchange of counts."""

    name: str
    gpus: int
    memory_bytes: float
    gemm: Line
    attention: Line
    links: Mapping[Split, Line]
    count_s: float = 0.0
    overlap: float = 1.0
    source: str = ""

    def link(self, split: Split) -> Line:
        """Of this split; between fitted ones the line of the nearest ratio, its slope scaled to what an expert GPU's
        share of the traffic has to pass."""
        if split in self.links:
            return self.links[split]
        ratio = math.log(split.ag / split.eg)
        near = min(self.links, key=lambda known: abs(math.log(known.ag / known.eg) - ratio))
        a, b = self.links[near]
        return Line(a, b * max(1.0, split.ag / split.eg) / max(1.0, near.ag / near.eg))


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
    """Of one layer: multi-head attention as the paper counts it."""
    tokens, m = samples * length, model
    projections = 2 * machine.gemm(tokens * m.hidden * m.heads * m.d_k)
    projections += 2 * machine.gemm(tokens * m.hidden * m.heads * m.d_v)
    return projections + machine.attention(m.heads * samples * length**2 * (m.d_k + m.d_v))


def shared_s(model: Model, machine: Machine, samples: int, length: int) -> float:
    if model.shared == 0:
        return 0.0
    return 3 * model.shared * machine.gemm(samples * length * model.hidden * model.expert_hidden)


def expert_s(model: Model, machine: Machine, split: Split, tokens: float) -> float:
    """`tokens` for each of a GPU's experts."""
    local = math.ceil(model.experts / split.eg)
    return 3 * local * machine.gemm(tokens * model.hidden * model.expert_hidden)


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
