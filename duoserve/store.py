"""The expert store on disk: one safetensors file per layer with 4096-aligned slabs, the trunk, config, tokenizer, manifest.

Knows files, offsets and lengths; knows nothing of slots, devices or how slabs are multiplied. The manifest is written last:
a folder without one is no store.

    manifest.json            format, fingerprint, layouts, layers; a checksum of every slab, header, file and of itself
    experts-000.safetensors  header padded to 4096, then slab 0, slab 1, ... (one uint8 tensor `experts`, (E, slab_bytes))
    trunk.safetensors        every other tensor of the checkpoint, under the checkpoint's names
    config.json, tokenizer   as the checkpoint has them
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from duoserve.codec import Layout
from duoserve.core import Key, Refusal
from duoserve.int4 import ORDERS

KIND, VERSION = "duoserve-expert-store", 1
MANIFEST, TRUNK, LOCK = "manifest.json", "trunk.safetensors", ".lock"
ALIGN = 4096
MAX_MANIFEST = 64 << 20


@dataclass(frozen=True)
class LayerFile:
    """One MoE layer: the module it stands for, its file, where its first slab lies, which layout its slabs have."""

    module: str
    file: str
    n_experts: int
    layout: int
    data_offset: int
    header_crc32: int
    crc32: tuple[int, ...]  # of each slab


class StoreSize(NamedTuple):
    """What planning needs to know of a store, made or to be made."""

    n_experts: int  # over all layers
    slab_bytes: int  # of a slot that fits any slab
    bf16_bytes: int  # of the whole checkpoint, were it bfloat16


class Store:
    """An opened expert store: reads slabs into memory that the caller owns. Safe to use from several threads."""

    def __init__(self, folder: Path):
        self.folder = folder
        data = _read_manifest(folder)
        try:
            self.format: str = data["format"]
            self.fingerprint: str = data["fingerprint"]
            self.dtype: str = data["dtype"]
            self.bf16_bytes: int = int(data["bf16_bytes"])
            self.layouts = [Layout.from_json(item) for item in data["layouts"]]
            self.layers = [LayerFile(**item | {"crc32": tuple(item["crc32"])}) for item in data["layers"]]
            self.files: dict[str, dict[str, Any]] = {
                str(name): dict(written) for name, written in data["files"].items()
            }
            self._order = str(data.get("int4_order"))
            self._fds: list[int] = []
            for layer in self.layers:
                self._fds.append(self._open(layer))
            self._seen = [bytearray(layer.n_experts) for layer in self.layers]
            if any(layout.format != self.format for layout in self.layouts) or self.slab_bytes < ALIGN:
                raise ValueError(f"layouts are not {self.format!r}")
            if self.format == "int4" and self._order not in ORDERS:
                raise ValueError(f"int4 order {self._order!r}")
            if self.dtype not in ("bfloat16", "float16", "float32"):
                raise ValueError(f"dtype {self.dtype!r}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            self.close()
            if isinstance(error, Refusal):
                raise
            raise Refusal(
                "E_STORE", f"{folder / MANIFEST} is incomplete ({error!r})", "convert the model again", 5
            ) from error

    @property
    def trunk(self) -> Path:
        return self.folder / TRUNK

    @property
    def slab_bytes(self) -> int:
        """Bytes of a slot that fits any slab of this store."""
        return max(layout.slab_bytes for layout in self.layouts)

    @property
    def n_experts(self) -> int:
        """All routed experts, over all layers."""
        return sum(layer.n_experts for layer in self.layers)

    @property
    def size(self) -> StoreSize:
        return StoreSize(self.n_experts, self.slab_bytes, self.bf16_bytes)

    def layout(self, layer: int) -> Layout:
        return self.layouts[self.layers[layer].layout]

    def read_into(self, key: Key, buffer: torch.Tensor) -> None:
        """Fill `buffer` (at least slab_bytes, uint8, page-aligned, on the host) with one slab, past the page cache.

        A slab is checked when it is first read. Raises OSError where the file ends early or the disk fails, Refusal
        where the bytes are not those that were written.
        """
        layer = self.layers[key.layer]
        length = self.layout(key.layer).slab_bytes
        offset = layer.data_offset + key.expert * length
        view = buffer.numpy().data[:length]
        done = 0
        while done < length:
            n = os.preadv(self._fds[key.layer], [view[done:]], offset + done)
            if n <= 0:
                at = f"{self.folder / layer.file} ended at byte {offset + done}"
                raise OSError(f"{at}, expert {key.expert} needs {length - done} more")
            done += n
        if not self._seen[key.layer][key.expert]:
            self._check(layer, key.expert, zlib.crc32(view))
            self._seen[key.layer][key.expert] = 1
        self.layout(key.layer).reorder(buffer[:length], self._order)  # where another kind of CPU made the store

    def verify(self) -> Iterator[str]:
        """Read every byte; yields a line for each file or slab that is not as it was written, and for each stray file."""
        for layer in self.layers:
            found = slab_checksums(self.folder / layer.file, layer.data_offset, layer.n_experts)
            for e, (got, want) in enumerate(zip(found, layer.crc32, strict=True)):
                if got != want:
                    yield f"{layer.file}: expert {e} has checksum {got:08x}, written was {want:08x}"
        for name, written in self.files.items():
            path = self.folder / name
            found_now = file_checksum(path) if path.is_file() else {"bytes": 0, "sha256": "missing"}
            if found_now != written:
                yield f"{name}: {_short(found_now)}, written was {_short(written)}"
        known = {MANIFEST, LOCK, *self.files, *(layer.file for layer in self.layers)}
        for file in sorted(self.folder.iterdir()):
            if file.name not in known:
                yield f"{file.name}: no part of this store"

    def _check(self, layer: LayerFile, expert: int, got: int) -> None:
        if got != layer.crc32[expert]:
            what = f"expert {expert} in {self.folder / layer.file}"
            raise Refusal(
                "E_CORRUPT",
                f"{what} has checksum {got:08x}, written was {layer.crc32[expert]:08x}",
                "check the disk, then convert the model again",
                5,
            )

    def close(self) -> None:
        while getattr(self, "_fds", None):
            os.close(self._fds.pop())

    def _open(self, layer: LayerFile) -> int:
        path = self.folder / layer.file
        if os.path.basename(layer.file) != layer.file:
            raise Refusal(
                "E_STORE", f"the manifest names {layer.file!r} outside the store", "convert the model again", 5
            )
        need = layer.data_offset + layer.n_experts * self.layouts[layer.layout].slab_bytes
        have = path.stat().st_size if path.is_file() else -1
        if have != need or layer.data_offset % ALIGN:
            raise Refusal(
                "E_STORE", f"{path} has {max(have, 0)} bytes, the manifest says {need}", "convert the model again", 5
            )
        if (got := header_checksum(path, layer.data_offset)) != layer.header_crc32:
            raise Refusal(
                "E_CORRUPT",
                f"the header of {path} has checksum {got:08x}, written was {layer.header_crc32:08x}",
                "convert the model again",
                5,
            )
        return open_direct(path)


def open_direct(path: Path) -> int:
    """A descriptor that reads past the page cache where the file system can, through it where it cannot (some tmpfs)."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDONLY)


