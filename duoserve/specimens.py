"""Models by their published configs alone: shapes to plan and simulate with, no weights. Knows what each config says and
what follows from it on the meta device; knows nothing of machines, routes or seconds.

Values are those of each publisher's config.json. A model whose own code is not in transformers is represented by a stock
class with the same tensor shapes, named in `note`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from duoserve.checkpoint import build_meta, find_experts, quiet
from duoserve.convert import layouts_of
from duoserve.core import Refusal, nearest
from duoserve.estimate import LayerNeeds, Needs, Product
from duoserve.needs import count_needs

PAGE = 4096  # slabs are multiples of it
COUNTED = Path(__file__).parent / "specimens.json"


@dataclass(frozen=True)
class Specimen:
    """`experts`, `trunk`: formats it is run in unless said otherwise. `published`: parameters, as its publisher says."""

    name: str
    kind: str  # transformers' model_type
    values: dict[str, Any]
    published: float
    experts: str
    trunk: str
    source: str
    note: str = ""

    @property
    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(self.kind, **self.values)


_MIXTRAL = {
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
}
_DEEPSEEK = {
    "vocab_size": 102400, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
    "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "max_position_embeddings": 4096,
}  # fmt: skip
_GPT_OSS = {"num_experts_per_tok": 4, "max_position_embeddings": 131072}
_MODELS = (
    Specimen(
        "mixtral-8x7b", "mixtral",
        _MIXTRAL | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        46.7e9, "int4", "int4", "mistralai/Mixtral-8x7B-v0.1 config.json",
    ),
    Specimen(
        "mixtral-8x22b", "mixtral",
        _MIXTRAL | {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48},
        141e9, "int4", "int4", "mistralai/Mixtral-8x22B-v0.1 config.json",
    ),
    Specimen(
        "qwen3-30b-a3b", "qwen3_moe",
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_local_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960,
        },
        30.5e9, "fp8", "bf16", "Qwen/Qwen3-30B-A3B config.json",
    ),
    Specimen(
        "deepseekmoe-16b", "glm4_moe",
        _DEEPSEEK | {
            "num_hidden_layers": 28, "intermediate_size": 10944, "head_dim": 128, "partial_rotary_factor": 1.0,
            "attention_bias": False, "use_qk_norm": False, "n_group": 1, "topk_group": 1,
        },
        16.4e9, "bf16", "bf16", "deepseek-ai/deepseek-moe-16b-base config.json",
        "its own code is not in transformers: glm4_moe of the same shapes (2 shared, 6 of 64 routed)",
    ),
    Specimen(
        "deepseek-v2-lite", "deepseek_v2",
        _DEEPSEEK | {
            "num_hidden_layers": 27, "intermediate_size": 10944, "q_lora_rank": None, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 1, "topk_group": 1,
        },
        15.7e9, "int4", "bf16", "deepseek-ai/DeepSeek-V2-Lite config.json",
    ),
    Specimen(
        "gpt-oss-20b", "gpt_oss", _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
        20.9e9, "int4", "bf16", "openai/gpt-oss-20b config.json", "published in MXFP4, 4.25 bits; here int4, 4.5 bits",
    ),
    Specimen(
        "gpt-oss-120b", "gpt_oss", _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
        116.8e9, "int4", "bf16", "openai/gpt-oss-120b config.json", "published in MXFP4, 4.25 bits; here int4, 4.5 bits",
    ),
)  # fmt: skip
SPECIMENS = {model.name: model for model in _MODELS}


def specimen(name: str) -> Specimen:
    if name not in SPECIMENS:
        raise Refusal("E_MODEL", f"no model is known by the name {name!r}", nearest(name, list(SPECIMENS)), 3)
    return SPECIMENS[name]


def parameters(model: Specimen) -> int:
    """Of the whole model, counted on meta."""
    return sum(p.numel() for p in build_meta(model.config, torch.bfloat16).parameters())


@lru_cache
def needs_of(name: str, experts: str | None = None, trunk: str | None = None) -> Needs:
    """What a token needs in these formats; in the model's own ones as `scripts/specimens.py` counted it beforehand."""
    model = specimen(name)
    asked = (experts or model.experts, trunk or model.trunk)
    known = json.loads(COUNTED.read_bytes()).get(name) if COUNTED.exists() else None
    if known is not None and asked == (model.experts, model.trunk):
        return _from_json(known)
    return count(model, *asked)


def count(model: Specimen, experts: str, trunk: str) -> Needs:
    """On the meta device: seconds. "fp8" is one byte a weight: its scales, 1/128 of that, are left out."""
    quiet()
    format = "bf16" if experts == "fp8" else experts
    config = model.config
    specs = find_experts(build_meta(config, torch.bfloat16))
    layouts = layouts_of(specs, format, "bfloat16", "bfloat16")
    needs = count_needs(config, torch.bfloat16, layouts, [s.n_experts for s in specs], format, trunk)
    if experts != "fp8":
        return needs
    layers = tuple(layer._replace(slab_bytes=-(-layer.weights // PAGE) * PAGE) for layer in needs.layers)
    return replace(needs, layers=layers, expert_format="fp8")


def to_json(needs: Needs) -> dict[str, Any]:
    """Layers that are alike only once."""
    said = {name: value for name, value in needs.to_json().items() if name != "active_bytes"}
    runs = [[list(layer), len(list(alike))] for layer, alike in groupby(needs.layers)]
    return said | {"layers": runs, "trunk": [list(product) for product in needs.trunk]}


def _from_json(said: dict[str, Any]) -> Needs:
    layers = tuple(LayerNeeds(*layer) for layer, times in said["layers"] for _ in range(times))
    return Needs(**(said | {"layers": layers, "trunk": tuple(Product(*part) for part in said["trunk"])}))
