"""What a model's tensors and its keys and values take, measured on the meta device. Knows transformers' models and caches;
knows nothing of budgets. Beside checkpoint.py the only file that uses private parts of transformers: `_get_dtype_plan` and
`_supports_default_dynamic_cache`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.fx.experimental._config as torch_shapes
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from duoserve.core import Refusal

# What transformers calls keys and values, as an argument and in what comes back: "past_key_values" until 5.23.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_LEAST_PERIOD = 128  # tokens; no compressed cache joins more into one


def tensor_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of all parameters and buffers of a meta model once loaded, tied ones once, what must stay float32 as such."""
    plan = {re.compile(_glob(pattern)): kept for pattern, kept in model._get_dtype_plan(dtype).items()}
    total, seen = 0, set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept = next((d for pattern, d in plan.items() if pattern.search(name)), tensor.dtype)
            total += tensor.numel() * (kept if tensor.is_floating_point() else tensor.dtype).itemsize
    return total


def _glob(pattern: str) -> str:
    return pattern.replace("*", ".*")


def kv_bytes(model: Any, tokens: int) -> int:
    """Bytes of cache after `tokens` tokens of one sequence, by running the meta model: exact for any attention.

    Where the model cannot run on meta: a bound, as if every layer kept keys and values of every attention head.
    `model` must be on meta with its experts replaced by something that runs there.
    """
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    text = model.config.get_text_config(decoder=True)
    try:  # the cache that `generate` would make; indexers ask for the non-zeros of a mask, which has none on meta
        cache = transformers.DynamicCache(config=text) if model._supports_default_dynamic_cache() else None
        with torch.no_grad(), torch_shapes.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            return cache_bytes(out[CACHE])
    except Refusal:
        raise
    except Exception:
        return _kv_bound(text, tokens, model.dtype)


def _kv_bound(text: Any, tokens: int, dtype: torch.dtype) -> int:
    sides = text.to_dict().items()
    head = max((side for name, side in sides if name.endswith("head_dim") and isinstance(side, int)), default=0)
    width = max(int(text.hidden_size), int(text.num_attention_heads) * head)
    return 2 * int(text.num_hidden_layers) * width * tokens * dtype.itemsize


def kv_period(config: Any) -> int:
    """Tokens after which a cache has seen every window and block: from there on each period adds the same."""
    text = config.get_text_config().to_dict()
    sides = [side for name, side in text.items() if re.search("window|chunk|block_size", name) and type(side) is int]
    return -(-max([1, *sides]) // _LEAST_PERIOD) * _LEAST_PERIOD


def cache_bytes(cache: Any) -> int:
    """Bytes that a transformers cache holds in tensors: keys and values, index keys, states of linear attention."""
    held = [tensor for part in (cache, *getattr(cache, "layers", ())) for tensor in _tensors(vars(part))]
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in held}.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def model_limit(config: Any) -> int | None:
    """The longest context the model was made for, where its config says."""
    text = config.get_text_config()
    return cast("int | None", getattr(text, "max_position_embeddings", None))
