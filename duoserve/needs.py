"""What one token of a model needs, from its config alone: counted on the stock model on the meta device. Knows models and
slab layouts; knows nothing of machines, budgets or seconds.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from duoserve.codec import Layout
from duoserve.core import Refusal
from duoserve.estimate import LayerNeeds, Needs
from duoserve.plan import Sizes

_PLAIN = {torch.bfloat16: "bf16", torch.float16: "float16", torch.float32: "float32"}
_CHOICES = re.compile(r"(num_)?experts?_per_tok(en)?|(moe_)?top_?k|moe_k|top_k_experts|moe_topk")


def count_needs(config: Any, dtype: torch.dtype, layouts: list[Layout], experts: list[int], format: str) -> Needs:
    """`layouts` and `experts` of each MoE layer; `format` of the experts."""
    sizes = Sizes(config, dtype)
    sizes.kv_bytes(1)  # runs the model once: the stand-ins have seen a route
    ops = count_ops(sizes.model)
    choices = [k or _choices(config) for k in sizes.choices]
    tables, head = _tables(sizes.model), _head(sizes.model)
    lookups = sum(p.numel() for p in tables if p is not head)
    matrices = {id(p): p for p in sizes.model.parameters() if p.ndim > 1}
    read = sum(p.numel() for p in matrices.values()) - lookups
    head_weights = head.numel() if head is not None else 0
    return Needs(
        layers=tuple(
            LayerNeeds(e, k, layout.slab_bytes, sum(p.rows * max(1, p.cols) for p in layout.params))
            for layout, e, k in zip(layouts, experts, choices, strict=True)
        ),
        expert_format=_PLAIN[getattr(torch, layouts[0].plain)] if format == "bf16" else format,
        trunk_format=_PLAIN[dtype],
        trunk_weights=read - head_weights,
        head_weights=head_weights,
        trunk_bytes=sizes.trunk_bytes - lookups * dtype.itemsize,
        kv_token_bytes=sizes.kv_bytes(2) - sizes.kv_bytes(1),
        ops=ops,
    )


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


def count_ops(model: Any) -> int:
    """Operations of a pass of one token behind another, views included; on meta, so that any two models compare."""
    ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
    counter = _Counter()
    try:
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            with counter:
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    except Exception as error:  # some attentions cannot run on meta
        kind = model.config.model_type
        raise Refusal(
            "E_ESTIMATE", f"{kind!r} does not run on the meta device", "measure it with chat --json"
        ) from error
    return counter.ops


def _choices(config: Any) -> int:
    """Where the model could not show it: what its config says."""
    text = config.get_text_config().to_dict()
    found = [value for name, value in text.items() if _CHOICES.fullmatch(name) and type(value) is int]
    if not found:
        raise Refusal("E_ESTIMATE", f"{config.model_type!r} names no number of experts per token", "measure it")
    return max(found)


def _tables(model: Any) -> list[torch.Tensor]:
    return list({id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}.values())


def _head(model: Any) -> torch.Tensor | None:
    head = model.get_output_embeddings()
    return head.weight if head is not None else None
