"""The model that ships: stock transformers reads it, no expert is dead, four bits cost little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.perplexity import perplexity, windows
from duoserve.engine import DEMO

TOKENS = 16 * 512


@pytest.fixture(scope="module")
def stock() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def bf16(cache: Path) -> float:
    import duoserve

    with duoserve.load(format="bf16", budget="half", cache_dir=str(cache)) as engine:
        return perplexity(engine.model, windows(TOKENS))


def test_bf16_is_the_stock_model(stock: Any, bf16: float) -> None:
    assert bf16 == pytest.approx(perplexity(stock, windows(TOKENS)), rel=2e-3)


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_four_bits_cost_less_than_five_per_cent(load: Any, bf16: float, format: str) -> None:
    assert perplexity(load(format=format, budget="half").model, windows(TOKENS)) <= 1.05 * bf16


def test_no_expert_is_dead(stock: Any) -> None:
    counts = torch.zeros(6, 32)
    for layer, block in enumerate(stock.model.layers):

        def count(module: Any, args: Any, layer: int = layer) -> None:
            counts[layer] += torch.bincount(args[1].flatten(), minlength=32)

        block.mlp.experts.register_forward_pre_hook(count)
    with torch.no_grad():
        for row in windows(40 * 512):
            stock(input_ids=row[None], use_cache=False)
    assert counts.min() > 0, (counts / counts.sum(1, keepdim=True)).min(1).values


def test_it_is_small_and_in_the_hubs_layout() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 26_000_000
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert "Hi" in text
