"""What fits: trunk, keys and values, slots. Knows sizes and the budget; the same arithmetic that the engine allocates by.

budget >= trunk + predictor + scratch + KV(ctx) + slots * slab,   at least two slots, at most one per expert
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from duoserve.checkpoint import build_meta, find_experts, replace_module
from duoserve.config import EngineConfig, parse_share, parse_size, parse_slots, size
from duoserve.core import Refusal
from duoserve.int4 import SCRATCH_BYTES
from duoserve.sizing import kv_bytes, kv_period, model_limit, tensor_bytes
from duoserve.store import StoreSize
from duoserve.trunk import quantise_linears

MIN_SLOTS = 2  # one computes while the other fills
FLOOR_CTX = 4096
LEAST_SCRATCH = 32 << 10
CPU_MARGIN, GPU_MARGIN = (4 << 30, 0.10), (1 << 30, 0.05)  # left free where no budget is given: at least bytes, share
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Bytes of each part of the budget, and what they buy. `slots` of `experts` fit; `ctx` tokens of keys and values."""

    budget_bytes: int
    trunk_bytes: int
    predictor_bytes: int
    scratch_bytes: int  # for unpacking a stretch of a matrix
    kv_bytes: int
    slot_bytes: int
    slots: int
    experts: int
    ctx: int
    smallest_bytes: int
    kv_state_bytes: int  # of a sequence, however short
    kv_token_bytes: int  # of each of its tokens while it is short of every window: the most a token can take

    @property
    def residency(self) -> float:
        return self.slots / self.experts

    @property
    def planned_bytes(self) -> int:
        return (
            self.trunk_bytes + self.predictor_bytes + self.scratch_bytes + self.kv_bytes + self.slots * self.slot_bytes
        )

    def kv_of(self, batch: int, length: int) -> int:
        """Bytes that keys and values of `batch` sequences of `length` tokens take, at most."""
        return batch * (self.kv_state_bytes + length * self.kv_token_bytes)

    def holds(self, batch: int, length: int) -> bool:
        """Whether that was planned for: one sequence up to `ctx`, several as far as their bytes fit together."""
        return length <= self.ctx and (batch == 1 or self.kv_of(batch, length) <= self.kv_bytes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"residency": self.residency, "planned_bytes": self.planned_bytes}


