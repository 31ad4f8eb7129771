"""A stock transformers model whose routed experts are ours. Knows how the parts come together: store, plan, device, cache,
transfer, runtime; knows nothing of prompts and text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from duoserve import attention
from duoserve.checkpoint import ExpertsSpec, build_meta, find_experts, load_trunk, replace_module
from duoserve.core import Kernels, Phase, Policy, Refusal, Step
from duoserve.device import Device
from duoserve.int4 import Scratch
from duoserve.moe import OffloadedExperts, Runtime, open_runtime
from duoserve.plan import Plan, host_slabs, size
from duoserve.sizing import CACHE, cache_bytes
from duoserve.store import Store
from duoserve.system import available_ram, give_back
from duoserve.transfer import HostTier
from duoserve.trunk import quantise_linears, settle

GENERATION = "generation_config.json"
LONG = 128  # rows of a pass whose activations are worth handing back: that takes about a millisecond
DRAFT = 16  # tokens per pass up to which a pass behind a prompt is decode: one token, or drafted ones to verify


class Loaded(NamedTuple):
    model: Any
    runtime: Runtime
    watch: PassWatch


def load_model(
    store: Store,
    config: Any,
    plan: Plan,
    dtype: torch.dtype,
    device: Device,
    trunk: str = "bf16",
    policy: Policy = Policy.DUOSERVE,
    kernels: Kernels | None = None,
) -> Loaded:
    """Build on meta, take the experts out, fill the trunk; the slots are allocated here, once. `trunk`: its format;
    `kernels`: what experts are computed by, as `open_runtime`."""
    model, specs = stock_model(store, config, dtype)
    scratch = Scratch(device.arena(plan.scratch_bytes))
    runtime = open_runtime(device, store, plan.slots, policy, _host_tier(device, store), scratch, kernels, dtype)
    fill_trunk(model, specs, store, dtype, device, trunk, scratch, runtime)
    return Loaded(model, runtime, watch_passes(model, specs, runtime, plan))


def stock_model(store: Store, config: Any, dtype: torch.dtype) -> tuple[Any, list[ExpertsSpec]]:
    """The stock model on meta and its experts modules, which must be those that the store has."""
    model = build_meta(config, dtype)
    specs = find_experts(model)
    if [spec.name for spec in specs] != [layer.module for layer in store.layers]:
        raise Refusal(
            "E_STORE",
            f"the store has {len(store.layers)} MoE layers, its config describes {len(specs)}",
            "convert the model again",
            5,
        )
    return model, specs


def fill_trunk(
    model: Any,
    specs: list[ExpertsSpec],
    store: Store,
    dtype: torch.dtype,
    device: Device,
    trunk: str,
    scratch: Scratch,
    runtime: Any,
) -> None:
    """Put the seam to `runtime` where the experts were, and load everything else."""
    for layer, spec in enumerate(specs):
        replace_module(model, spec.name, OffloadedExperts(spec.module, layer, runtime))
    load_trunk(model, store.checked_trunk(), dtype)
    linears = quantise_linears(model, trunk, {spec.n_experts for spec in specs}, scratch)
    settle(model, linears, device)
    if (store.folder / GENERATION).is_file():
        model.generation_config = _generation_config(store.folder)
    if device.name == "cpu":
        attention.use(model)


def _generation_config(folder: Path) -> Any:
    """How the model's publisher would have it answer. What decides the shape of an answer is not the publisher's to say:
    one answer, as ids, over keys and values that we plan for."""
    try:
        config = transformers.GenerationConfig.from_pretrained(folder)
        config.update(num_return_sequences=1, return_dict_in_generate=False, cache_implementation=None)
    except Exception as error:  # of any kind: a stranger's file goes through code that expects its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        what = f"{folder / GENERATION} cannot be used ({reason})"
        raise Refusal("E_CONFIG", what, "correct or remove it in the checkpoint, and convert again", 5) from error
    return config


def watch_passes(model: Any, specs: list[ExpertsSpec], runtime: Any, plan: Plan) -> PassWatch:
    """Tell `runtime` of every pass of the model."""
    watch = PassWatch(runtime, plan)
    for layer, spec in enumerate(specs):
        holder = decoder_layer(spec.name)
        if holder is not None:
            watch.follow(model.get_submodule(holder), layer)
    model.register_forward_pre_hook(watch.before, with_kwargs=True)
    model.register_forward_hook(watch.after, with_kwargs=True)
    return watch


def _host_tier(device: Device, store: Store) -> HostTier | None:
    if device.disk is None:
        return None
    tier = HostTier(device, store, host_slabs(store.size, available_ram()))
    tier.fill()
    return tier


class PassWatch:
    """Turns each forward pass into a Step, and keeps keys and values within what was planned for them.

    The seam sees flat rows only; request, position and padding are known here.
    """

    def __init__(self, runtime: Runtime, plan: Plan):
        self._runtime, self._plan = runtime, plan
        self.kv_peak_bytes = 0

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        shape = ids if ids is not None else kwargs.get("inputs_embeds")
        if shape is None:
            return
        batch, length = shape.shape[:2]
        past = kwargs.get(CACHE, kwargs.get("past_key_values"))
        before = _tokens_before(past, kwargs.get("attention_mask"), length)
        if kwargs.get("use_cache") is not False:
            self._check_room(batch, before + length)
        phase = Phase.DECODE if before and length <= DRAFT else Phase.PREFILL
        step = Step(self._runtime.steps, phase, batch * length, batch)
        if self._runtime.learns:
            self._describe(step, ids, batch, length, before, kwargs)
        self._runtime.begin(step)

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = getattr(output, CACHE, None)
        if cache is not None:
            self.kv_peak_bytes = max(self.kv_peak_bytes, cache_bytes(cache))
        if self._runtime.finish() >= LONG:
            give_back()

    def follow(self, decoder_layer: Any, layer: int) -> None:
        """Tell the runtime what enters the decoder layer of MoE layer `layer`, before its attention."""

        def enters(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            if isinstance(x, torch.Tensor) and x.ndim == 3:
                self._runtime.enter(layer, x.reshape(-1, x.shape[-1]))

        decoder_layer.register_forward_pre_hook(enters, with_kwargs=True)

    def _check_room(self, batch: int, length: int) -> None:
        if not self._plan.holds(batch, length):
            raise Refusal(
                "E_CTX",
                f"{batch} x {length} tokens do not fit the {self._plan.ctx} planned for keys and values "
                f"({size(self._plan.kv_of(batch, length))} of {size(self._plan.kv_bytes)})",
                "load with a larger --ctx",
                4,
            )

    def _describe(self, step: Step, ids: Any, batch: int, length: int, before: int, kwargs: dict[str, Any]) -> None:
        read = self._runtime.device.read
        mask = kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        step.ids_BS = read(ids) if ids is not None else None
        if positions is not None:
            step.positions_BS = read(positions).expand(batch, length)
        else:
            step.positions_BS = torch.arange(before, before + length).expand(batch, length)
        if mask is not None and mask.ndim == 2:
            step.padding_BS = read(mask)[:, -length:] == 0


def decoder_layer(experts: str) -> str | None:
    """The name of the decoder layer that holds an experts module: up to its number in the list of layers."""
    match = re.match(r"(.*?\.\d+)(\.|$)", experts)
    return match[1] if match else None


def _tokens_before(past: Any, mask: Any, length: int) -> int:
    """Tokens in the cache before this pass. A cache whose first layer keeps no keys says 0; the mask knows better."""
    if past is None:
        return 0
    masked = mask.shape[1] - length if isinstance(mask, torch.Tensor) and mask.ndim == 2 else 0
    return max(int(past.get_seq_length()), masked)
