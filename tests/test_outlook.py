"""`duoserve plan`: from a config alone, what the engine then does to the byte; and the arithmetic of its estimate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import toys

from duoserve.core import Refusal
from duoserve.outlook import look


def config_alone(folder: Path, into: Path) -> Path:
    into.mkdir(exist_ok=True)
    shutil.copy(folder / "config.json", into)
    return into


@pytest.mark.parametrize("family", toys.PROMISED)
def test_a_config_alone_gives_the_engines_plan(toy: Any, load: Any, tmp_path: Path, family: str) -> None:
    folder = toy(family)
    for options in ({"budget": "min", "ctx": 32}, {"budget": "half"}, {"dtype": "float32", "format": "int4"}):
        engine = load(folder, **({"budget": "1GiB"} | options))
        for source in (config_alone(folder, tmp_path / "bare"), folder, engine.store.folder):
            assert look(source, **({"budget": "1GiB"} | options)).plan == engine.plan, (source, options)


def test_ram_is_what_the_default_budget_comes_from(toy: Any) -> None:
    found = look(toy("mixtral"), ram="20GiB")
    assert found.plan.budget_bytes == (20 << 30) - (4 << 30)
    assert look(toy("mixtral"), ram="100GiB").plan.budget_bytes == (100 << 30) - (10 << 30)
    with pytest.raises(Refusal, match=r"E_BUDGET: a budget of 0 B .* the smallest is"):
        look(toy("mixtral"), ram="4GiB")
    with pytest.raises(Refusal, match=r"E_MEMORY: the plan takes .* KiB, 97.7 KiB are free"):
        look(toy("mixtral"), ram=100_000, budget="1GiB")


@pytest.mark.parametrize("family", [*toys.PROMISED, "qwen3_next", "nemotron_h", "cohere2_moe", "zaya"])
def test_what_a_token_needs_is_what_the_engine_reads(toy: Any, load: Any, family: str) -> None:
    """Chosen experts from a run on meta, against the misses of a pool that keeps nothing."""
    needs = look(toy(family), budget="min").needs
    engine = load(toy(family), budget="min")
    engine.model.generate(toys.ids(1, 1), max_new_tokens=1, min_new_tokens=1, do_sample=False)
    counts = engine.runtime.transfer.counts()
    assert needs is not None and counts.misses + counts.hits == sum(layer.choices for layer in needs.layers)
    active = sum(layer.choices * engine.store.layout(i).slab_bytes for i, layer in enumerate(needs.layers))
    assert needs.active_bytes == active
    assert needs.trunk_bytes <= engine.plan.trunk_bytes and needs.ops > 50
