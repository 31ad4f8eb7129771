"""A store is as it was written, or says which part is not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from stores import SEED, content, flip, layers, often, problems

import duoserve
from duoserve.convert import convert
from duoserve.core import Key, Refusal
from duoserve.device import host_arena
from duoserve.manifest import is_store, write_manifest
from duoserve.store import Store


def test_a_store_as_written_has_no_problems(store: Path) -> None:
    assert problems(store) == []


@pytest.mark.parametrize("name", ["experts-001.safetensors", "trunk.safetensors", "config.json"])
def test_missing_truncated_extra_and_swapped_files_are_named(store: Path, name: str) -> None:
    data = (store / name).read_bytes()
    (store / name).unlink()
    assert name in problems(store)[0]
    (store / name).write_bytes(data[:-1])
    assert name in problems(store)[0]
    (store / name).write_bytes(data)
    (store / "notes.txt").write_text("mine")
    assert problems(store) == ["notes.txt: no part of this store"]


def test_slabs_are_read_past_the_page_cache(store: Path) -> None:
    import fcntl

    opened = Store(store)
    try:
        os.close(os.open(store / "manifest.json", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct reads")
    assert all(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT for fd in opened._fds)
    opened.close()


@pytest.mark.parametrize(
    "change",
    [
        {"layouts": []},
        {"format": None},
        {"layers": [{}]},
        {"files": 3},
        {"bf16_bytes": "x"},
        {"layers": "no"},
        {"dtype": 1},
    ],
    ids=str,
)
def test_manifests_with_wrong_types_are_refused(store: Path, change: dict[str, Any]) -> None:
    data = json.loads((store / "manifest.json").read_text())
    del data["sha256"]
    write_manifest(store, data | change)
    with pytest.raises(Refusal, match="E_STORE"):
        Store(store)


def test_a_damaged_slab_is_caught_when_first_read(store: Path) -> None:
    path = store / "experts-001.safetensors"
    flip(path, (path.stat().st_size - 4096 * 3) * 8)
    with duoserve.load(store, budget="min") as engine:
        with pytest.raises(Refusal, match=r"E_CORRUPT: expert \d+ in .*experts-001") as refusal, torch.no_grad():
            engine.model(toys.ids(4, 32))
        assert refusal.value.status == 5
        engine.runtime.cache.check()


@often(100, 1000)
def test_flipped_bits_are_named_by_verify_by_opening_and_by_the_first_touch(store: Path, times: int) -> None:
    rng = random.Random(SEED)
    pristine = Store(store)
    buffer, first = host_arena(pristine.slab_bytes), pristine.layers[0].data_offset
    files = sorted(store.iterdir())
    for i in range(times):
        victim = rng.choice(files)
        size = victim.stat().st_size
        bit = rng.randrange((first if victim.name.startswith("experts") and i % 4 == 0 else size) * 8)
        flip(victim, bit)
        found = problems(store)
        assert found and victim.name in found[0], (victim.name, bit, found)
        if victim.name.startswith("experts") and bit >= first * 8:
            layer = next(n for n, layer in enumerate(pristine.layers) if layer.file == victim.name)
            expert = (bit // 8 - first) // pristine.layout(layer).slab_bytes
            assert len(found) == 1 and f"expert {expert} " in found[0], (bit, found)
            with contextlib.closing(Store(store)) as opened:
                for key in (Key(n, e) for n, at in enumerate(opened.layers) for e in range(at.n_experts)):
                    touch = contextlib.nullcontext()
                    if key == (layer, expert):
                        touch = pytest.raises(Refusal, match=rf"E_CORRUPT: expert {expert} in .*{victim.name}")
                    with touch:
                        opened.read_into(key, buffer)
        else:
            assert len(found) == 1 and found[0].startswith("E_"), "found by opening or loading, not by verify alone"
        flip(victim, bit)
    assert problems(store) == []
    pristine.close()


def damage(kind: str, store: Path, other: Path, rng: random.Random) -> set[str]:
    """Break a store in one way; returns the names of which one must be told."""
    names = sorted(file.name for file in store.iterdir())
    victim = store / rng.choice(names)
    experts = sorted(store.glob("experts-*"))
    if kind == "missing":
        victim.unlink()
    elif kind == "truncated":
        os.truncate(victim, rng.randrange(victim.stat().st_size))
    elif kind == "longer":
        with open(victim, "ab") as file:
            file.write(b"x" * rng.choice((1, 512, 4096)))
    elif kind == "extra":
        name = rng.choice(
            ("experts-003.safetensors", "vocab.json", "notes.md", "x", ".hidden", "adapter_model.safetensors")
        )
        victim = store / name
        victim.write_bytes(rng.randbytes(10))
    elif kind == "swapped layers":
        a, b = rng.sample(experts, 2)
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
        return {a.name, b.name}
    elif kind == "swapped slabs":
        victim = rng.choice(experts)
        data = bytearray(victim.read_bytes())
        n = (len(data) - 4096) // 6
        i, j = (4096 + n * e for e in rng.sample(range(6), 2))
        data[i : i + n], data[j : j + n] = data[j : j + n], data[i : i + n]
        victim.write_bytes(data)
    elif kind == "another model's file":
        different = [name for name in names if (other / name).read_bytes() != (store / name).read_bytes()]
        victim = store / rng.choice([name for name in different if name != "manifest.json"])
        shutil.copy(other / victim.name, victim)
    else:
        shutil.copy(other / "manifest.json", store)
        return {name for name in names if (other / name).read_bytes() != (store / name).read_bytes()}
    return {victim.name}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the same shapes, made of another model."""
    folder = tmp_path_factory.mktemp("other")
    return convert(toys.make(folder / "m", "qwen3_moe", seed=1), folder / "s")


