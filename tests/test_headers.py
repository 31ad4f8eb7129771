"""What a stranger wrote is judged before it is believed: hand-made lies by class, and thousands of random ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import pytest

from duoserve import checkpoint
from duoserve.checkpoint import Checkpoint
from duoserve.core import Refusal
from duoserve.headers import MAX_HEADER
from duoserve.manifest import MAX_MANIFEST
from duoserve.store import Store, file_checksum

TRUNK, LAYER = "trunk.safetensors", "experts-001.safetensors"
MUTATIONS = 20_000
Change = Callable[[Any], Any]


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def opened(folder: Path) -> None:
    """As far as a load goes before it needs a model."""
    store = Store(folder)
    try:
        store.checked_trunk()
    finally:
        store.close()


def refused(folder: Path, name: str) -> str:
    """What opening says, which is one line that names the file."""
    before = open_files()
    with pytest.raises(Refusal) as refusal:
        opened(folder)
    line = str(refusal.value)
    assert refusal.value.status == 5 and line.isprintable() and len(line) < 900, line
    assert name in line, line
    assert open_files() == before, "a refused store stays open"
    return line


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def put(*path: Any, value: Any) -> Change:
    """A change that sets what lies at `path`."""

    def change(tree: Any) -> Any:
        at = tree
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return tree

    return change


def drop(*path: Any) -> Change:
    def change(tree: Any) -> Any:
        at = tree
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        return tree

    return change


def layer(field: str, value: Any) -> Change:
    return put("layers", 1, field, value=value)


def param(field: int, value: Any) -> Change:
    return put("layouts", 0, "params", 0, field, value=value)


def add_file(name: str) -> Change:
    return put("files", name, value={"bytes": 0, "crc32": 0, "sha256": "0" * 64})


MANIFESTS: dict[str, Change] = {
    "a list": lambda tree: [],
    "null": lambda tree: None,
    "another kind": put("kind", value="gguf"),
    "no version": drop("version"),
    "the version before": put("version", value=1),
    "a later version": put("version", value=3),
    "the version as text": put("version", value="2"),
    "the version as a float": put("version", value=2.0),
    "an unknown format": put("format", value="int3"),
    "the format as a list": put("format", value=["int4"]),
    "an unknown dtype": put("dtype", value="pickle"),
    "no plain dtype": drop("plain"),
    "a fingerprint with a line break": put("fingerprint", value="ab\ncd"),
    "an empty fingerprint": put("fingerprint", value=""),
    "a negative size": put("bf16_bytes", value=-1),
    "a size of 10^30": put("bf16_bytes", value=10**30),
    "a size that is true": put("bf16_bytes", value=True),
    "no layers": put("layers", value=[]),
    "layers by name": put("layers", value={}),
    "layers that are numbers": put("layers", value=[1, 2, 3]),
    "more layers than any model": lambda tree: tree | {"layers": tree["layers"][:1] * 5000},
    "a layer without checksums": drop("layers", 1, "crc32"),
    "a layer with a field too many": layer("code", "import os"),
    "two layers in one file": layer("file", "experts-000.safetensors"),
    "two layers of one module": lambda tree: layer("module", tree["layers"][0]["module"])(tree),
    "0 experts": layer("n_experts", 0),
    "10^30 experts": layer("n_experts", 10**30),
    "experts as a float": layer("n_experts", 6.0),
    "experts true": layer("n_experts", True),
    "an expert more than checksums": layer("n_experts", 7),
    "a layout beyond the last": layer("layout", 1),
    "a layout before the first": layer("layout", -1),
    "an offset of 0": layer("data_offset", 0),
    "an offset between pages": layer("data_offset", 4097),
    "an offset beyond the file": layer("data_offset", 8192),
    "an offset of 2^63": layer("data_offset", 1 << 63),
    "checksums that are texts": layer("crc32", ["0"] * 6),
    "a checksum of 2^32": layer("crc32", [1 << 32] * 6),
    "a negative checksum": layer("crc32", [-1] * 6),
    "a file outside": layer("file", "../experts-001.safetensors"),
    "a file by its full path": layer("file", "/etc/passwd"),
    "a file named with NUL": layer("file", "experts\0.safetensors"),
    "a file named with half a character": layer("file", "experts\ud800.safetensors"),
    "a hidden file": layer("file", ".lock"),
    "no file name": layer("file", ""),
    "a file name of 5000 characters": layer("file", "x" * 5000),
    "the manifest as a layer": layer("file", "manifest.json"),
    "the trunk as a layer": layer("file", TRUNK),
    "the folder as a layer": layer("file", "."),
    "a missing file": layer("file", "experts-007.safetensors"),
    "a module with a line break": layer("module", "model\nlayers"),
    "no layouts": put("layouts", value=[]),
    "a layout of another format": put("layouts", 0, "format", value="bf16"),
    "a layout of no bytes": put("layouts", 0, "slab_bytes", value=0),
    "a layout of 2^62 bytes": put("layouts", 0, "slab_bytes", value=1 << 62),
    "slabs a page larger": lambda tree: put("layouts", 0, "slab_bytes", value=tree["layouts"][0]["slab_bytes"] + 4096)(tree),
    "rows below 0": param(1, -64),
    "2^60 rows": param(1, 1 << 60),
    "rows as a float": param(1, 64.0),
    "columns as text": param(2, "64"),
    "a parameter of two fields": put("layouts", 0, "params", 0, value=["w", 1]),
    "two parameters of one name": lambda tree: param(0, tree["layouts"][0]["params"][1][0])(tree),
    "parts elsewhere": put("layouts", 0, "parts", 0, 4, value=64),
    "a part of another dtype": put("layouts", 0, "parts", 0, 2, value="int64"),
    "no files": put("files", value={}),
    "files as a list": put("files", value=[]),
    "no trunk": drop("files", TRUNK),
    "a file above the store": add_file("../config.json"),
    "a file in a folder": add_file("a/b.json"),
    "a file behind backslashes": add_file("a\\b.json"),
    "a layer as a file": add_file(LAYER),
    "a file of -1 bytes": put("files", "config.json", "bytes", value=-1),
    "a file without checksum": drop("files", "config.json", "crc32"),
    "a file too short": put("files", "config.json", "bytes", value=3),
}  # fmt: skip
NAMED = {  # by the file that does not fit what the manifest says
    "a missing file": "experts-007.safetensors",
    "an offset beyond the file": LAYER,
    "slabs a page larger": "manifest.json",
    "a file too short": "config.json",
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_that_lie_are_refused(store: Path, change: Change) -> None:
    """Their sha256 is right: someone meant it."""
    (store / "manifest.json").write_bytes(mutations.resealed(change(manifest(store))))
    refused(store, NAMED.get(next(name for name in MANIFESTS if MANIFESTS[name] is change), "manifest.json"))


TEXTS = {
    "empty": b"",
    "half": b'{"kind": "duoserve-ex',
    "no UTF-8": b"\xff\xfe\x00",
    "nested 100,000 deep": b"[" * 100_000,
    "objects nested 50,000 deep": b'{"a":' * 50_000,
    "a name twice": b'{"kind": 1, "kind": 2}',
    "NaN": b'{"kind": NaN}',
    "a number of 10,000 digits": b"9" * 10_000,
    "a million values": b"[" + b"[]," * 1_000_000 + b"[]]",
    "more bytes than are read": b" " * (MAX_MANIFEST + 1),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_manifests_that_are_none_are_refused(store: Path, text: bytes) -> None:
    (store / "manifest.json").write_bytes(text)
    refused(store, "manifest.json")


def first_tensor(header: Any) -> Any:
    return header[min(name for name in header if name != "__metadata__")]


def tensor(field: str, value: Any) -> Change:
    def change(header: Any) -> Any:
        first_tensor(header)[field] = value
        return header

    return change


def overlap(header: Any) -> Any:
    """Two tensors over the same bytes."""
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    return header | {"again": header[names[0]]}


def gap(header: Any) -> Any:
    for item in header.values():
        item["data_offsets"] = [n + 64 for n in item["data_offsets"]]
    return header


HEADERS: dict[str, Change] = {
    "a list": lambda header: [],
    "nothing": lambda header: {},
    "an unknown dtype": tensor("dtype", "OBJECT"),
    "a dtype that is none": tensor("dtype", 3),
    "a wider dtype": tensor("dtype", "F64"),
    "a shape below 0": tensor("shape", [-1, -64]),
    "a shape whose product wraps at 2^64": tensor("shape", [1 << 32, 1 << 32, 64]),
    "a shape of texts": tensor("shape", ["64"]),
    "a shape with true": tensor("shape", [True, 64]),
    "a shape of 3000 sides": tensor("shape", [1] * 3000),
    "offsets backwards": tensor("data_offsets", [4096, 0]),
    "offsets beyond the file": tensor("data_offsets", [0, 1 << 39]),
    "offsets of 2^64": tensor("data_offsets", [1 << 64, 1 << 65]),
    "one offset": tensor("data_offsets", [0]),
    "no offsets": lambda header: first_tensor(header).pop("data_offsets") and header,
    "a field too many": tensor("code", "x"),
    "tensors over each other": overlap,
    "a gap before the first": gap,
    "metadata that are numbers": put("__metadata__", value={"a": 1}),
    "metadata nested deep": put("__metadata__", value={"a": {"b": {"c": {}}}}),
    "a tensor left out": lambda header: {n: header[n] for n in sorted(header)[1:]},
    "another name": lambda header: {f"{n}\n\x1b[2J": {"dtype": "U8"} for n in header},
}


@pytest.mark.parametrize("name", [TRUNK, LAYER])
@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_headers_that_lie_are_refused(store: Path, name: str, change: Change) -> None:
    """The manifest agrees with them: checksums and sizes are right."""
    data = (store / name).read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + n]))).encode()
    header += b" " * (-(len(header) + 8) % 4096)
    with_header(store, name, len(header), header, data[8 + n :])
    refused(store, name)


@pytest.mark.parametrize("name", [TRUNK, LAYER])
@pytest.mark.parametrize("said", [0, 1, MAX_HEADER + 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 4080, 4089])
def test_headers_of_another_length_are_refused(store: Path, name: str, said: int) -> None:
    data = (store / name).read_bytes()
    with_header(store, name, said, data[8:4096], data[4096:])
    refused(store, name)


def with_header(store: Path, name: str, said: int, header: bytes, rest: bytes) -> None:
    (store / name).write_bytes(said.to_bytes(8, "little") + header + rest)
    tree = manifest(store)
    for entry in tree["layers"]:
        if entry["file"] == name:
            entry["data_offset"] = (8 + len(header)) // 4096 * 4096
            entry["header_crc32"] = zlib.crc32((store / name).read_bytes()[: entry["data_offset"]])
    if name in tree["files"]:
        tree["files"][name] = file_checksum(store / name)
    (store / "manifest.json").write_bytes(mutations.resealed(tree))


@pytest.mark.parametrize("name", ["manifest.json", "config.json", TRUNK, LAYER])
@pytest.mark.parametrize("how", ["link out", "link to nothing", "link to itself", "folder", "pipe", "device"])
def test_files_that_are_no_files_are_refused_without_waiting(store: Path, tmp_path: Path, name: str, how: str) -> None:
    path = store / name
    path.rename(tmp_path / name)
    if how == "link out":
        path.symlink_to(tmp_path / name)
    elif how == "link to nothing":
        path.symlink_to(tmp_path / "nothing")
    elif how == "link to itself":
        path.symlink_to(path)
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    refused(store, name)


def test_a_store_in_the_hub_cache_may_be_links_into_its_blobs(store: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    store.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    opened(snapshot)


@pytest.mark.parametrize("name", ["added_tokens.json", "model.safetensors", "tokenizer.model", "vocab.txt", "x.py"])
def test_files_that_a_load_would_read_unchecked_are_refused(store: Path, name: str) -> None:
    (store / name).write_text("{}")
    assert "no part of this store" in refused(store, name)


def test_20000_mutated_headers_do_no_harm(whole: Path, tmp_path: Path) -> None:
    """Bytes and fields, with checksums made to fit: each opens and reads the right slabs, or is refused in one line."""
    shutil.copytree(whole, tmp_path / "s")
    seed = int(os.environ.get("MUTATION_SEED", "20"))
    command = [sys.executable, mutations.__file__, str(tmp_path / "s"), str(MUTATIONS), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(told)
    assert not told["bad"], told
    assert told["opened"] + told["refused"] >= MUTATIONS and told["opened"] > 100 and told["refused"] > 10_000, told
    assert told["slowest_s"] < 1 and told["peak_extra_bytes"] <= 64 << 20, told


CHECKPOINTS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a config nested deep": ("config.json", lambda _: b'{"a":' * 50_000),
    "a config of a million values": ("config.json", lambda _: b"[" + b"[]," * 1_000_000 + b"[]]"),
    "a config that is a list": ("config.json", lambda _: b"[]"),
    "a config with a name twice": ("config.json", lambda text: text.replace(b"{", b'{"model_type": "mixtral",', 1)),
    "a config of 10,000 digits": ("config.json", lambda _: b'{"n": ' + b"9" * 10_000 + b"}"),
    "an index nested deep": ("model.safetensors.index.json", lambda _: b"[" * 100_000),
    "an index that is a number": ("model.safetensors.index.json", lambda _: b"3"),
    "an index of lists": ("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": ["b"]}}'),
    "an index of nothing": ("model.safetensors.index.json", lambda _: b'{"weight_map": {}}'),
    "an index of links up": ("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": "../m.safetensors"}}'),
    "an index with NUL": ("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": "a\\u0000.safetensors"}}'),
    "an index with half a character": ("model.safetensors.index.json", lambda _: b'{"weight_map":{"a":"\\ud800"}}'),
    "a shard header of 2^63": ("shard", lambda data: (1 << 63).to_bytes(8, "little") + data[8:]),
    "a shard header of 17 MiB": ("shard", lambda data: (17 << 20).to_bytes(8, "little") + b" " * (17 << 20) + data),
    "a shard of 7 bytes": ("shard", lambda data: data[:7]),
    "a shard cut": ("shard", lambda data: data[:-1]),
    "a shard too long": ("shard", lambda data: data + b"\0"),
    "a shard of a million values": ("shard", lambda _: shard(b"[" + b"[]," * 1_000_000 + b"[]]")),
    "a shard nested deep": ("shard", lambda _: shard(b"[" * 100_000)),
    "a shard with a negative shape": ("shard", lambda _: shard(b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}')),
    "a shard of an unknown dtype": ("shard", lambda _: shard(b'{"a":{"dtype":"OBJ","shape":[0],"data_offsets":[0,0]}}')),
}  # fmt: skip


def shard(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(("name", "change"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints_that_lie_are_refused(
    toy: Any, tmp_path: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(toy("mixtral"), folder)
    victim = sorted(folder.glob("model-*.safetensors"))[0] if name == "shard" else folder / name
    victim.write_bytes(change(victim.read_bytes()))
    with pytest.raises(Refusal) as refusal:
        Checkpoint(folder)
    line = str(refusal.value)
    assert refusal.value.status == 5 and line.isprintable() and len(line) < 900, line


@pytest.mark.parametrize("part", ["config.json", "model.safetensors.index.json", "shard"])
def test_mutated_checkpoints_open_or_are_refused(toy: Any, tmp_path: Path, part: str) -> None:
    """What is read before any weight: config and index as JSON, a shard's header."""
    folder = tmp_path / "m"
    shutil.copytree(toy("mixtral"), folder)
    victim = sorted(folder.glob("model-*.safetensors"))[0] if part == "shard" else folder / part
    mutator = mutations.random.Random(21)
    original, tally = victim.read_bytes(), mutations.Tally()
    for i in range(300):
        if part == "shard":
            n = int.from_bytes(original[:8], "little")
            header = mutations.mutate_bytes(mutator, original[8 : 8 + n])
            victim.write_bytes(shard(header) + original[8 + n :])
        else:
            victim.write_bytes(mutations.dumped(mutations.mutate_tree(mutator, json.loads(original))))
        tally.run(lambda: read_checkpoint(folder, part), f"{part} {i}")
    assert not tally.bad and tally.refused, tally.bad[:5]


def read_checkpoint(folder: Path, part: str) -> None:
    if part == "config.json":
        checkpoint.read_config(folder)
    else:
        checkpoint._stored(folder)
