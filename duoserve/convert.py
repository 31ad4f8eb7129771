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
from duoserve.config import FORMATS, one_of
from duoserve.core import Refusal
from duoserve.durable import LOCK, exclusive, replacing, sync_folder
from duoserve.folder import SIDE_FILES, weight_files
from duoserve.headers import read_json
from duoserve.hub import check
from duoserve.hub import source as source_of
from duoserve.int4 import int4_order
from duoserve.manifest import (
    ALIGN,
    JOB,
    KIND,
    MANIFEST,
    MAX_MANIFEST,
    TRUNK,
    VERSION,
    LayerFile,
    check_layer,
    is_store,
    read_manifest,
    write_manifest,
)
from duoserve.store import (
    Entry,
    Store,
    StoreSize,
    file_checksum,
    header_checksum,
    slab_checksums,
    write_safetensors,
)
from duoserve.version import __version__

_EXPERT_BYTES = 32  # that an expert takes in the manifest and in the note of what is done, at most
_IDENTITY = ("fingerprint", "format", "plain")  # which model, made into what
Progress = Callable[[int, int, str], None]  # bytes of slabs done, bytes in all (0: not counted), what is being done


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
        one_of("format", format, FORMATS)
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
        folder = self.source["repo"].replace("/", "--") if self.source else self.checkpoint.folder.resolve().name
        return f"{folder}-{self.checkpoint.fingerprint[:12]}-{self.format}{wide}"

    @property
    def source(self) -> dict[str, str] | None:
        """Repository and commit on the hub, if it came from there."""
        return source_of(self.checkpoint.folder)

    def check(self, progress: Progress | None = None) -> None:
        """Refuse weights that are not what the hub published; reads all of them."""
        check(self.checkpoint.folder, weight_files(self.checkpoint.folder), progress)

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

    Refuses what `Checkpoint` refuses, a folder that holds something else, and a disk without room. Where the store is
    there already it is read from end to end, and what is damaged is made again. Memory: about one parameter of one
    expert, twice.
    """
    conversion = Conversion.of(source, format, dtype)
    if is_store(out):
        tell = _teller(conversion, progress)
        with exclusive(out, tell):
            store = _whole(out, conversion)
            if store:
                tell("reading the store that is there")
                if any(problem.file in store.names for problem in store.verify()):
                    _reopen(out, conversion)
                store.close()
    write_store(conversion, out, progress).close()
    return out


def write_store(conversion: Conversion, out: Path, progress: Progress | None = None) -> Store:
    """Carry a conversion out and open what it made; see `convert`. A whole store is opened as it is, but for the trunk's
    check nothing large is read; where another process makes the same store, wait for it and take it."""
    if not (out / JOB).exists() and (store := _whole(out, conversion)):
        return store
    is_new = not out.exists()
    with exclusive(out, _teller(conversion, progress)):
        if is_new:
            sync_folder(out.parent)
        store = _whole(out, conversion)
        if store is None:
            _refuse_early(out, conversion)
            conversion.check(progress)  # before wrong bytes become a job that right ones would not match
            _write(conversion, out, _prepare(out, conversion), progress)
        (out / JOB).unlink(missing_ok=True)
        return store or Store(out)


def _teller(conversion: Conversion, progress: Progress | None) -> Callable[[str], None]:
    return lambda what: progress(0, 0, what) if progress else None


def _opened(source: Path) -> Checkpoint:
    try:
        return Checkpoint(source)
    except Refusal:
        if source_of(source):  # bytes that went wrong on their way explain it better, and must be fetched again
            check(source, weight_files(source))
        raise


def _write(conversion: Conversion, out: Path, done: _Done, progress: Progress | None) -> None:
    checkpoint, layouts = conversion.checkpoint, conversion.layouts
    unique, layers, before = list(dict.fromkeys(layouts)), [], 0
    for i, (spec, layout) in enumerate(zip(checkpoint.specs, layouts, strict=True)):
        path = out / _layer_name(i)
        what = f"converting layer {i + 1} of {len(layouts)}"
        report = _Report(progress, before, conversion.slab_bytes, what, layout.slab_bytes)
        if path.is_file() and done.get(path.name) == _described(path, spec, unique.index(layout)):
            report.slabs(spec.n_experts)  # finished before an interruption, and still as it was then
        else:
            path.unlink(missing_ok=True)  # or it would need room beside its successor
            _write_layer(path, checkpoint, spec, layout, report)
            done[path.name] = _described(path, spec, unique.index(layout))
            _note(conversion, out, done)
        layers.append(done[path.name])
        before += layout.slab_bytes * spec.n_experts
    _write_trunk(out / TRUNK, checkpoint, conversion.trunk_dtype)
    side_files = checkpoint.side_files()
    for name, content in side_files.items():
        with replacing(out / name) as stream:
            stream.write(content)
    about = {
        "made_by": f"duoserve {__version__}",
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "bf16_bytes": conversion.size.bf16_bytes,
        "source": conversion.source,
        "ignored": checkpoint.ignored,
        "layouts": [layout.to_json() for layout in unique],
        "layers": [asdict(layer) for layer in layers],
        "files": {name: file_checksum(out / name) for name in (TRUNK, *side_files)},
    }
    write_manifest(out, conversion.job() | about)


def _layer_name(i: int) -> str:
    return f"experts-{i:03d}.safetensors"


def _described(path: Path, spec: ExpertsSpec, layout: int) -> LayerFile:
    """A layer's file as it lies there now, every byte read."""
    return LayerFile(
        module=spec.name,
        file=path.name,
        n_experts=spec.n_experts,
        layout=layout,
        data_offset=ALIGN,
        header_crc32=header_checksum(path, ALIGN),
        crc32=tuple(slab_checksums(path, ALIGN, spec.n_experts)),
    )


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


