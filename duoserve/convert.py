"""A checkpoint becomes an expert store, one expert at a time. Knows checkpoints, codecs and the store's files; knows
nothing of slots or devices. However large the model, it holds one expert's parameter and one slab at a time.

Interrupted at any moment, the same call goes on: finished layer files are kept, the manifest comes last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from duoserve.checkpoint import Checkpoint, ExpertsSpec
from duoserve.codec import Layout, Param
from duoserve.config import FORMATS
from duoserve.core import Refusal, nearest
from duoserve.folder import SIDE_FILES, weight_files
from duoserve.hub import check
from duoserve.hub import source as source_of
from duoserve.int4 import int4_order
from duoserve.store import (
    ALIGN,
    LOCK,
    MANIFEST,
    TRUNK,
    Entry,
    LayerFile,
    Store,
    StoreSize,
    exclusive,
    file_checksum,
    header_checksum,
    is_store,
    replacing,
    slab_checksums,
    write_manifest,
    write_safetensors,
)
from duoserve.version import __version__

JOB = "conversion.json"  # what is being made here; replaced by the manifest
Progress = Callable[[int, int, str], None]  # bytes of slabs done, bytes in all, what is being done


@dataclass(frozen=True)
class Conversion:
    """What a checkpoint becomes: known from its headers, before a byte is written."""

    checkpoint: Checkpoint
    format: str
    plain: str  # dtype of what is not quantised
    layouts: list[Layout]  # of each layer

    @classmethod
    def of(cls, source: Path, format: str = "int4", dtype: str | None = None) -> Conversion:
        """What is not quantised is stored as the checkpoint has it, but float32 as bfloat16 unless `dtype` is "float32"."""
        if format not in FORMATS:
            raise Refusal("E_OPTION", f"unknown format {format!r}", nearest(format, FORMATS))
        checkpoint = _opened(source)
        layouts = layouts_of(checkpoint.specs, format, dtype, str(checkpoint.dtype).removeprefix("torch."))
        return cls(checkpoint, format, layouts[0].plain, layouts)

    @property
    def size(self) -> StoreSize:
        return store_size(self.checkpoint.specs, self.layouts, self.checkpoint.total_parameters())

    @property
    def slab_bytes(self) -> int:
        """Of all slabs together."""
        layers = zip(self.layouts, self.checkpoint.specs, strict=True)
        return sum(layout.slab_bytes * spec.n_experts for layout, spec in layers)

    @property
    def trunk_dtype(self) -> torch.dtype:
        """Of what was quantised in the checkpoint's trunk; all else there keeps its own."""
        dtype: torch.dtype = getattr(torch, self.plain)
        return dtype

    @property
    def name(self) -> str:
        """A folder name that no other model or format has."""
        wide = "" if self.plain == "bfloat16" else f"-{self.plain}"
        came_from = source_of(self.checkpoint.folder)
        folder = came_from["repo"].replace("/", "--") if came_from else self.checkpoint.folder.resolve().name
        return f"{folder}-{self.checkpoint.fingerprint[:12]}-{self.format}{wide}"

    def job(self) -> dict[str, Any]:
        """What tells this store from every other; int4 stores of other CPUs are as good, but not to be continued here."""
        return {
            "fingerprint": self.checkpoint.fingerprint,
            "format": self.format,
            "plain": self.plain,
            "int4_order": int4_order(),
        }


def convert(
    source: Path, out: Path, format: str = "int4", dtype: str | None = None, progress: Progress | None = None
) -> Path:
    """Write the expert store of the checkpoint folder `source` into `out` and return `out`; options as `Conversion.of`.

    Refuses what `Checkpoint` refuses, a folder that holds something else, and a disk without room. A damaged store is
    made again. Memory: about one parameter of one expert, twice.
    """
    return write_store(Conversion.of(source, format, dtype), out, progress)


def write_store(conversion: Conversion, out: Path, progress: Progress | None = None) -> Path:
    """Carry a conversion out; see `convert`. Where another process makes the same store, wait for it and take it."""
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out, lambda what: progress(0, conversion.slab_bytes, what) if progress else None):
        if not is_store(out) or _is_damaged(out):  # before wrong bytes become a job that right ones would not match
            folder = conversion.checkpoint.folder
            check(folder, weight_files(folder), progress)
        if _prepare(out, conversion.job(), _store_bytes(conversion)):
            _write(conversion, out, progress)
    return out


def _opened(source: Path) -> Checkpoint:
    try:
        return Checkpoint(source)
    except Refusal:
        if source_of(source):  # bytes that went wrong on their way explain it better, and must be fetched again
            check(source, weight_files(source))
        raise


def _write(conversion: Conversion, out: Path, progress: Progress | None) -> None:
    checkpoint, layouts = conversion.checkpoint, conversion.layouts
    unique, layers, done = list(dict.fromkeys(layouts)), [], 0
    for i, (spec, layout) in enumerate(zip(checkpoint.specs, layouts, strict=True)):
        path = out / f"experts-{i:03d}.safetensors"
        report = _Report(
            progress, done, conversion.slab_bytes, f"converting layer {i + 1} of {len(layouts)}", layout.slab_bytes
        )
        start = _write_layer(path, checkpoint, spec, layout, report)
        layers.append(
            LayerFile(
                module=spec.name,
                file=path.name,
                n_experts=spec.n_experts,
                layout=unique.index(layout),
                data_offset=start,
                header_crc32=header_checksum(path, start),
                crc32=tuple(slab_checksums(path, start, spec.n_experts)),
            )
        )
        done += layout.slab_bytes * spec.n_experts
    _write_trunk(out / TRUNK, checkpoint, conversion.trunk_dtype)
    side_files = checkpoint.side_files()
    for name, content in side_files.items():
        with replacing(out / name) as stream:
            stream.write(content)
    about = {
        "made_by": f"duoserve {__version__}",
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "bf16_bytes": conversion.size.bf16_bytes,
        "source": source_of(checkpoint.folder),
        "ignored": checkpoint.ignored,
        "layouts": [layout.to_json() for layout in unique],
        "layers": [asdict(layer) for layer in layers],
        "files": {name: file_checksum(out / name) for name in (TRUNK, *side_files)},
    }
    write_manifest(out, conversion.job() | about)
    (out / JOB).unlink(missing_ok=True)


