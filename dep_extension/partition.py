"""What fits where: how many samples an attention GPU has room for, how many GPUs the experts need at least, which rank holds
which. Knows sizes; knows nothing of time.

    attention GPU   attention and shared experts of all layers, whole; keys and values and activations of r1 micro-batches
    expert GPU      its share of every layer's routed experts, and a chunk's rows on their way in and out
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dep_extension.cost import Machine, Model, Split

RESERVE = 0.9  # of a GPU's memory is planned with: the rest is the allocator's, the libraries' and the driver's
ACTIVATIONS = (
    8  # times the hidden states of a micro-batch that its pass holds at once, projections and attention included
)


@dataclass(frozen=True)
class Room:
    """Bytes that an attention GPU has beside its weights, and what a sample takes of them."""

    free_bytes: float
    kv_bytes: float  # of a sample, in all layers
    active_bytes: float  # of a sample that is being computed

    def holds(self, samples: int, r1: int) -> bool:
        """Keys and values of all micro-batches, activations of each: all are between two of their layers at once."""
        return samples >= 1 and r1 >= 1 and r1 * samples * (self.kv_bytes + self.active_bytes) <= self.free_bytes


def room(model: Model, machine: Machine, split: Split, length: int) -> Room | None:
    """None where the weights alone do not fit."""
    memory = RESERVE * machine.memory_bytes
    experts = math.ceil(model.experts / split.eg) * model.layers * model.expert_bytes
    free = memory - model.trunk_bytes
    if experts > memory or free <= 0:
        return None
    return Room(free, length * model.token_kv_bytes, ACTIVATIONS * length * model.hidden * model.weight_bytes)


def largest_r1(fits: Room, samples: int) -> int:
    """Micro-batches of `samples` each that fit."""
    return int(fits.free_bytes // (samples * (fits.kv_bytes + fits.active_bytes)))


def largest_samples(fits: Room) -> int:
    """The most in one micro-batch."""
    return int(fits.free_bytes // (fits.kv_bytes + fits.active_bytes))


def splits(model: Model, gpus: int) -> Iterator[Split]:
    """Every division into two groups of at least one; no more expert GPUs than experts."""
    return (Split(gpus - eg, eg) for eg in range(1, min(gpus - 1, model.experts) + 1))


def shares(experts: int, ranks: int, replicas: int = 1) -> tuple[tuple[int, ...], ...]:
    """Which experts each expert rank holds: their ids, rising. One after the other and then from the first again, until
    each is on `replicas` ranks; sizes differ by one at most. A rank holds none where there are more ranks than experts.

    ValueError where an expert cannot be on so many ranks.
    """
    if experts < 1 or ranks < 1:
        raise ValueError(f"{experts} experts on {ranks} ranks are nothing to share: at least 1 on 1 are needed")
    if not 1 <= replicas <= ranks:
        raise ValueError(f"{replicas} replicas of each expert on {ranks} ranks: ask for 1 to {ranks}")
    ends = [experts * replicas * rank // ranks for rank in range(ranks + 1)]
    return tuple(tuple(sorted(at % experts for at in range(*pair))) for pair in pairwise(ends))


def shares_after(shares: Sequence[Sequence[int]], lost: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """What the ranks that are left hold, in their former order, once those in `lost` (their numbers) are gone: what they
    held before, and what nobody holds any more, each given to whoever then holds the fewest, the first of them.

    ValueError where no rank is left, or where one is lost that was not there.
    """
    gone = set(lost)
    strange = sorted(gone - set(range(len(shares))))
    if strange:
        raise ValueError(f"rank {strange[0]} is lost of {len(shares)} expert ranks: they count from 0")
    left = [set(held) for rank, held in enumerate(shares) if rank not in gone]
    if not left:
        raise ValueError(f"{len(gone)} of {len(shares)} expert ranks are lost, 0 are left: at least 1 is needed")
    orphans = {expert for held in shares for expert in held} - set().union(*left)
    for expert in sorted(orphans):
        min(left, key=len).add(expert)
    return tuple(tuple(sorted(held)) for held in left)
