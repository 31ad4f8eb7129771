"""What tests share: toy checkpoints made once per run, a private cache of stores, one line on the seed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent))  # benchmarks; what is installed comes first
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two threads each would spin against each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import toys

import duoserve
from duoserve.convert import convert

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this run keeps converted stores."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`toy("mixtral")`: the folder of a toy checkpoint, made at first use."""
    made: dict[Any, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        at = (family, tuple(sorted(changes.items())))
        if at not in made:
            made[at] = toys.make(tmp_path_factory.mktemp(family), family, **changes)
        return made[at]

    return make


@pytest.fixture
def load(cache: Path) -> Any:
    """`duoserve.load` with this run's cache; what it opened is closed afterwards."""
    opened = []

    def open_engine(*args: Any, **options: Any) -> duoserve.Engine:
        opened.append(duoserve.load(*args, cache_dir=str(cache), **options))
        return opened[-1]

    yield open_engine
    for engine in opened:
        engine.close()


@pytest.fixture(scope="session")
def model(toy: Callable[..., Path]) -> Path:
    """The checkpoint that `whole` and `store` are made of."""
    return toy("qwen3_moe")


@pytest.fixture(scope="session")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert store, for reading alone."""
    return convert(model, tmp_path_factory.mktemp("whole") / "s")


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that may be harmed."""
    shutil.copytree(whole, tmp_path / "s")
    return tmp_path / "s"
