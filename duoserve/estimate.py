"""How long a token and a prompt should take on a machine, and what no engine could beat. Pure arithmetic on plain values:
knows what a pass needs and what a machine does in a second; knows nothing of models, files or devices.

    decode    step = operations + trunk and head + per layer max(read of the missing, resident experts) + missing experts
    limit     the larger of missing bytes / disk (or link) and bytes read / memory: both at once, nothing else
    prefill   the larger of compute and the stream of what is absent

Routes are taken to be uniform and independent, so that a hit is as likely as residency says; real routers repeat themselves
and do better. Reading begins when a layer's route is known, so within a layer only resident experts overlap it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from duoserve.profile import Launch, Profile

COPIES = 2  # transformers' growing cache is read and written once more with every token


class LayerNeeds(NamedTuple):
    """One MoE layer: its experts, how many a token takes, and the size of each."""

    experts: int
    choices: int
    slab_bytes: int
    weights: int  # of one expert


class Product(NamedTuple):
    """Matrices of the trunk, of one format, that a pass multiplies: all of its rows, or (a head) the last one only."""

    format: str
    weights: int
    last_row_only: bool


@dataclass(frozen=True)
class Needs:
    """What one token needs, wherever it runs. `ops`: operations of the stock model in a pass of one token.

    Attention's FLOPs are four for each head, query, key and dimension, masked or not.
    """

    layers: tuple[LayerNeeds, ...]
    expert_format: str
    trunk: tuple[Product, ...]
    trunk_bytes: int  # read by every pass, head included, tables looked up in not
    kv_bytes: int  # that a token reads and the cache copies, `context` tokens in
    ops: int
    context: int  # tokens behind a decoded token, and of the prompt
    token_attention_flops: int
    prompt_attention_flops: int

    @property
    def active_bytes(self) -> int:
        """Of the experts that one token takes."""
        return sum(layer.choices * layer.slab_bytes for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        layers = [layer._asdict() for layer in self.layers]
        trunk = [product._asdict() for product in self.trunk]
        return asdict(self) | {"layers": layers, "trunk": trunk, "active_bytes": self.active_bytes}


class Shares(NamedTuple):
    """Where the nearest copy of an expert lies, as shares of all experts."""

    slots: float
    host: float
    disk: float


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes per decoded token, and seconds of a prompt. `low` has operations at their cheapest."""

    token_bytes: int  # read by the kernels: trunk, experts, keys and values
    missed_bytes: float
    misses: float
    resident_s: float  # a step with everything resident
    token_s: float
    low_s: float
    limit_s: float
    limited_by: str
    prompt: int
    prompt_compute_s: float
    prompt_stream_s: float

    @property
    def prompt_s(self) -> float:
        return max(self.prompt_compute_s, self.prompt_stream_s)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "prompt_s": self.prompt_s,
            "tokens_per_s": 1 / self.token_s,
            "limit_tokens_per_s": 1 / self.limit_s,
        }


class _Road(NamedTuple):
    """How a missing slab comes: its mean bytes/s alone, and in company."""

    alone: float
    together: float


class Limit(NamedTuple):
    """Seconds that no engine could beat, and what they are spent on: memory, disk or link."""

    seconds: float
    by: str


def limit(read_bytes: float, moved_bytes: float, memory: float, road: float, road_name: str) -> Limit:
    """Kernels read `read_bytes` at `memory` bytes/s while `moved_bytes` come at `road` bytes/s; nothing else is done."""
    memory_s, road_s = read_bytes / memory, moved_bytes / road
    return Limit(memory_s, "memory") if memory_s >= road_s else Limit(road_s, road_name)


def estimate(needs: Needs, shares: Shares, profile: Profile) -> Estimate:
    missed = (1 - shares.slots) * needs.active_bytes
    token_bytes = needs.trunk_bytes + needs.active_bytes + needs.kv_bytes
    road = {layer: _road(layer.slab_bytes, shares, profile) for layer in set(needs.layers)}
    fastest = max(road[layer].together for layer in needs.layers)
    road_name = "link" if profile.link and shares.disk == 0 else "disk"
    least = limit(token_bytes, missed, profile.memory, fastest, road_name)
    return Estimate(
        token_bytes=token_bytes,
        missed_bytes=missed,
        misses=(1 - shares.slots) * sum(layer.choices for layer in needs.layers),
        resident_s=_step(needs, 1.0, profile, profile.cold, road),
        token_s=_step(needs, shares.slots, profile, profile.cold, road),
        low_s=_step(needs, shares.slots, profile, profile.warm, road),
        limit_s=least.seconds,
        limited_by=least.by,
        prompt=needs.context,
        prompt_compute_s=_prompt_compute(needs, profile),
        prompt_stream_s=sum(
            (1 - shares.slots) * _distinct(layer, needs.context) * layer.slab_bytes / road[layer].together
            for layer in needs.layers
        ),
    )


def _step(needs: Needs, residency: float, profile: Profile, launch: Launch, road: dict[LayerNeeds, _Road]) -> float:
    trunk = sum(part.weights * profile.weight_s(part.format, 1) for part in needs.trunk)
    rest = needs.ops * launch.op_s + needs.token_attention_flops / profile.attention.decode
    rest += COPIES * needs.kv_bytes / profile.memory
    return trunk + rest + sum(_layer(layer, needs, residency, profile, launch, road[layer]) for layer in needs.layers)


def _layer(layer: LayerNeeds, needs: Needs, residency: float, profile: Profile, launch: Launch, road: _Road) -> float:
    """Mean over how many of the chosen are absent."""
    k = layer.choices
    expert_s = layer.weights * profile.weight_s(needs.expert_format, 1) + launch.expert_s
    total = launch.layer_s
    for absent in range(k + 1):
        chance = math.comb(k, absent) * (1 - residency) ** absent * residency ** (k - absent)
        read_s = absent * layer.slab_bytes / (road.together if absent > 1 else road.alone)
        total += chance * (max(read_s, (k - absent) * expert_s) + absent * expert_s)
    return total


def _road(slab_bytes: int, shares: Shares, profile: Profile) -> _Road:
    """Over the link from host memory, and for what is not there from disk first; without a link, from disk."""
    alone, together = (profile.disk_rate(slab_bytes, threads) for threads in (1, 2))
    if profile.link is None:
        return _Road(alone, together)
    from_disk = shares.disk / max(shares.disk + shares.host, 1e-12)
    link_s = 1 / profile.link.pinned
    return _Road(1 / (link_s + from_disk / alone), 1 / max(link_s, from_disk / together))


def _prompt_compute(needs: Needs, profile: Profile) -> float:
    rows = needs.context
    seconds = needs.prompt_attention_flops / profile.attention.prompt
    seconds += needs.ops * profile.cold.op_s
    seconds += sum(
        part.weights * profile.weight_s(part.format, 1 if part.last_row_only else rows) for part in needs.trunk
    )
    for layer in needs.layers:
        distinct = _distinct(layer, rows)
        each = max(1, round(rows * layer.choices / distinct))
        product = layer.weights * profile.weight_s(needs.expert_format, each)
        seconds += distinct * (product + profile.cold.expert_s) + profile.cold.layer_s
    return seconds


def _distinct(layer: LayerNeeds, rows: int) -> float:
    """Experts that `rows` tokens take between them."""
    return layer.experts * (1 - (1 - layer.choices / layer.experts) ** rows)
