"""What a store says of itself: manifest.json, and conversion.json while it is being made. Knows names, types and ranges;
knows nothing of codecs and opens no other file. Imports no torch, so that stores can be listed at once.

The manifest's own sha256 finds what a disk did to it. What a stranger wrote is found by type and range, field by field,
before any of it becomes a size, an offset or a file's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duoserve.config import DTYPES, FORMATS
from duoserve.core import Refusal
from duoserve.durable import LOCK, replacing
from duoserve.headers import is_counts, read_json, shown

KIND, VERSION = "duoserve-expert-store", 2
MANIFEST, TRUNK = "manifest.json", "trunk.safetensors"
JOB = "conversion.json"  # what is being made here and what of it is done; the manifest comes in its place
ALIGN = 4096
MAX_MANIFEST, MAX_VALUES = 4 << 20, 300_000
REMEDY = "convert the model again"

_MAX_LAYERS, _MAX_EXPERTS, _MAX_FILES = 4096, 1 << 16, 64
_MAX_ROWS, _MAX_SLAB = 1 << 24, 1 << 40
_FILE = re.compile(r"\w[\w.+ ()-]{0,200}")  # within the folder, nothing hidden; \w has no surrogates
_TEXT = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,500}")
_HEX = re.compile(r"[0-9a-f]{1,64}")


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

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerFile:
        return cls(**data | {"crc32": tuple(data["crc32"])})


def is_store(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def write_manifest(folder: Path, data: dict[str, Any]) -> None:
    data = {"kind": KIND, "version": VERSION} | data
    with replacing(folder / MANIFEST) as stream:
        stream.write(json.dumps(data | {"sha256": digest(data)}, indent=1).encode())


def digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder` without its sha256, every field of it checked; Refusal where one is not as it must be."""
    path = folder / MANIFEST
    try:
        data = read_json(path, REMEDY, MAX_MANIFEST, MAX_VALUES)
    except Refusal as refusal:
        raise refusal.under("E_STORE") from refusal
    return judge(data, path)


def judge(data: Any, where: object) -> dict[str, Any]:
    """The manifest behind parsed JSON; see `read_manifest`."""
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise _refusal(where, "is not the manifest of an expert store")
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise _refusal(where, f"has version {shown(data.get('version'))}, this program reads {VERSION}")
    said = data.pop("sha256", None)
    if said != digest(data):
        raise Refusal("E_CORRUPT", f"{where} is not as it was written (sha256 differs)", REMEDY, 5)
    check = _Check(where)
    check.text(data, "fingerprint", _HEX)
    check.one_of(data, "format", FORMATS)
    check.one_of(data, "plain", DTYPES)
    check.one_of(data, "dtype", DTYPES)
    check.whole(data, "bf16_bytes", 1, 1 << 60)
    layouts = check.items(data, "layouts", _MAX_LAYERS)
    for layout in layouts:
        _check_layout(check, layout, data["format"])
    layers = check.items(data, "layers", _MAX_LAYERS)
    for layer in layers:
        check_layer(layer, len(layouts), where)
    _check_files(check, data.get("files"), [layer["file"] for layer in layers])
    check.distinct("modules", [layer["module"] for layer in layers])
    return data


def check_layer(layer: Any, n_layouts: int, where: object) -> None:
    """Refuse what `LayerFile` cannot be made from."""
    check = _Check(where)
    check.names(layer, "a layer", LayerFile.__dataclass_fields__)
    check.text(layer, "module", _TEXT)
    check.text(layer, "file", _FILE)
    check.whole(layer, "n_experts", 1, _MAX_EXPERTS)
    check.whole(layer, "layout", 0, n_layouts - 1)
    check.whole(layer, "data_offset", ALIGN, 1 << 20)
    check.whole(layer, "header_crc32", 0, (1 << 32) - 1)
    if layer["data_offset"] % ALIGN:
        raise _refusal(where, f"begins slabs at byte {layer['data_offset']}, which is no multiple of {ALIGN}")
    sums = layer["crc32"]
    if not is_counts(sums) or len(sums) != layer["n_experts"] or max(sums) >= 1 << 32:
        raise _refusal(where, f"has no checksum for each of {layer['n_experts']} experts of {shown(layer['file'])}")


