"""A store is as it was written, or says which part is not."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

import duoserve
from duoserve.convert import convert
from duoserve.core import Refusal
from duoserve.store import Store


@pytest.fixture(scope="module")
def whole(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(toy("qwen3_moe"), tmp_path_factory.mktemp("whole") / "s", "int4")


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "s")
    return tmp_path / "s"


def problems(folder: Path) -> list[str]:
    """What opening or verifying says; nothing if all is well."""
    try:
        opened = Store(folder)
    except Refusal as refusal:
        return [str(refusal)]
    found = [str(problem) for problem in opened.verify()]
    opened.close()
    return found


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_store_as_written_has_no_problems(store: Path) -> None:
    assert problems(store) == []


def test_every_flipped_bit_is_found_and_its_file_named(store: Path) -> None:
    rng = random.Random(20)
    files = sorted(store.iterdir())
    for _ in range(100):
        victim = rng.choice(files)
        bit = rng.randrange(victim.stat().st_size * 8)
        flip(victim, bit)
        found = problems(store)
        assert found and victim.name in found[0], (victim.name, bit, found)
        flip(victim, bit)
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
    import os

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
    import json

    from duoserve.manifest import write_manifest

    data = json.loads((store / "manifest.json").read_text())
    del data["sha256"]
    write_manifest(store, data | change)
    with pytest.raises(Refusal, match="E_STORE"):
        Store(store)


def test_swapped_layers_are_found(store: Path) -> None:
    a, b = store / "experts-000.safetensors", store / "experts-001.safetensors"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert {line.split(":")[0] for line in problems(store)} == {a.name, b.name}


def test_a_damaged_slab_is_caught_when_first_read(store: Path) -> None:
    path = store / "experts-001.safetensors"
    flip(path, (path.stat().st_size - 4096 * 3) * 8)
    with duoserve.load(store, budget="min") as engine:
        with pytest.raises(Refusal, match=r"E_CORRUPT: expert \d+ in .*experts-001") as refusal, torch.no_grad():
            engine.model(toys.ids(4, 32))
        assert refusal.value.status == 5
        engine.runtime.cache.check()
