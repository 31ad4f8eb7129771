"""The expert store on disk: one safetensors file per layer with 4096-aligned slabs, the trunk, config, tokenizer, manifest.

Knows files, offsets and lengths; knows nothing of slots, devices or how slabs are multiplied. The manifest is written last:
a folder without one is no store.

    manifest.json            format, fingerprint, layouts, layers; a checksum of every slab, header, file and of itself
    experts-000.safetensors  header padded to 4096, then slab 0, slab 1, ... (one uint8 tensor `experts`, (E, slab_bytes))
    trunk.safetensors        every other tensor of the checkpoint, under the checkpoint's names
    config.json, tokenizer   as the checkpoint has them
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from duoserve.codec import Layout
from duoserve.core import Key, Refusal
from duoserve.durable import LOCK, replacing
from duoserve.headers import DTYPE_BITS, parse_header, read_header, regular_size
from duoserve.int4 import ORDERS
from duoserve.manifest import ALIGN, JOB, MANIFEST, REMEDY, TRUNK, LayerFile, read_manifest

PIECE = 1 << 20  # bytes read at a time, so that checking a file of any size takes this much memory
# What a reader of configs, tokenizers and weights would open if it lay in the folder, whether the manifest names it or not.
_READ_BY_LOADERS = re.compile(r"[^.].*\.(json|jinja|model|tiktoken|bpe|safetensors|bin|py)|(vocab|merges)\.txt")


class StoreSize(NamedTuple):
    """What planning needs to know of a store, made or to be made."""

    n_experts: int  # over all layers
    slab_bytes: int  # of a slot that fits any slab
    bf16_bytes: int  # of the whole checkpoint, were it bfloat16


class Store:
    """An opened expert store: reads slabs into memory that the caller owns. Safe to use from several threads."""

    def __init__(self, folder: Path):
        """Refuses a store that is not as it was written, the file named.

        Headers, small files and all sizes are checked here, the trunk by `checked_trunk`, a slab when it is first read;
        `verify` reads everything.
        """
        self.folder = folder
        self._fds: list[int] = []
        self._trunk_is_checked = False
        data = read_manifest(folder)
        try:
            self.format: str = data["format"]
            self.fingerprint: str = data["fingerprint"]
            self.dtype: str = data["dtype"]
            self.bf16_bytes: int = data["bf16_bytes"]
            self.layouts = [self._layout(item) for item in data["layouts"]]
            self.layers = [LayerFile.from_json(item) for item in data["layers"]]
            self.files: dict[str, dict[str, Any]] = data["files"]
            self._order = str(data.get("int4_order"))
            self._check_links()
            for layer in self.layers:
                self._fds.append(self._open(layer))
            for name in self.files:
                self._check_size(name)
                if name != TRUNK:
                    self._check_file(name)
            self._check_strays()
            self._seen = [bytearray(layer.n_experts) for layer in self.layers]
            if self.format == "int4" and self._order not in ORDERS:
                raise ValueError(f"int4 order {self._order!r}")
        except BaseException as error:
            self.close()
            if isinstance(error, Refusal) or not isinstance(error, (KeyError, TypeError, ValueError, AttributeError)):
                raise
            raise Refusal("E_STORE", f"{folder / MANIFEST} is incomplete ({error!r})", REMEDY, 5) from error

    def check_format(self, asked: str | None) -> None:
        """Refuse what experts were not stored as; None asks nothing."""
        if asked not in (None, self.format):
            what = f"the store is {self.format}, asked was {asked}"
            raise Refusal("E_FORMAT", what, "convert the checkpoint")

    @property
    def trunk(self) -> Path:
        return self.folder / TRUNK

    def checked_trunk(self) -> Path:
        """The trunk's file, once its header describes it and every byte is as written; it is read for that only once.

        Reading it warms the page cache for whoever loads it next.
        """
        if not self._trunk_is_checked:
            read_header(self.trunk, REMEDY)
            self._check_file(TRUNK)
            self._trunk_is_checked = True
        return self.trunk

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

    def verify(self) -> Iterator[Problem]:
        """Read every byte; yields each file or slab that is not as it was written, and each stray file."""
        for layer in self.layers:
            found = slab_checksums(self.folder / layer.file, layer.data_offset, layer.n_experts)
            for e, (got, want) in enumerate(zip(found, layer.crc32, strict=True)):
                if got != want:
                    yield Problem(layer.file, f"expert {e} has checksum {got:08x}, written was {want:08x}")
        for name, written in self.files.items():
            path = self.folder / name
            found_now = file_checksum(path) if path.is_file() else {"bytes": 0, "crc32": 0, "sha256": "missing"}
            if found_now != written:
                yield Problem(name, f"{_short(found_now)}, written was {_short(written)}")
        for file in self._strays():
            yield Problem(file.name, "no part of this store")

    @property
    def names(self) -> set[str]:
        """All files that the store consists of."""
        return {MANIFEST, *self.files, *(layer.file for layer in self.layers)}

    def _strays(self) -> list[Path]:
        known = self.names | {LOCK, JOB}
        return [file for file in sorted(self.folder.iterdir()) if file.name not in known]

    def _layout(self, data: dict[str, Any]) -> Layout:
        try:
            return Layout.from_json(data)
        except Refusal as refusal:
            what = f"{self.folder / MANIFEST} has a slab layout that this program would not make"
            raise Refusal("E_STORE", what, REMEDY, 5) from refusal

    def _check_links(self) -> None:
        """Nothing in the store lies elsewhere."""
        for name in sorted(self.names):
            if (self.folder / name).is_symlink() and _leaves(self.folder / name):
                raise Refusal("E_STORE", f"{self.folder / name} is a link out of the store", REMEDY, 5)

    def _check_strays(self) -> None:
        """Nothing lies beside the store's files that a load would read."""
        for stray in self._strays():
            if _READ_BY_LOADERS.fullmatch(stray.name) or (stray.is_dir() and not stray.name.startswith(".")):
                raise Refusal("E_STRAY", f"{stray} is no part of this store, but would be read with it", "remove it", 5)

    def _check_size(self, name: str) -> None:
        have, need = regular_size(self.folder / name), self.files[name]["bytes"]
        if have != need:
            raise _wrong_size(self.folder / name, have, need)

    def _check_file(self, name: str) -> None:
        written = self.files[name]["crc32"]
        with open(self.folder / name, "rb") as file:
            got = _crc(file, self.files[name]["bytes"])
        if got != written:
            what = f"{self.folder / name} has checksum {got:08x}, written was {written:08x}"
            raise Refusal("E_CORRUPT", what, REMEDY, 5)

    def _check(self, layer: LayerFile, expert: int, got: int) -> None:
        if got != layer.crc32[expert]:
            what = f"expert {expert} in {self.folder / layer.file}"
            raise Refusal(
                "E_CORRUPT",
                f"{what} has checksum {got:08x}, written was {layer.crc32[expert]:08x}",
                "check the disk, then run `duoserve convert` again, which reads all and makes anew what is damaged",
                5,
            )

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def _open(self, layer: LayerFile) -> int:
        path, slab_bytes = self.folder / layer.file, self.layouts[layer.layout].slab_bytes
        need = layer.data_offset + layer.n_experts * slab_bytes
        if (have := regular_size(path)) != need:
            raise _wrong_size(path, have, need)
        text = _head(path, layer.data_offset)
        if (got := zlib.crc32(text)) != layer.header_crc32:
            what = f"the header of {path} has checksum {got:08x}, written was {layer.header_crc32:08x}"
            raise Refusal("E_CORRUPT", what, REMEDY, 5)
        if int.from_bytes(text[:8], "little") != layer.data_offset - 8:
            raise Refusal("E_CORRUPT", f"{path} has a header of another length than its manifest says", REMEDY, 5)
        tensors = parse_header(text[8:], need - layer.data_offset, path, REMEDY)
        wanted = ("U8", (layer.n_experts, slab_bytes))
        if list(tensors) != ["experts"] or tensors["experts"][:2] != wanted:
            what = f"{path} describes other than {layer.n_experts} experts of {slab_bytes} bytes"
            raise Refusal("E_CORRUPT", what, REMEDY, 5)
        return open_direct(path)


