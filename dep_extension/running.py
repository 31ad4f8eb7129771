"""From a command's options to a run: the plan, the world, this process's side of it, and what rank 0 hands back. Knows
how the parts come together; knows nothing of command lines.
"""

from __future__ import annotations

import hashlib
import json
import os
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
from dep_extension.problemfile import problem_to_json
from dep_extension.recovery import Company, Replan, solved_again
from dep_extension.schedule import Order, Turn
from dep_extension.solver import Plan, Problem
from dep_extension.spans import Load, Span, Spans, Trial, medians, times
from dep_extension.walk import Itinerary
from dep_extension.world import here, open_world
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
        saved = None if self.plan is None else planfile.read(self.plan)
        known = None if saved is None else saved.plan
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
        return Settled(ag, eg, r1, r2, order, replicas, None if known is None else known.name, self._again(saved), held)

    def _again(self, saved: planfile.Saved | None) -> Again:
        """What was asked for by name stays as it is."""
        asked = {"--r1": self.r1, "--r2": self.r2, "--order": self.order, "--replicas": self.replicas}
        named = [option for option, value in asked.items() if value is not None]
        if saved is None:
            return Again("there is no --plan FILE, whose costs it takes to solve it again")
        if saved.problem is None:
            return Again(f"{self.plan} has no costs: save it again with `duoserve dep plan --save`")
        if named:
            return Again(f"{', '.join(named)} was asked for")
        return Again("", saved.problem, saved.plan)

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


class Again(NamedTuple):
    """With what a plan is solved again where a rank is lost; else `why` the cut is kept then."""

    why: str
    problem: Problem | None = None
    plan: Plan | None = None

    def fitting(self, opened: Opened) -> Again:
        """Costs of another model are none."""
        if self.problem is None:
            return self
        experts = {layer.n_experts for layer in opened.store.layers}
        costs, layers = self.problem.model, len(opened.store.layers)
        if experts == {costs.experts} and layers == costs.layers:
            return self
        have = f"the model has {layers} of {'/'.join(map(str, sorted(experts)))}"
        return Again(f"the plan's costs are of {costs.layers} layers of {costs.experts} experts, {have}")

    def replan(self) -> Replan | None:
        if self.problem is None or self.plan is None:
            return None
        return solved_again(self.problem, self.plan)

    @property
    def digest(self) -> str:
        """Ranks whose files differ in it would go apart at a loss."""
        said = None if self.problem is None or self.plan is None else problem_to_json(self.problem, self.plan.split)
        return hashlib.sha256(json.dumps([said, self.plan and self.plan.samples]).encode()).hexdigest()


class Settled(NamedTuple):
    """A plan that can be walked."""

    ag: int
    eg: int
    r1: int
    r2: int
    order: Order | tuple[Turn, ...]
    replicas: int
    name: str | None
    again: Again
    held: Placement | None = None  # as experts were placed by their loads

    def course(self, opened: Opened) -> Course:
        itinerary = Itinerary.of(len(opened.store.layers), self.r1, self.r2, self.order)
        if self.held is None:
            return Course(self.ag, self.eg, tuple(opened.shares(self.eg, self.replicas)), itinerary)
        experts_L = [layer.n_experts for layer in opened.store.layers]
        return Course(self.ag, self.eg, checked(self.held, experts_L, self.eg), itinerary)

    def to_json(self) -> dict[str, Any]:
        order = self.order.value if isinstance(self.order, Order) else [list(turn) for turn in self.order]
        plain = {name: value for name, value in self._asdict().items() if name != "again"}
        return plain | {"order": order, "held": self.held is not None}


class Ranks(NamedTuple):
    """This process's part of a run."""

    opened: Opened
    settled: Settled
    place: Place
    company: Company
    side: AttentionSide | ExpertSide


