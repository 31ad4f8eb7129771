"""Expert parallelism without two groups: every GPU attends to its own samples and holds its share of the experts, and rows
are exchanged among all of them, there and back. The baseline that disaggregation has to beat. Priced with the same lines and
executed by its own simulation. Knows costs, memory and two resources; knows no files.

    serial       attention | shared | exchange .. | experts | exchange back .. | next layer
    overlapped   two micro-batches take turns: one computes while the other's rows are under way (as DeepSeek's serving and
                 vLLM's dual-batch overlap do); the better of two orders

    compute   A0 A1 S0 S1 .. E0 .. E1 ..                link   D0 D1 .. C0 .. C1

What a GPU sends and receives crosses its link both ways at once, as in FinDEP; what stays on the GPU crosses nothing. The
line is the one of a split in two halves, where sender and receiver have as much to pass as each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from dep_extension.cost import Split, attention_s, expert_line, shared_s
from dep_extension.imbalance import Burden, burden_of_shares
from dep_extension.partition import IN_AND_OUT, RESERVE, expert_gpu_bytes
from dep_extension.problem import Problem

OVERLAPPED = 2  # micro-batches
MOST_PLACES = 1 << 14  # of a layer, that are tried to be filled: some 20 ms


@dataclass(frozen=True)
class Colocated:
    """What it comes to. `samples`: of a micro-batch on each GPU. `exposed_s`: the link works and nothing is computed."""

    name: str
    gpus: int
    samples: int
    micro_batches: int
    replicas: int
    spare: int | None
    makespan_s: float
    exposed_s: float
    tokens_per_s: float


class Parts(NamedTuple):
    """Seconds of one layer of one micro-batch."""

    attention: float
    shared: float
    counts: float
    exchange: float
    expert: float


def colocated(problem: Problem, gpus: int, spare: int | None = None) -> list[Colocated]:
    """Serial and overlapped, each with its best copies of experts, or with so many spare places, and the most samples that
    fit; fewer where the batch is fixed. Empty where the model does not fit, or an expert would be nowhere."""
    found = [(one, gpus, n) for n in (1, OVERLAPPED) for one in _copied(problem, gpus, spare)]
    done = [one for at in found if (one := _best(*at)) is not None]
    best = (max((c for c in done if c.micro_batches == n), key=_rate, default=None) for n in (1, OVERLAPPED))
    return [one for one in best if one is not None]


def _rate(one: Colocated) -> float:
    return one.tokens_per_s


def _copied(problem: Problem, gpus: int, spare: int | None) -> Iterator[Problem]:
    """Replicas and, where loads are known, spare places: powers of two, from as many as give every GPU an expert."""
    r = max(1, gpus // problem.model.experts)
    while r <= gpus and spare is None:
        yield replace(problem, replicas=r)
        r *= 2
    if problem.skew is not None:
        yield from (replace(problem, spare=n) for n in (spares(problem, gpus) if spare is None else [spare]))


def spares(problem: Problem, ranks: int) -> Iterator[int]:
    """None, powers of two, and as many as let each of the ranks hold every expert; what takes long to place is left out."""
    share = math.ceil(problem.model.experts / ranks)
    most = problem.model.experts - share
    for n in sorted({0, most, *(1 << k for k in range(most.bit_length()))}):
        if n == 0 or ranks * (share + n) <= MOST_PLACES:
            yield n


def _best(problem: Problem, gpus: int, micro_batches: int) -> Colocated | None:
    most = _largest(problem, gpus, micro_batches)
    if problem.samples is not None:
        asked = math.ceil(math.ceil(problem.samples / gpus) / micro_batches)
        if asked > most or (micro_batches - 1) * asked * gpus >= problem.samples:
            return None  # a micro-batch would be empty: this is the serial one
        most = asked
    if most < 1:
        return None
    parts = parts_of(problem, gpus, most)
    seconds, exposed = _timed(parts, problem.model.layers, micro_batches, problem.machine.overlap)
    samples = micro_batches * most * gpus if problem.samples is None else problem.samples
    name = "colocated" if micro_batches == 1 else "colocated, two overlapped"
    tokens = samples * problem.length
    copies = problem.replicas, problem.spare
    return Colocated(name, gpus, most, micro_batches, *copies, seconds, exposed, tokens / seconds)


def _burden(problem: Problem, gpus: int) -> Burden:
    return problem.burden(gpus) or burden_of_shares(None, problem.model.experts, gpus, 1)


def _largest(problem: Problem, gpus: int, micro_batches: int) -> int:
    """Samples in a micro-batch on each GPU that memory has room for, beside the trunk and the GPU's experts."""
    model, length = problem.model, problem.length
    if not problem.has_places(gpus):
        return 0
    found = _burden(problem, gpus)
    free = RESERVE * problem.machine.memory_bytes - model.trunk_bytes - expert_gpu_bytes(model, found.experts)
    hidden = length * model.hidden * model.weight_bytes
    rows = IN_AND_OUT * hidden * model.choices * gpus * float(found.most_C.max()) / model.experts
    waiting = length * (model.token_kv_bytes + model.token_waiting_bytes)
    each = micro_batches * waiting + length * model.token_attending_bytes + rows
    return max(0, int(free // each))


def parts_of(problem: Problem, gpus: int, samples: int) -> Parts:
    """Of micro-batches of `samples` on each GPU; the busiest one's experts and exchange, the mean over measured chunks."""
    model, machine = problem.model, problem.machine
    found = _burden(problem, gpus)
    tokens = math.ceil(samples * gpus * model.choices * problem.length / model.experts)  # of an expert
    busiest = tokens * float(found.most_C.mean())
    return Parts(
        attention_s(model, machine, samples, problem.length),
        shared_s(model, machine, samples, problem.length),
        machine.count_s,
        machine.link(Split(gpus, gpus))(busiest * model.hidden * (gpus - 1) / gpus),
        expert_line(model, machine, found.experts)(busiest),
    )


def _timed(parts: Parts, layers: int, micro_batches: int, overlap: float) -> tuple[float, float]:
    """Makespan and what of the link was exposed. Compute is slower beside transfers only where it runs beside them."""
    if micro_batches > 1:
        slow = parts._replace(
            attention=overlap * parts.attention, shared=overlap * parts.shared, expert=overlap * parts.expert
        )
        return min(simulate(slow, layers, order) for order in ORDERS)
    there = parts.counts + parts.exchange
    beside = max(overlap * parts.shared, there) if parts.shared else there  # shared experts beside the way there
    exposed = beside - overlap * parts.shared + parts.exchange
    return layers * (parts.attention + beside + parts.expert + parts.exchange), layers * exposed


ORDERS = ("A0 A1 S0 S1 E0 E1", "A0 S0 A1 S1 E0 E1", "A0 A1 S0 E0 S1 E1")  # of compute, in a layer


def simulate(parts: Parts, layers: int, order: str) -> tuple[float, float]:
    """Two micro-batches over all layers: makespan and exposed seconds of the link, which takes exchanges as they come."""
    compute = link = 0.0
    spans: list[tuple[float, float]] = []  # of compute
    moved: list[tuple[float, float]] = []
    sent, back = [0.0, 0.0], [0.0, 0.0]
    for what, i in [(word[0], int(word[1])) for word in order.split()] * layers:
        needs = {"A": back[i], "S": 0.0, "E": sent[i]}[what]
        start = max(compute, needs)
        compute = start + {"A": parts.attention, "S": parts.shared, "E": parts.expert}[what]
        spans.append((start, compute))
        if what != "S":
            begin = max(link, compute)
            link = begin + parts.exchange + (parts.counts if what == "A" else 0.0)
            moved.append((begin, link))
            (sent if what == "A" else back)[i] = link
    end = max(compute, link)
    return end, end - _covered(spans) - _idle(spans, moved, end)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Spans of one resource, which do not overlap."""
    return sum(end - start for start, end in spans)


def _idle(spans: list[tuple[float, float]], moved: list[tuple[float, float]], end: float) -> float:
    """Seconds in which neither computes nor moves anything."""
    reached = idle = 0.0
    for start, stop in sorted(spans + moved):
        idle += max(0.0, start - reached)
        reached = max(reached, stop)
    return idle + end - reached
