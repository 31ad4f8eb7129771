"""EPS-MoE's tables: the constants give back the rows they were read from, stages hide what they can and no more."""

from __future__ import annotations

import random

import pytest

from benchmarks.epsmoe import report
from benchmarks.epsmoe_model import (
    FITTED,
    all_cells,
    layer,
    link_ms,
    overhead,
    pays,
    pipelined,
    product_ms,
    ratio_of,
    stages,
    switched,
    threshold,
)
from benchmarks.epsmoe_paper import ABLATION, COLUMNS, LENGTHS_V2, Column


def test_the_constants_give_back_the_rows_they_were_read_from() -> None:
    for number, row in enumerate(ABLATION[:3]):
        for column, ms in zip(COLUMNS, row.ms, strict=True):
            if (number, column) != (1, Column(256, 1536)):  # the row that the paper prints as slower than without FP8
                assert link_ms(column, row.fp8) + product_ms(column, row.dense) == pytest.approx(ms)
    fitted = [cell for cell in all_cells() if cell.fitted]
    assert len(fitted) == 2 and all(cell.ours == pytest.approx(cell.paper) for cell in fitted)
    link, product = link_ms(FITTED), product_ms(FITTED, True)
    assert layer(link, product, 5) - pipelined(link, product, 5) == pytest.approx(5 * overhead()[0] + overhead()[1])


def test_stages_leave_the_shorter_part_of_one_stage_exposed() -> None:
    """The paper's saving, min(C, G) (N - 1) / N, is what the events give; where the link takes longer, at least that."""
    rng = random.Random(0)
    for _ in range(500):
        link, product, n = rng.uniform(0.1, 9), rng.uniform(0.1, 9), rng.randrange(1, 21)
        took = pipelined(link, product, n)
        assert took >= max(link, product) * (1 - 1e-9)
        ideal = max(link, product) + min(link, product) / n
        assert took == pytest.approx(ideal) if product >= link or n == 1 else took <= ideal + 1e-9


def test_the_kernel_switch_gains_more_the_wider_the_product_and_less_the_longer_the_prompt() -> None:
    assert 1 > ratio_of(1536) > ratio_of(3072) > ratio_of(15360) == ratio_of(30000) > 0
    gains = [switched(length, 0.8) for length in LENGTHS_V2]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0


def test_the_page_has_every_cell_with_its_verdict() -> None:
    cells = all_cells()
    page = report(cells)
    assert all(f"| {cell.cell} |" in page for cell in cells) and len(cells) > 70
    assert {cell.verdict for cell in cells} == {"fitted", "reproduced", "short", "over"}
    assert f"m = {threshold()}" in page


def test_stages_follow_the_root_rule_as_a_divisor() -> None:
    """EPS-MoE: N* = sqrt(C / k_o); 20 local experts, as DeepSeek-V2 on 8 GPUs."""
    for hidden, each in ((2.0, 0.08), (1.0, 0.0025), (1.0, 0.04), (0.5, 1.0)):
        n = stages(hidden, hidden * 3, each, 20)
        ideal = (hidden / each) ** 0.5
        divisors = [1, 2, 4, 5, 10, 20]
        below, above = (
            max(d for d in divisors if d <= max(1, ideal)),
            min((d for d in divisors if d >= ideal), default=20),
        )
        assert n in (below, above)
    assert stages(2.0, 1.0, 0.04, 20) == stages(1.0, 2.0, 0.04, 20) == 5
    assert stages(0.5, 1.0, 1.0, 20) == 1


def test_stages_pay_only_where_neither_part_grows_much() -> None:
    """Constant parts of either make cutting expensive for few tokens (the paper's threshold is m = 1700 on its machine)."""

    def link(tokens: float) -> float:
        return 0.5 + 1e-3 * tokens

    def compute(tokens: float, experts: float) -> float:
        return 0.01 + 1e-3 * tokens * experts / 8

    assert not pays(link, compute, 100, 8, 2) and pays(link, compute, 4000, 8, 2)