class _Report(NamedTuple):
    """Tells a Progress how many slabs of one layer are done."""

    progress: Progress | None
    before: int
    total: int
    what: str
    slab_bytes: int

    def slabs(self, n: int) -> None:
        if self.progress:
            self.progress(self.before + n * self.slab_bytes, self.total, self.what)


def layouts_of(specs: list[ExpertsSpec], format: str, dtype: str | None, stored: str) -> list[Layout]:
    """Of each MoE layer of a checkpoint whose weights are `stored` so; `dtype` as in `Conversion.of`."""
    narrow = dtype == "bfloat16" or (stored == "float32" and dtype != "float32")
    return [_layout(spec, format, "bfloat16" if narrow else stored) for spec in specs]


def store_size(specs: list[ExpertsSpec], layouts: list[Layout], parameters: int) -> StoreSize:
    """`parameters` of the whole model."""
    n_experts = sum(spec.n_experts for spec in specs)
    return StoreSize(n_experts, max(layout.slab_bytes for layout in layouts), 2 * parameters)


def _layout(spec: ExpertsSpec, format: str, plain: str) -> Layout:
    params = []
    for name, shape in spec.parameters.items():
        if len(shape) == 1:
            params.append(Param(name, shape[0], 0))
        else:
            rows, cols = reversed(shape) if spec.module.is_transposed else shape
            params.append(Param(name, rows, cols))
    return Layout.of(format, params, plain)


def _write_layer(path: Path, checkpoint: Checkpoint, spec: ExpertsSpec, layout: Layout, report: _Report) -> int:
    entry = Entry(
        "experts", "U8", (spec.n_experts, layout.slab_bytes), lambda: _slabs(checkpoint, spec, layout, report)
    )
    if path.is_file() and path.stat().st_size == ALIGN + entry.n_bytes:
        report.slabs(spec.n_experts)  # finished before an interruption: only whole files ever get this name
        return ALIGN
    return write_safetensors(path, [entry])


def _slabs(checkpoint: Checkpoint, spec: ExpertsSpec, layout: Layout, report: _Report) -> Iterable[torch.Tensor]:
    """All slabs of a layer, piece by piece, so that not even one of them is held whole."""
    wanted = getattr(torch, layout.plain)
    for e in range(spec.n_experts):
        for param in layout.params:
            value = checkpoint.expert(spec, param.name, e, wanted)
            yield from layout.pieces(param.name, value.T if param.cols and spec.module.is_transposed else value)
            del value
        report.slabs(e + 1)


def _write_trunk(path: Path, checkpoint: Checkpoint, plain: torch.dtype) -> None:
    def pieces(name: str) -> Callable[[], Iterable[torch.Tensor]]:
        return lambda: checkpoint.trunk_pieces(name, plain)

    write_safetensors(path, [Entry(name, dtype, shape, pieces(name)) for name, dtype, shape in checkpoint.trunk(plain)])


def _store_bytes(conversion: Conversion) -> int:
    checkpoint = conversion.checkpoint
    entries = checkpoint.trunk(conversion.trunk_dtype)
    trunk = sum(Entry(name, dtype, shape, lambda: []).n_bytes for name, dtype, shape in entries)
    side = sum(len(content) for content in checkpoint.side_files().values())
    return conversion.slab_bytes + ALIGN * len(conversion.layouts) + trunk + side


def _is_damaged(out: Path) -> bool:
    """Whether the store in `out` cannot be opened; if so its manifest and layers are taken away, to be made again."""
    try:
        Store(out).close()
        return False
    except Refusal:
        for file in (*out.glob("experts-*.safetensors"), *out.glob(TRUNK), out / MANIFEST):
            file.unlink()
        for file in out.iterdir():
            if SIDE_FILES.fullmatch(file.name):
                file.unlink()
        return True


def _prepare(out: Path, job: dict[str, Any], need: int) -> bool:
    """Make `out` ready to be written; False where it already holds just this store."""
    if is_store(out) and not _is_damaged(out):
        have = json.loads((out / MANIFEST).read_text())
        if all(have.get(name) == value for name, value in job.items() if name != "int4_order"):
            (out / JOB).unlink(missing_ok=True)
            return False
        raise Refusal(
            "E_EXISTS",
            f"{out} holds another store ({have['format']} of {have['fingerprint'][:8]}, wanted {job['format']} of "
            f"{job['fingerprint'][:8]})",
            "give an empty folder",
        )
    for stray in out.glob(".*.tmp"):
        stray.unlink()
    started = json.loads((out / JOB).read_text()) if (out / JOB).is_file() else None
    if started != job and any(file.name != LOCK for file in out.iterdir()):
        raise Refusal("E_EXISTS", f"{out} is not empty and holds no part of this store", "give an empty folder")
    have = sum(file.stat().st_size for file in out.iterdir())
    free = shutil.disk_usage(out).free
    if free < need - have:
        raise Refusal(
            "E_DISK",
            f"the store needs {need - have:,} bytes more, {free:,} are free in {out}",
            "free some, or give a folder on another disk",
            6,
        )
    with replacing(out / JOB) as stream:
        stream.write(json.dumps(job).encode())
    return True
