"""A head ranks one row, compiled or not, as it ranks many."""

from __future__ import annotations

import pytest
import torch

from duoserve import native
from duoserve.core import Phase, Route, Step
from predictor.features import Feature
from predictor.model import Head, Heads, Shape

E, DIM, UNITS = 12, 37, 5


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_is_ranked_as_many_are(compiled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and native.head() is None:
        pytest.skip("no compiled head on this CPU")
    if not compiled:
        monkeypatch.setattr(native, "head", lambda: None)
    torch.manual_seed(0)
    wanted = (Feature("hidden", 0), Feature("route", 0))
    weights = torch.randn(E + UNITS, DIM + E), torch.randn(E + UNITS), torch.randn(E, UNITS)
    heads = Heads("head", Shape(None, (E, E), (2, 2), DIM), 1, [None, Head(wanted, *weights)])
    for chosen in ([3, 7], [11, 0]):
        route = Route(0, torch.tensor([chosen]), torch.tensor([[0.7, 0.3]]), torch.randn(1, DIM, dtype=dtype))
        step = Step(0, Phase.DECODE, 1, routes=[route])
        torch.testing.assert_close(heads.rank(step, 1), heads.rank_rows(step, 1)[0], rtol=1e-4, atol=1e-5)