class _Shape(nn.Module):
    """Stands for the experts while shapes are computed on meta; also shows that they are called as we can serve."""

    def __init__(self, spec: Any, kind: str):
        super().__init__()
        self.kind = kind
        self.choices: int | None = None  # experts a token takes, once it was called
        for name, child in spec.named_children():
            if next(child.parameters(), None) is not None:
                self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes = [tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if len(shapes) != 3 or any(len(s) != 2 for s in shapes) or shapes[1] != shapes[2]:
            raise Refusal(
                "E_LAYOUT",
                f"{self.kind!r} calls its experts with {shapes}, not (rows, hidden), (rows, k), (rows, k)",
                "this family cannot be offloaded yet",
            )
        self.choices = shapes[1][1]
        return torch.empty_like(args[0] if args else next(iter(kwargs.values())))


class Sizes:
    """A model's sizes from its config alone, on the meta device."""

    def __init__(self, config: Any, dtype: torch.dtype, trunk: str = "bf16"):
        self.model = build_meta(config, dtype)
        specs = find_experts(self.model)
        self._experts = {s.name: _Shape(s.module, self.model.config.model_type) for s in specs}
        for name, shape in self._experts.items():
            replace_module(self.model, name, shape)
        quantise_linears(self.model, trunk, {spec.n_experts for spec in specs})
        self.trunk_bytes = tensor_bytes(self.model, dtype)
        self.scratch_bytes = min(SCRATCH_BYTES, max(LEAST_SCRATCH, self.trunk_bytes // 8))
        self.limit = model_limit(self.model.config)
        self._period = kv_period(self.model.config)
        self._kv: dict[int, int] = {}

    @property
    def choices(self) -> list[int | None]:
        """Experts that a token takes in each MoE layer; None where the model has not run."""
        return [shape.choices for shape in self._experts.values()]

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the cache of one sequence. Far beyond windows it is extended by its growth per period, because some
        attentions run token by token, even on meta."""
        first = self._period + tokens % self._period
        periods = (tokens - first) // self._period
        if periods < 2:
            return self._measured(tokens)
        return self._measured(first) + periods * (self._measured(first + self._period) - self._measured(first))

    def _measured(self, tokens: int) -> int:
        if tokens not in self._kv:
            self._kv[tokens] = kv_bytes(self.model, tokens)
        return self._kv[tokens]


def make_plan(
    store: StoreSize,
    config: Any,
    dtype: torch.dtype,
    options: EngineConfig,
    free_bytes: int,
    default: str | None = None,
    trunk: str = "bf16",
    predictor_bytes: int = 0,
) -> Plan:
    """Divide the budget. Raises Refusal with the smallest budget where it does not suffice.

    `trunk` is the format of its linears.
    Without `ctx`, keys and values get min(4096, the model's limit) tokens, and what is left once every expert is resident;
    `sequences` times that, for as many that are answered at once.
    """
    sizes = Sizes(config, dtype, trunk)
    floor = options.ctx or min(FLOOR_CTX, sizes.limit or FLOOR_CTX)
    if sizes.limit and floor > sizes.limit:
        warnings.warn(
            f"a context of {floor} tokens is more than the {sizes.limit} the model was made for", stacklevel=2
        )
    resident = sizes.trunk_bytes + predictor_bytes + sizes.scratch_bytes
    fixed = resident + options.sequences * sizes.kv_bytes(floor)
    smallest = fixed + min(MIN_SLOTS, store.n_experts) * store.slab_bytes
    asked = options.budget if options.budget is not None else default
    budget = _budget_bytes(asked, store, smallest, fixed, free_bytes)
    if budget < smallest:
        raise _too_small(budget, smallest, sizes, predictor_bytes, floor, options.sequences, store)
    slots = min(store.n_experts, (budget - fixed) // store.slab_bytes)
    if options.slots is not None:
        slots = min(slots, max(MIN_SLOTS, parse_slots(options.slots) or _top_k(sizes)))
    ctx = floor
    if options.ctx is None and slots == store.n_experts:
        ctx = _longest(sizes, floor, (budget - resident - slots * store.slab_bytes) // options.sequences)
    token = sizes.kv_bytes(2) - sizes.kv_bytes(1)
    return Plan(
        budget_bytes=budget,
        trunk_bytes=sizes.trunk_bytes,
        predictor_bytes=predictor_bytes,
        scratch_bytes=sizes.scratch_bytes,
        kv_bytes=options.sequences * sizes.kv_bytes(ctx),
        slot_bytes=store.slab_bytes,
        slots=slots,
        experts=store.n_experts,
        ctx=ctx,
        smallest_bytes=smallest,
        kv_state_bytes=sizes.kv_bytes(1) - token,
        kv_token_bytes=token,
    )


def _top_k(sizes: Sizes) -> int:
    """As many as a token chooses in one layer, the most of any layer."""
    return max((choices for choices in sizes.choices if choices is not None), default=MIN_SLOTS)


def default_budget(device: str, free_bytes: int) -> int:
    """What may be taken where nobody said: what is free less a margin."""
    least, share = CPU_MARGIN if device == "cpu" else GPU_MARGIN
    return max(0, free_bytes - max(least, int(share * free_bytes)))


def host_slabs(store: StoreSize, free_bytes: int) -> int:
    """Slabs of the host tier between a disk and a GPU: as many as fit what is free, less a margin."""
    return max(MIN_SLOTS, min(store.n_experts, default_budget("cpu", free_bytes) // store.slab_bytes))


def check_memory(plan: Plan, free_bytes: int) -> None:
    if plan.planned_bytes > free_bytes:
        raise Refusal(
            "E_MEMORY",
            f"the plan takes {size(plan.planned_bytes)}, {size(free_bytes)} are free",
            "lower --budget or --ctx, or free some memory",
            4,
        )


def compute_dtype(asked: str | None, stored: str) -> torch.dtype:
    """Of trunk and arithmetic, for a checkpoint stored as `stored`."""
    return getattr(torch, asked or ("bfloat16" if stored == "float32" else stored))


def trunk_format(config: EngineConfig, format: str, dtype: torch.dtype, device: str) -> str:
    """What was asked, else four bits on the CPU, whose memory is slow, unless exactness was asked for elsewhere."""
    exact = format == "bf16" or dtype == torch.float32
    return config.trunk or ("bf16" if exact or device != "cpu" else "int4")


def _too_small(
    budget: int, smallest: int, sizes: Sizes, predictor_bytes: int, ctx: int, sequences: int, store: StoreSize
) -> Refusal:
    predictor = f"predictor {size(predictor_bytes)}, " if predictor_bytes else ""
    many = f"{sequences} x " if sequences > 1 else ""
    parts = (
        f"trunk {size(sizes.trunk_bytes)}, {predictor}scratch {size(sizes.scratch_bytes)}, keys and values of {many}{ctx} "
        f"tokens {size(sequences * sizes.kv_bytes(ctx))} and {MIN_SLOTS} slots of {size(store.slab_bytes)}"
    )
    return Refusal(
        "E_BUDGET",
        f"a budget of {size(budget)} ({budget:,} bytes) cannot hold {parts}; the smallest is {size(smallest)} "
        f"({smallest:,} bytes)",
        "raise --budget, lower --ctx, or say --budget min",
        4,
    )


def _budget_bytes(asked: str | int | None, store: StoreSize, smallest: int, fixed: int, free: int) -> int:
    if asked is None:
        return free
    if asked == "min":
        return smallest
    if asked == "half":  # half of the experts, the demo's default
        return fixed + max(MIN_SLOTS, store.n_experts // 2) * store.slab_bytes
    if isinstance(asked, str) and asked.strip().endswith("%"):
        return int(parse_share(asked) * store.bf16_bytes)
    return parse_size(asked, "budget")


def _longest(sizes: Sizes, floor: int, room: int) -> int:
    """The most tokens whose keys and values fit `room`, in steps of doubling, up to the model's limit."""
    ctx, top = floor, sizes.limit or floor
    while ctx < top and sizes.kv_bytes(min(2 * ctx, top)) <= room:
        ctx = min(2 * ctx, top)
    return ctx
