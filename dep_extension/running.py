"""From a command's options to a run: the plan, the world, this process's side of it, and what rank 0 hands back. Knows
how the parts come together; knows nothing of command lines.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dep_extension import planfile
from dep_extension.answering import Answer, Asked, Reader, deal, figures, gathered, report, works
from dep_extension.comm import PeerLost, Place, Role
from dep_extension.executor import AttentionSide, Course, ExpertSide, Opened, open_store
from dep_extension.kernel_choice import Table
from dep_extension.kernel_table import here as measured_here
from dep_extension.placement import Placement, checked
from dep_extension.recovery import attend, serve
from dep_extension.schedule import Order, Turn
from dep_extension.spans import Load, Span, Spans, times
from dep_extension.walk import Itinerary
from dep_extension.world import World, here, open_world
from duoserve.config import EngineConfig
from duoserve.core import Refusal, nearest
from duoserve.device import Device, open_device
from duoserve.system import use_threads

DEFAULT_R1, DEFAULT_R2 = 2, 1
MEASURE = "run `duoserve dep kernels MODEL --save FILE` here"


@dataclass(frozen=True)
class Cutting:
    """What was asked of the plan; None: what the file says, else a default."""

    attention_ranks: int | None = None
    expert_ranks: int | None = None
    plan: Path | None = None
    r1: int | None = None
    r2: int | None = None
    order: str | None = None
    replicas: int | None = None

    def settled(self, world: int) -> Settled:
        """For `world` processes. Refused where the file and the options, or an option and what there is, differ."""
        known = None if self.plan is None else planfile.load(self.plan)
        ag, eg = known.split if known is not None else (None, None)
        ag, eg = (
            self._same("attention ranks", self.attention_ranks, ag),
            self._same("expert ranks", self.expert_ranks, eg),
        )
        ag = ag or (max(1, world - eg) if eg else 1)
        eg = eg or max(1, world - ag)
        r1 = self.r1 or (known.r1 if known is not None else DEFAULT_R1)
        r2 = self.r2 or (known.r2 if known is not None else DEFAULT_R2)
        order: Order | tuple[Turn, ...] = Order.ASAS
        if self.order is not None:
            order = _order(self.order)
        elif known is not None and known.r1 == r1:
            order = known.order
        replicas = self.replicas or (known.replicas if known is not None else 1)
        held = known.held if known is not None and self.replicas is None else None
        return Settled(ag, eg, r1, r2, order, replicas, None if known is None else known.name, held)

    def _same(self, what: str, asked: int | None, planned: int | None) -> int | None:
        if asked is not None and planned is not None and asked != planned:
            raise Refusal(
                "E_OPTION", f"{asked} {what} are asked for, {self.plan} has {planned}", "leave one of them out"
            )
        return asked if asked is not None else planned


def _order(name: str) -> Order:
    if name not in Order.__members__:
        raise Refusal("E_OPTION", f"unknown order {name!r}", nearest(name, list(Order.__members__)))
    return Order[name]


class Settled(NamedTuple):
    """A plan that can be walked."""

    ag: int
    eg: int
    r1: int
    r2: int
    order: Order | tuple[Turn, ...]
    replicas: int
    name: str | None
    held: Placement | None = None  # as experts were placed by their loads

    def course(self, opened: Opened) -> Course:
        itinerary = Itinerary.of(len(opened.store.layers), self.r1, self.r2, self.order)
        if self.held is None:
            return Course(self.ag, self.eg, tuple(opened.shares(self.eg, self.replicas)), itinerary)
        experts_L = [layer.n_experts for layer in opened.store.layers]
        return Course(self.ag, self.eg, checked(self.held, experts_L, self.eg), itinerary)

    def to_json(self) -> dict[str, Any]:
        order = self.order.value if isinstance(self.order, Order) else [list(turn) for turn in self.order]
        return self._asdict() | {"order": order, "held": self.held is not None}


class Ranks(NamedTuple):
    """This process's part of a run."""

    opened: Opened
    settled: Settled
    place: Place
    comm: World
    side: AttentionSide | ExpertSide


@contextmanager
def agreed(world: World) -> Iterator[None]:
    """What one rank refuses in here all refuse, in the words of the first; all come here at the same place."""
    refusal = None
    try:
        yield
    except Refusal as why:
        refusal = why
    mine = {"why": None} if refusal is None else {"why": str(refusal), "status": refusal.status}
    for one in gathered(world, mine):
        if one["why"] is not None:
            code, _, rest = one["why"].partition(": ")
            what, _, remedy = rest.rpartition("; ")
            raise Refusal(code, what, remedy, one["status"]) from refusal


