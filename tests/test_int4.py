"""Four-bit matrices: every order of every CPU, both ways of multiplying, and that a row never depends on its neighbours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duoserve import native
from duoserve.codec import Layout, Param
from duoserve.int4 import ORDERS, Int4Weight, Scratch, int4_order, pack, reorder, unpack

SHAPES = [(16, 32), (64, 64), (96, 32), (112, 96), (208, 64), (320, 192)]
CAPABILITIES = {"avx512": "tile64", "avx2": "tile32", "default": "pair32"}


def matrix(n: int, k: int, seed: int = 0) -> tuple[Int4Weight, torch.Tensor]:
    """A packed matrix and the values it stands for."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    layout = Layout.of("int4", [Param("w", n, k)])
    slab = torch.zeros(layout.slab_bytes, dtype=torch.uint8)
    layout.encode("w", w, slab)
    weight = layout.weights(slab)["w"]
    assert isinstance(weight, Int4Weight)
    return weight, weight.dense(torch.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_order_unpacks_to_what_was_packed(order: str, n: int, k: int) -> None:
    q_KN = torch.randint(0, 16, (k, n), dtype=torch.int8, generator=torch.Generator().manual_seed(n))
    packed = pack(q_KN, order)
    whole = n // int(order[-2:]) * int(order[-2:])
    parts = [unpack(part, order) for part in (packed[:whole], packed[whole:]) if part.shape[0]]
    assert torch.equal(torch.cat(parts, dim=1), q_KN)
    for other in ORDERS:
        again = packed.clone()
        reorder(again, order, other)
        assert torch.equal(again, pack(q_KN, other)), other


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_our_packing_is_torchs(n: int, k: int) -> None:
    q_NK = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=torch.Generator().manual_seed(k))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK, 1)
    assert torch.equal(packed.view(n, k // 2), pack(q_NK.T, int4_order()))


@pytest.mark.parametrize("rows", [1, 5, 47, 48, 130])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_unpacked_matrix(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    weight, dense = matrix(n, k)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
    want = x.float() @ dense.T
    error = (weight.linear(x).float() - want).norm() / want.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype], error


def test_a_small_scratch_changes_nothing() -> None:
    weight, _ = matrix(320, 192)
    x = torch.randn(60, 192)
    small = Scratch(torch.empty(64 * 192 * 6, dtype=torch.uint8))
    product = Int4Weight(weight.packed, weight.scale_zero, 320, 192, weight.order, small).linear(x)
    torch.testing.assert_close(product, weight.linear(x), rtol=0, atol=1e-5)


needs_native = pytest.mark.skipif(not native.available(), reason="no compiled kernel for this CPU")


@needs_native
@pytest.mark.parametrize(("n", "k"), [(64, 32), (64, 64), (128, 96), (448, 512)])
def test_compiled_products_are_torchs_but_for_rounding(n: int, k: int) -> None:
    weight, dense = matrix(n, k)
    x = torch.randn(13, k).bfloat16()
    product = native.product(weight.packed, weight.scale_zero, weight.order, weight.group)
    assert product is not None
    got = product(x)
    want = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.packed, weight.group, weight.scale_zero)
    exact = x.double() @ dense.double().T
    ours, torchs = ((y.double() - exact).norm() / exact.norm() for y in (got, want))
    assert ours <= 1.05 * torchs and ours < 3e-3, (ours, torchs)


@needs_native
def test_a_row_of_a_compiled_product_depends_on_nothing_else() -> None:
    weight, _ = matrix(448, 512)
    x = torch.randn(40, 512).bfloat16()
    alone = torch.cat([weight.linear(x[i : i + 1]) for i in range(40)])
    for rows in (2, 5, 6, 7, 12, 13, 40):
        assert torch.equal(weight.linear(x[:rows]), alone[:rows]), rows
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(weight.linear(x), alone), n
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("change", [{"order": "tile32"}, {"dtype": torch.float32}, {"n": 80}])
def test_what_the_compiled_kernel_is_not_made_for_is_left_to_torch(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, _ = matrix(change.get("n", 64), 64)
    monkeypatch.setattr(native.Product, "__call__", lambda *_: pytest.fail("the compiled kernel was called"))
    x = torch.randn(2, 64).to(change.get("dtype", torch.bfloat16))
    assert replace(weight, order=change.get("order", weight.order)).linear(x).shape == (2, weight.rows)


ANSWER = """
import json, sys, torch, duoserve, toys
from dataclasses import replace
from pathlib import Path
from duoserve.convert import convert
from duoserve.int4 import int4_order
from duoserve.store import Store
model, folder, name = sys.argv[1:]
convert(Path(model), Path(folder) / name, "int4")
found = {"order": int4_order(), "logits": {}, "tokens": {}}
for store in sorted(Path(folder).iterdir()):
    with duoserve.load(store, budget="min", trunk="bf16") as engine:
        ids = toys.ids()
        with torch.inference_mode():
            found["logits"][store.name] = engine.model(ids).logits.float().flatten().tolist()
        out = engine.model.generate(ids[:1], max_new_tokens=12, do_sample=False)
        found["tokens"][store.name] = out[0].tolist()
print(json.dumps(found))
"""


def test_a_store_answers_alike_on_every_kind_of_cpu(toy: Any, tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("a CPU without AVX-512 cannot play the others")
    found = {}
    for capability in CAPABILITIES:  # each makes a store, and reads its own and those of the ones before it
        paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
        env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(paths)}
        (tmp_path / "stores").mkdir(exist_ok=True)
        command = [sys.executable, "-c", ANSWER, str(toy("mixtral")), str(tmp_path / "stores"), capability]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found[capability] = json.loads(done.stdout.splitlines()[-1])
    assert {c: f["order"] for c, f in found.items()} == CAPABILITIES
    reference = torch.tensor(found["avx512"]["logits"]["avx512"])
    for capability, answers in found.items():
        stores = {name: torch.tensor(logits) for name, logits in answers["logits"].items()}
        own = stores[capability]
        assert all(torch.equal(logits, own) for logits in stores.values()), f"{capability}: stores differ"
        assert ((own - reference).norm() / reference.norm()).item() < 0.02
        assert all(tokens == found["avx512"]["tokens"]["avx512"] for tokens in answers["tokens"].values())
