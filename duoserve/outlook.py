"""What fits and what it will cost, before anything is loaded: from a config alone, a checkpoint or a store, by the engine's
own arithmetic. Knows models, plans and machine profiles; opens no slots and reads no weights.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from duoserve.checkpoint import build_meta, find_experts, quiet, read_config
from duoserve.codec import Layout
from duoserve.config import EngineConfig, parse_size
from duoserve.convert import Conversion, layouts_of, store_size
from duoserve.core import Refusal
from duoserve.device import open_device
from duoserve.engine import DEMO
from duoserve.estimate import Estimate, Needs, Shares, estimate
from duoserve.hub import resolve
from duoserve.manifest import is_store
from duoserve.needs import count_needs
from duoserve.plan import Plan, check_memory, compute_dtype, default_budget, host_slabs, make_plan, size, trunk_format
from duoserve.profile import Profile
from duoserve.store import Store, StoreSize
from duoserve.system import available_ram


class Subject(NamedTuple):
    """A model as planning sees it, made or to be made."""

    config: Any
    store: StoreSize
    layouts: list[Layout]  # of each MoE layer
    experts: list[int]  # of each MoE layer
    format: str
    stored: str  # dtype of the checkpoint
    known_from: str


@dataclass(frozen=True)
class Outlook:
    """A plan with where its experts lie and, where the machine is known, what a token and a prompt take."""

    plan: Plan
    shares: Shares
    device: str
    format: str
    trunk: str
    dtype: str
    known_from: str
    warnings: list[str]
    needs: Needs | None
    estimate: Estimate | None
    unknown: str | None  # why there is no estimate

    def to_json(self) -> dict[str, Any]:
        about = {
            name: getattr(self, name)
            for name in ("device", "format", "trunk", "dtype", "known_from", "warnings", "unknown")
        }
        needs = {"needs": self.needs.to_json() if self.needs else None}
        found = {"estimate": self.estimate.to_json()} if self.estimate else {"estimate": None}
        return self.plan.to_json() | about | {"shares": self.shares._asdict()} | needs | found


def look(
    model: str | os.PathLike[str] | None = None,
    profile: Profile | None = None,
    ram: str | int | None = None,
    predictor_bytes: int = 0,
    **options: Any,
) -> Outlook:
    """Plan MODEL as `duoserve.load` would with these options; refuses as it would.

    A folder with nothing but config.json suffices; of a hub id only that file is fetched. `ram`: plan as if so much memory
    were free. `predictor_bytes`: of what guesses ahead. Without a `profile` there is no estimate.
    """
    quiet()
    config = EngineConfig.of(**options)
    subject = _subject(DEMO if model is None else resolve(model, weights=False), config)
    dtype = compute_dtype(config.dtype, subject.stored)
    device = open_device(config.device)
    try:
        name, free = device.name, device.free_bytes()
    finally:
        device.close()
    host = parse_size(ram, "ram") if ram is not None else available_ram()
    free = host if name == "cpu" and ram is not None else free
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        default = "half" if model is None else None
        trunk = trunk_format(config, subject.format, dtype, name)
        given = default_budget(name, free)
        plan = make_plan(subject.store, subject.config, dtype, config, given, default, trunk, predictor_bytes)
    check_memory(plan, free)
    shares = _shares(plan, 0 if name == "cpu" else host_slabs(subject.store, host))
    needs, found, unknown = _estimate(subject, dtype, trunk, shares, profile, name)
    kind = str(dtype).removeprefix("torch.")
    notes = [str(w.message) for w in said]
    return Outlook(plan, shares, name, subject.format, trunk, kind, subject.known_from, notes, needs, found, unknown)


def _estimate(
    subject: Subject, dtype: Any, trunk: str, shares: Shares, profile: Profile | None, device: str
) -> tuple[Needs | None, Estimate | None, str | None]:
    try:
        needs = count_needs(subject.config, dtype, subject.layouts, subject.experts, subject.format, trunk)
    except Refusal as refusal:
        return None, None, str(refusal)
    if profile is None:
        return needs, None, "no machine profile"
    if profile.device != device:
        return needs, None, f"the machine profile is of {profile.device}, not {device}"
    strange = [f for f in (*(part.format for part in needs.trunk), needs.expert_format) if not profile.knows(f)]
    if strange:
        return needs, None, f"the machine profile has no rate for {strange[0]}"
    return needs, estimate(needs, shares, profile), None


def _shares(plan: Plan, host: int) -> Shares:
    """Both tiers keep what routers chose most, so what has a slot counts among what host memory holds."""
    slots = plan.slots / plan.experts
    held = max(slots, host / plan.experts)
    return Shares(slots, held - slots, 1 - held)


def _subject(folder: Path, config: EngineConfig) -> Subject:
    if is_store(folder):
        return _made(folder, config)
    if any(folder.glob("*.safetensors")):
        return _from_weights(Conversion.of(folder, config.made_as, config.dtype))
    return _from_config(read_config(folder), config.made_as, config.dtype)


def _made(folder: Path, config: EngineConfig) -> Subject:
    store = Store(folder)
    try:
        store.check_format(config.format)
        layouts = [store.layout(i) for i in range(len(store.layers))]
        experts = [layer.n_experts for layer in store.layers]
        return Subject(read_config(folder), store.size, layouts, experts, store.format, store.dtype, "expert store")
    finally:
        store.close()


def _from_weights(conversion: Conversion) -> Subject:
    checkpoint = conversion.checkpoint
    experts = [spec.n_experts for spec in checkpoint.specs]
    stored = str(checkpoint.dtype).removeprefix("torch.")
    return Subject(
        checkpoint.config, conversion.size, conversion.layouts, experts, conversion.format, stored, "checkpoint"
    )


def _from_config(config: Any, format: str, dtype: str | None) -> Subject:
    """As if the weights were stored as the config says; in bfloat16 where it says nothing."""
    stored = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    model = build_meta(config, compute_dtype(None, stored))
    specs = find_experts(model)
    layouts = layouts_of(specs, format, dtype, stored)
    parameters = sum(p.numel() for p in model.parameters())
    experts = [spec.n_experts for spec in specs]
    return Subject(config, store_size(specs, layouts, parameters), layouts, experts, format, stored, "config")


def table(outlook: Outlook) -> list[tuple[str, str]]:
    """Rows for people: what, and how much."""
    plan, shares = outlook.plan, outlook.shares
    where = [f"{shares.slots:.0%} in slots"]
    where += [f"{shares.host:.0%} in host RAM"] if outlook.device != "cpu" else []
    rows = [
        (
            "device",
            f"{outlook.device}, experts {outlook.format}, trunk {outlook.trunk} (known from {outlook.known_from})",
        ),
        (
            "budget",
            f"{size(plan.budget_bytes)} (smallest {size(plan.smallest_bytes)}, planned {size(plan.planned_bytes)})",
        ),
        ("trunk", f"{size(plan.trunk_bytes)}, and {size(plan.scratch_bytes)} of scratch"),
        ("predictor", size(plan.predictor_bytes) if plan.predictor_bytes else "none"),
        ("keys and values", f"{size(plan.kv_bytes)} for a context of {plan.ctx} tokens"),
        ("slots", f"{plan.slots} of {plan.experts} experts, {size(plan.slot_bytes)} each"),
        ("experts lie", ", ".join([*where, f"{shares.disk:.0%} on disk"])),
    ]
    if outlook.needs:
        needs = outlook.needs
        each = f"{size(needs.active_bytes)} of experts, {size(needs.trunk_bytes)} of trunk"
        rows.append(("a token reads", each))
    return rows + (_costs(outlook.estimate) if outlook.estimate else [("estimate", f"none: {outlook.unknown}")])


def _costs(e: Estimate) -> list[tuple[str, str]]:
    share = e.limit_s / e.token_s
    return [
        ("a token misses", f"{e.misses:.1f} experts, {size(e.missed_bytes)}"),
        ("decode", f"{1e3 * e.low_s:.1f} to {1e3 * e.token_s:.1f} ms a token, {1 / e.token_s:.1f} tokens/s at least"),
        ("its limit", f"{1e3 * e.limit_s:.1f} ms a token ({e.limited_by}); expected runs at {share:.0%} of it"),
        ("all resident", f"{1e3 * e.resident_s:.1f} ms a token"),
        (
            f"prompt of {e.prompt}",
            f"{e.prompt_s:.2f} s: the larger of compute {e.prompt_compute_s:.2f} s and stream {e.prompt_stream_s:.2f} s",
        ),
        (
            "assuming",
            "routes that do not repeat (hits = residency), as much context, steady state, an idle machine",
        ),
    ]
