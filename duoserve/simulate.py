"""The same engine in virtual time: passes with known routes go through the real cache, transfer, prefill and decode code on
a `ClockDevice`. Knows what a pass chose and what work costs; knows nothing of tensors, files or where either comes from.

    for pass in passes:   begin -> per MoE layer: trunk, then bring(experts chosen) -> what follows the last -> finish
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch

from duoserve.cache import Slot
from duoserve.clock import ClockDevice, Link
from duoserve.core import Key, Phase, Policy, Predictor, Route, Step
from duoserve.decisions import Decisions
from duoserve.device import Device
from duoserve.future import Future
from duoserve.moe import Runtime, Work, open_runtime
from duoserve.store import Store
from duoserve.timeline import Timeline
from duoserve.transfer import Counts, HostTier

__all__ = [
    *(
        "Costs",
        "Driver",
        "Link",
        "Outcome",
        "Pass",
        "PassTime",
        "Shape",
        "Simulation",
        "Slabs",
        "counted",
    ),
    *("passes", "simulate", "undisturbed"),
]


@dataclass(frozen=True)
class Shape:
    """What the scheduler sees of a model and its budget: of each MoE layer its experts and the bytes of one, and the slots.

    `host_slots`: slabs in host memory between the disk and the device; 0 where slabs come from one place (host memory over
    the link, or the disk where slots are host memory).
    """

    experts: tuple[int, ...]
    slab_bytes: tuple[int, ...]
    slots: int
    host_slots: int = 0


class Costs(Protocol):
    """Seconds of the work of one pass. `launch_s`: host time to hand one piece of work to an asynchronous device;
    `predict_s`: of one ranking.
    """

    launch_s: float
    predict_s: float

    def trunk_s(self, layer: int, rows: int, phase: Phase) -> float:
        """All between MoE layer `layer - 1` and `layer`, this one's router included; 0 begins with the embedding, and
        `layer` equal to the number of MoE layers is what follows the last, head included."""
        ...

    def expert_s(self, layer: int, rows: int) -> float:
        """One expert's product with so many rows."""
        ...

    def combine_s(self, layer: int, rows: int) -> float:
        """What a layer takes once, whatever it chose: sorting rows, the sum over experts."""
        ...


class Pass(NamedTuple):
    """One forward pass: of each MoE layer which experts were chosen, by how many rows.

    `step` has the routes as a predictor reads them (ids, hidden states); None where nobody guesses from them.
    """

    phase: Phase
    rows: int
    chosen: Sequence[Mapping[int, int]]
    step: Step | None = None


class PassTime(NamedTuple):
    phase: Phase
    rows: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a simulated run took and moved. `moved_bytes` came over the link, `disk_bytes` from the disk into host memory."""

    passes: tuple[PassTime, ...]
    counts: Counts
    moved_bytes: int
    link_busy_s: float
    disk_bytes: int
    disk_busy_s: float
    total_s: float
    prediction: dict[str, Any] | None
    stalls: dict[str, float] = field(default_factory=dict)

    @property
    def accesses(self) -> int:
        return self.counts.hits + self.counts.in_flight + self.counts.misses


def simulate(
    shape: Shape,
    costs: Costs,
    link: Link,
    policy: Policy,
    passes: Iterable[Pass],
    *,
    disk: Link | None = None,
    predictor: Predictor | None = None,
    always: bool = False,
    asynchronous: bool = False,
    decisions: Decisions | None = None,
    timeline: Timeline | None = None,
    future: Future | None = None,
) -> Outcome:
    """Run the passes one after the other. `always`: guess also where it is not measured to pay. `decisions`: those of a
    recorded run, to be repeated. `future`: what the passes choose, for a policy that knows it."""
    simulation = Simulation(shape, costs, link, policy, disk=disk, predictor=predictor, always=always,
                            asynchronous=asynchronous, decisions=decisions)  # fmt: skip
    simulation.runtime.record(timeline)
    if future is not None:
        simulation.runtime.foresee(future)
    with undisturbed():
        for one in passes:
            simulation.run(one)
    simulation.runtime.record(None)
    return simulation.outcome()


@contextmanager
def undisturbed() -> Iterator[None]:
    """While passes are simulated, nobody looks for cycles: their events make none, and all that torch has loaded would be
    looked through again and again, which takes longer than the passes."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Driver:
    """Takes passes with known routes through a runtime, of whatever device. `compute` takes a stock model's seconds."""

    def __init__(self, runtime: Runtime, costs: Costs, compute: Callable[[float], Any]):
        self.runtime, self.costs, self._compute = runtime, costs, compute
        self._expert_s: dict[tuple[int, int], float] = {}
        self.times: list[PassTime] = []

    def run(self, one: Pass) -> float:
        """Seconds of one pass."""
        runtime, device = self.runtime, self.runtime.device
        began = device.now()
        step = self._step(one)
        runtime.begin(step)
        for layer, tokens in enumerate(one.chosen):
            self._enter(step, one, layer)
            self._compute(self.costs.trunk_s(layer, one.rows, one.phase))
            self._spoken(step, one, layer)
            last = Work(_nothing, self.costs.combine_s(layer, one.rows))
            device.join(runtime.bring(layer, one.rows, dict(tokens), self._work(layer, tokens), last))
        self._compute(self.costs.trunk_s(len(one.chosen), one.rows, one.phase))
        runtime.finish()
        seconds = device.now() - began
        self.times.append(PassTime(one.phase, one.rows, seconds))
        return seconds

    def _step(self, one: Pass) -> Step:
        step = Step(self.runtime.steps, one.phase, one.rows)
        if one.step is not None:
            step.batch, step.ids_BS = one.step.batch, one.step.ids_BS
            step.positions_BS, step.padding_BS = one.step.positions_BS, one.step.padding_BS
        return step

    def _enter(self, step: Step, one: Pass, layer: int) -> None:
        entered = one.step.inputs.get(layer) if one.step is not None else None
        self.runtime.enter(layer, cast(torch.Tensor, entered))

    def _spoken(self, step: Step, one: Pass, layer: int) -> None:
        """Note the layer's route where somebody looks at it."""
        if self.runtime.learns:
            ids = torch.tensor([list(one.chosen[layer])])
            known = one.step.routes[layer] if one.step is not None else Route(layer, ids, torch.empty(0))
            step.routes.append(known)

    def _work(self, layer: int, tokens: Mapping[int, int]) -> Callable[[Slot], Work]:
        known = self._expert_s

        def work(slot: Slot) -> Work:
            rows = tokens[slot.key.expert]  # type: ignore[union-attr]
            seconds = known.get((layer, rows))
            if seconds is None:
                seconds = known[layer, rows] = self.costs.expert_s(layer, rows)
            return Work(_nothing, seconds)

        return work


