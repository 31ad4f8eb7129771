"""What one token of a model needs, from its config alone: counted on the stock model on the meta device. Knows models and
slab layouts; knows nothing of machines, budgets or seconds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config as torch_shapes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from duoserve.codec import Layout
from duoserve.core import Refusal
from duoserve.estimate import LayerNeeds, Needs, Product
from duoserve.plan import Sizes
from duoserve.sizing import CACHE
from duoserve.trunk import QuantisedLinear

CONTEXT = 512  # tokens that a decoded token looks back on, and of the prompt whose time is estimated
_PLAIN = {torch.bfloat16: "bf16", torch.float16: "float16", torch.float32: "float32"}


def count_needs(
    config: Any, dtype: torch.dtype, layouts: list[Layout], experts: list[int], format: str, trunk: str
) -> Needs:
    """`layouts` and `experts` of each MoE layer; `format` of the experts, `trunk` of its linears."""
    sizes = Sizes(config, dtype, trunk)
    counted = count_passes(sizes.model, CONTEXT)
    choices = [k for k in sizes.choices if k is not None]  # a layer that was not called fails the strict zip below
    lookups = sum(table.numel() for table in _tables(sizes.model))
    return Needs(
        layers=tuple(
            LayerNeeds(e, k, layout.slab_bytes, sum(p.rows * max(1, p.cols) for p in layout.params))
            for layout, e, k in zip(layouts, experts, choices, strict=True)
        ),
        expert_format=_PLAIN[getattr(torch, layouts[0].plain)] if format == "bf16" else format,
        trunk=tuple(_products(sizes.model, _PLAIN[dtype], trunk)),
        trunk_bytes=sizes.trunk_bytes - lookups * dtype.itemsize,
        kv_bytes=sizes.kv_bytes(CONTEXT),
        ops=counted.ops,
        context=CONTEXT,
        token_attention_flops=counted.token_attention_flops,
        prompt_attention_flops=counted.prompt_attention_flops,
    )


class _Counter(TorchDispatchMode):
    """Operations, views included, and the FLOPs of those that multiply two activations: attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.attention_flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.attention_flops += 2 * out.numel() * args[-1].shape[-2]
        return out


class Counted(NamedTuple):
    ops: int  # of a pass of one token
    token_attention_flops: int
    prompt_attention_flops: int


def count_passes(model: Any, context: int) -> Counted:
    """A prompt of `context` tokens and one token behind it; on meta, so that any two models compare."""
    ids = torch.zeros(1, context, dtype=torch.long, device="meta")
    prompt, token = _Counter(), _Counter()
    try:
        with torch.no_grad(), torch_shapes.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
            with prompt:
                cache = model(input_ids=ids, use_cache=True, logits_to_keep=1)[CACHE]
            with token:
                model(input_ids=ids[:, :1], use_cache=True, logits_to_keep=1, **{CACHE: cache})
    except Exception as error:  # some attentions cannot run on meta
        kind = model.config.model_type
        raise Refusal(
            "E_ESTIMATE", f"{kind!r} does not run on the meta device", "measure it with chat --json"
        ) from error
    return Counted(token.ops, token.attention_flops, prompt.attention_flops)


def _products(model: Any, plain: str, trunk: str) -> list[Product]:
    """The trunk's matrices, by format and by whether they are the head."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    lookups = {id(table) for table in _tables(model)}
    matrices = {id(p): p for p in model.parameters() if p.ndim > 1 and id(p) not in lookups}
    plain_head = matrices.pop(id(head.weight)) if head is not None and head not in linears else None
    found = [
        Product(trunk, sum(m.in_features * m.out_features for m in linears if m is not head), False),
        Product(trunk, sum(m.in_features * m.out_features for m in linears if m is head), True),
        Product(plain, sum(p.numel() for p in matrices.values()), False),
        Product(plain, plain_head.numel() if plain_head is not None else 0, True),
    ]
    return [product for product in found if product.weights]


def _tables(model: Any) -> list[torch.Tensor]:
    """What is looked up and not multiplied."""
    head = model.get_output_embeddings()
    multiplied = getattr(head, "_parameters", {}).get("weight")
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return [table for table in tables.values() if table is not multiplied]