@contextmanager
def agreed(company: Company) -> Iterator[None]:
    """What one rank refuses in here all refuse, in the words of the first; all come here at the same place."""
    refusal = None
    try:
        yield
    except Refusal as why:
        refusal = why
    mine = {"why": None} if refusal is None else {"why": str(refusal), "status": refusal.status}
    for one in gathered(company.tell, mine):
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
    settled = settled._replace(again=settled.again.fitting(opened))
    device, world = _device(config), None
    try:
        course = settled.course(opened)
        world = open_world(place, opened.dtype, device.torch_device, interface)
        company = Company(world, course, settled.again.replan())
        _same_costs(company, settled.again)
        with agreed(company):
            company.side = _side(opened, device, config, company, sequences(place, settled.r1))
        assert company.side is not None
        yield Ranks(opened, settled, place, company, company.side)
        world.close()
    except PeerLost:
        if world is not None:
            world.abandon()
        raise
    finally:
        device.close()
        opened.store.close()


def _same_costs(company: Company, again: Again) -> None:
    """ValueError where ranks would solve the plan again from other costs, before a loss asks for it."""
    said = {one["digest"] for one in gathered(company.tell, {"digest": again.digest})}
    if len(said) > 1:
        raise ValueError(
            f"the plan files of {len(company.world.ranks)} ranks have {len(said)} costs: give all the same"
        )


def _side(
    opened: Opened, device: Device, config: EngineConfig, company: Company, sequences: int
) -> AttentionSide | ExpertSide:
    place, peers = company.world.place, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if place.role is Role.ATTENTION:
        return AttentionSide(opened, device, place, company.course, sequences, peers)
    return ExpertSide(opened, device, place, company.course, peers, _table(config, device))


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
        company, todo = mine.company, []
        with agreed(company):
            if isinstance(mine.side, AttentionSide):
                dealt = deal(many, mine.place.ag, mine.settled.r1)[mine.place.index]
                todo = works(mine.side, Reader(mine.opened), asked, dealt)
        made: list[Answer] = []
        if isinstance(mine.side, AttentionSide):
            made = [one for batch in company.attend(todo) for one in batch]
        else:
            company.serve()
        everybody = gathered(company.last_words, _report(mine) | {"answers": [list(one) for one in made]})
        if mine.place.rank != 0:
            return None
        answers = sorted(Answer(*one) for rank in everybody for one in rank.pop("answers", ()))
        return figures(mine.opened, mine.settled.to_json(), answers, everybody) | _losses(mine)


def _report(mine: Ranks) -> dict[str, Any]:
    return report(mine.side) | {"losses": [one._asdict() for one in mine.company.outages]}


def _losses(mine: Ranks) -> dict[str, Any]:
    """What was walked behind each loss; `kept`: why the cut is kept then, instead of solved again."""
    why = mine.settled.again.why
    outages = [] if why else mine.company.outages
    walked = [{"lost": list(one.ranks), **one.cut, "solved_s": one.solved_s} for one in outages]
    return {"replanned": walked, "kept": why or None}


def time_it(
    model: str | None, config: EngineConfig, cut: Cutting, interface: str | None, load: Load, trials: int
) -> dict[str, Any] | None:
    """Medians over `trials` runs of random prompts, on rank 0; None on the others. A run in which a rank was lost is told
    and not counted, nor are runs of fewer ranks where there are some of all."""
    with ranks(model, config, cut, interface, lambda place, r1: -(-load.samples // place.ag)) as mine:
        runs = [_trial(mine, load) for _ in range(trials + 1)][1:]
        reports = gathered(mine.company.last_words, _report(mine))
        if mine.place.rank != 0:
            return None
        summed = {**load._asdict(), "threads": torch.get_num_threads(), "plan": mine.settled.to_json()}
        return medians(runs, load.tokens) | summed | {"ranks": reports} | _losses(mine)


def _trial(mine: Ranks, load: Load) -> Trial:
    """One run, as all ranks saw it that are left."""
    spans, company = Spans(), mine.company
    before = len(company.outages)
    if isinstance(mine.side, AttentionSide):
        company.attend(_random(mine.side, load, mine), spans)
    else:
        company.serve(spans)
    everybody = gathered(company.tell, {"spans": [list(span) for span in spans.found]})
    lost = tuple(rank for one in company.outages[before:] for rank in one.ranks)
    return Trial(times([[Span(*span) for span in rank["spans"]] for rank in everybody]), len(everybody), lost)


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