KINDS = [
    "missing",
    "truncated",
    "longer",
    "extra",
    "swapped layers",
    "swapped slabs",
    "another model's file",
    "stale manifest",
]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_every_kind_is_named_20_times(whole: Path, other: Path, tmp_path: Path, kind: str) -> None:
    rng = random.Random(SEED)
    for i in range(20):
        store = tmp_path / f"s{i}"
        shutil.copytree(whole, store)
        names = damage(kind, store, other, rng)
        if not is_store(store):
            assert names == {"manifest.json"}, "a folder without a manifest is no store"
            continue
        found = problems(store)
        assert found and any(name in found[0] for name in names), (kind, i, names, found)
        shutil.rmtree(store)


@pytest.mark.parametrize("victim", ["trunk.safetensors", "config.json", "experts-001.safetensors", "manifest.json"])
def test_a_damaged_store_in_the_cache_is_made_again_and_whole_layers_are_kept(
    model: Path, tmp_path: Path, victim: str
) -> None:
    duoserve.load(model, cache_dir=str(tmp_path)).close()
    store = next((tmp_path / "stores").iterdir())
    wanted, before = content(store), layers(store)
    flip(store / victim, 8 * 50)
    duoserve.load(model, cache_dir=str(tmp_path)).close()
    assert content(store) == wanted
    redone = {name for name, inode in layers(store).items() if inode != before[name]}
    assert redone == (set(before) if victim == "manifest.json" else {victim} & set(before))


def test_loading_checks_each_file_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    duoserve.load(model, cache_dir=str(tmp_path)).close()
    store, checked, check = next((tmp_path / "stores").iterdir()), [], Store._check_file
    monkeypatch.setattr(Store, "_check_file", lambda self, name: (checked.append(name), check(self, name))[1])
    for source in (model, store):
        checked.clear()
        duoserve.load(source, cache_dir=str(tmp_path)).close()
        assert sorted(checked) == sorted(json.loads((store / "manifest.json").read_text())["files"])


@pytest.mark.parametrize("victim", ["trunk.safetensors", "config.json"])
def test_a_damaged_file_is_refused_before_the_first_token(store: Path, victim: str) -> None:
    flip(store / victim, 8 * ((store / victim).stat().st_size - 3))
    with pytest.raises(Refusal, match=f"E_CORRUPT: .*{victim} has checksum") as refusal:
        duoserve.load(store)
    assert refusal.value.status == 5


def test_converting_again_reads_everything_and_mends_one_slab(model: Path, whole: Path, store: Path) -> None:
    victim, before = store / "experts-002.safetensors", layers(store)
    flip(victim, 8 * (victim.stat().st_size - 4096))
    convert(model, store)
    assert content(store) == content(whole)
    assert [name for name in before if layers(store)[name] != before[name]] == [victim.name]


def test_a_file_that_is_not_ours_is_told_of_and_left(model: Path, store: Path) -> None:
    (store / "vocab.json").write_text("mine")
    before = content(store)
    with pytest.raises(Refusal, match=r"E_STRAY: .*vocab.json is no part of this store"):
        convert(model, store)
    assert content(store) == before


def test_a_damaged_note_of_what_is_done_starts_over_or_is_refused(model: Path, whole: Path, store: Path) -> None:
    data = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").unlink()
    job = {name: data[name] for name in ("fingerprint", "format", "plain", "int4_order")}
    (store / "conversion.json").write_text(json.dumps({"version": 2, "job": job, "layers": [{"file": "../x"}]}))
    shutil.copytree(store, store.with_name("second"))
    convert(model, store)
    assert content(store) == content(whole)
    (store.with_name("second") / "conversion.json").write_text("{" * 10_000)
    with pytest.raises(Refusal, match=r"E_CORRUPT: .*conversion.json .*; remove .*second and convert again"):
        convert(model, store.with_name("second"))


def as_version_1(store: Path) -> None:
    """The store as the version before wrote it: without checksums of whole files, its manifest sealed the same way."""
    from mutations import resealed

    data = json.loads((store / "manifest.json").read_text()) | {"version": 1}
    for written in data["files"].values():
        del written["crc32"]
    (store / "manifest.json").write_bytes(resealed(data))


def test_stores_of_the_version_before_are_rebuilt_in_the_cache_and_refused_elsewhere(
    model: Path, tmp_path: Path
) -> None:
    duoserve.load(model, cache_dir=str(tmp_path)).close()
    store = next((tmp_path / "stores").iterdir())
    wanted = content(store)
    as_version_1(store)
    with pytest.raises(Refusal, match=r"E_STORE: .*manifest.json has version 1, this program reads 2") as refusal:
        duoserve.load(store)
    assert refusal.value.status == 5
    duoserve.load(model, cache_dir=str(tmp_path)).close()
    assert content(store) == wanted


def test_another_models_store_is_never_cleared_however_old_or_damaged(other: Path, model: Path, tmp_path: Path) -> None:
    for harm in (as_version_1, lambda store: flip(store / "config.json", 80)):
        out = tmp_path / harm.__name__
        shutil.copytree(other, out)
        harm(out)
        before = content(out)
        with pytest.raises(Refusal, match=r"E_EXISTS: .* holds another store"):
            convert(model, out)
        assert content(out) == before
