"""Experts as grouped products over the slots where they lie: the same model, whatever is resident, and no slot is read too
early or written too early."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from test_hazards import EXPERTS, WIDTH, Machine, folder, number

from dep_extension.kernel_choice import Point, Shape, Table
from dep_extension.kernel_table import here
from duoserve.codec import Layout, Param
from duoserve.core import Key, Policy, Refusal
from duoserve.engine import load as load_engine
from duoserve.experts import combine, group
from duoserve.grouped import GAP, Bank, GroupedWeight, Placed, Wave, stretches, unfit
from duoserve.sizing import CACHE

__all__ = ["folder"]
RESIDENCIES = ("min", "1GiB")


class Says:
    """A table that always says the same."""

    machine = "a table for tests"

    def __init__(self, grouped: bool):
        self._grouped = grouped

    def grouped(self, products: Sequence[tuple[int, int]], experts: int, dtype: str, tokens: int) -> bool:
        assert products and experts > 0 and tokens > 0
        return self._grouped


GROUPED, DENSE = Says(True), Says(False)


@torch.no_grad()
def logits(path: Path, cache: Path, table: Any, budget: str, dtype: str = "float32") -> torch.Tensor:
    """Of a prompt and of one token behind it."""
    with load_engine(str(path), cache_dir=str(cache), dtype=dtype, format="bf16", budget=budget, table=table) as engine:
        prompt = engine.model(toys.ids(1, 22))
        token = engine.model(toys.ids(1, 1, seed=1), **{CACHE: prompt[CACHE]})
        stats = engine.stats()["kernels"]
        assert table is None or stats["grouped" if table is GROUPED else "dense"] > 0, stats
        assert table is None or stats["dense" if table is GROUPED else "grouped"] == 0, stats
        return torch.cat([prompt.logits, token.logits], dim=1)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_grouped_logits_are_the_dense_ones_and_do_not_depend_on_what_is_resident(
    toy: Any, cache: Path, family: str
) -> None:
    """Biases, transposed and concatenated matrices, clamps and experts without a gate are among these families."""
    want = logits(toy(family), cache, None, "1GiB")
    got = [logits(toy(family), cache, GROUPED, budget) for budget in RESIDENCIES]
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(other, got[0]) for other in got[1:])


def test_a_table_that_says_dense_changes_no_bit(toy: Any, cache: Path) -> None:
    want = logits(toy("gpt_oss"), cache, None, "half")
    assert torch.equal(logits(toy("gpt_oss"), cache, DENSE, "half"), want)


def test_greedy_tokens_are_the_same(toy: Any, cache: Path) -> None:
    answers = []
    for table in (None, GROUPED):
        options = {"dtype": "float32", "budget": "half", "table": table}
        with load_engine(str(toy("qwen3_moe")), cache_dir=str(cache), **options) as engine:
            answers.append(engine.generate(input_ids=toys.ids(2, 9), max_new_tokens=12, do_sample=False).tolist())
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("format", ["int4", "bf16"])
def test_what_cannot_be_grouped_is_dense_and_says_so(toy: Any, cache: Path, format: str) -> None:
    """Four bits; and bfloat16 experts that are computed in float32."""
    path = toy("qwen3_moe") if format == "int4" else toys.make(cache / "narrow", "qwen3_moe", torch.bfloat16)
    with pytest.warns(UserWarning, match="the table of kernels is not used: experts are") as said:
        engine = load_engine(str(path), cache_dir=str(cache), format=format, dtype="float32", table=GROUPED)
    with engine, torch.no_grad():
        engine.model(toys.ids())
        stats = engine.stats()["kernels"]
    assert stats["grouped"] == 0 < stats["dense"] and stats["why"] in str(said[0].message)


# The two ordering edges


class Grouping(Machine):
    """A machine whose experts come as groups: each slot must hold its own number while its rows are multiplied."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, kernels=GROUPED, **more)
        self.largest = 0

    def expert(self, x_PD: torch.Tensor, weights: Any) -> torch.Tensor:
        matrix = weights["w"]
        if not isinstance(matrix, GroupedWeight):  # alone
            matrix = GroupedWeight(matrix.w_NK.T[None], torch.tensor([len(x_PD)], dtype=torch.int32))
        ends = matrix.ends_G.tolist()
        groups = [(g, start, end) for g, (start, end) in enumerate(pairwise([0, *ends])) if end > start]
        self.largest = max(self.largest, len(groups))
        before = all(bool((matrix.w_GKN[g] == x_PD[start, 0]).all()) for g, start, _ in groups)
        if self.slow == "compute":
            time.sleep(0.0005)
        y_PD = matrix.linear(x_PD)
        self.corrupt += not (before and ends[-1] == len(x_PD) and torch.equal(y_PD, x_PD * x_PD * WIDTH))
        return x_PD