def _check_layout(check: _Check, layout: Any, format: str) -> None:
    """Types and ranges; whether a layout is one that the codec makes, the codec knows."""
    check.names(layout, "a layout", ("format", "plain", "params", "parts", "slab_bytes"))
    check.one_of(layout, "format", (format,))
    check.one_of(layout, "plain", DTYPES)
    check.whole(layout, "slab_bytes", ALIGN, _MAX_SLAB)
    for param in check.items(layout, "params", 64):
        if not (isinstance(param, list) and len(param) == 3 and isinstance(param[0], str) and is_counts(param[1:])):
            raise _refusal(check.where, f"has a parameter that is none: {shown(param)}")
        if not _TEXT.fullmatch(param[0]) or not 1 <= param[1] <= _MAX_ROWS or param[2] > _MAX_ROWS:
            raise _refusal(check.where, f"has a parameter out of range: {shown(param)}")
    for part in check.items(layout, "parts", 256):
        if not (isinstance(part, list) and len(part) == 5 and is_counts(part[3]) and len(part[3]) <= 8):
            raise _refusal(check.where, f"has a part that is none: {shown(part)}")
        if not all(isinstance(word, str) for word in part[:3]) or not is_counts(part[4:]):
            raise _refusal(check.where, f"has a part that is none: {shown(part)}")
    check.distinct("parameters", [param[0] for param in layout["params"]])


def _check_files(check: _Check, files: Any, layer_files: list[str]) -> None:
    if not isinstance(files, dict) or len(files) > _MAX_FILES or TRUNK not in files:
        raise _refusal(check.where, f"lists no files, or more than {_MAX_FILES}, or no {TRUNK}")
    for name, written in files.items():
        if not _FILE.fullmatch(name):
            raise _refusal(check.where, f"names the file {shown(name)}, which is no name of a file in the store")
        check.names(written, f"file {shown(name)}", ("bytes", "crc32", "sha256"))
        check.whole(written, "bytes", 0, _MAX_SLAB)
        check.whole(written, "crc32", 0, (1 << 32) - 1)
        check.text(written, "sha256", _HEX)
    check.distinct("files", [*files, *layer_files, MANIFEST, JOB, LOCK])


@dataclass(frozen=True)
class _Check:
    """Refuses fields of the wrong type or range, naming the file that has them."""

    where: object

    def names(self, data: Any, what: str, wanted: Iterable[str]) -> None:
        if not isinstance(data, dict) or set(data) != set(wanted):
            raise _refusal(self.where, f"describes {what} by {shown(data)}, wanted are {', '.join(wanted)}")

    def whole(self, data: dict[str, Any], name: str, low: int, high: int) -> None:
        value = data.get(name)
        if type(value) is not int or not low <= value <= high:  # True is an int, but no number
            raise _refusal(self.where, f"has {name} {shown(value)}, not a whole number from {low} to {high}")

    def text(self, data: dict[str, Any], name: str, pattern: re.Pattern[str]) -> None:
        value = data.get(name)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise _refusal(self.where, f"has {name} {shown(value)}, which is none")

    def one_of(self, data: dict[str, Any], name: str, known: tuple[str, ...]) -> None:
        value = data.get(name)
        if not isinstance(value, str) or value not in known:
            raise _refusal(self.where, f"has {name} {shown(value)}, known are {', '.join(known)}")

    def items(self, data: dict[str, Any], name: str, most: int) -> list[Any]:
        value = data.get(name)
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise _refusal(self.where, f"has {name} {shown(value)}, not a list of 1 to {most}")
        return value

    def distinct(self, what: str, names: list[str]) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise _refusal(self.where, f"names {shown(name)} twice among its {what}")
            seen.add(name)


def _refusal(where: object, what: str) -> Refusal:
    return Refusal("E_STORE", f"{where} {what}", REMEDY, 5)
