"""Every policy answers alike; each does what it is named for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from test_ahead import greedy

NEW = ["lfp", "mif", "duoserve-paper", "belady"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_logits_are_bit_identical_whatever_the_policy(toy: Any, load: Any, family: str) -> None:
    ids, folder = toys.ids(batch=3), toy(family)
    ids[1, :4], mask = 0, torch.ones_like(ids)
    mask[1, :4] = 0
    whole = load(folder, budget="1GiB")
    assert whole.plan.slots == whole.plan.experts
    few: dict[str, Any] = {"max_new_tokens": 7}
    want = [greedy(whole, ids[:1], **few), greedy(whole, ids, attention_mask=mask, **few)]
    for policy in NEW:
        for budget in ("min", "half", "1GiB"):
            engine = load(folder, budget=budget, policy=policy)
            found = [greedy(engine, ids[:1], **few), greedy(engine, ids, attention_mask=mask, **few)]
            for (tokens, logits), (same_tokens, same_logits) in zip(want, found, strict=True):
                assert torch.equal(tokens, same_tokens) and torch.equal(logits, same_logits), (policy, budget)
            engine.runtime.cache.check()


def moved(engine: Any, slab: int) -> int:
    """Slabs that have crossed by now, those under way included."""
    wait = engine.device.copy.submit(lambda: None)
    wait.wait()
    while engine.device.copy._active or any(engine.device.copy._lanes.values()):
        pass
    return int(engine.device.copy.cost_done) // slab


def test_lfp_moves_whole_layers_whatever_is_chosen(toy: Any, load: Any) -> None:
    """Room for two layers of three: every pass moves every layer, one pass and one layer ahead."""
    engine = load(toy("qwen3_moe"), budget="min", policy="lfp")
    layers, experts = len(engine.store.layers), engine.store.layers[0].n_experts
    engine = load(
        toy("qwen3_moe"), budget=engine.plan.smallest_bytes + (2 * experts - 2) * engine.plan.slot_bytes, policy="lfp"
    )
    assert engine.plan.slots == 2 * experts
    greedy(engine, toys.ids(batch=1), max_new_tokens=6)
    slab = engine.store.layout(0).slab_bytes
    assert moved(engine, slab) == (6 * layers + 1) * experts
    assert engine.stats()["misses"] == 0  # each expert was under way when its router spoke
