"""FinDEP's tables from its published coefficients: never behind PPPipe, and gaining where the paper says it gains."""

from __future__ import annotations

import pytest

from benchmarks.findep_cells import BOUNDED, PAPER, TODAY, Assumption, best, gain, geomean, online, rate
from dep_extension.cost import Split
from dep_extension.solver import findep, pppipe

OFFLINE = [
    (m, int(n), bed, cell)
    for m, rows in PAPER["offline"].items()
    for n, row in rows.items()
    for bed, cell in row.items()
]
ONLINE = [(m, int(n), bed) for m, rows in PAPER["online"]["cells"].items() for n, row in rows.items() for bed in row]


def ratio(a: Assumption, model: str, length: int, bed: str) -> float:
    """On the paper's split of that machine."""
    split = Split(*PAPER["online"]["splits"][model][bed])
    before, after = (best(solve, a, model, bed, length, a.samples(length), split) for solve in (pppipe, findep))
    return gain((before, after))


@pytest.fixture(scope="module")
def ratios() -> dict[tuple[str, int, str], float]:
    return {(model, length, bed): ratio(BOUNDED, model, length, bed) for model, length, bed, _ in OFFLINE}


def test_the_papers_cells_are_all_there() -> None:
    assert len(OFFLINE) == 28 and len(ONLINE) == 16
    gains = [after / before for *_, (before, after) in OFFLINE]
    assert geomean(gains) == pytest.approx(1.137, abs=5e-4) and max(gains) == pytest.approx(1.61, abs=0.01)


def test_findep_is_never_behind_pppipe(ratios: dict[tuple[str, int, str], float]) -> None:
    assert len(ratios) == 28 and min(ratios.values()) >= 1 - 1e-9
    for model, length, bed in ONLINE:
        assert gain(online(BOUNDED, model, bed, length, BOUNDED.samples(length))) >= 1 - 1e-9, (model, length, bed)


def test_longer_sequences_gain_more_and_fast_links_gain_little(ratios: dict[tuple[str, int, str], float]) -> None:
    by_length = [geomean(r for (_, n, _), r in ratios.items() if n == length) for length in (1024, 4096, 8192)]
    assert by_length == sorted(by_length) and by_length[-1] > 1.2
    slow, fast = (geomean(r for (_, _, bed), r in ratios.items() if bed in beds) for beds in ("AB", "C"))
    assert 1 <= fast < 1.1 < slow


def test_eight_samples_leave_little_of_what_one_gains() -> None:
    roomy = ratio(BOUNDED._replace(tokens=8 * 8192), "qwen3-235b-a22b", 8192, "A")
    assert 1 <= roomy < 1.05 < ratio(BOUNDED, "qwen3-235b-a22b", 8192, "A")


@pytest.mark.parametrize("varied", ["m_a", "r1"])
def test_throughput_rises_as_in_the_papers_tables(varied: str) -> None:
    split = Split(*PAPER["monotone"]["splits"]["C"])
    rates = [rate(TODAY, "C", 2048, split, varied, step) for step in PAPER["monotone"]["steps"]]
    assert rates == sorted(rates) and rates[-1] > rates[0]
