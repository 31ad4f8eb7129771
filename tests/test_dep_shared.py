"""Shared experts at their own turn: whoever calls them when, the model gets what it would have computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dep_extension.shared import Shared

WIDTH = 6
Forward = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def before(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As qwen2_moe does."""
    shared = block.shared_expert(x)
    y = block.experts(x)
    return y + torch.sigmoid(block.shared_expert_gate(x)) * shared


def after(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As deepseek_v2 does."""
    return block.experts(x) + block.shared_expert(x)


def early(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Reads the output before the experts are asked."""
    shared = block.shared_expert(x).relu()
    return block.experts(x) + shared


def another(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Its input is not the block's."""
    return block.experts(x) + block.shared_expert(x * 2)


class Block(nn.Module):
    def __init__(self, how: Forward):
        super().__init__()
        self.how = how
        self.experts: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.shared_expert: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.shared_expert_gate = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(self, x)


class Turns(nn.Module):
    """Experts in whose time the shared ones have their turn."""

    def __init__(self, inner: nn.Module, shared: Shared, log: list[str]):
        super().__init__()
        self.inner, self.shared, self.log = inner, [shared], log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.shared[0]
        shared.arrived(0, 0)
        self.log.append("turn")
        shared.fill(0)
        shared.fill(0)  # a turn that comes twice, as behind a loss
        self.log.append("back")
        return self.inner(x)


@pytest.mark.parametrize(
    "how,elsewhere", [(before, 0), (after, 0), (early, 3), (another, 1)], ids=["before", "after", "early", "another"]
)
def test_the_model_gets_what_it_would_have_computed(how: Forward, elsewhere: int) -> None:
    torch.manual_seed(0)
    block, shared, log = Block(how), Shared(poison=True), []
    x = torch.randn(2, 3, WIDTH)
    with torch.inference_mode():
        want = block(x)
        block.experts = Turns(block.experts, shared, log)
        inner = block.shared_expert
        inner.register_forward_pre_hook(lambda *args: log.append("shared"))
        shared.wrap(nn.ModuleDict({"mlp": block}), "mlp.experts", 0)
        for _ in range(3):
            with shared.running(0):
                assert torch.equal(block(x), want)
    assert shared.at_their_turn == ["mlp.shared_expert"]
    assert shared.elsewhere == elsewhere
    if elsewhere == 0:
        assert log == ["turn", "shared", "back"] * 3
