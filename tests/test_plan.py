"""The budget: what it buys, what it refuses, and that what was planned is what is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys

from duoserve.config import EngineConfig, parse_count, parse_size
from duoserve.core import Refusal


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("6GiB", 6 << 30),
        ("500MB", 500 * 10**6),
        ("12G", 12 * 10**9),
        ("1.5 KiB", 1536),
        ("77", 77),
        (77, 77),
        ("2kib", 2048),
    ],
)
def test_sizes_read_as_people_write_them(text: Any, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "six", "6 gigs", "-1", "6iB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="E_SIZE"):
        parse_size(text)


@pytest.mark.parametrize("budget", [6e9, True, 0, -3, "nan%", "inf%", "-5%", "0%"])
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    with pytest.raises(Refusal, match="E_SIZE"):
        EngineConfig(budget=budget)


def test_a_plan_larger_than_memory_is_refused_with_both_numbers(
    toy: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duoserve.device.ThreadDevice.free_bytes", lambda self: 300_000)
    with pytest.raises(Refusal, match=r"E_MEMORY: the plan takes .* KiB, 293.0 KiB are free"):
        load(toy("mixtral"), budget="1GiB")


def test_contexts_read_as_people_write_them() -> None:
    assert parse_count("32k") == 32768 and parse_count("100") == 100


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(Refusal, match="did you mean 'budget'"):
        EngineConfig.of(budjet="1GiB")
    with pytest.raises(Refusal, match="did you mean 'int4'"):
        EngineConfig.of(format="int5")


def test_a_budget_below_the_smallest_names_the_smallest_and_that_one_works(toy: Any, load: Any) -> None:
    smallest = load(toy("mixtral"), budget="min").plan.smallest_bytes
    with pytest.raises(Refusal, match=f"{smallest:,} bytes") as refusal:
        load(toy("mixtral"), budget=smallest - 1)
    assert refusal.value.status == 4
    engine = load(toy("mixtral"), budget=smallest)
    assert engine.plan.slots == 2
    engine.model.generate(toys.ids(1), max_new_tokens=4, do_sample=False)
    assert engine.stats()["used_bytes"] <= smallest


def test_a_share_is_of_the_bf16_checkpoint(toy: Any, load: Any) -> None:
    parameters = sum(p.numel() for p in toys.stock(toy("mixtral")).parameters())
    engine = load(toy("mixtral"), budget="80%")
    assert engine.plan.budget_bytes == int(0.8 * 2 * parameters)


@pytest.mark.parametrize("family", toys.PROMISED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_planned_is_used(toy: Any, load: Any, family: str, dtype: str) -> None:
    """Trunk and slots to the byte; keys and values to the byte once the context is full."""
    engine = load(toy(family), dtype=dtype, budget="half", ctx=64)
    engine.model.generate(toys.ids(1, 40), max_new_tokens=25, min_new_tokens=25, do_sample=False)
    stats = engine.stats()
    assert stats["used"] == stats["planned"]


def test_a_large_budget_holds_everything_and_lengthens_the_context(toy: Any, load: Any) -> None:
    plan = load(toy("mixtral", max_position_embeddings=65536), budget="1GiB").plan
    assert plan.slots == plan.experts and plan.ctx == 65536
    assert plan.planned_bytes <= plan.budget_bytes


def test_more_tokens_than_planned_are_refused_not_dropped(toy: Any, load: Any) -> None:
    engine = load(toy("mixtral"), ctx=16)
    with pytest.raises(Refusal, match="1 x 17 tokens do not fit the 16 planned"):
        engine.model.generate(toys.ids(1, 16), max_new_tokens=8, do_sample=False)
    engine.model.generate(toys.ids(1, 8), max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        engine.model(toys.ids(1, 200), use_cache=False)  # keeps no keys and values


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_batches_share_the_planned_bytes(toy: Any, load: Any, family: str) -> None:
    """Short sequences of a windowed model take more bytes a token than one long one: counted in bytes, not in tokens."""
    engine = load(toy(family), ctx=64, dtype="float32")
    taken = 0
    for batch in range(1, 12):
        try:
            engine.model.generate(toys.ids(batch, 8), max_new_tokens=4, do_sample=False)
            taken = batch
        except Refusal:
            break
    assert 2 <= taken < 11 and engine.stats()["used_bytes"] <= engine.stats()["planned_bytes"]
