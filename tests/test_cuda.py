"""The GPU device: the same logits through pinned host slabs, a copy stream and events. Needs an NVIDIA GPU; without
pytest-xdist: `pytest -o addopts= -m cuda`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("budget", ["min", "half", 1 << 30])
@pytest.mark.parametrize("family", toys.PROMISED)
def test_logits_and_tokens_equal_the_stock_model_on_the_gpu(toy: Any, load: Any, family: str, budget: Any) -> None:
    engine, stock = load(toy(family), dtype="float32", budget=budget, device="cuda"), toys.stock(toy(family)).cuda()
    ids = toys.ids().cuda()
    with torch.no_grad():
        got, want = engine.model(ids).logits, stock(ids).logits
    assert ((got - want).abs().max() / want.abs().max()).item() <= 1e-5
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(engine.model.generate(ids[:1], **options), stock.generate(ids[:1], **options))
    engine.runtime.cache.check()


@pytest.mark.parametrize("format", ["int4", "nf4", "bf16"])
def test_tokens_do_not_depend_on_the_budget_on_the_gpu(toy: Any, load: Any, format: str) -> None:
    logits = []
    for budget in ("min", "half", 1 << 30):
        engine = load(toy("qwen3_moe"), budget=budget, format=format, device="cuda")
        with torch.no_grad():
            logits += [engine.model(toys.ids(seed=s).cuda()).logits for s in (0, 1, 0)]
    assert all(torch.equal(logits[i], logits[i % 3]) for i in range(len(logits)))


def test_a_pool_that_cannot_be_pinned_is_copied_pageable_with_one_warning(
    toy: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duoserve.device.cuda._register", lambda address, n_bytes: False)
    with pytest.warns(UserWarning, match="could be pinned") as warned:
        engine = load(toy("mixtral"), budget="min", device="cuda")
    assert len([w for w in warned if "could be pinned" in str(w.message)]) == 1
    engine.model.generate(toys.ids().cuda(), max_new_tokens=4, do_sample=False)
