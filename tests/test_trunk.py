"""The trunk in four bits: the stock model with the same rounded weights, no more, no less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import nn

from duoserve.plan import Sizes
from duoserve.trunk import QuantisedLinear


def quantised(engine: Any) -> dict[str, QuantisedLinear]:
    return {name: m for name, m in engine.model.named_modules() if isinstance(m, QuantisedLinear)}


@pytest.mark.parametrize("format", ["int4", "nf4"])
@pytest.mark.parametrize("family", toys.PROMISED)
def test_logits_are_those_of_the_stock_model_with_the_rounded_weights(
    toy: Any, load: Any, family: str, format: str
) -> None:
    engine = load(toy(family), dtype="float32", trunk=format, budget="half")
    stock, linears = toys.stock(toy(family)), quantised(engine)
    assert {"lm_head", "model.layers.1.self_attn.o_proj"} <= set(linears)
    for name, linear in linears.items():
        original = stock.get_submodule(name)
        assert isinstance(original, nn.Linear)
        change = (original.weight - linear.weight).norm() / original.weight.norm()
        assert 0.02 < change < 0.15, (name, change)
        original.weight.data = linear.weight
    ids = toys.ids()
    with torch.no_grad():
        got, want = engine.model(ids).logits, stock(ids).logits
    assert ((got - want).abs().max() / want.abs().max()).item() <= 1e-5


@pytest.mark.parametrize("family", toys.PROMISED)
def test_routers_and_embeddings_stay_as_they_are(toy: Any, load: Any, family: str) -> None:
    engine = load(toy(family))
    assert engine.stats()["trunk"] == "int4"
    for name in quantised(engine):
        assert "router" not in name and not name.endswith("gate") and "embed" not in name, name
    assert engine.model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_tied_head_is_rounded_and_its_embedding_is_not(toy: Any, load: Any) -> None:
    folder = toy("mixtral", tie_word_embeddings=True)
    engine = load(folder, dtype="float32", trunk="int4")
    stock = toys.stock(folder)
    assert torch.equal(engine.model.get_input_embeddings().weight, stock.get_input_embeddings().weight)
    assert not torch.equal(engine.model.lm_head.weight, stock.lm_head.weight)
    assert engine.stats()["used"]["trunk_bytes"] == engine.plan.trunk_bytes


@pytest.mark.parametrize(
    ("options", "trunk"),
    [({}, "int4"), ({"format": "bf16"}, "bf16"), ({"dtype": "float32"}, "bf16"), ({"format": "nf4"}, "int4")],
)
def test_the_trunk_is_rounded_by_default_where_the_experts_are(
    toy: Any, load: Any, options: dict[str, Any], trunk: str
) -> None:
    engine = load(toy("qwen3_moe"), **options)
    assert engine.stats()["trunk"] == trunk and bool(quantised(engine)) == (trunk == "int4")


@pytest.mark.parametrize("trunk", ["bf16", "int4", "nf4"])
@pytest.mark.parametrize("family", toys.PROMISED)
def test_the_plan_knows_the_size_of_every_trunk(toy: Any, load: Any, family: str, trunk: str) -> None:
    engine = load(toy(family), trunk=trunk)
    used = engine.stats()["used"]["trunk_bytes"]
    assert used == engine.plan.trunk_bytes
    assert Sizes(engine.model.config, torch.bfloat16, trunk).trunk_bytes == used


@pytest.mark.parametrize("trunk", ["int4", "nf4"])
def test_logits_do_not_depend_on_the_budget(toy: Any, load: Any, trunk: str) -> None:
    logits = []
    for budget in ("min", "half", 1 << 30):
        with torch.no_grad():
            logits.append(load(toy("qwen3_moe"), budget=budget, trunk=trunk).model(toys.ids(length=60)).logits)
    assert all(torch.equal(logits[0], other) for other in logits)
