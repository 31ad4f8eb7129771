"""Small random models of real families, saved as the hub would hold them. Every parameter and every saved buffer is
perturbed, so that a bias, a correction or a clamp that is dropped shows in the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 128
_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_DEEPSEEK = _BASE | _MLA | {
    "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2}

PROMISED: dict[str, dict[str, Any]] = {
    "mixtral": _BASE | {"intermediate_size": 96, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": _BASE | _EXPERTS | {"intermediate_size": 96, "shared_expert_intermediate_size": 64},
    "qwen3_moe": _BASE | _EXPERTS | {"intermediate_size": 96, "head_dim": 16},
    "deepseek_v2": _DEEPSEEK | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _DEEPSEEK | {"q_lora_rank": 24},
    "gpt_oss": _BASE | {"intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16,
                        "sliding_window": 16,
                        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}  # fmt: skip


def make(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Save a toy checkpoint of `family` in `folder`, in several shards, and return `folder`."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **((PROMISED.get(family) or {}) | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    perturb(model)
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    return folder


@torch.no_grad()
def perturb(model: Any) -> None:
    """Random values everywhere; experts and their biases wide enough to reach gpt_oss's clamp at 7."""
    saved = set(model.state_dict())
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if name not in saved or not p.is_floating_point():
            continue
        if "norm" in name:
            p.add_(torch.randn_like(p) * 0.1)
        elif "experts" in name and "gate_up" in name:
            p.normal_(std=1.5)
        else:
            p.normal_(std=0.1)


@torch.no_grad()
def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The stock model, all in memory."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def ids(batch: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
