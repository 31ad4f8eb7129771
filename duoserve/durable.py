"""Files that are there whole or not at all, and one process at a time. Knows names, syncs and locks; knows nothing of what
is in the files. Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that is either there whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: what was renamed or removed stays so when the power fails."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def exclusive(folder: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """Be the only process at work on `folder`, which is made if need be; the kernel frees the lock of a process that died.

    `waiting` is told of the process that has it, if any, before this one waits; what it raises is raised here.
    """
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)  # once more: the owner before us may have removed the store
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue
        try:
            _take(file, waiting)
            if _is_still(file, path):
                try:
                    os.truncate(file, 0)
                    os.pwrite(file, str(os.getpid()).encode(), 0)
                    yield
                finally:
                    if _is_still(file, path):  # not where the whole folder was moved away
                        path.unlink()
                return
        finally:  # also where the former owner took the file away while we waited: then once more
            os.close(file)


def holder(folder: Path) -> int | None:
    """The process that is at work on `folder`, 0 where it is not known which, None where there is none."""
    try:
        file = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _pid(file)
    finally:
        os.close(file)


def _take(file: int, waiting: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting(f"waiting for process {_pid(file) or '?'}, which makes the same store")
        fcntl.flock(file, fcntl.LOCK_EX)


def _is_still(file: int, path: Path) -> bool:
    try:
        return os.fstat(file).st_ino == os.stat(path).st_ino
    except FileNotFoundError:
        return False


def _pid(file: int) -> int:
    text = os.pread(file, 16, 0)
    return int(text) if text.isdigit() else 0
