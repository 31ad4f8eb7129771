"""Grouped or dense products: both are the same product, the table's choice is the quicker, files are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dep_extension.kernel_choice import (
    Kernel,
    Point,
    Shape,
    Table,
    dense,
    grouped,
    measure,
    multiply,
    to_json,
)
from dep_extension.kernel_table import GROUP, here, shapes_of, table_for
from duoserve.kernels import kernels

SHAPE = Shape(64, 96, 4, "bfloat16")
TABLE = Table("here", {SHAPE: (Point(1, 1e-3, 2e-3), Point(10, 2e-3, 2.5e-3), Point(100, 9e-3, 5e-3))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 4], [8, 8, 8, 8]])
def test_both_are_the_same_product(dtype: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(sum(counts), 64).to(dtype), torch.randn(4, 64, 96).to(dtype)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    want = torch.cat([rows.float() @ m.float() for rows, m in zip(x.split(counts), w, strict=True)])
    for got in (grouped(x, w, ends), dense(x, w, counts)):
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=0.2)


def test_what_is_measured_here_is_what_is_chosen() -> None:
    table = measure([SHAPE], [1, 8], "here")
    for point in table.points[SHAPE]:
        assert point.grouped > 0 and point.dense > 0
        quicker = Kernel.GROUPED if point.grouped <= point.dense else Kernel.DENSE
        assert table.choose(SHAPE, point.tokens) is quicker


def test_the_choice_changes_where_the_times_cross() -> None:
    assert [TABLE.choose(SHAPE, n).value for n in (1, 10, 12, 90, 100, 5000)] == [
        "grouped", "grouped", "grouped", "dense", "dense", "dense"
    ]  # fmt: skip
    assert TABLE.crossover(SHAPE) == 100
    assert to_json(TABLE)["shapes"][0]["crossover"] == 100
    with pytest.raises(ValueError, match=r"has 1 shapes .*, not 1x1 x 1 float32: measure it"):
        TABLE.choose(Shape(1, 1, 1, "float32"), 5)


def test_a_table_is_kept_and_belongs_to_its_machine(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    TABLE.save(path)
    assert Table.load(path, "here") == TABLE
    with pytest.raises(ValueError, match="was measured on 'here', this is 'there'"):
        Table.load(path, "there")


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: d.update(kind="other"),
        lambda d: d.pop("shapes"),
        lambda d: d["shapes"][0][4].reverse(),
        lambda d: d["shapes"][0][4].clear(),
        lambda d: d["shapes"][0][4][0].__setitem__(1, float("nan")),
        lambda d: d["shapes"][0][4][0].__setitem__(1, -1.0),
        lambda d: d["shapes"].append("x"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, harm: object) -> None:
    path = tmp_path / "table.json"
    TABLE.save(path)
    data = json.loads(path.read_text())
    harm(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"is no table of kernels \(.*\): measure it again") as refused:
        Table.load(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 0], [300, 200, 100, 1]])
def test_a_chunk_of_rows_is_multiplied_as_the_table_says(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(sum(counts), 64).bfloat16(), torch.randn(4, 64, 96).bfloat16()
    taken: list[str] = []
    for name, function in (("grouped", grouped), ("dense", dense)):
        monkeypatch.setattr(
            f"dep_extension.kernel_choice.{name}", lambda *a, _n=name, _f=function: taken.append(_n) or _f(*a)
        )
    got = multiply(x, w, counts, TABLE)
    assert taken == ["grouped" if 0 < sum(counts) < 100 else "dense"]
    torch.testing.assert_close(got, multiply(x, w, counts), rtol=2e-2, atol=0.2)
    assert got.shape == (sum(counts), 96)


def test_a_table_answers_by_the_nearest_number_of_experts_and_over_all_products() -> None:
    few, many, other = Shape(8, 8, 2, "float32"), Shape(8, 8, 16, "float32"), Shape(4, 8, 2, "float32")
    quick, slow = (Point(1, 1e-3, 2e-3),), (Point(1, 9e-3, 2e-3),)
    table = Table("here", {few: quick, many: slow, other: slow})
    assert table.nearest(Shape(8, 8, 1, "float32")) == table.nearest(Shape(8, 8, 5, "float32")) == few
    assert table.nearest(Shape(8, 8, 6, "float32")) == table.nearest(Shape(8, 8, 999, "float32")) == many
    assert table.grouped([(8, 8)], 4, "float32", 1) and not table.grouped([(8, 8)], 20, "float32", 1)
    assert not table.grouped([(8, 8), (4, 8)], 2, "float32", 1)  # 10 ms together, 4 ms one by one
    with pytest.raises(ValueError, match="not 8x9 x 2 float32: measure it"):
        table.grouped([(8, 8), (8, 9)], 2, "float32", 1)


def test_a_model_is_measured_within_the_time_given_and_large_numbers_are_left_out() -> None:
    shapes = shapes_of([(64, 128), (64, 64), (64, 128)], 40, 4, "float32")
    assert shapes == [Shape(k, n, e, "float32") for k, n in ((64, 128), (64, 64)) for e in (4, GROUP)]
    assert shapes_of([(1 << 14, 1 << 15)], 8, 2, "float32")[-1].experts == 1  # as many as memory has room for
    table = table_for(shapes, tokens=(1, 8, 10**7), budget_s=0.4)
    assert table.machine == here() and set(table.points) == set(shapes)
    assert all([p.tokens for p in points] == [1, 8] for points in table.points.values())


def test_the_command_writes_what_an_engine_reads(
    toy: Any, load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    kernels(str(toy("qwen3_moe")), save=path, dtype="float32", device="cpu", seconds=0.3)
    said = capsys.readouterr().out
    assert said.startswith(here()) and "6 x (64, 96) float32: " in said and "1 tokens each" in said
    engine = load(toy("qwen3_moe"), dtype="float32", kernels=str(path))
    assert engine.stats()["kernels"] == {"table": here(), "grouped": 0, "dense": 0, "why": None}
