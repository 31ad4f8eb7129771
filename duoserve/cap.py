"""Memory control groups for processes of a benchmark, and what of files the page cache holds. Knows both versions of the
kernel's interface; groups need root.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from duoserve.config import size
from duoserve.core import Refusal


class Group(NamedTuple):
    """A control group's folder; a process joins by writing its id to `procs`."""

    folder: Path

    @property
    def procs(self) -> Path:
        return self.folder / "cgroup.procs"

    def kills(self) -> int:
        """How many of its processes the kernel ended because memory was out."""
        counts = _text(self.folder / "memory.oom_control") + "\n" + _text(self.folder / "memory.events")
        found = [line.split() for line in counts.splitlines()]
        return sum(int(words[1]) for words in found if len(words) == 2 and words[0] == "oom_kill")


@contextlib.contextmanager
def memory_group(n_bytes: int, name: str) -> Iterator[Group]:
    """A new group whose processes share `n_bytes` of memory, page cache included."""
    if os.geteuid() != 0:
        what = f"a memory cap of {size(n_bytes)} takes a control group, which user {os.geteuid()} cannot make"
        raise Refusal("E_CAP", what, "run as root, or leave the cap out")
    with _root() as (root, limit):
        group = root / f"duoserve-{os.getpid()}-{name}"
        group.mkdir()
        try:
            (group / limit).write_text(str(n_bytes))
            yield Group(group)
        finally:
            _remove(group)


@contextlib.contextmanager
def _root() -> Iterator[tuple[Path, str]]:
    unified = Path("/sys/fs/cgroup")
    if "memory" in _text(unified / "cgroup.subtree_control").split():
        yield unified, "memory.max"
        return
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["mount", "-t", "cgroup", "-o", "memory", "none", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            what = f"this system gives 0 memory control groups ({done.stderr.strip()})"
            raise Refusal("E_CAP", what, "leave the cap out")
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
    """Every run begins with nothing of its files in memory. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def forget_files(of: Path) -> None:
    """Let the page cache drop what it holds of a file, or of a folder's; pages that a process has mapped stay."""
    for path in [of, *sorted(of.rglob("*"))]:
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)  # what is not on the disk yet cannot be dropped
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
