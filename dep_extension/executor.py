"""One rank of a disaggregated run over a real model: what it opens, and its walk. Knows stores, models, plans and a `Comm`;
knows nothing of how processes come to be, nor of prompts and text (`answering.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from dep_extension.attention import Attention
from dep_extension.comm import Comm, Place
from dep_extension.partition import shares
from dep_extension.rows import Shares
from dep_extension.shares import Beside, ExpertRank, Share
from dep_extension.walk import START, AttentionWalk, ExpertWalk, Inline, Itinerary, Note, Position, Worker
from duoserve.checkpoint import check_config, quiet, read_config
from duoserve.config import EngineConfig, parse_share, parse_size, parse_slots, size
from duoserve.convert import Conversion, Progress, write_store
from duoserve.core import Kernels, Policy, Refusal
from duoserve.device import Device
from duoserve.engine import DEMO
from duoserve.hub import resolve
from duoserve.int4 import Scratch
from duoserve.manifest import is_store
from duoserve.model import fill_trunk, stock_model, watch_passes
from duoserve.plan import (
    MIN_SLOTS,
    Sizes,
    check_memory,
    compute_dtype,
    default_budget,
    host_slabs,
    make_plan,
    trunk_format,
)
from duoserve.shelf import cache_dir, note_use, refuse_half_made
from duoserve.store import Store, StoreSize
from duoserve.system import available_ram
from duoserve.transfer import HostTier


class Opened(NamedTuple):
    """A store, and how all ranks compute with it."""

    store: Store
    config: EngineConfig
    dtype: torch.dtype
    trunk: str

    @property
    def width(self) -> int:
        """Of the rows that experts read."""
        params = [param for layout in self.store.layouts for param in layout.params if param.name in _FIRST]
        widths = {param.cols for param in params}
        if len(widths) != 1:
            what = f"experts read rows of {sorted(widths)} values in different layers"
            raise Refusal("E_LAYOUT", what, "run it on one device")
        return widths.pop()

    def shares(self, ranks: int, replicas: int = 1) -> list[Shares]:
        """Of each layer: who holds which experts."""
        return [shares(layer.n_experts, ranks, replicas) for layer in self.store.layers]

    def empty(self, device: Device) -> torch.Tensor:
        """(0, D) of the rows that travel."""
        return torch.empty(0, self.width, dtype=self.dtype, device=device.torch_device)


_FIRST = ("gate_up_proj", "up_proj")  # an expert's first matrix, in either kind of family


def open_store(model: str | None, config: EngineConfig, progress: Progress | None = None) -> Opened:
    """The store behind MODEL, as `duoserve.load` finds it. Converted once, by whoever holds the lock; the others wait."""
    quiet()
    folder = DEMO if model is None else resolve(model, progress, check_config)
    if is_store(folder):
        store = Store(folder)
        if config.format not in (None, store.format):
            store.close()
            what = f"the store is {store.format}, asked was {config.format}"
            raise Refusal("E_FORMAT", what, "convert the checkpoint")
    else:
        store = _converted(folder, config, progress)
    note_use(store.folder)
    dtype = compute_dtype(config.dtype, store.dtype)
    return Opened(store, config, dtype, trunk_format(config, store.format, dtype, _device_name(config)))


def _converted(folder: Path, config: EngineConfig, progress: Progress | None) -> Store:
    refuse_half_made(folder)
    conversion = Conversion.of(folder, config.format or ("bf16" if config.dtype == "float32" else "int4"), config.dtype)
    return write_store(conversion, cache_dir(config.cache_dir) / conversion.name, progress)


def _device_name(config: EngineConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Course:
    """What all ranks of a run agree on: the split, the shares of each layer, and the order of everything."""

    ag: int
    eg: int
    shares_L: tuple[Shares, ...]
    itinerary: Itinerary

    @property
    def most(self) -> int:
        """Local experts of the rank that has most, in any layer."""
        return max(len(held) for shares in self.shares_L for held in shares)

    def held(self, rank: int) -> list[Sequence[int]]:
        return [shares[rank] for shares in self.shares_L]


class AttentionSide:
    """An attention rank's model: trunk, routers, shared experts, keys and values, and no slot for an expert.

    `sequences`: how many this rank holds keys and values of, at once. `peers`: ranks that share this machine's memory.
    """

    def __init__(
        self,
        opened: Opened,
        device: Device,
        place: Place,
        course: Course,
        sequences: int = 1,
        peers: int = 1,
        poison: bool = False,
    ):
        store, config = opened.store, read_config(opened.store.folder)
        self.opened, self.device, self.course = opened, device, course
        free = default_budget(device.name, device.free_bytes()) // peers
        none = store.size._replace(n_experts=0)
        options = replace(opened.config, sequences=max(1, sequences), slots=None)
        self.plan = make_plan(none, config, opened.dtype, options, free, None, opened.trunk)
        check_memory(self.plan, device.free_bytes())
        experts_L = [layer.n_experts for layer in store.layers]
        self.hub = Attention(device, experts_L, course.shares_L, course.itinerary.r2, place.index)
        self.hub.shared.poison = poison
        self.model, specs = stock_model(store, config, opened.dtype)
        scratch = Scratch(device.arena(self.plan.scratch_bytes))
        fill_trunk(self.model, specs, store, opened.dtype, device, opened.trunk, scratch, self.hub)
        watch_passes(self.model, specs, self.hub, self.plan)
        for layer, spec in enumerate(specs):
            self.hub.shared.wrap(self.model, spec.name, layer)

    def follow(self, course: Course) -> None:
        """Send by another course from now on, of as many micro-batches; what is not wholly back is sent again."""
        self.course = course
        self.hub.share_out(course.shares_L, course.itinerary.r2)

    def run(
        self,
        comm: Comm,
        works: Sequence[Callable[[], Any]],
        note: Note | None = None,
        walk: Callable[[], None] | None = None,
    ) -> list[Any]:
        """Walk until every micro-batch of every rank has ended; what this rank's returned. Without work of its own for a
        micro-batch of the plan, it sends nothing for it. `walk`: instead of one that ends where a rank is lost."""
        r1 = self.course.itinerary.r1
        assert len(works) <= r1, f"{len(works)} micro-batches, the plan has {r1}"
        self.hub.batches.clear()
        for work in [*works, *[_nothing] * (r1 - len(works))]:
            self.hub.add(work)
        self.walk(comm, START, note) if walk is None else walk()
        return [batch.result for batch in self.hub.batches[: len(works)]]

    def walk(self, comm: Comm, start: Position, note: Note | None = None) -> None:
        """From `start` on, with the micro-batches as they are; `run` begins at the first."""
        empty_0D = self.opened.empty(self.device)
        walk = AttentionWalk(comm, self.course.itinerary, self.hub, empty_0D, self.course.most, note)
        with torch.inference_mode():
            walk.run(start)


def _nothing() -> None:
    """A micro-batch without prompts."""


class ExpertSide:
    """An expert rank: its share of the store, and slots for it."""

    def __init__(
        self,
        opened: Opened,
        device: Device,
        place: Place,
        course: Course,
        peers: int = 1,
        kernels: Kernels | None = None,
    ):
        self.opened, self.device, self._peers, self._kernels = opened, device, peers, kernels
        config = read_config(opened.store.folder)
        _, specs = stock_model(opened.store, config, opened.dtype)
        _refuse_norms(specs)
        self._modules = [spec.module for spec in specs]
        self._scratch = Scratch(device.arena(Sizes(config, opened.dtype, opened.trunk).scratch_bytes))
        self.follow(course, place)

    def follow(self, course: Course, place: Place) -> None:
        """Hold what this course gives to this place, from now on. Slots are taken anew and filled as rows come."""
        self.course, config = course, self.opened.config
        share = Share(self.opened.store, course.held(place.index))
        free = default_budget(self.device.name, self.device.free_bytes()) // self._peers
        self.slots = expert_slots(share, config, self._scratch.n_bytes, free)
        host, policy = _host_tier(self.device, share), Policy(config.policy)
        self.rank = ExpertRank(
            self.device,
            share,
            self.slots,
            self._modules,
            policy,
            host,
            self._scratch,
            self._kernels,
            self.opened.dtype,
        )

    def walk(self, comm: Comm, start: Position = START, note: Note | None = None, worker: Worker | None = None) -> None:
        """Serve until every micro-batch of every attention rank has ended. `worker`: where experts compute; without one on a
        thread beside this one, which issues, on a GPU behind it, or where all ranks are one thread on that."""
        own = Beside() if worker is None and self.device.name == "cpu" and comm.blocks else None
        empty_0D, most, itinerary = self.opened.empty(self.device), self.course.most, self.course.itinerary
        try:
            walk = ExpertWalk(comm, itinerary, self.rank.compute, empty_0D, most, worker or own or Inline(), note)
            walk.run(start)
        finally:
            if own is not None:
                own.close()


def _host_tier(device: Device, share: Share) -> HostTier | None:
    """Between the disk and a GPU, as in the engine."""
    if device.disk is None:
        return None
    slabs = host_slabs(StoreSize(share.n_experts, share.slab_bytes, 0), available_ram())
    tier = HostTier(device, cast(Store, share), slabs)
    tier.fill()
    return tier


def _refuse_norms(specs: Sequence[Any]) -> None:
    for spec in specs:
        if getattr(spec.module, "has_post_expert_norm", False):
            what = f"{spec.name} has a norm behind each of its {spec.n_experts} experts"
            raise Refusal("E_LAYOUT", what, "run this family on one device")


def expert_slots(share: Share, config: EngineConfig, scratch_bytes: int, free_bytes: int) -> int:
    """Slots of an expert rank: as many as its budget holds, at most one per expert of its share. `half` and shares in
    percent are of what it holds."""
    wanted = share.n_experts
    slab, asked = share.slab_bytes, config.budget
    least = min(MIN_SLOTS, wanted)
    if asked in ("min", "half"):
        fits = least if asked == "min" else max(least, wanted // 2)
    elif isinstance(asked, str) and asked.strip().endswith("%"):
        fits = int(parse_share(asked) * wanted)
    else:
        fits = ((free_bytes if asked is None else parse_size(asked, "budget")) - scratch_bytes) // slab
    if config.slots is not None:
        fits = min(fits, max(least, parse_slots(config.slots) or least))
    if fits < least:
        need = scratch_bytes + least * slab
        what = f"a budget of {size(max(0, fits) * slab)} for slots holds {max(0, fits)} experts"
        raise Refusal("E_BUDGET", f"{what}, an expert rank needs {least} ({size(need)})", "raise --budget", 4)
    return min(wanted, fits)