def _write_layer(path: Path, checkpoint: Checkpoint, spec: ExpertsSpec, layout: Layout, report: _Report) -> None:
    shape = (spec.n_experts, layout.slab_bytes)
    start = write_safetensors(path, [Entry("experts", "U8", shape, lambda: _slabs(checkpoint, spec, layout, report))])
    assert start == ALIGN, (path, start)


def _slabs(checkpoint: Checkpoint, spec: ExpertsSpec, layout: Layout, report: _Report) -> Iterable[torch.Tensor]:
    """All slabs of a layer, piece by piece, so that not even one of them is held whole."""
    wanted = getattr(torch, layout.plain)
    for e in range(spec.n_experts):
        for param in layout.params:
            value = checkpoint.expert(spec, param.name, e, wanted)
            _check_numbers(value, f"{spec.name}.{param.name} of expert {e}")
            yield from layout.pieces(param.name, value.T if param.cols and spec.module.is_transposed else value)
            del value
        report.slabs(e + 1)


def _check_numbers(value: torch.Tensor, what: str) -> None:
    """One value that is no number takes its whole block of 64 with it, and every answer after that."""
    if not value.sum(dtype=torch.float32).isfinite():
        bad = int(value.numel() - value.isfinite().sum())
        what = f"{bad:,} of {value.numel():,} values of {what} are no finite numbers"
        raise Refusal("E_CORRUPT", what, "fetch the checkpoint again, or tell its publisher", 5)


def _write_trunk(path: Path, checkpoint: Checkpoint, plain: torch.dtype) -> None:
    def pieces(name: str) -> Callable[[], Iterable[torch.Tensor]]:
        return lambda: checkpoint.trunk_pieces(name, plain)

    write_safetensors(path, [Entry(name, dtype, shape, pieces(name)) for name, dtype, shape in checkpoint.trunk(plain)])


def _store_bytes(conversion: Conversion) -> int:
    """Bytes of the files to be made, with what the manifest and the note of what is done may take."""
    checkpoint = conversion.checkpoint
    entries = checkpoint.trunk(conversion.trunk_dtype)
    trunk = sum(Entry(name, dtype, shape, lambda: []).n_bytes + 256 for name, dtype, shape in entries)
    side = [len(content) for content in checkpoint.side_files().values()]
    about = _EXPERT_BYTES * conversion.size.n_experts + ALIGN * (2 * len(conversion.layouts) + len(side) + 4)
    return conversion.slab_bytes + trunk + sum(side) + about


_Done = dict[str, LayerFile]  # finished layers by their files' names


def _whole(out: Path, conversion: Conversion) -> Store | None:
    """The store in `out`, open, its trunk read; None where there is none or a damaged one. Refuses another model's."""
    if not is_store(out):
        return None
    try:
        store = Store(out)
    except Refusal as refusal:
        _refuse_others(out, _claimed(out / MANIFEST), conversion)
        if refusal.code == "E_STRAY":  # not ours to remove, and making the store again would not cure it
            raise
        return None
    try:
        _refuse_others(out, read_manifest(out), conversion)
    except BaseException:
        store.close()
        raise
    try:
        store.checked_trunk()
        return store
    except Refusal:
        store.close()
        return None


