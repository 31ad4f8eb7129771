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

_LAYERS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_LOCAL = {"intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2}
_ROUTED = {"intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2,
           "n_group": 2, "topk_group": 1}  # fmt: skip
_SHARED = {"n_shared_experts": 1, "first_k_dense_replace": 1}
_MLA_ROUTED = _BASE | _MLA | _ROUTED | {"n_shared_experts": 1, "q_lora_rank": 24}
_INDEXED = _MLA_ROUTED | {"index_topk": 6, "index_head_dim": 32, "index_n_heads": 2}
_KDA = _BASE | _MLA | _LOCAL | {
    "intermediate_size": 96, "moe_intermediate_size": 48, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_DELTA = _BASE | _EXPERTS | {
    "head_dim": 16, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_INKLING = _BASE | {
    "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "head_dim": 16, "sliding_window_size": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 16, "d_rel": 8, "rel_extent": 32, "unpadded_vocab_size": VOCAB,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
}  # fmt: skip
_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}

# Families that nobody wrote code for. A version of transformers may lack some.
OTHERS: dict[str, dict[str, Any]] = {
    "afmoe": _BASE | _EXPERTS | _LAYERS | {"intermediate_size": 96, "head_dim": 16, "num_shared_experts": 1},
    "aria_text": _BASE | {"intermediate_size": 48, "moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": _MLA_ROUTED,
    "axk2": _INDEXED,
    "bailing_hybrid": _KDA | _SPARSE | {"head_dim": 16},
    "beam": _BASE | _EXPERTS | _LAYERS | _SPARSE | {"intermediate_size": 96, "num_experts": 8, "head_dim": 16,
                                                    "n_group": 2, "topk_group": 1},
    "cohere2_moe": _BASE | _EXPERTS | _LAYERS | {"intermediate_size": 48, "head_dim": 16, "num_shared_experts": 1},
    "deepseek_v32": _INDEXED | {"first_k_dense_replace": 1},
    "deepseek_v4": _BASE | {
        "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 24, "moe_intermediate_size": 48, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "sliding_window": 8, "o_groups": 2, "o_lora_rank": 16,
        "hc_mult": 2, "index_topk": 2, "index_head_dim": 16, "index_n_heads": 2, "num_nextn_predict_layers": 0,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": _BASE | _ROUTED | _SHARED | _LAYERS | {"head_dim": 16},
    "dots3_note_text": _INDEXED | {"sliding_window": 8, "shared_experts_intermediate_size": 48},
    "ernie4_5_moe": _BASE | {"intermediate_size": 96, "moe_intermediate_size": 48, "moe_num_experts": 6, "moe_k": 2,
                             "moe_num_shared_experts": 1},
    "exaone_moe": _BASE | _EXPERTS | _LAYERS | {"intermediate_size": 96, "num_shared_experts": 1},
    "flex_olmo": _BASE | {"intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2},
    "flint": _BASE | _EXPERTS | _LAYERS | {"intermediate_size": 96, "head_dim": 16, "mlp_only_layers": [0],
                                           "shared_expert_intermediate_size": 64},
    "gemma4_text": _BASE | _EXPERTS | _LAYERS | {
        "intermediate_size": 96, "head_dim": 16, "enable_moe_block": True, "top_k_experts": 2,
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "glm4_moe": _BASE | _ROUTED | _SHARED | {"head_dim": 16, "use_qk_norm": True},
    "glm4_moe_lite": _MLA_ROUTED,
    "glm_moe_dsa": _INDEXED | {"first_k_dense_replace": 1},
    "granitemoe": _BASE | _LOCAL,
    "granitemoe_swa": _BASE | _LOCAL | _LAYERS | {"shared_intermediate_size": 32},
    "granitemoehybrid": _BASE | _LOCAL | {
        "shared_intermediate_size": 32, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16,
    },
    "granitemoeshared": _BASE | _LOCAL | {"shared_intermediate_size": 32},
    "hunyuan_v1_moe": _BASE | {"intermediate_size": 48, "num_experts": 6, "moe_topk": 2, "head_dim": 16},
    "hy_v3": _BASE | _EXPERTS | {"intermediate_size": 96, "head_dim": 16},
    "hy_v4": _INDEXED | {"hc_mult": 2},
    "inkling_text": _INKLING | {"n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "inkling2_text": _INKLING,
    "jamba": _BASE | {"intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False,
                      "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                      "expert_layer_offset": 0},
    "kimi_linear": _KDA | {"q_lora_rank": 24, "linear_head_dim": 16, "linear_num_heads": 4},
    "kolibri1": _BASE | _EXPERTS | _LAYERS | {"head_dim": 16, "shared_expert_intermediate_size": 48},
    "laguna": _BASE | _EXPERTS | _LAYERS | {"intermediate_size": 96, "head_dim": 16,
                                            "shared_expert_intermediate_size": 64},
    "lfm2_moe": _BASE | _EXPERTS | {"intermediate_size": 96, "num_dense_layers": 1,
                                    "layer_types": ["conv", "full_attention", "conv"]},
    "mellum": _BASE | _EXPERTS | _LAYERS | {"head_dim": 16},
    "mimo_v2_flash": _BASE | _ROUTED | _LAYERS | {"head_dim": 16, "v_head_dim": 16},
    "minimax": _BASE | _LOCAL | {"head_dim": 16, "block_size": 16,
                                 "layer_types": ["full_attention", "linear_attention", "full_attention"]},
    "minimax_m2": _BASE | _LOCAL | {"head_dim": 16},
    "minimax_m3_vl_text": _BASE | _LOCAL | _SPARSE | {
        "head_dim": 16, "dense_intermediate_size": 96, "shared_intermediate_size": 48, "rotary_dim": 8,
        "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 2,
    },
    "nemotron_h": _BASE | _ROUTED | {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "moe", "attention", "moe"], "head_dim": 16,
        "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 48, "moe_latent_size": 32, "ssm_state_size": 16,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16, "use_mamba_kernels": False,
    },
    "olmoe": _BASE | {"intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2},
    "phimoe": _BASE | _LOCAL,
    "qwen3_5_moe_text": _DELTA,
    "qwen3_next": _DELTA | {"intermediate_size": 96},
    "qwen4_exp_text": _DELTA | {
        "hc_count": 2, "hc_lowrank": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 8, "indexer_compress_ratio": 4, "ple_layer_ids": [1], "ple_embed_dim": 32,
        "heads_per_ngram": 2, "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
    },
    "solar_open": _BASE | _ROUTED | {"head_dim": 16, "n_shared_experts": 1},
    "zaya": _BASE | {"moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 1, "head_dim": 16,
                     "router_hidden_size": 32},
}  # fmt: skip


def make(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Save a toy checkpoint of `family` in `folder`, in several shards, and return `folder`."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **((PROMISED | OTHERS).get(family, {}) | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    perturb(model)
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    return folder


@torch.no_grad()
def perturb(model: Any) -> None:
    """Random values everywhere; experts and their biases wide enough to reach gpt_oss's clamp at 7."""
    saved = set(model.state_dict())
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if "tid2eid" in name:  # deepseek_v4's table from token to experts
            p.random_(0, model.config.n_routed_experts)
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