@pytest.mark.parametrize("slow", ["copies", "compute"])
@pytest.mark.parametrize("host", [0, 9])
def test_no_corrupt_read_in_groups(folder: Path, slow: str, host: int) -> None:
    largest = 0
    for slots in (1, 2, 6, 24):
        machine = Grouping(folder, slots, slow, host=host)
        assert machine.run(25, seed=slots) == 0
        largest = max(largest, machine.largest)
    assert largest > 2  # experts were together


@pytest.mark.parametrize("policy", list(Policy), ids=lambda p: p.value)
def test_groups_under_every_policy_neither_hang_nor_read_what_is_not_there(folder: Path, policy: Policy) -> None:
    asking = policy in (Policy.MIF, Policy.PAPER, Policy.DUOSERVE)
    for slots in (2, 7):
        assert Grouping(folder, slots, "compute", policy=policy, guessing=asking).run(15, seed=slots) == 0


@pytest.mark.parametrize(("edge", "slow"), [("ready", "copies"), ("released", "compute")])
def test_a_missing_edge_is_caught_in_groups(folder: Path, edge: str, slow: str) -> None:
    assert Grouping(folder, 5, slow, without=edge).run(40) > 0


def test_a_failed_read_among_a_group_leaves_the_pool_whole(folder: Path) -> None:
    machine = Grouping(folder, 6, "nothing")
    read, bad = machine.store.read_into, Key(1, 3)

    def fail(key: Key, buffer: torch.Tensor) -> None:
        if key == bad:
            raise OSError("the disk says no")
        read(key, buffer)

    ids = torch.tensor([[2], [3], [4], [5]])
    x = torch.tensor([[number(Key(1, int(e)))] * WIDTH for e in ids])
    machine.store.read_into = fail
    for _ in range(2):
        with pytest.raises(OSError, match="the disk says no"):
            machine.runtime.run(1, machine.expert, x, ids, torch.ones(4, 1))
        machine.runtime.cache.check()
    machine.store.read_into = read
    assert machine.run(10) == 0


# The arithmetic alone