def _refuse_others(out: Path, have: dict[str, Any], conversion: Conversion) -> None:
    """What is made of another model, or into another format, is never written over, whole or not."""
    job = conversion.job()
    others = [name for name in _IDENTITY if name in have and have[name] != job[name]]
    if "fingerprint" in others and conversion.source and have.get("source") == conversion.source:
        conversion.check()  # one commit has one fingerprint: some bytes went wrong since
    if others:
        theirs = f"{str(have.get('format'))[:8]} of {str(have.get('fingerprint'))[:8]}"
        what = f"{out} holds another store ({theirs}, wanted {job['format']} of {job['fingerprint'][:8]})"
        raise Refusal("E_EXISTS", what, "give an empty folder")


def _claimed(path: Path) -> dict[str, Any]:
    """What a manifest that may be damaged, or another version's, says of itself; nothing where it cannot be read."""
    try:
        data = read_json(path, "", MAX_MANIFEST)
    except Refusal:
        return {}
    return data if isinstance(data, dict) else {}


def _reopen(out: Path, conversion: Conversion) -> None:
    """Make a store that is damaged a conversion under way, whose layers are kept as far as they are as written."""
    try:
        have = read_manifest(out)
    except Refusal:
        have = {}
    layers = have["layers"] if all(have.get(name) == value for name, value in conversion.job().items()) else []
    _write_note(out, conversion, layers)
    (out / MANIFEST).unlink()
    sync_folder(out)


def _note(conversion: Conversion, out: Path, done: _Done) -> None:
    _write_note(out, conversion, [asdict(layer) for layer in done.values()])


def _write_note(out: Path, conversion: Conversion, layers: list[Any]) -> None:
    about = {"kind": KIND, "version": VERSION, "job": conversion.job(), "layers": layers}
    about |= {"model_type": conversion.checkpoint.config.model_type, "source": conversion.source}
    with replacing(out / JOB) as stream:
        stream.write(json.dumps(about).encode())


def _started(out: Path, conversion: Conversion) -> _Done | None:
    """The layers that an interrupted conversion had finished; None where none was begun here. Refuses another one's."""
    if not (out / JOB).is_file():
        return None
    data = read_json(out / JOB, f"remove {out} and convert again", MAX_MANIFEST)
    data = data if isinstance(data, dict) else {}
    job = data.get("job", data)
    _refuse_others(out, (job if isinstance(job, dict) else {}) | {"source": data.get("source")}, conversion)
    if job != conversion.job() or data.get("version") != VERSION or not isinstance(data.get("layers"), list):
        return {}  # the same model, from the beginning
    try:
        for layer in data["layers"]:
            check_layer(layer, len(conversion.layouts), out / JOB)
    except Refusal:
        return {}
    return {layer["file"]: LayerFile.from_json(layer) for layer in data["layers"]}


def _refuse_early(out: Path, conversion: Conversion) -> None:
    """Refuse a folder that holds something else, and a disk without room; changes nothing and reads no weights."""
    files = [file for file in out.iterdir() if file.name != LOCK]
    if not is_store(out) and _started(out, conversion) is None and not all(map(_is_temporary, files)):
        raise Refusal("E_EXISTS", f"{out} is not empty and holds no part of this store", "give an empty folder")
    have = sum(file.stat().st_size for file in files if _is_part(file) or _is_temporary(file))  # kept, or making room
    need, free = _store_bytes(conversion), shutil.disk_usage(out).free
    if free < need - have:
        raise Refusal(
            "E_DISK",
            f"the store needs {need - have:,} bytes more, {free:,} are free in {out}",
            "free some, or give a folder on another disk",
            6,
        )


def _prepare(out: Path, conversion: Conversion) -> _Done:
    """Make `out` ready to be written; returns the layers that were finished before."""
    if is_store(out):  # and damaged
        _reopen(out, conversion)
    for file in out.iterdir():
        if _is_temporary(file):
            file.unlink()
    done = _kept(out, conversion, _started(out, conversion) or {})
    _note(conversion, out, done)
    return done


def _is_temporary(file: Path) -> bool:
    return file.match(".*.tmp")


def _is_part(file: Path) -> bool:
    """Whether a file that lies in the folder of a store under way is one of its files, and ours to remove."""
    return file.match("experts-*.safetensors") or file.name == TRUNK or bool(SIDE_FILES.fullmatch(file.name))


def _kept(out: Path, conversion: Conversion, done: _Done) -> _Done:
    """Those finished layers that may still be whole; whatever else an interruption left is taken away."""
    sizes = {
        _layer_name(i): ALIGN + layout.slab_bytes * spec.n_experts
        for i, (layout, spec) in enumerate(zip(conversion.layouts, conversion.checkpoint.specs, strict=True))
    }
    kept = {}
    for file in out.iterdir():
        if file.name in done and sizes.get(file.name) == file.stat().st_size:
            kept[file.name] = done[file.name]
        elif _is_part(file):
            file.unlink()
    return kept
