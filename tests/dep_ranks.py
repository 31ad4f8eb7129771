"""Ranks of a disaggregated run for tests: processes over Gloo, or greenlets of one thread. Each rank runs many plans."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import toys
from safetensors.torch import load_file, save_file

from dep_extension.comm import Place, Role
from dep_extension.executor import AttentionSide, Course, ExpertSide, open_store
from dep_extension.faults import Bounds
from dep_extension.local import local_world, together
from dep_extension.placement import Placement
from dep_extension.schedule import Order
from dep_extension.walk import Inline, Itinerary
from dep_extension.world import host_store, open_world
from duoserve.config import EngineConfig
from duoserve.device import open_device

NEW = 5  # tokens


class Plan(NamedTuple):
    """What to run: on how many ranks, cut how, and how many slots an expert rank has (None: one for each expert)."""

    folder: str
    cache: str
    ag: int
    eg: int
    r1: int
    r2: int
    order: str = "ASAS"
    slots: int | None = None
    replicas: int = 1
    grouped: bool = False
    held: Placement | None = None  # instead of replicas

    @property
    def name(self) -> str:
        return f"{self.ag}+{self.eg} r1={self.r1} r2={self.r2} {self.order}"


class Always:
    """A table of kernels that says grouped, whatever is asked."""

    machine = "a table for tests"

    def grouped(self, products: Sequence[tuple[int, int]], experts: int, dtype: str, tokens: int) -> bool:
        return True


class Outcome(NamedTuple):
    """Of one micro-batch: ids (B, S + NEW) and logits (NEW, B, V)."""

    ids: torch.Tensor
    logits: torch.Tensor


def prompts(plan: Plan, rank: int) -> list[torch.Tensor]:
    """Of attention rank `rank`, (B, S) for each of its micro-batches: all of other sizes; the last rank has one less."""
    many = plan.r1 - (rank == plan.ag - 1 and plan.ag * plan.r1 > 1)
    return [toys.ids(1 + (i + rank) % 3, 1 + (5 * i + 7 * rank + 3) % 13, seed=100 * rank + i) for i in range(many)]


def answer(model: Any, ids_BS: torch.Tensor, new: int = NEW) -> Outcome:
    out = model.generate(
        input_ids=ids_BS,
        attention_mask=torch.ones_like(ids_BS),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Outcome(out.sequences, torch.stack(out.logits))


def new_tokens(rank: int, batch: int) -> int:
    """Micro-batches end at different times."""
    return NEW - (rank + batch) % 3


def side_of(plan: Plan, place: Place, device: Any) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """What a rank opens, and its run: outcomes by micro-batch, or an expert rank's figures."""
    slots = {} if plan.slots is None else {"slots": plan.slots}
    opened = open_store(plan.folder, EngineConfig.of(dtype="float32", cache_dir=plan.cache, **slots))
    itinerary = Itinerary.of(len(opened.store.layers), plan.r1, plan.r2, Order(plan.order))
    course = Course(plan.ag, plan.eg, plan.held or tuple(opened.shares(plan.eg, plan.replicas)), itinerary)
    if place.role is Role.EXPERT:
        experts = ExpertSide(opened, device, place, course, kernels=Always() if plan.grouped else None)

        def serve(comm: Any, **options: Any) -> dict[str, Any]:
            experts.walk(comm, **options)
            counts = experts.rank.runtime.transfer.counts()
            experts.rank.runtime.cache.check()
            found = {"slots": experts.slots, "share": experts.rank.share.n_experts, "misses": counts.misses}
            found["rows"] = experts.rank.rows
            grouping = experts.rank.runtime.grouping
            return found | {"passes": None if grouping is None else dict(grouping.passes)}

        return experts, serve
    attention = AttentionSide(opened, device, place, course, poison=True)

    def attend(comm: Any, **options: Any) -> dict[str, Any]:
        works = [
            lambda ids=ids, i=i: answer(attention.model, ids, new_tokens(place.index, i))
            for i, ids in enumerate(prompts(plan, place.index))
        ]
        shared = attention.hub.shared
        return {"outcomes": attention.run(comm, works), "elsewhere": shared.elsewhere, "at": shared.at_their_turn}

    return attention, attend