class Problem(NamedTuple):
    """A file that is not as it was written, and what is wrong with it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def _leaves(link: Path) -> bool:
    """Whether a link points out of its folder; hub caches link into a folder `blobs` two above, which is no other place."""
    home, target = os.path.realpath(link.parent), os.path.realpath(link)  # which, unlike resolve, survives circles
    return os.path.dirname(target) not in (home, str(Path(home).parent.parent / "blobs"))


def _wrong_size(path: Path, have: int, need: int) -> Refusal:
    found = "is missing" if have < 0 else f"has {have} bytes"
    return Refusal("E_STORE", f"{path} {found}, the manifest says {need}", REMEDY, 5)


def _head(path: Path, n_bytes: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(n_bytes)


def open_direct(path: Path) -> int:
    """A descriptor that reads past the page cache where the file system can, through it where it cannot (some tmpfs)."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDONLY)


def slab_checksums(path: Path, data_offset: int, n_experts: int) -> list[int]:
    """CRC-32 of each slab of a layer's file, from the file itself."""
    slab_bytes = (path.stat().st_size - data_offset) // n_experts
    with open(path, "rb") as file:
        file.seek(data_offset)
        return [_crc(file, slab_bytes) for _ in range(n_experts)]


def header_checksum(path: Path, data_offset: int) -> int:
    """CRC-32 of what lies before the first slab."""
    return zlib.crc32(_head(path, data_offset))


def file_checksum(path: Path) -> dict[str, Any]:
    """Length, CRC-32 (quick: for every load) and SHA-256 (for `verify`) of a file, as the manifest keeps them."""
    crc, sha, n_bytes = 0, hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            crc, n_bytes = zlib.crc32(piece, crc), n_bytes + len(piece)
            sha.update(piece)
    return {"bytes": n_bytes, "crc32": crc, "sha256": sha.hexdigest()}


def _short(checksum: dict[str, Any]) -> str:
    return f"{checksum['bytes']} bytes with sha256 {checksum['sha256'][:12]}"


def _crc(file: BinaryIO, n_bytes: int) -> int:
    crc = 0
    while n_bytes:
        piece = file.read(min(n_bytes, PIECE))
        if not piece:
            break
        crc, n_bytes = zlib.crc32(piece, crc), n_bytes - len(piece)
    return crc


class Entry:
    """A tensor to be written: its safetensors name, dtype and shape, and pieces that together are its bytes."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Callable[[], Iterable[torch.Tensor]]):
        self.name, self.dtype, self.shape, self.pieces = name, dtype, shape, pieces
        self.n_bytes = DTYPE_BITS[dtype] // 8
        for side in shape:
            self.n_bytes *= side


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


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
