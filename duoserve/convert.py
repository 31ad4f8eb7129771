"""A checkpoint becomes an expert store, one expert at a time. Knows checkpoints, codecs and the store's files; knows
nothing of slots or devices. However large the model, it holds one expert's parameter and one slab at a time.

Interrupted at any moment, the same call goes on: finished layer files are kept, the manifest comes last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from duoserve.version import __version__
from duoserve.checkpoint import Checkpoint, ExpertsSpec
from duoserve.codec import Layout, Param, int4_order
from duoserve.config import FORMATS
from duoserve.core import Refusal, nearest
from duoserve.store import ALIGN, TRUNK, Entry, is_store, replacing, write_manifest, write_safetensors

JOB = "conversion.json"  # what is being made here; replaced by the manifest
Progress = Callable[[int, int, str], None]  # bytes of slabs done, bytes in all, what is being done


def convert(
    source: Path, out: Path, format: str = "int4", dtype: str | None = None, progress: Progress | None = None
) -> Path:
    """Write the expert store of the checkpoint folder `source` into `out` and return `out`.

    `dtype` is that of what is not quantised: "float32" keeps a float32 checkpoint exact, otherwise bfloat16 is stored
    (float16 where asked for and given). Refuses what `Checkpoint` refuses, a folder that holds something else, and a
    disk without room. Memory: about one expert in the checkpoint's dtype, twice, and one slab.
    """
    if format not in FORMATS:
        raise Refusal("E_OPTION", f"unknown format {format!r}", nearest(format, FORMATS))
    checkpoint = Checkpoint(source)
    plain = dtype if dtype is not None and getattr(torch, dtype) == checkpoint.dtype else "bfloat16"
    layouts = [_layout(spec, format, plain) for spec in checkpoint.specs]
    job = {"fingerprint": checkpoint.fingerprint(), "format": format, "plain": plain, "int4_order": int4_order()}
    if not _prepare(out, job, _store_bytes(checkpoint, layouts)):
        return out
    total = sum(layout.slab_bytes * spec.n_experts for layout, spec in zip(layouts, checkpoint.specs, strict=True))
    done, unique, layers = 0, list(dict.fromkeys(layouts)), []
    for i, (spec, layout) in enumerate(zip(checkpoint.specs, layouts, strict=True)):
        path = out / f"experts-{i:03d}.safetensors"

        def report(slabs: int, i: int = i, layout: Layout = layout, base: int = done) -> None:
            if progress:
                progress(base + slabs * layout.slab_bytes, total, f"layer {i + 1} of {len(layouts)}")

        start = _write_layer(path, checkpoint, spec, layout, report)
        layers.append({"module": spec.name, "file": path.name, "n_experts": spec.n_experts, "layout": unique.index(layout),
                       "data_offset": start})  # fmt: skip
        done += layout.slab_bytes * spec.n_experts
    _write_trunk(out / TRUNK, checkpoint)
    for file in checkpoint.side_files():
        with replacing(out / file.name) as stream:
            stream.write(file.read_bytes())
    write_manifest(out, job | {
        "made_by": f"duoserve {__version__}",
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "bf16_bytes": 2 * checkpoint.total_parameters(),
        "ignored": checkpoint.ignored,
        "layouts": [layout.to_json() for layout in unique],
        "layers": layers,
    })  # fmt: skip
    (out / JOB).unlink(missing_ok=True)
    return out


def _layout(spec: ExpertsSpec, format: str, plain: str) -> Layout:
    params = []
    for name, shape in spec.parameters.items():
        if len(shape) == 1:
            params.append(Param(name, shape[0], 0))
        else:
            rows, cols = reversed(shape) if spec.module.is_transposed else shape
            params.append(Param(name, rows, cols))
    return Layout.of(format, params, plain)


def _write_layer(
    path: Path, checkpoint: Checkpoint, spec: ExpertsSpec, layout: Layout, report: Callable[[int], None]
) -> int:
    entry = Entry(
        "experts", "U8", (spec.n_experts, layout.slab_bytes), lambda: _slabs(checkpoint, spec, layout, report)
    )
    if (
        path.is_file()
        and path.stat().st_size == (start := path.stat().st_size - entry.n_bytes) + entry.n_bytes
        and start == ALIGN
    ):
        report(spec.n_experts)  # finished before an interruption: only whole files ever get this name
        return start
    return write_safetensors(path, [entry])


def _slabs(
    checkpoint: Checkpoint, spec: ExpertsSpec, layout: Layout, report: Callable[[int], None]
) -> Iterable[torch.Tensor]:
    slab = torch.empty(layout.slab_bytes, dtype=torch.uint8)
    for e in range(spec.n_experts):
        slab.zero_()
        for param in layout.params:
            value = checkpoint.expert(spec, param.name, e)
            layout.encode(param.name, value.T if param.cols and spec.module.is_transposed else value, slab)
            del value
        yield slab
        report(e + 1)


def _write_trunk(path: Path, checkpoint: Checkpoint) -> None:
    def pieces(name: str) -> Callable[[], Iterable[torch.Tensor]]:
        return lambda: [checkpoint.tensor(name)]

    write_safetensors(path, [Entry(name, dtype, shape, pieces(name)) for name, dtype, shape in checkpoint.trunk()])


def _store_bytes(checkpoint: Checkpoint, layouts: list[Layout]) -> int:
    slabs = sum(
        layout.slab_bytes * spec.n_experts + ALIGN for layout, spec in zip(layouts, checkpoint.specs, strict=True)
    )
    trunk = sum(Entry(name, dtype, shape, lambda: []).n_bytes for name, dtype, shape in checkpoint.trunk())
    return slabs + trunk + sum(file.stat().st_size for file in checkpoint.side_files())


def _prepare(out: Path, job: dict[str, Any], need: int) -> bool:
    """Make `out` ready to be written; False where it already holds just this store."""
    out.mkdir(parents=True, exist_ok=True)
    if is_store(out):
        have = json.loads((out / "manifest.json").read_text())
        if all(have.get(name) == value for name, value in job.items()):
            return False
        raise Refusal("E_EXISTS", f"{out} holds another store ({have.get('format')} of {str(have.get('fingerprint'))[:8]}, wanted "
                      f"{job['format']} of {job['fingerprint'][:8]})", "give an empty folder")  # fmt: skip
    started = json.loads((out / JOB).read_text()) if (out / JOB).is_file() else None
    if started != job and any(out.iterdir()):
        raise Refusal("E_EXISTS", f"{out} is not empty and holds no part of this store", "give an empty folder")
    have = sum(file.stat().st_size for file in out.iterdir())
    free = shutil.disk_usage(out).free
    if free < need - have:
        raise Refusal("E_DISK", f"the store needs {need - have:,} bytes more, {free:,} are free in {out}",
                      "free some, or give a folder on another disk", 6)  # fmt: skip
    for stray in out.glob(".*.tmp"):
        stray.unlink()
    with replacing(out / JOB) as stream:
        stream.write(json.dumps(job).encode())
    return True
