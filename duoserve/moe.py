"""The seam: what stands in a stock model where its routed experts were. Reads a layer's route once, lets prefill or
decode bring the experts past, and hands the arithmetic to the compute stream. Knows the floors below; knows nothing of
attention, caches of keys and values, or text.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from duoserve import policies
from duoserve.cache import ExpertCache, Slot
from duoserve.core import Kernels, Key, Observer, Phase, Policy, Predictor, Route, Step
from duoserve.decisions import Decisions
from duoserve.device import Device, Event
from duoserve.experts import Groups, Weights, combine, expert_function, group
from duoserve.future import Future
from duoserve.grouped import Bank, Grouping, Placed, Wave
from duoserve.int4 import Scratch
from duoserve.store import Store
from duoserve.timeline import (
    COMPUTE,
    HEAD,
    NONE,
    OUTSIDE,
    PASSES,
    PREDICTOR,
    QUICK,
    RANK,
    ROUTE,
    SCHEDULE,
    STALL,
    TRUNK,
    Timeline,
)
from duoserve.transfer import HostTier, Transfer


class Cancelled(Exception):
    """Somebody asked to stop while a prompt was being read; the pool is whole, the pass is not."""


class Company(Protocol):
    """Generations that share the model and meet at every MoE layer (`together.py`); it stands in for the runtime while one
    of them is `inside`."""

    @property
    def inside(self) -> bool: ...

    def begin(self, step: Step) -> None: ...

    def enter(self, layer: int, x_TD: torch.Tensor) -> None: ...

    def meet(self, arrival: Arrival) -> torch.Tensor: ...

    def finish(self) -> int: ...


class Arrival(NamedTuple):
    """Rows that have come to a MoE layer."""

    layer: int
    expert: Callable[..., torch.Tensor]
    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


class Work(NamedTuple):
    """What the compute stream is to do, and the seconds it takes where they are known beforehand (a simulated machine)."""

    fn: Callable[[], Any]
    cost: float = 0.0


class Runtime:
    """What all layers of one model share: the pool, the way into it, both schedules, and the Step that is running."""

    def __init__(
        self,
        device: Device,
        cache: ExpertCache,
        transfer: Transfer,
        policy: Policy = Policy.DUOSERVE,
        grouping: Grouping | None = None,
    ):
        self.device, self.cache, self.transfer, self.policy = device, cache, transfer, policy
        self.grouping = grouping  # None: experts are computed one by one
        self._per_layer = [layer.n_experts for layer in transfer.store.layers]
        self._schedules = policies.schedules(policy, cache, transfer, self._per_layer, self._think)
        self.ahead = self._schedules.ahead
        self.observers: list[Observer] = []
        self.company: Company | None = None
        self._thread = device.thread
        self.steps = 0
        self._step: Step | None = None
        self._learns = self._hidden = self._inputs = False  # what the running pass is asked for
        self._former: Step | None = None  # the pass before, kept for predictors
        self._on_layer: Callable[[int, int], None] | None = None
        self._cancelled: Callable[[], bool] | None = None
        self._lock = threading.RLock()
        self._closed = False
        self._torn = False  # something that no code here expects, as Ctrl-C, ended a step of the schedule half-way
        self._all_or_nothing = _Marking(self)
        self._process = os.getpid()  # whose threads bring the experts

    def close(self) -> None:
        """Refuse further passes; one that is running ends first."""
        with self._lock:
            self._closed = True

    @contextmanager
    def following(
        self, on_layer: Callable[[int, int], None] | None, cancelled: Callable[[], bool] | None
    ) -> Iterator[None]:
        """While a prompt is read: report each layer done, and raise `Cancelled` between layers once asked to."""
        self._on_layer, self._cancelled = on_layer, cancelled
        try:
            yield
        finally:
            self._on_layer = self._cancelled = None
            self._thread.turn(OUTSIDE)  # also where a pass was left early

    @property
    def timeline(self) -> Timeline | None:
        """What is being recorded into."""
        return self._thread.timeline

    def record(self, timeline: Timeline | None) -> None:
        """Record what happens from now on, or no more; what is computed does not depend on it."""
        with self._lock:
            self.device.record(timeline)

    @property
    def stalls(self) -> dict[str, float]:
        """Seconds that compute waited for experts, by cause (`timeline.CAUSES`), since the device was opened."""
        return self._thread.stalls

    @property
    def running(self) -> Step | None:
        """The pass that runs just now."""
        return self._step

    @property
    def learns(self) -> bool:
        """Whether anybody wants to see Steps with their tokens and routes."""
        return bool(self.observers) or self.ahead.predictor is not None

    def wants(self, what: str) -> bool:
        """Whether an observer or the predictor asked for "hidden" or "inputs"."""
        return any(what in getattr(who, "wants", ()) for who in (*self.observers, self.ahead.predictor))

    def predict(self, predictor: Predictor | None, always: bool = False) -> None:
        """Guess with this predictor from the next pass on; unless `always`, only while it is measured to pay."""
        with self._lock:
            self.ahead.use(predictor, always)

    def decide(self, decisions: Decisions) -> None:
        """From now on these note, or say, what the clock decides."""
        with self._lock:
            self.transfer.decide(decisions)

    def foresee(self, future: Future) -> None:
        """The passes from the next one on will choose so: for `Policy.BELADY`, which knows it."""
        with self._lock:
            self.ahead.foresee(future)

    def begin(self, step: Step) -> None:
        """A pass starts; its routes are noted only where somebody wants them."""
        if self.company is not None and self.company.inside:
            self.company.begin(step)
            return
        if os.getpid() != self._process:  # a fork has none of these threads, and would wait for them without end
            what = f"the engine was opened by process {self._process}, this is a fork of it ({os.getpid()})"
            raise RuntimeError(f"{what}: open one here")
        if self._torn:
            with self._lock:
                self.transfer.forget()
                self._torn = False
        if self.timeline is not None and self.timeline.full:
            self.record(None)
        self._began = self.device.now()
        self._thread.turn(TRUNK, 0)
        step.previous, self._former = _followed(self._former, step), None
        self._step = step
        self.steps += 1
        self._learns, self._hidden, self._inputs = self.learns, self.wants("hidden"), self.wants("inputs")
        with self._all_or_nothing:
            self.ahead.begin(step)

    def enter(self, layer: int, x_TD: torch.Tensor) -> None:
        """A MoE layer's attention is about to read `x_TD`."""
        if self.company is not None and self.company.inside:
            self.company.enter(layer, x_TD)
            return
        with self._all_or_nothing:
            if self._step is not None and self._inputs:
                self._step.inputs[layer] = x_TD
                self.ahead.entered(self._step, layer)
            self.ahead.push()

    def finish(self) -> int:
        """Hand the finished Step to whoever observes; returns its rows."""
        if self.company is not None and self.company.inside:
            return self.company.finish()
        step, self._step = self._step, None
        if step is None:
            return 0
        ended = self.device.now()
        with self._all_or_nothing:
            self.ahead.finish(step, ended - self._began)
        if self.timeline is not None:
            self.timeline.add(PASSES, step.phase.value, NONE, NONE, self._began, ended)
            self._thread.turn(OUTSIDE)
        for observer in self.observers:
            observer(step)
        if self.learns:
            self._former = step
        return step.rows

    def _think(self, fn: Callable[[], None], layer: int, number: int, quick: bool) -> None:
        """Make the ranking `number`, of a layer, on the predictor's stream, after what was computed so far; at once if
        that is quick and a thread."""
        what = Key(layer, NONE)
        if not (quick and self.device.name == "cpu"):
            self.transfer.decisions.think(
                number, fn, lambda: self.device.predict.submit(fn, (self.device.mark(),), what=what)
            )
            return
        began = self.device.now()
        self._thread.wait(fn, PREDICTOR, what)
        if self.timeline is not None:
            self.timeline.add(QUICK, RANK, layer, NONE, began, self.device.now())

    def run(
        self,
        layer: int,
        expert: Callable[..., torch.Tensor],
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """y_TD of one layer's routed experts; safe to call from several threads, one layer at a time."""
        if self.company is not None and self.company.inside:
            return self.company.meet(Arrival(layer, expert, x_TD, ids_TK, weights_TK))
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._follow(layer)
            self._thread.turn(ROUTE, layer)
            ids = self.device.read(ids_TK)
            self._note(layer, ids, weights_TK, x_TD)
            groups = group(x_TD, ids, self._per_layer[layer])
            tokens = {expert: stop - start for expert, (start, stop) in groups.spans.items()}

            def work(slot: Slot) -> Work:
                assert slot.key is not None, slot
                return Work(_Rows(expert, groups, groups.spans[slot.key.expert], self.transfer.weights(slot)))

            bank = self.grouping.of(layer, groups) if self.grouping is not None else None
            together = None if bank is None else _Together(expert, groups, bank, self.transfer)
            y: list[torch.Tensor] = []
            last = Work(lambda: y.append(combine(groups, weights_TK, x_TD.dtype)))
            with self._all_or_nothing:
                done = self.bring(layer, x_TD.shape[0], tokens, work, last, together)
            if done.issued:
                self.device.join(done)
            else:  # another thread computes
                self._thread.turn(STALL, layer, NONE, COMPUTE)
                self.device.join(done)
                self._leave(layer)
            return y[0]

    def bring(
        self,
        layer: int,
        rows: int,
        tokens: dict[int, int],
        work: Callable[[Slot], Work],
        last: Work,
        together: Callable[[Sequence[Slot]], Work] | None = None,
    ) -> Event:
        """A layer's router has spoken for `rows` rows (`tokens`: expert -> rows): bring its experts past the compute stream,
        which does `work` of each slot, or the work `together` of all that are at hand at once, and then `last`. Returns when
        `last` happens.
        """
        self._thread.turn(SCHEDULE, layer)
        schedule = self._schedule(layer, len(tokens), rows)
        self.ahead.spoken(self._step, layer, tokens)
        reads: list[Event] = []
        with closing(schedule.run(layer, rows, tokens)) as slots:
            for wave in self._waves(slots, together is not None):
                try:
                    fn, cost = together(wave) if together is not None else work(wave[0])
                    what = wave[0].key if len(wave) == 1 else Key(layer, NONE)
                    read = self.device.compute.submit(fn, [slot.ready for slot in wave], cost=cost, what=what)
                except BaseException:
                    for slot in wave:
                        self.transfer.abandon(slot)
                    raise
                for slot in wave:
                    self.transfer.release(slot, read)
                reads.append(read)
        done = self.device.compute.submit(last.fn, reads, cost=last.cost)
        self.ahead.push()
        self._leave(layer)
        return done

    def _waves(self, slots: Iterator[Slot], several: bool) -> Iterator[list[Slot]]:
        """One slot at a time, or `several`: those at hand. Nothing is kept while the next one may need its slot."""
        wave: list[Slot] = []
        try:
            for slot in slots:
                wave.append(slot)
                if not (several and self.transfer.at_hand()):
                    out, wave = wave, []
                    yield out
        finally:  # an error above leaves nothing pinned
            for slot in wave:
                self.transfer.abandon(slot)

    def _leave(self, layer: int) -> None:
        """The model goes on: to the attention before the next MoE layer, or to the head."""
        after = layer + 1
        self._thread.turn(TRUNK if after < len(self._per_layer) else HEAD, after)

    def _schedule(self, layer: int, distinct: int, rows: int) -> policies.Schedule:
        """The paper's phase where it is plain (a prompt, or one token); in between the number of experts decides."""
        prompt = self._step is not None and self._step.phase is Phase.PREFILL
        if rows > 1 and prompt:
            return self._schedules.dense
        if rows > 1 and 2 * distinct >= self._per_layer[layer]:
            return self._schedules.crowd or self._schedules.dense
        return self._schedules.sparse

    def _follow(self, layer: int) -> None:
        if self._step is None or self._step.phase is not Phase.PREFILL:
            return
        if self._cancelled is not None and self._cancelled():
            raise Cancelled
        if self._on_layer is not None:
            self._on_layer(layer, len(self._per_layer))

    def _note(self, layer: int, ids: torch.Tensor, weights_TK: torch.Tensor, x_TD: torch.Tensor) -> None:
        if self._step is not None and self._learns:
            weights = self.device.read(weights_TK)
            self._step.routes.append(Route(layer, ids, weights, x_TD if self._hidden else None))


class _Marking:
    """Notes in a runtime what ended half-way; errors that code expects (`Exception`) have put all in order themselves."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Runtime):
        self._runtime = runtime

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._runtime._torn = True


def open_runtime(
    device: Device,
    store: Store,
    slots: int,
    policy: Policy = Policy.DUOSERVE,
    host: HostTier | None = None,
    scratch: Scratch | None = None,
    kernels: Kernels | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Runtime:
    """A pool of `slots`, the way into it and both schedules, as `policy` wants them. Experts are computed one by one, or as
    `kernels` measured to be quicker in `dtype`."""
    cache = ExpertCache(slots, [layer.n_experts for layer in store.layers], policies.keep(policy))
    transfer = Transfer(device, store, cache, host, scratch, policies.manners(policy))
    grouping = None
    if kernels is not None:
        layouts, experts = zip(*((store.layouts[layer.layout], layer.n_experts) for layer in store.layers), strict=True)
        grouping = Grouping(kernels, dtype, layouts, experts, transfer.memory, transfer.slab_bytes)
    return Runtime(device, cache, transfer, policy, grouping)


def _followed(former: Step | None, step: Step) -> Step | None:
    """The pass before, if this one goes on with its sequences; it forgets its own, so that no chain grows."""
    if former is None or former.batch != step.batch or former.positions_BS is None or step.positions_BS is None:
        return None
    if not torch.equal(former.positions_BS[:, -1] + 1, step.positions_BS[:, 0]):
        return None
    former.previous = None
    former.inputs.clear()
    return former


class _Rows:
    """One expert's rows, to be computed on the compute stream."""

    __slots__ = ("expert", "groups", "span", "weights")

    def __init__(self, expert: Callable[..., torch.Tensor], groups: Groups, span: tuple[int, int], weights: Weights):
        self.expert, self.groups, self.span, self.weights = expert, groups, span, weights

    def __call__(self) -> None:
        start, stop = self.span
        self.groups.out_PD[start:stop] = self.expert(self.groups.x_PD[start:stop], self.weights)


class _Together:
    """The rows of several experts as one piece of work."""

    __slots__ = ("bank", "expert", "groups", "transfer")

    def __init__(self, expert: Callable[..., torch.Tensor], groups: Groups, bank: Bank, transfer: Transfer):
        self.expert, self.groups, self.bank, self.transfer = expert, groups, bank, transfer

    def __call__(self, wave: Sequence[Slot]) -> Work:
        return Work(Wave(self.expert, self.groups, self.bank, [self._placed(slot) for slot in wave]))

    def _placed(self, slot: Slot) -> Placed:
        assert slot.key is not None, slot
        return Placed(slot.index, *self.groups.spans[slot.key.expert], self.transfer.weights(slot))


class OffloadedExperts(nn.Module):
    """Takes the place of a stock experts module and its signature: (x_TD, ids_TK, weights_TK) -> y_TD. Inference only.

    `spec` is the stock module on meta: it says how to compute. Its submodules with parameters of their own (a norm after
    the experts) belong to the trunk and are registered here under their names.
    """

    def __init__(self, spec: Any, layer: int, runtime: Runtime):
        super().__init__()
        for name, child in spec.named_children():
            if next(child.parameters(), None) is not None:
                self.add_module(name, child)
        self.num_experts = spec.num_experts
        self._layer, self._runtime, self._expert = layer, runtime, expert_function(spec)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(hidden_states, top_k_index, top_k_weights)
        return self._runtime.run(self._layer, self._expert, hidden_states, top_k_index, top_k_weights)
