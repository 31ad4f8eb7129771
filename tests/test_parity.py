"""Logits and tokens equal the stock float32 model's, whatever fits: two slots, half of the experts, all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys

BUDGETS = ["min", "half", 1 << 30]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.fixture(scope="module", params=toys.PROMISED)
def pair(request: Any, toy: Any) -> Any:
    """A family's checkpoint and its stock model."""
    folder = toy(request.param)
    return folder, toys.stock(folder)


@pytest.mark.parametrize("budget", BUDGETS)
def test_logits_and_greedy_tokens_equal_the_stock_model(pair: Any, load: Any, budget: Any) -> None:
    folder, stock = pair
    engine = load(folder, budget=budget, dtype="float32")
    ids = toys.ids()
    with torch.no_grad():
        assert relative(engine.model(ids).logits, stock(ids).logits) <= 1e-5
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(engine.model.generate(ids[:1], **options), stock.generate(ids[:1], **options))
    assert engine.stats()["used_bytes"] <= engine.stats()["budget_bytes"]
    engine.runtime.cache.check()


def test_sampling_prompt_lookup_and_padded_batches_equal_the_stock_model(pair: Any, load: Any) -> None:
    folder, stock = pair
    engine = load(folder, budget="half", dtype="float32")
    ids = toys.ids(batch=3)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :2] = 0
    ids = torch.where(mask == 0, 0, ids)
    repeated = toys.ids(1, 6).repeat(1, 4)
    runs: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (ids, {"attention_mask": mask, "do_sample": False}),
        (ids, {"attention_mask": mask, "do_sample": True, "temperature": 0.8, "top_p": 0.9}),
        (repeated, {"prompt_lookup_num_tokens": 4, "do_sample": False}),
    ]
    for prompt, options in runs:
        answers = []
        for model in (engine.model, stock):
            torch.manual_seed(7)
            answers.append(model.generate(prompt, max_new_tokens=16, **options))
        assert torch.equal(*answers), options
    engine.runtime.cache.check()


def test_gpt_oss_toy_reaches_the_clamp(toy: Any) -> None:
    """The clamp at 7 must matter in the toy, or parity would not notice its loss."""
    stock = toys.stock(toy("gpt_oss"))
    seen = []
    experts = stock.model.layers[0].mlp.experts
    original = experts._apply_gate
    experts._apply_gate = lambda h: (seen.append(h.abs().max().item()), original(h))[1]
    with torch.no_grad():
        stock(toys.ids())
    assert max(seen) > experts.limit


def test_each_expert_crosses_once_per_layer_of_a_prompt(toy: Any, load: Any) -> None:
    """With two slots nothing is guessed that a need would wait for, and nothing moves twice."""
    engine = load(toy("qwen3_moe"), budget="min")
    with torch.no_grad():
        engine.model(toys.ids(4, 40))
    stats = engine.stats()
    assert stats["misses"] + stats["in_flight"] + stats["hits"] == 18, "three layers, all six experts of each"
    assert stats["bytes_moved"] == 18 * engine.store.slab_bytes


@pytest.mark.parametrize("format", ["int4", "nf4", "bf16"])
def test_tokens_do_not_depend_on_the_budget(toy: Any, load: Any, format: str) -> None:
    """Same kernels, same order: bit-identical logits in every format (design D10)."""
    folder = toy("qwen3_moe")
    logits = []
    for budget in BUDGETS:
        engine = load(folder, budget=budget, format=format)
        with torch.no_grad():
            logits.append(engine.model(toys.ids()).logits)
            engine.model(toys.ids(seed=1))
            logits.append(engine.model(toys.ids()).logits)
    assert all(torch.equal(logits[0], other) for other in logits)


def test_three_tiers_give_the_same_logits_as_two(toy: Any, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk, host memory and slots, as on a GPU; the host tier holds fewer slabs than there are experts."""
    import duoserve
    from duoserve import device, engine, model, plan

    logits, slab_bytes = [], 8192
    for tiers in (2, 3):
        monkeypatch.setattr(
            engine, "open_device", lambda name, link, tiers=tiers: device.ThreadDevice(host_tier=tiers == 3)
        )
        monkeypatch.setattr(model, "available_ram", lambda: plan.CPU_MARGIN[0] + 9 * slab_bytes)
        with duoserve.load(toy("qwen3_moe"), budget="min", cache_dir=str(cache)) as opened, torch.no_grad():
            logits += [opened.model(toys.ids(seed=seed)).logits for seed in range(3)]
            host = opened.runtime.transfer.host
            assert (host is not None) == (tiers == 3) and opened.store.slab_bytes == slab_bytes
            assert host is None or len(host.cache.slots) == 9 < opened.store.n_experts
    assert all(torch.equal(a, b) for a, b in zip(logits[:3], logits[3:], strict=True))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_checkpoints_run_in_float32_without_rounding(toy: Any, load: Any, stored: torch.dtype) -> None:
    folder = toy("mixtral", dtype=stored)
    engine = load(folder, dtype="float32", budget="half")
    with torch.no_grad():
        assert relative(engine.model(toys.ids()).logits, toys.stock(folder)(toys.ids()).logits) <= 1e-5
