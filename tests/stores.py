"""What tests of stores ask of a folder, and how they harm it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from duoserve.core import Refusal
from duoserve.store import Store

SEED = int(os.environ.get("FAULT_SEED", "30"))


def often(few: int, many: int) -> Any:
    """Run a test with a few repetitions, and as a slow one with many."""
    at_length = [pytest.mark.slow, pytest.mark.timeout(1800)]
    return pytest.mark.parametrize("times", [few, pytest.param(many, marks=at_length)])


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def problems(folder: Path) -> list[str]:
    """What opening, loading the trunk or verifying says; nothing if all is well."""
    try:
        opened = Store(folder)
    except Refusal as refusal:
        return [str(refusal)]
    with contextlib.closing(opened):
        try:
            opened.checked_trunk()
        except Refusal as refusal:
            return [str(refusal)]
        return [str(problem) for problem in opened.verify()]


def layers(folder: Path) -> dict[str, tuple[int, int]]:
    """Inodes and times of finished layers: one that was written again has others."""
    return (
        {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("experts-*.safetensors")}
        if folder.exists()
        else {}
    )


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