class Simulation(Driver):
    """A runtime on a virtual machine; `run` passes, then ask for the `outcome`."""

    def __init__(
        self,
        shape: Shape,
        costs: Costs,
        link: Link,
        policy: Policy,
        *,
        disk: Link | None = None,
        predictor: Predictor | None = None,
        always: bool = False,
        asynchronous: bool = False,
        decisions: Decisions | None = None,
    ):
        self.device = ClockDevice(link, disk if shape.host_slots else None, asynchronous, costs.launch_s)
        device, store = cast(Device, self.device), cast(Store, Slabs(shape))  # they stand in for the real ones
        host = HostTier(device, store, shape.host_slots) if shape.host_slots else None
        if host is not None:
            host.fill()
        runtime = open_runtime(device, store, shape.slots, policy, host)
        if predictor is not None:
            runtime.predict(_Timed(predictor, self.device, costs.predict_s), always)
        if decisions is not None:
            runtime.decide(decisions)
        super().__init__(runtime, costs, self._on_gpu if asynchronous else self.device.spend)

    def outcome(self) -> Outcome:
        copy, disk = self.device.copy, self.device.disk
        return Outcome(
            passes=tuple(self.times),
            counts=self.runtime.transfer.counts(),
            moved_bytes=int(copy.cost_done),
            link_busy_s=copy.busy_s,
            disk_bytes=int(disk.cost_done) if disk is not None else 0,
            disk_busy_s=disk.busy_s if disk is not None else 0.0,
            total_s=self.device.now(),
            prediction=self.runtime.ahead.stats(),
            stalls=dict(self.runtime.stalls),
        )

    def _on_gpu(self, seconds: float) -> None:
        """The host waits for what comes of it: a route, or logits."""
        self.device.compute.submit(_nothing, cost=seconds)
        self.device.read(None)


def passes(step: Step, decode_S: torch.Tensor, experts: Sequence[int]) -> Iterator[Pass]:
    """A recorded sequence as its passes: the prompt's rows in one, each decoded row in one of its own."""
    rows = decode_S.tolist()
    prompt = rows.index(True) if True in rows else len(rows)
    for first, end in ((0, prompt), *((row, row + 1) for row in range(prompt, len(rows)))):
        if first < end:
            phase = Phase.PREFILL if first == 0 and not rows[0] else Phase.DECODE
            yield _pass(step, first, end, phase, experts)


def _pass(step: Step, first: int, end: int, phase: Phase, experts: Sequence[int]) -> Pass:
    part = Step(step.index, phase, end - first)
    part.ids_BS = step.ids_BS[:, first:end] if step.ids_BS is not None else None
    part.positions_BS = step.positions_BS[:, first:end] if step.positions_BS is not None else None
    part.inputs = {layer: x_TD[first:end] for layer, x_TD in step.inputs.items()}
    chosen = []
    for route in step.routes:
        ids, hidden = route.ids_TK[first:end], route.hidden_TD
        hidden = hidden[first:end] if hidden is not None else None
        part.routes.append(Route(route.layer, ids, route.weights_TK[first:end], hidden))
        chosen.append(counted(ids.flatten().tolist(), experts[route.layer]))
    return Pass(phase, end - first, chosen, part)


def counted(ids: Iterable[int], experts: int) -> dict[int, int]:
    """Expert -> rows, in the order in which the engine takes them; an id equal to `experts` means none."""
    rows: dict[int, int] = {}
    for e in sorted(ids):
        if e < experts:
            rows[e] = rows.get(e, 0) + 1
    return rows


class _Timed:
    """A predictor that takes its time on a virtual machine."""

    def __init__(self, predictor: Predictor, device: ClockDevice, seconds: float):
        self._predictor, self._device, self._seconds = predictor, device, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    def rank(self, step: Step, layer: int) -> torch.Tensor:
        self._device.spend(self._seconds)
        return self._predictor.rank(step, layer)


class _Layer(NamedTuple):
    n_experts: int
    slab_bytes: int


class Slabs:
    """Stands in for a store: sizes, no bytes."""

    slab_bytes = 0  # of a slot's memory: there is none

    def __init__(self, shape: Shape):
        self.layers = [_Layer(*layer) for layer in zip(shape.experts, shape.slab_bytes, strict=True)]

    def layout(self, layer: int) -> _Layer:
        return self.layers[layer]

    def read_into(self, key: Key, buffer: torch.Tensor) -> None: ...


def _nothing() -> None: ...