def in_one_thread(plan: Plan) -> list[dict[str, Any]]:
    """All ranks as greenlets; what each returned, attention ranks first."""
    comms = local_world(plan.ag, plan.eg, torch.float32, poison=True)
    devices = [open_device("cpu") for _ in comms]
    runs = [side_of(plan, comm.place, device)[1] for comm, device in zip(comms, devices, strict=True)]

    def run(comm: Any, serve: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        found = serve(comm) if comm.place.role is Role.ATTENTION else serve(comm, worker=Inline())
        comm.close()
        return found

    try:
        with torch.inference_mode():
            sides = [lambda comm=comm, serve=serve: run(comm, serve) for comm, serve in zip(comms, runs, strict=True)]
            return together(comms, *sides)
    finally:
        for device in devices:
            device.close()


def in_processes(plans: Sequence[Plan], folder: Path) -> list[list[dict[str, Any]]]:
    """Each rank a process, all plans one after the other; of each plan what each rank returned, attention ranks first."""
    ranks = max(plan.ag + plan.eg for plan in plans)
    store = host_store("127.0.0.1", 0, 60)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dep_ranks"])
    args = [(rank, store.port, list(plans), str(folder)) for rank in range(ranks)]
    processes = [context.Process(target=_rank, args=each) for each in args]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(600)
        assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [[_read(folder, k, rank) for rank in range(plan.ag + plan.eg)] for k, plan in enumerate(plans)]


def _rank(rank: int, port: int, plans: list[Plan], folder: str) -> None:
    torch.set_num_threads(1)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        for k, plan in enumerate(plans):
            if rank < plan.ag + plan.eg:
                mine = env | {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(k)}
                _run(plan, k, Place.of(rank, plan.ag, plan.eg), mine, Path(folder))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _run(plan: Plan, k: int, place: Place, env: dict[str, str], folder: Path) -> None:
    device = open_device("cpu")
    try:
        _, serve = side_of(plan, place, device)
        world = open_world(place, torch.float32, bounds=Bounds(form=60), poison=True, env=env)
        found = serve(world)
        world.close()
    finally:
        device.close()
    outcomes = found.pop("outcomes", [])
    tensors = {f"{name}{i}": t.contiguous() for i, o in enumerate(outcomes) for name, t in o._asdict().items()}
    (folder / f"{k}-{place.rank}.json").write_text(json.dumps(found | {"many": len(outcomes)}))
    save_file(tensors, folder / f"{k}-{place.rank}.safetensors")


def _read(folder: Path, k: int, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{k}-{rank}.json").read_text())
    tensors = load_file(folder / f"{k}-{rank}.safetensors")
    outcomes = [Outcome(tensors[f"ids{i}"], tensors[f"logits{i}"]) for i in range(found.pop("many"))]
    return found | ({"outcomes": outcomes} if outcomes or rank == 0 else {})


def check(plan: Plan, found: list[dict[str, Any]], stock: Any, ours: Any) -> None:
    """Tokens as one process makes them, stock's and ours; logits within 1e-5 of stock's."""
    for rank, result in enumerate(found[: plan.ag]):
        asked = prompts(plan, rank)
        outcomes = result.get("outcomes", [])
        assert len(outcomes) == len(asked)
        for i, (ids_BS, got) in enumerate(zip(asked, outcomes, strict=True)):
            with torch.inference_mode():
                want = answer(stock, ids_BS, new_tokens(rank, i))
                mine = answer(ours, ids_BS, new_tokens(rank, i))
            where = f"{plan.name} attention rank {rank} micro-batch {i}"
            assert torch.equal(got.ids, want.ids), where
            assert torch.equal(got.ids, mine.ids), where
            assert (got.logits - want.logits).abs().max() < 1e-5, where
