"""Families that nobody wrote code for: the stock model's logits and tokens, the planned bytes, or one line of refusal.

A family that the installed transformers lacks is skipped. Most run only with `-m slow`; a varied few always do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from duoserve.checkpoint import read_config
from duoserve.core import Refusal
from duoserve.experts import expert_function
from duoserve.plan import Sizes
from duoserve.sizing import CACHE, cache_bytes, kv_bytes

BUDGETS = ["min", "half", 1 << 30]
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
ALWAYS = {  # one of each kind of strangeness
    "deepseek_v4",  # routing by token id, compressed caches, hyper-connections
    "ernie4_5_moe",  # names of its own in the config
    "granitemoe",  # fused checkpoint tensors, scaled residuals
    "lfm2_moe",  # convolutions
    "minimax",  # a cache of its own
    "nemotron_h",  # experts without gate, in a latent space; state-space layers
    "qwen3_next",  # linear attention
}


def _needs(family: str) -> None:
    try:
        known = CONFIG_MAPPING[family] in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    except KeyError:
        known = False
    if not known:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def _left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = toys.ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return torch.where(mask == 0, 0, ids), mask


EVERY = [pytest.param(family, marks=() if family in ALWAYS else pytest.mark.slow) for family in toys.OTHERS]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Toys are too small for more; on a shared machine a second thread costs twenty times the time in waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", EVERY)
def test_any_family_behind_the_experts_interface_equals_stock(toy: Any, load: Any, family: str) -> None:
    _needs(family)
    if family == "aria_text" and transformers.__version__.startswith("5.17"):
        pytest.skip("this transformers lays out aria's experts outside its experts interface")
    folder = toy(family)
    stock, ids = toys.stock(folder), toys.ids()
    padded, mask = _left_padded()
    with torch.inference_mode():
        want, want_padded = stock(ids).logits, stock(padded, attention_mask=mask).logits[mask.bool()]
        tokens = stock.generate(input_ids=ids[:1], **GREEDY)
        tokens_padded = stock.generate(input_ids=padded, attention_mask=mask, **GREEDY)
    for budget in BUDGETS:
        engine = load(folder, budget=budget, dtype="float32", ctx=1024)
        with torch.inference_mode():
            assert _relative(engine.model(ids).logits, want) <= 1e-5
            assert _relative(engine.model(padded, attention_mask=mask).logits[mask.bool()], want_padded) <= 1e-5
            cached = engine.model(ids[:1], use_cache=True)[CACHE]
        assert torch.equal(engine.generate(input_ids=ids[:1], **GREEDY), tokens)
        assert torch.equal(engine.generate(input_ids=padded, attention_mask=mask, **GREEDY), tokens_padded)
        engine.runtime.cache.check()
        assert engine.stats()["used"]["trunk_bytes"] == engine.plan.trunk_bytes
    assert cache_bytes(cached) == Sizes(read_config(folder), torch.float32).kv_bytes(ids.shape[1])
    with torch.inference_mode():
        for name, p in stock.named_parameters():
            if ".experts." in name:
                p.zero_()
        assert _relative(stock(ids).logits, want) > 1e-3, "the experts do not matter in this toy"


@pytest.mark.parametrize("family", [
    "qwen3_next",  # grows by nothing in two of three layers
    pytest.param("deepseek_v4", marks=pytest.mark.slow),
    pytest.param("jamba", marks=pytest.mark.slow),
    pytest.param("afmoe", marks=pytest.mark.slow),
])  # fmt: skip
def test_long_contexts_are_extended_without_running_them(family: str) -> None:
    _needs(family)
    config = transformers.AutoConfig.for_model(family, **toys.OTHERS[family])
    sizes = Sizes(config, torch.float32)
    for tokens in (100, 1024, 1500):
        assert sizes.kv_bytes(tokens) == kv_bytes(sizes.model, tokens)


def test_where_the_meta_pass_fails_the_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("mixtral", "deepseek_v3"):
        sizes = Sizes(transformers.AutoConfig.for_model(family, **toys.PROMISED[family]), torch.float32)
        exact = kv_bytes(sizes.model, 64)
        monkeypatch.setattr(type(sizes.model), "forward", None)
        assert exact <= kv_bytes(sizes.model, 64) <= 32 * exact


def test_the_norm_after_an_expert_is_applied() -> None:
    """No causal language model has it yet; the stock module is compared by itself."""
    module = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark", reason="no muse_spark here")
    config = transformers.AutoConfig.for_model("muse_spark_text", num_local_experts=3, moe_hidden_size=64,
                                               moe_intermediate_size=48)  # fmt: skip
    torch.manual_seed(0)
    experts = module.MuseSparkExperts(config).eval()
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(std=0.3)
        x, ids = torch.randn(5, 64), torch.full((5, 1), 2)
        weights = {name: _Plain(p[2]) for name, p in experts.named_parameters(recurse=False)}
        want = experts(x, ids, torch.ones(5, 1))
        assert _relative(expert_function(experts)(x, weights), want) <= 1e-5


class _Plain:
    """A matrix as the codec would hand it over."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix = matrix

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.matrix)


_VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_hidden_layers": 1, "num_attention_heads": 2,
           "num_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "out_hidden_size": 64, "patch_size": 4,
           "num_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_5_moe", pytest.param("gemma4", marks=pytest.mark.slow)])
def test_multimodal_checkpoints_answer_text_like_stock(tmp_path: Path, load: Any, family: str) -> None:
    """As the hub holds them: with the towers, which the text model ignores or keeps in the trunk."""
    _needs(family)
    changes = {"text_config": toys.OTHERS[f"{family}_text"], "vision_config": _VISION}
    if family == "gemma4":
        changes["audio_config"] = None
    config = transformers.AutoConfig.for_model(family, **changes)
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    toys.perturb(whole)
    whole.save_pretrained(tmp_path / "model")
    engine = load(tmp_path / "model", dtype="float32", budget="half")
    stock, ids = toys.stock(tmp_path / "model"), toys.ids()
    with torch.inference_mode():
        assert _relative(engine.model(ids).logits, stock(ids).logits) <= 1e-5
        assert torch.equal(engine.model.generate(ids, **GREEDY), stock.generate(ids, **GREEDY))
    assert engine.stats()["used"]["trunk_bytes"] == engine.plan.trunk_bytes


_DENSE = toys.PROMISED["mixtral"] | {"num_hidden_layers": 2}
_OUTSIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("E_NOT_MOE", _DENSE),
    "llama4_text": ("E_LAYOUT", _DENSE | {"intermediate_size_mlp": 96, "head_dim": 16}),
    "dbrx": ("E_LAYOUT", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 128,
                          "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 2},
                          "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}}),
    "jetmoe": ("E_LAYOUT", _DENSE | {"kv_channels": 16}),
    "doge": ("E_LAYOUT", _DENSE | {"is_moe": True, "num_experts": 16}),
    "longcat_flash": ("E_LAYOUT", {
        "hidden_size": 64, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "num_layers": 2,
        "num_attention_heads": 4, "vocab_size": 128, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 6, "zero_expert_num": 2, "moe_topk": 2}),
    "nllb-moe": ("E_CONFIG", {"d_model": 64, "vocab_size": 128, "encoder_layers": 2, "decoder_layers": 2,
                              "num_experts": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
                              "encoder_attention_heads": 4, "decoder_attention_heads": 4}),
    "switch_transformers": ("E_CONFIG", {"d_model": 64, "vocab_size": 128, "d_kv": 16, "d_ff": 64, "num_layers": 2,
                                         "num_heads": 4, "num_experts": 4}),
    "qwen3_vl_moe": ("E_CONFIG", {"text_config": toys.PROMISED["qwen3_moe"], "vision_config": _VISION}),
}  # fmt: skip


@pytest.mark.parametrize("family", _OUTSIDE)
def test_other_layouts_are_refused_in_one_line(tmp_path: Path, load: Any, family: str) -> None:
    code, settings = _OUTSIDE[family]
    config = transformers.AutoConfig.for_model(family, **settings)
    kinds = ("CausalLM", "Seq2SeqLM", "ImageTextToText")
    for auto in (getattr(transformers, f"AutoModelFor{kind}") for kind in kinds):
        if type(config) in auto._model_mapping:
            auto.from_config(config).save_pretrained(tmp_path / "model")
            break
    with pytest.raises(Refusal, match=rf"^{code}: [^\n]+; [^\n]+$"):
        load(tmp_path / "model", budget="min")


def test_a_config_that_no_model_can_be_built_from_is_refused(tmp_path: Path, toy: Any, load: Any) -> None:
    for file in toy("mixtral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"hidden_act": "silu"', '"hidden_act": "none-such"'))
    with pytest.raises(Refusal, match=r"^E_CONFIG: [^\n]+$"):
        load(tmp_path, budget="min")
