"""The store behind MODEL, converted if need be, and the plan that fits it. Knows checkpoints, stores and plans; knows
nothing of slots or prompts.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from duoserve.checkpoint import read_config
from duoserve.config import EngineConfig
from duoserve.convert import Conversion, Progress, write_store
from duoserve.device import Device
from duoserve.manifest import is_store
from duoserve.plan import Plan, check_memory, compute_dtype, default_budget, make_plan, trunk_format
from duoserve.shelf import cache_dir, note_use, refuse_half_made
from duoserve.store import Store, StoreSize
from duoserve.tokenizer import read_tokenizer

DEMO = Path(__file__).parent / "demo"


class Fit(NamedTuple):
    """A plan that fits, and how is computed by it."""

    plan: Plan
    dtype: torch.dtype
    trunk: str  # format of the trunk's linears


class Opened(NamedTuple):
    store: Store
    plan: Plan
    dtype: torch.dtype
    trunk: str


def open_model(
    folder: Path,
    config: EngineConfig,
    device: Device,
    progress: Progress | None,
    default: str | None,
    predictor_bytes: int,
) -> Opened:
    """The store behind MODEL, converted if need be, but not before its plan is known to fit."""

    def fit(size: StoreSize, model_config: Any, stored: str, format: str) -> Fit:
        dtype = compute_dtype(config.dtype, stored)
        trunk, free = trunk_format(config, format, dtype, device.name), device.free_bytes()
        budget = default_budget(device.name, free)
        plan = make_plan(size, model_config, dtype, config, budget, default, trunk, predictor_bytes)
        check_memory(plan, device.free_bytes())
        return Fit(plan, dtype, trunk)

    if is_store(folder):
        store = Store(folder)
        note_use(folder)
        try:
            _check(store, config)
            return Opened(store, *fit(store.size, read_config(folder), store.dtype, store.format))
        except BaseException:
            store.close()
            raise
    refuse_half_made(folder)
    conversion = Conversion.of(folder, config.made_as, config.dtype)
    checkpoint = conversion.checkpoint
    read_tokenizer(folder)  # refuse before an hour of converting
    stored = str(checkpoint.dtype).removeprefix("torch.")
    fitting = fit(conversion.size, checkpoint.config, stored, conversion.format)
    store = write_store(conversion, cache_dir(config.cache_dir) / conversion.name, progress)
    note_use(store.folder)
    return Opened(store, *fitting)


def _check(store: Store, config: EngineConfig) -> None:
    store.check_format(config.format)
    if config.dtype == "float32" == store.dtype and store.layouts[0].plain != "float32":
        warnings.warn(
            "the store rounded a float32 checkpoint to bfloat16; `duoserve convert --dtype float32` keeps it exact",
            stacklevel=4,
        )
