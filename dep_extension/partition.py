"""What fits where: how many samples an attention GPU has room for, how many GPUs the experts need at least, which rank holds
which. Knows sizes; knows nothing of time.

    attention GPU   attention and shared experts of all layers, whole; what r1 micro-batches keep there
    expert GPU      its share of every layer's routed experts, and a micro-batch's rows on their way in and out
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from dep_extension.cost import Machine, Model, Split

RESERVE = 0.9  # of a GPU's memory is planned with: the rest is the allocator's, the libraries' and the driver's
IN_AND_OUT = 2  # times an expert GPU's rows: as they came, and what becomes of them


@dataclass(frozen=True)
class Room:
    """Bytes that a GPU of each group has beside its weights, and what a sample takes of them."""

    free_bytes: float  # of an attention GPU
    waiting_bytes: (
        float  # of a sample there as long as it is: keys and values of all layers, and what went to the experts
    )
    attending_bytes: float  # of a sample whose micro-batch attends
    expert_free_bytes: float = math.inf
    rows_bytes: float = 0.0  # on an expert GPU, of a micro-batch with one sample on each attention GPU

    def holds(self, samples: int, r1: int) -> bool:
        """All micro-batches wait, one attends at a time. An expert GPU has one micro-batch's rows: those of the next come in
        as its own go out."""
        return samples >= 1 and r1 >= 1 and r1 <= largest_r1(self, samples)


def room(
    model: Model, machine: Machine, split: Split, length: int, local: int | None = None, most: float | None = None
) -> Room | None:
    """None where the weights alone do not fit. `local`: experts on the fullest GPU; `most`: what the busiest one gets, as
    many times a balanced expert's tokens. None: no expert is twice, and all are alike."""
    memory = RESERVE * machine.memory_bytes
    experts = expert_gpu_bytes(model, math.ceil(model.experts / split.eg) if local is None else local)
    free = memory - model.trunk_bytes
    if experts > memory or free <= 0:
        return None
    rows = length * split.ag * model.choices * (model.experts / split.eg if most is None else most) / model.experts
    return Room(
        free,
        length * (model.token_kv_bytes + model.token_waiting_bytes),
        length * model.token_attending_bytes,
        memory - experts,
        IN_AND_OUT * rows * model.hidden * model.weight_bytes,
    )


def expert_gpu_bytes(model: Model, local: int) -> float:
    """Weights of `local` experts of every layer."""
    return local * model.layers * model.expert_bytes


class Need(NamedTuple):
    """What the fuller GPU of a split needs at least, and the split that needs least."""

    split: Split
    n_bytes: float


def least(
    model: Model,
    splits: Iterable[Split],
    length: int,
    samples: int | None,
    micro_batches: int,
    replicas: int = 1,
    spare: int = 0,
) -> Need:
    """Of these splits: weights and one sample on each attention GPU, or `samples` in all, in so many micro-batches."""
    found = []
    for split in splits:
        each = 1 if samples is None else math.ceil(samples / split.ag)
        at_once = math.ceil(each / micro_batches)
        hidden = length * model.hidden * model.weight_bytes
        waiting = each * length * (model.token_kv_bytes + model.token_waiting_bytes)
        attention = model.trunk_bytes + waiting + at_once * length * model.token_attending_bytes
        rows = IN_AND_OUT * hidden * at_once * split.ag * model.choices / split.eg
        local = min(model.experts, math.ceil(model.experts * replicas / split.eg) + spare)
        found.append(Need(split, max(attention, expert_gpu_bytes(model, local) + rows) / RESERVE))
    return min(found, key=lambda need: need.n_bytes)


def largest_r1(fits: Room, samples: int) -> int:
    """Micro-batches of `samples` each that fit."""
    if samples * fits.rows_bytes > fits.expert_free_bytes:
        return 0
    return max(0, int((fits.free_bytes / samples - fits.attending_bytes) // fits.waiting_bytes))


def largest_samples(fits: Room, r1: int = 1) -> int:
    """The most in each of `r1` micro-batches."""
    attended = fits.free_bytes // (r1 * fits.waiting_bytes + fits.attending_bytes)
    passed = fits.expert_free_bytes // fits.rows_bytes if fits.rows_bytes else math.inf
    most = int(max(0.0, min(attended, passed)))
    return most if most == 0 or fits.holds(most, r1) else most - 1  # by a rounding error


def splits(model: Model, gpus: int, replicas: int = 1) -> Iterator[Split]:
    """Every division into two groups of at least one; no more expert GPUs than there are copies of experts, no fewer than
    there are of each."""
    return (Split(gpus - eg, eg) for eg in range(replicas, min(gpus - 1, replicas * model.experts) + 1))


def shares(experts: int, ranks: int, replicas: int = 1) -> tuple[tuple[int, ...], ...]:
    """Which experts each expert rank holds: their ids, rising. One after the other and then from the first again, until
    each is on `replicas` ranks; sizes differ by one at most. A rank holds none where there are more ranks than experts.

    ValueError where an expert cannot be on so many ranks.
    """
    ends = bounds(experts, ranks, replicas)
    return tuple(tuple(sorted(at % experts for at in range(*pair))) for pair in pairwise(ends))


def bounds(experts: int, ranks: int, replicas: int) -> list[int]:
    """Where each rank's run begins, and the last one's ends, in all copies one after the other."""
    if experts < 1 or ranks < 1:
        raise ValueError(f"{experts} experts on {ranks} ranks are nothing to share: at least 1 on 1 are needed")
    if not 1 <= replicas <= ranks:
        raise ValueError(f"{replicas} replicas of each expert on {ranks} ranks: ask for 1 to {ranks}")
    return [experts * replicas * rank // ranks for rank in range(ranks + 1)]


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
