"""What a micro-batch takes while its layer attends: never less than was measured, and little more."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duoserve.depsubject import known_model
from duoserve.sizing import CACHE

LENGTH, MORE = 256, 1.08


class Live(TorchDispatchMode):
    """Bytes of tensors that live at once, at most: those that are made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in given | set(self.alive):
                self.alive[key] = t.untyped_storage().nbytes()
                weakref.finalize(t.untyped_storage(), self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def attended(model: Any) -> float:
    """Elements of a token while the second layer attends to a whole prompt."""
    config, attention = model.config, model.model.layers[1].self_attn
    x_BSD, pos_BS = torch.randn(1, LENGTH, config.hidden_size), torch.arange(LENGTH)[None]
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad(), Live() as live:
        rotary = model.model.rotary_emb(x_BSD, pos_BS)
        attention(x_BSD, position_embeddings=rotary, attention_mask=None, **{CACHE: cache})
    return live.peak / LENGTH / x_BSD.element_size()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"num_attention_heads": 8, "num_key_value_heads": 8}),
        ("deepseek_v2", {"v_head_dim": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}),
    ],
)
def test_a_token_that_attends_takes_what_was_measured(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = toys.make(tmp_path / family, family, **changes)
    measured, planned = attended(toys.stock(folder)), known_model(str(folder), "A").attending
    assert planned is not None and measured <= planned <= MORE * measured, (measured, planned)


def test_unequal_heads_write_their_scores_on_a_cpu(toy: Callable[..., Path]) -> None:
    """Which is not planned with: a GPU's kernels need not (cost.py says so)."""
    model = toys.stock(toy("deepseek_v2"))
    config = model.config
    assert config.qk_nope_head_dim + config.qk_rope_head_dim != config.v_head_dim
    planned = known_model(str(toy("deepseek_v2")), "A").attending
    scores = (2 * config.num_attention_heads + 1) * LENGTH
    assert planned is not None and attended(model) == pytest.approx(planned + scores, rel=0.1)