@contextmanager
def ranks(
    model: str | None, config: EngineConfig, cut: Cutting, interface: str | None, sequences: Callable[[Place, int], int]
) -> Iterator[Ranks]:
    """Open this rank's part: store, world, device, side. `sequences` that an attention rank will hold, given r1."""
    settled = cut.settled(int(os.environ.get("WORLD_SIZE", 1)))
    place = here(settled.ag, settled.eg)
    use_threads(config.threads)
    opened = open_store(model, config)
    device, comm = _device(config), None
    try:
        course = settled.course(opened)
        comm = open_world(place, opened.dtype, device.torch_device, interface)
        peers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        side: AttentionSide | ExpertSide
        with agreed(comm):
            if place.role is Role.ATTENTION:
                side = AttentionSide(opened, device, place, course, sequences(place, settled.r1), peers)
            else:
                side = ExpertSide(opened, device, place, course, peers, _table(config, device))
        yield Ranks(opened, settled, place, comm, side)
        comm.close()
    except PeerLost:
        if comm is not None:
            comm.abandon()
        raise
    finally:
        device.close()
        opened.store.close()


def _device(config: EngineConfig) -> Device:
    if config.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return open_device(config.device)


def _table(config: EngineConfig, device: Device) -> Table | None:
    """Which products of a chunk are quicker as one, as was measured here."""
    if config.kernels is None:
        return None
    try:
        return Table.load(Path(config.kernels), measured_here(device.name))
    except OSError as error:
        raise Refusal("E_KERNELS", f"{config.kernels}: {error.strerror or error}", MEASURE, 3) from error
    except ValueError as error:
        raise Refusal("E_KERNELS", str(error), MEASURE) from error


def answer(
    model: str | None, config: EngineConfig, cut: Cutting, interface: str | None, asked: Asked
) -> dict[str, Any] | None:
    """Figures with the answers in order of prompts, on rank 0; None on the others."""
    many = len(asked.prompts)
    with ranks(model, config, cut, interface, lambda place, r1: -(-many // place.ag)) as mine:
        todo = []
        with agreed(mine.comm):
            if isinstance(mine.side, AttentionSide):
                dealt = deal(many, mine.place.ag, mine.settled.r1)[mine.place.index]
                todo = works(mine.side, Reader(mine.opened), asked, dealt)
        made: list[Answer] = []
        if isinstance(mine.side, AttentionSide):
            batches, outages = attend(mine.side, mine.comm, todo)
            made = [one for batch in batches for one in batch]
        else:
            outages = serve(mine.side, mine.comm)
        losses = [one._asdict() for one in outages]
        everybody = gathered(mine.comm, report(mine.side) | {"losses": losses, "answers": [list(one) for one in made]})
        if mine.place.rank != 0:
            return None
        answers = sorted(Answer(*one) for rank in everybody for one in rank.pop("answers"))
        return figures(mine.opened, mine.settled.to_json(), answers, everybody)


def time_it(
    model: str | None, config: EngineConfig, cut: Cutting, interface: str | None, load: Load, trials: int
) -> dict[str, Any] | None:
    """Medians over `trials` runs of random prompts, on rank 0; None on the others."""
    with ranks(model, config, cut, interface, lambda place, r1: -(-load.samples // place.ag)) as mine:
        runs = []
        for trial in range(trials + 1):
            spans = Spans()
            if isinstance(mine.side, AttentionSide):
                mine.side.run(mine.comm, _random(mine.side, load, mine), spans)
            else:
                mine.side.walk(mine.comm, note=spans)
            everybody = gathered(mine.comm, {"spans": [list(span) for span in spans.found]})
            if trial:
                runs.append(times([[Span(*span) for span in rank["spans"]] for rank in everybody]))
        reports = gathered(mine.comm, report(mine.side))
        if mine.place.rank != 0:
            return None
        seconds = statistics.median(run.seconds for run in runs)
        return {
            "tokens_per_s": load.tokens / seconds,
            "seconds": seconds,
            "exposed_s": statistics.median(run.exposed_s for run in runs),
            "busy_s": [statistics.median(each) for each in zip(*(run.busy_s for run in runs), strict=True)],
            "runs_s": [run.seconds for run in runs],
            **load._asdict(),
            "threads": torch.get_num_threads(),
            "plan": mine.settled.to_json(),
            "ranks": reports,
        }


def _random(side: AttentionSide, load: Load, mine: Ranks) -> list[Callable[[], Any]]:
    """Generations of this rank's micro-batches: ids alone, as many tokens as were asked for."""
    generator = torch.Generator().manual_seed(mine.place.index)
    vocabulary = side.model.config.get_text_config().vocab_size
    dealt = deal(load.samples, mine.place.ag, mine.settled.r1)[mine.place.index]
    shapes = [(len(batch), load.prompt_tokens) for batch in dealt]
    ids = [torch.randint(vocabulary, shape, generator=generator).to(side.device.torch_device) for shape in shapes]
    return [lambda ids_BS=ids_BS: _generate(side.model, ids_BS, load.new_tokens) for ids_BS in ids]  # type: ignore[misc]


def _generate(model: Any, ids_BS: torch.Tensor, new: int) -> None:
    if len(ids_BS):
        mask_BS = torch.ones_like(ids_BS)
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        model.generate(input_ids=ids_BS, attention_mask=mask_BS, **options)