def is_store(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def write_manifest(folder: Path, data: dict[str, Any]) -> None:
    data = {"kind": KIND, "version": VERSION} | data
    with replacing(folder / MANIFEST) as stream:
        stream.write(json.dumps(data | {"sha256": _digest(data)}, indent=1).encode())


def slab_checksums(path: Path, data_offset: int, n_experts: int) -> list[int]:
    """CRC-32 of each slab of a layer's file, from the file itself."""
    slab_bytes = (path.stat().st_size - data_offset) // n_experts
    with open(path, "rb") as file:
        file.seek(data_offset)
        return [_crc(file, slab_bytes) for _ in range(n_experts)]


def header_checksum(path: Path, data_offset: int) -> int:
    """CRC-32 of what lies before the first slab."""
    with open(path, "rb") as file:
        return zlib.crc32(file.read(data_offset))


def file_checksum(path: Path) -> dict[str, Any]:
    """Length and SHA-256 of a file, as the manifest keeps them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _short(checksum: dict[str, Any]) -> str:
    return f"{checksum['bytes']} bytes with sha256 {checksum['sha256'][:12]}"


def _crc(file: BinaryIO, n_bytes: int) -> int:
    crc = 0
    while n_bytes:
        piece = file.read(min(n_bytes, 1 << 20))
        if not piece:
            break
        crc, n_bytes = zlib.crc32(piece, crc), n_bytes - len(piece)
    return crc


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class Entry:
    """A tensor to be written: its safetensors name, dtype and shape, and pieces that together are its bytes."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Callable[[], Iterable[torch.Tensor]]):
        self.name, self.dtype, self.shape, self.pieces = name, dtype, shape, pieces
        self.n_bytes = _DTYPE_BYTES[dtype]
        for side in shape:
            self.n_bytes *= side


_DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def write_safetensors(path: Path, entries: list[Entry]) -> int:
    """Stream `entries` into a file whose data starts at a multiple of 4096; returns that start. Durable when it returns."""
    header, offset = {}, 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.n_bytes],
        }
        offset += entry.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGN)
    with replacing(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            written = 0
            for piece in entry.pieces():
                written += stream.write(_bytes_of(piece))
            assert written == entry.n_bytes, (entry.name, written, entry.n_bytes)
    return 8 + len(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that is either there whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def exclusive(folder: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """Be the only process at work on `folder`; the kernel frees the lock of a process that died.

    `waiting` is told of the process that has it, if any, before this one waits.
    """
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(file, waiting)
            if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
                os.truncate(file, 0)
                os.pwrite(file, str(os.getpid()).encode(), 0)
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:  # also where the former owner took the file away while we waited: then once more
            os.close(file)


def _take(file: int, waiting: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting(f"waiting for process {os.pread(file, 32, 0).decode() or '?'}, which makes the same store")
        fcntl.flock(file, fcntl.LOCK_EX)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    size = path.stat().st_size
    if size > MAX_MANIFEST:
        raise Refusal(
            "E_STORE", f"{path} has {size} bytes, at most {MAX_MANIFEST} are read", "convert the model again", 5
        )
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise Refusal("E_STORE", f"{path} is not JSON ({error})", "convert the model again", 5) from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise Refusal("E_STORE", f"{path} is not the manifest of an expert store", "convert the model again", 5)
    if data.get("version") != VERSION:
        raise Refusal(
            "E_STORE",
            f"{path} has version {data.get('version')}, this program reads {VERSION}",
            "convert the model again",
            5,
        )
    digest = data.pop("sha256", None)
    if digest != _digest(data):
        raise Refusal("E_CORRUPT", f"{path} is not as it was written (sha256 differs)", "convert the model again", 5)
    return data
