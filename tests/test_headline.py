"""The headline's arithmetic on made-up times: what a cell would take, and at which link the paper's mean would come out."""

from __future__ import annotations

import pytest

from benchmarks import headline
from benchmarks.headline import Times, ratio, remedy, verdict


def times(duo: Times, base: Times, pinned: Times, lfp: Times, pageable: Times) -> dict[str, Times]:
    return {"DuoServe": duo, "on-demand": base, "on-demand, pinned": pinned, "LFP": lfp, "LFP, pageable": pageable}


def run(ttft: float, token: float, tokens: int = 32) -> Times:
    return Times(ttft, ttft + (tokens - 1) * token, token, 0)


# A token of on-demand: 0.1 s apart from copies of 10 GB; so of LFP, whose layers have 100 GB.
CELL = times(run(1.0, 0.5), run(2.0, 1.1), run(0.8, 0.5), run(1.0, 4.1), run(2.5, 10.1))


def test_a_verdict_is_of_the_range() -> None:
    assert [verdict(value, 1.4, 7.5) for value in (1.3, 1.4, 7.5, 7.6)] == ["below", "in range", "in range", "above"]


def test_answers_up_to_the_length_that_is_named_stay_in_range() -> None:
    assert ratio(CELL, "LFP", "e2e") > 7.55
    said = remedy(CELL, "LFP", "e2e", 1.42, 7.55)
    longest = int(said.split()[4])

    def at(tokens: int) -> float:
        lfp, duo = run(1.0, 4.1, tokens), run(1.0, 0.5, tokens)
        return lfp.e2e / duo.e2e

    assert at(longest) <= 7.55 < at(longest + 1)


def test_memory_that_would_put_a_cell_in_range_is_named() -> None:
    assert remedy(CELL, "LFP", "ttft", 1.78, 5.34) == "pageable memory for LFP gives 2.50"
    assert remedy(CELL, "on-demand", "ttft", 1.78, 5.34) == ""


@pytest.mark.parametrize("rate", [10.0, 14.0, 25.0])
def test_the_link_at_which_the_papers_mean_comes_out(rate: float) -> None:
    """Between 25 GB/s pinned and 10 pageable a synchronous token takes 0.1 s + 10 GB / rate, and a prompt likewise."""
    duo = run(1.0, 0.5)
    slow, fast, wanted = (run(0.1 + 10 / r, 0.1 + 10 / r) for r in (10.0, 25.0, rate))
    found = {("m", "a5000", "SQuAD"): times(duo, slow, fast, slow, slow)}
    assert headline._pageable(found, "SQuAD", wanted.e2e / duo.e2e) == pytest.approx(rate)
    low, _, high = headline._at(found, "e2e", rate).partition("-")
    assert low == high == f"{wanted.e2e / duo.e2e:.2f}"
