"""The GPU's int4 kernels without a GPU: their results by Triton's interpreter, which wants a process of its own and
multiplies no bfloat16, and that they compile, in bfloat16, for the GPUs we name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from duoserve.int4 import ORDERS, TILES, Int4Weight, Scratch, group_of, pack

pytest.importorskip("triton")

SHAPES = [(16, 32), (112, 96), (208, 64), (192, 512)]
ROWS = [
    (1, "float16", 1e-3),
    (19, "float16", 1e-3),
    (3, "float32", 1e-6),
]  # and the error, relative, that rounding leaves
CASES = [(order, n, k) for order in ORDERS for n, k in SHAPES]


class Matrix(NamedTuple):
    packed: torch.Tensor
    scale_zero: torch.Tensor
    w_NK: torch.Tensor  # what they stand for

    @classmethod
    def of(cls, order: str, n: int, k: int) -> Matrix:
        generator = torch.Generator().manual_seed(n + k)
        q_NK = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.int8)
        scale_zero = torch.randn(k // group_of(k), n, 2, generator=generator).bfloat16()
        scale, zero = (scale_zero.float()[..., i].repeat_interleave(group_of(k), 0).T for i in (0, 1))
        return cls(pack(q_NK.T, order), scale_zero, (q_NK.float() - 8) * scale + zero)


def product_errors(kernels: Any, order: str, n: int, k: int) -> Iterator[float]:
    matrix = Matrix.of(order, n, k)
    for rows, dtype, _ in ROWS:
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(getattr(torch, dtype))
        want = x.double() @ matrix.w_NK.double().T
        got = kernels.linear(x, matrix.packed, matrix.scale_zero, group_of(k), *TILES[order])
        assert got.dtype == x.dtype and got.shape == want.shape
        yield ((got.double() - want).norm() / want.norm()).item()


def unpacking_error(kernels: Any, order: str, n: int, k: int) -> float:
    """Of the middle of a wider matrix too, whose scales lie further apart."""
    matrix = Matrix.of(order, n, k)
    wider = torch.cat((matrix.scale_zero, matrix.scale_zero), dim=1)
    into_KN = torch.full((k, n), torch.nan)
    kernels.unpack(into_KN, matrix.packed, wider[:, n:], group_of(k), *TILES[order])
    return float((into_KN.T - matrix.w_NK).abs().max())


def rows_that_differ(kernels: Any) -> list[int]:
    """When each is multiplied by itself."""
    matrix = Matrix.of("tile64", 192, 512)
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(0)).half()
    arguments = (matrix.packed, matrix.scale_zero, group_of(512), *TILES["tile64"])
    whole = kernels.linear(x, *arguments)
    return [i for i in (0, 15, 16, 39) if not torch.equal(kernels.linear(x[i : i + 1], *arguments)[0], whole[i])]


def interpret() -> dict[str, Any]:
    from duoserve import triton_int4

    return {
        "products": [list(product_errors(triton_int4, *case)) for case in CASES],
        "unpacked": [unpacking_error(triton_int4, *case) for case in CASES],
        "differ": rows_that_differ(triton_int4),
    }


@pytest.fixture(scope="module")
def interpreted() -> Any:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_products_are_those_of_the_matrix(interpreted: Any) -> None:
    for case, errors in zip(CASES, interpreted["products"], strict=True):
        assert all(error < most for error, (*_, most) in zip(errors, ROWS, strict=True)), (case, errors)


def test_unpacking_is_the_matrix(interpreted: Any) -> None:
    assert all(error < 1e-5 for error in interpreted["unpacked"]), interpreted["unpacked"]


def test_a_row_depends_on_no_other_row(interpreted: Any) -> None:
    assert interpreted["differ"] == []


POINTERS = {"x": "*bf16", "packed": "*u8", "scale_zero": "*bf16", "parts": "*fp32", "into": "*bf16"}


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("name", ["_product", "_unpack"])
def test_kernels_compile_for_ampere_ada_and_hopper(name: str, arch: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from duoserve import triton_int4

    kernel = getattr(triton_int4, name)
    constants = {
        "HALF": 32,
        "BLOCK": 32,
        "APART": True,
        "GROUP": 64,
        "ROWS": triton_int4.ROWS,
        "COLUMNS": triton_int4.COLUMNS,
    }
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    assert f"sm_{arch}" in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("n", "k"), [(112, 96), (1024, 4096)])
def test_a_matrix_on_the_gpu_is_multiplied_as_it_stands(order: str, n: int, k: int) -> None:
    matrix = Matrix.of(order, n, k)
    weight = Int4Weight(matrix.packed.cuda(), matrix.scale_zero.cuda(), n - 3, k, order, Scratch())
    for rows in (1, 17, 64, 65, 200):  # by the kernel, and from 65 rows on unpacked by the other one
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()
        want = x.double() @ matrix.w_NK[: n - 3].double().T
        got = weight.linear(x.cuda()).cpu()
        assert ((got.double() - want).norm() / want.norm()).item() < 8e-3, rows


if __name__ == "__main__":
    print(json.dumps(interpret()))
