"""Breaks headers and manifests at random, and counts what reading them does: opened, refused, or worse.

Run as a program it prints one line of JSON: python tests/mutations.py STORE COUNT SEED. It measures itself in a process of
its own, so that the peak of its memory is its own.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duoserve.core import Refusal
from duoserve.headers import bounded_json, parse_header
from duoserve.manifest import LayerFile, digest, judge

STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 4095, 4096, 1 << 31, 1 << 32, 1 << 63, 1 << 64, -(1 << 63), 10**30, 0.0, 1.0, 1.5,
    -0.0, 1e308, "", "a", "\0", "..", "../x", "/etc/passwd", "a/b", "\ud800", "\n", "é", "x" * 5000, "0" * 64, [], {},
    [[]], [0], [0, 0], [-1], [True], [1 << 40, 1 << 40], {"": ""}, {"a": {"a": {}}}, "manifest.json", "experts", "U8", "F4",
    "trunk.safetensors", "experts-000.safetensors", "int4", "bf16", "float32", [None] * 300, list(range(1000)),
]  # fmt: skip
TEXTS = [
    b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"NaN", b"[1e999]", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"0" * 10_000,
    b"[" + b"{}," * 200_000 + b"{}]", b"[" + b"[]," * 500_000 + b"[]]", b'{"a":1,"a":2}', b'"' + b"\\u0000" * 1000 + b'"',
    b"[" + b"{}," * 140_000 + b"{}]", b"[" + b'"ab",' * 290_000 + b"0]", b"[" + b"0," * 290_000 + b"0]",
    b"null", b"[]", b"{}", b"-", b"1e5", b'{"\\ud800":0}', b"\0" * 4096, b" " * 100_000,
]  # fmt: skip


class Tally:
    """What became of each mutation; `slowest` in seconds of this process, so that a busy machine is no hang."""

    def __init__(self) -> None:
        self.opened = self.refused = 0
        self.slowest = 0.0
        self.bad: list[str] = []

    def run(self, read: Callable[[], Any], what: str) -> None:
        began = time.process_time()
        try:
            read()
            self.opened += 1
        except Refusal as refusal:
            self.refused += 1
            line = str(refusal)
            if not line.isprintable() or len(line) > 900:
                self.bad.append(f"{what}: refused in other than one line: {line[:200]!r}")
        except BaseException as error:  # a panic of a library is no Exception
            self.bad.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            if isinstance(error, KeyboardInterrupt):
                raise
        self.slowest = max(self.slowest, time.process_time() - began)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside parsed JSON."""
    found = [at] if at else []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += places(value[key], (*at, key))
    return found


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """The same JSON but for one to three places: another value, another's value, gone, twice, a number a little off."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        all_places = places(tree)
        if not all_places:
            return tree
        *before, last = rng.choice(all_places)
        parent = tree
        for key in before:
            parent = parent[key]
        how = rng.randrange(6)
        if how == 0:
            del parent[last]
        elif how == 1 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[last]))
        elif how == 2 and isinstance(parent, dict):
            parent[rng.choice([word for word in STRANGE if isinstance(word, str)])] = parent.pop(last)
        elif how == 3 and type(parent[last]) is int:
            parent[last] += rng.choice((-1, 1, -4096, 4096, 1 << 32, parent[last]))
        elif how == 4:
            *there, key = rng.choice(all_places)
            other = tree
            try:
                for step in there:
                    other = other[step]
                parent[last] = copy.deepcopy(other[key])
            except (KeyError, IndexError, TypeError):  # that place was inside what has just gone
                parent[last] = None
        else:
            parent[last] = copy.deepcopy(rng.choice(STRANGE))
    return tree


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, a stretch gone, repeated, overwritten or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 8, 64))
        how = rng.randrange(5)
        if how == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del out[at : at + n]
        elif how == 2:
            out[at:at] = out[at : at + n]
        elif how == 3:
            out[at : at + n] = rng.randbytes(n)
        else:
            out[at:at] = rng.choice(
                (b"[", b"{", b"}", b",", b'"', b"-", b"9" * n, b"\\ud800", b"e9", b"\0", rng.randbytes(n))
            )
    return bytes(out)


def dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def resealed(tree: Any) -> bytes:
    """A manifest with the sha256 that its content has."""
    if isinstance(tree, dict):
        tree.pop("sha256", None)
        tree["sha256"] = digest(tree)
    return dumped(tree)


def read_manifest_text(text: bytes) -> None:
    for layer in judge(bounded_json(text, "m", "r"), "m")["layers"]:
        LayerFile.from_json(layer)


class Mutator:
    """Makes mutations of one store: of its manifest and of the headers of its files."""

    def __init__(self, store: Path, seed: int):
        self.store, self.rng, self.tally = store, random.Random(seed), Tally()
        self.manifest = json.loads((store / "manifest.json").read_text())
        self.headers: list[tuple[bytes, int]] = []
        for name in ("trunk.safetensors", "experts-000.safetensors"):
            data = (store / name).read_bytes()
            n = int.from_bytes(data[:8], "little")
            self.headers.append((data[8 : 8 + n], len(data) - 8 - n))

    def text(self) -> tuple[str, bytes, int]:
        """Which kind of text, the text, and for a safetensors header how many bytes follow it."""
        kind = self.rng.choices(("manifest", "resealed", "header", "header tree", "text"), (4, 6, 4, 6, 1))[0]
        if kind == "manifest":
            return kind, mutate_bytes(self.rng, dumped(self.manifest)), -1
        if kind == "resealed":
            return kind, resealed(mutate_tree(self.rng, self.manifest)), -1
        header, data_bytes = self.rng.choice(self.headers)
        if kind == "header":
            return kind, mutate_bytes(self.rng, header), data_bytes
        if kind == "header tree":
            return kind, dumped(mutate_tree(self.rng, json.loads(header))), data_bytes
        return kind, self.rng.choice(TEXTS), self.rng.choice((-1, 0, 4096))

    def parse(self, count: int) -> None:
        """Mutations read as texts, which is quick."""
        for i in range(count):
            kind, text, data_bytes = self.text()
            if data_bytes < 0:
                self.tally.run(lambda text=text: read_manifest_text(text), f"{kind} {i}")
            else:
                self.tally.run(lambda t=text, n=data_bytes: parse_header(t, n, "f", "r"), f"{kind} {i}")

    def open(self, count: int) -> None:
        """Mutations written into a store that is then opened, manifest made to agree with what was done to a header.

        What opens must give back the slabs that were written.
        """
        from duoserve.store import Store

        originals = {name: (self.store / name).read_bytes() for name in ("manifest.json", *self._safetensors())}
        slabs = self._slabs(Store(self.store))
        for i in range(count):
            name = self.rng.choice((*self._safetensors()[:2], "manifest.json"))
            kind = self._break(name, originals)
            self.tally.run(lambda: self._open_and_compare(Store, slabs), f"{kind} {i}")
            for changed in {name, "manifest.json"}:
                (self.store / changed).write_bytes(originals[changed])

    def _break(self, name: str, originals: dict[str, bytes]) -> str:
        if name == "manifest.json":
            changed = mutate_tree(self.rng, self.manifest)
            (self.store / name).write_bytes(resealed(changed))
            return "resealed manifest"
        data = originals[name]
        n = int.from_bytes(data[:8], "little")
        header = mutate_bytes(self.rng, data[8 : 8 + n])
        if self.rng.random() < 0.5:
            header = dumped(mutate_tree(self.rng, json.loads(data[8 : 8 + n])))
        header = (header + b" " * (n - len(header)))[: max(n, len(header)) if self.rng.random() < 0.3 else n]
        said = self.rng.choice((len(header), len(header), len(header), 1 << 63, (1 << 64) - 1, 0, len(data)))
        (self.store / name).write_bytes(said.to_bytes(8, "little") + header + data[8 + n :])
        self._agree(name)
        return f"header of {name}"

    def _agree(self, name: str) -> None:
        """Write a manifest whose checksums and sizes fit the broken file, as an attacker would."""
        from duoserve.store import file_checksum

        manifest = copy.deepcopy(self.manifest)
        for layer in manifest["layers"]:
            if layer["file"] == name:
                layer["header_crc32"] = zlib.crc32((self.store / name).read_bytes()[: layer["data_offset"]])
        if name in manifest["files"]:
            manifest["files"][name] = file_checksum(self.store / name)
        (self.store / "manifest.json").write_bytes(resealed(manifest))

    def _open_and_compare(self, opener: Any, slabs: dict[Any, bytes]) -> None:
        store = opener(self.store)
        try:
            store.checked_trunk()
            for key, slab in self._slabs(store).items():
                assert slabs[key] == slab, f"{key} reads other bytes than were written"
        finally:
            store.close()

    def _safetensors(self) -> list[str]:
        return ["trunk.safetensors", "experts-000.safetensors"]

    def _slabs(self, store: Any) -> dict[Any, bytes]:
        from duoserve.core import Key
        from duoserve.device import host_arena

        buffer = host_arena(store.slab_bytes)
        keys = [Key(i, e) for i, layer in enumerate(store.layers) for e in (0, layer.n_experts - 1)]
        found = {}
        for key in keys:
            store.read_into(key, buffer)
            found[key] = buffer.numpy()[: store.layout(key.layer).slab_bytes].tobytes()
        store.close()
        return found


def peak_rss() -> int:
    """Bytes that this process has held at most since the mark was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main() -> None:
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    mutator = Mutator(folder, seed)
    mutator.open(2)  # what every later reading needs is in memory now
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_rss()
    mutator.parse(count * 19 // 20)
    mutator.open(count - count * 19 // 20)
    tally = mutator.tally
    about = {"opened": tally.opened, "refused": tally.refused, "slowest_s": tally.slowest, "bad": tally.bad[:10]}
    print(json.dumps(about | {"peak_extra_bytes": peak_rss() - before, "seed": seed}))


if __name__ == "__main__":
    main()
