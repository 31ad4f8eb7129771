"""The command `dep kernels`: whether this machine multiplies a model's experts quicker as one grouped product or one after
the other, measured. Knows how to find a model's shapes and what to print; the clock is `dep_extension.kernel_table`'s.
Imports torch late.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from duoserve import flags
from duoserve.core import Refusal
from duoserve.flags import check_targets, engine_options

if TYPE_CHECKING:
    from dep_extension.kernel_choice import Point, Shape, Table

LONGEST_S = 3600.0


class Subject(NamedTuple):
    """What a model multiplies: (K, N) of each product of an expert, the same for layers that are alike."""

    layers: list[tuple[tuple[tuple[int, int], ...], int]]  # products, experts
    top_k: int
    dtype: str


@engine_options(
    *("dtype", "device", "threads"),
    dtype="Arithmetic: bfloat16, float32 or float16.",
    threads="Threads of arithmetic, as the model will be run with.",
)
def kernels(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, checkpoint folder, expert store or known name; the demo if left out.")
    ] = None,
    *,
    save: Annotated[Path | None, typer.Option("--save", "-o", help="Write the table here, for `--kernels`.")] = None,
    options: dict[str, Any],
    seconds: Annotated[float, typer.Option(help="Measure for about so long.")] = 100.0,
    as_json: flags.AsJson = False,
) -> None:
    """Measure grouped against dense products of a model's experts on this machine, for `chat --kernels FILE`."""
    if not 0 < seconds <= LONGEST_S:
        raise Refusal("E_OPTION", f"--seconds {seconds:g} is not between 0 and {LONGEST_S:g}", "leave it out")
    check_targets(save)
    table = measured(model, **options, seconds=seconds, progress=sys.stderr.isatty())
    if save is not None:
        table.save(save)
    if as_json:
        from dep_extension.kernel_choice import to_json

        print(json.dumps(to_json(table)))
    else:
        print("\n".join(lines(table)))


def measured(
    model: str | None, dtype: str | None, device: str, threads: int | None, seconds: float, progress: bool = False
) -> Table:
    """The table of a model's shapes on this machine."""
    from dep_extension.kernel_table import shapes_of, table_for
    from duoserve.device import gpus
    from duoserve.system import use_threads

    use_threads(threads)
    on_gpu = device == "cuda" or (device == "auto" and bool(gpus()))
    if on_gpu and not gpus():
        raise Refusal("E_DEVICE", "no CUDA GPU can be used here (0 found)", "run with --device cpu", 7)
    found = subject(model, dtype)
    shapes: list[Shape] = []
    for products, experts in found.layers:
        shapes += shapes_of(products, experts, found.top_k, found.dtype)

    def say(shape: Shape, point: Point) -> None:
        if progress:
            print(f"{_name(shape)}: {point.tokens} tokens each", file=sys.stderr, flush=True)

    return table_for(list(dict.fromkeys(shapes)), "cuda" if on_gpu else "cpu", budget_s=seconds, say=say)


def subject(model: str | None, dtype: str | None) -> Subject:
    """The shapes that a model's config describes; no weights are read."""
    from duoserve.checkpoint import build_meta, find_experts, quiet, read_config
    from duoserve.convert import layouts_of
    from duoserve.engine import DEMO
    from duoserve.hub import resolve
    from duoserve.plan import Sizes, compute_dtype
    from duoserve.specimens import SPECIMENS

    quiet()
    if model in SPECIMENS:
        config = SPECIMENS[model].config
    else:
        config = read_config(DEMO if model is None else resolve(model, weights=False))
    stored = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    kind = compute_dtype(dtype, stored)
    specs = find_experts(build_meta(config, kind))
    layouts = layouts_of(specs, "bf16", None, "bfloat16")
    layers = [
        (tuple((p.cols, p.rows) for p in layout.params if p.cols), spec.n_experts)
        for layout, spec in zip(layouts, specs, strict=True)
    ]
    sizes = Sizes(config, kind)
    sizes.kv_bytes(1)  # runs it on meta, so that its routers say how many they choose
    top_k = max(chosen for chosen in sizes.choices if chosen is not None)
    return Subject(list(dict.fromkeys(layers)), top_k, str(kind).removeprefix("torch."))


def lines(table: Table) -> Iterator[str]:
    """For people: microseconds, and where dense products begin to be the quicker ones."""
    yield table.machine
    for shape, points in table.points.items():
        cross = table.crossover(shape)
        yield f"{_name(shape)}: " + ("grouped throughout" if cross is None else f"dense from {cross} tokens each on")
        for point in points:
            quicker = "grouped" if point.grouped <= point.dense else "dense"
            times = f"grouped {1e6 * point.grouped:12,.0f} us   dense {1e6 * point.dense:12,.0f} us"
            yield f"  {point.tokens:5d} tokens each   {times}   {quicker}"


def _name(shape: Any) -> str:
    return f"{shape.experts} x ({shape.k}, {shape.n}) {shape.dtype}"


if __name__ == "__main__":
    typer.run(kernels)
