"""A memory control group for one benchmark process. Knows both versions of the kernel's interface; needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def memory_group(n_bytes: int, name: str) -> Iterator[Path]:
    """A new group whose processes share `n_bytes` of memory, page cache included; write a pid to its `cgroup.procs`."""
    with _root() as (root, limit):
        group = root / f"duoserve-{os.getpid()}-{name}"
        group.mkdir()
        try:
            (group / limit).write_text(str(n_bytes))
            yield group
        finally:
            _remove(group)


@contextlib.contextmanager
def _root() -> Iterator[tuple[Path, str]]:
    unified = Path("/sys/fs/cgroup")
    if "memory" in _text(unified / "cgroup.subtree_control").split():
        yield unified, "memory.max"
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "cgroup", "-o", "memory", "none", folder], check=True)
        try:
            yield Path(folder), "memory.limit_in_bytes"
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def _remove(group: Path) -> None:
    for _ in range(50):  # the last process may still be on its way out
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def drop_page_cache() -> None:
    """Every run begins with nothing of its files in memory."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
