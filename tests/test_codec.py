"""Slabs: what goes in comes out, within what the format promises."""

from __future__ import annotations

import pytest
import torch

from duoserve.codec import Layout, Param
from duoserve.core import Refusal
from duoserve.int4 import ORDERS, int4_order

SHAPES = [(16, 32), (24, 40), (80, 64), (112, 96), (10, 33), (192, 192), (200, 256)]
ERROR = {"int4": 0.10, "nf4": 0.11, "bf16": 0.005}  # relative norm on normal weights


def encoded(format: str, w: torch.Tensor, plain: str = "bfloat16") -> tuple[Layout, torch.Tensor]:
    layout = Layout.of(format, [Param("w", *w.shape), Param("b", w.shape[0], 0)], plain)
    slab = torch.zeros(layout.slab_bytes, dtype=torch.uint8)
    layout.encode("w", w, slab)
    layout.encode("b", w[:, 0].clone(), slab)
    return layout, slab


@pytest.mark.parametrize("format", ERROR)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_come_back_and_multiply(format: str, shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    layout, slab = encoded(format, w)
    weights = layout.weights(slab)
    dense = weights["w"].dense(torch.float32)
    assert ((dense - w).norm() / w.norm()).item() <= ERROR[format]
    assert torch.equal(weights["b"], w[:, 0].bfloat16())
    for rows in (1, 3, 40):
        x = torch.randn(rows, shape[1])
        torch.testing.assert_close(weights["w"].linear(x), x @ dense.T, rtol=1e-4, atol=1e-3)


def test_int4_equals_a_plain_reference() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    layout, slab = encoded("int4", w)
    low, high = w.view(64, 2, 64).aminmax(dim=2)
    scale = ((high - low) / 15).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    q = ((w.view(64, 2, 64) - zero[..., None]) / scale[..., None]).round().add(8).clamp(0, 15)
    want = ((q - 8) * scale[..., None] + zero[..., None]).view(64, 128)
    torch.testing.assert_close(layout.weights(slab)["w"].dense(torch.float32), want)


def test_int4_of_a_large_matrix_packs_in_chunks_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(1000, 256, generator=torch.Generator().manual_seed(3))
    _, whole = encoded("int4", w)
    monkeypatch.setattr("duoserve.int4.CHUNK", 64 * 256)
    _, pieces = encoded("int4", w)
    assert torch.equal(whole, pieces)


def test_plain_float32_is_exact() -> None:
    w = torch.randn(10, 33)
    layout, slab = encoded("bf16", w, plain="float32")
    assert torch.equal(layout.weights(slab)["w"].dense(torch.float32), w)


def test_slabs_are_whole_pages_and_layouts_survive_json() -> None:
    layout, _ = encoded("int4", torch.randn(80, 64))
    assert layout.slab_bytes % 4096 == 0
    assert Layout.from_json(layout.to_json()) == layout


def test_a_layout_that_contradicts_itself_is_refused() -> None:
    data = encoded("int4", torch.randn(80, 64))[0].to_json()
    data["slab_bytes"] -= 4096
    with pytest.raises(Refusal, match="E_STORE"):
        Layout.from_json(data)


def test_this_machine_packs_in_an_order_we_know() -> None:
    assert int4_order() in ORDERS