@pytest.mark.parametrize("slots", [(0, 1, 2, 3), (3, 0, 2, 1), (0, 40, 41, 90), (7, 6, 60, 5)], ids=str)
def test_any_slots_give_the_rows_of_their_experts(slots: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layout = Layout.of("bf16", [Param("w", 24, 16), Param("w_bias", 24, 0), Param("v", 16, 24)], "float32")
    memory = torch.full((96 * layout.slab_bytes,), 255, dtype=torch.uint8)  # what is in no slot asked for is no number
    parts = {}
    for slot in slots:
        parts[slot] = [torch.randn(24, 16), torch.randn(24), torch.randn(16, 24)]
        slab = memory[slot * layout.slab_bytes : (slot + 1) * layout.slab_bytes]
        for param, value in zip(layout.params, parts[slot], strict=True):
            layout.encode(param.name, value, slab)
    x_TD, ids_TK, weights_TK = torch.randn(9, 16), torch.randint(0, 5, (9, 2)), torch.rand(9, 2)

    def expert(x: torch.Tensor, weights: Any) -> torch.Tensor:
        return weights["v"].linear(torch.relu(weights["w"].linear(x) + weights["w_bias"]))

    groups = group(x_TD, ids_TK, 4)
    wave = Wave(expert, groups, Bank(memory, layout.slab_bytes, layout), [])
    wave.at, wave.few = [Placed(slots[e], *span, {}) for e, span in groups.spans.items()], 1
    wave()
    want = torch.zeros(9, 16)
    for t, k in ((t, k) for t in range(9) for k in range(2) if ids_TK[t, k] < 4):
        w, b, v = parts[slots[int(ids_TK[t, k])]]
        want[t] += weights_TK[t, k] * (v @ torch.relu(w @ x_TD[t] + b))
    torch.testing.assert_close(combine(groups, weights_TK, torch.float32), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_a_grouped_product_is_the_dense_ones_bit_for_bit(dtype: torch.dtype) -> None:
    """What lets a few experts be multiplied one by one there, and tokens not depend on how many came together."""
    torch.manual_seed(0)
    for k, n in ((64, 96), (192, 192), (512, 48), (40, 1024)):
        layout = Layout.of("bf16", [Param("w", n, k)], str(dtype).removeprefix("torch."))
        memory = torch.zeros(12 * layout.slab_bytes, dtype=torch.uint8)
        slabs = memory.split(layout.slab_bytes)
        for slab in slabs:
            layout.encode("w", torch.randn(n, k), slab)
        bank = Bank(memory, layout.slab_bytes, layout)
        for rows in (1, 2, 7, 33, 200):
            x = torch.randn(4 * rows, k).to(dtype)
            at = [Placed(slot, i * rows, (i + 1) * rows, {}) for i, slot in enumerate((0, 1, 5, 11))]
            got = bank.weights(at, x.device)["w"].linear(x)  # type: ignore[union-attr]
            alone = [layout.weights(slabs[one.slot])["w"].linear(x[one.start : one.stop]) for one in at]  # type: ignore[union-attr]
            assert torch.equal(got, torch.cat(alone)), (k, n, rows)


def test_a_stretch_ends_where_too_many_slots_have_no_rows() -> None:
    rng = random.Random(0)
    for _ in range(200):
        slots = rng.sample(range(100), rng.randrange(1, 20))
        found = list(stretches([Placed(slot, 0, 1, {}) for slot in slots]))
        assert [one.slot for stretch in found for one in stretch] == sorted(slots)
        inside = [b.slot - a.slot for stretch in found for a, b in pairwise(stretch)]
        between = [b[0].slot - a[-1].slot for a, b in pairwise(found)]
        assert all(gap <= GAP + 1 for gap in inside) and all(gap > GAP + 1 for gap in between)


def test_what_a_grouped_product_cannot_read_is_named() -> None:
    plain = Layout.of("bf16", [Param("w", 8, 16)], "float32")
    assert unfit(plain, torch.float32) is None
    assert "kept in float32 and computed in bfloat16" in str(unfit(plain, torch.bfloat16))
    assert "has 24 bytes, no multiple of 16" in str(unfit(Layout.of("bf16", [Param("w", 8, 12)]), torch.bfloat16))
    assert "experts are int4" in str(unfit(Layout.of("int4", [Param("w", 64, 64)]), torch.bfloat16))


# The table as a file


def toy_table(machine: str, n: int = 96) -> Table:
    """Of the toy qwen3_moe: dense from 4 rows for each expert on."""
    times = (Point(1, 1e-6, 2e-6), Point(3, 1e-6, 2e-6), Point(4, 3e-6, 2e-6))
    return Table(machine, {Shape(64, n, 6, "float32"): times, Shape(48, 64, 6, "float32"): times})


def test_the_engine_goes_by_the_file_it_is_given(toy: Any, load: Any, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    toy_table(here()).save(path)
    engine = load(toy("qwen3_moe"), dtype="float32", kernels=str(path))
    with torch.no_grad():
        engine.model(toys.ids(1, 4))
        assert engine.stats()["kernels"] == {"table": here(), "grouped": 3, "dense": 0, "why": None}
        engine.model(toys.ids(2, 40))
        assert engine.stats()["kernels"] == {"table": here(), "grouped": 3, "dense": 3, "why": None}


def test_a_table_without_the_models_shapes_or_of_another_machine_is_refused(
    toy: Any, load: Any, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    toy_table(here(), n=95).save(path)
    with pytest.raises(Refusal, match=r"^E_KERNELS: .* has 2 shapes .*, not 64x96 x 6 float32: .*dep kernels MODEL"):
        load(toy("qwen3_moe"), dtype="float32", kernels=str(path))
    toy_table("another one").save(path)
    with pytest.raises(Refusal, match=r"^E_KERNELS: .* was measured on 'another one', this is .*dep kernels MODEL"):
        load(toy("qwen3_moe"), dtype="float32", kernels=str(path))


def test_groups_are_chosen_by_rows_not_by_what_is_resident(folder: Path) -> None:
    """Fewer slots make smaller groups; how many passes are grouped stays the same."""
    counts = []
    for slots in (2, 24):
        machine = Grouping(folder, slots, "nothing")
        assert machine.run(20) == 0
        grouping = machine.runtime.grouping
        assert grouping is not None
        counts.append((dict(grouping.passes), machine.largest))
    assert counts[0][0] == counts[1][0] and counts[0][1] < counts[1][1] <= EXPERTS


def test_without_a_table_nothing_is_said(toy: Any, load: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(toy("qwen3_moe")).stats()["kernels"] is None
