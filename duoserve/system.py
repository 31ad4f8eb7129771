"""What the operating system says of this process: memory it may take, cores it may use, its caps. Knows Linux's files; knows
nothing of GPUs, streams or experts.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

import torch


def available_ram() -> int:
    """Bytes this process may still take: what the kernel calls available, or less where its control group caps it."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for folder, limit_name, usage_name in _memory_groups():
        limit, usage = (_number(os.path.join(folder, name)) for name in (limit_name, usage_name))
        if limit is not None and usage is not None:
            free = min(free, max(0, limit - usage + _cached_files(folder)))
    return free


def usable_cores() -> float:
    """By affinity, and by the control group's quota where that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    for path in ("/sys/fs/cgroup/cpu.max", *_own_group("cpu.max")):
        quota, _, period = _text(path).partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            cores = min(cores, int(quota) / int(period))
    for folder in ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"):
        quota, period = _text(f"{folder}/cpu.cfs_quota_us"), _text(f"{folder}/cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, int(quota) / int(period))
    return cores


def threads(asked: int | None = None) -> int:
    """For arithmetic: `asked`, or what $OMP_NUM_THREADS says, or one for each real core that may be used."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return asked or (int(said) if said.isdigit() and int(said) else max(1, min(_real_cores(), int(usable_cores()))))


def use_threads(asked: int | None = None) -> int:
    """Give torch's arithmetic so many `threads`; returns the number.

    Torch by itself takes every core that the machine shows, whatever a container's quota is.
    """
    n = threads(asked)
    if n != torch.get_num_threads():
        torch.set_num_threads(n)
    return n


def _real_cores() -> int:
    """Cores that may be used, two threads of one core counted once: they share the units that multiply."""
    seen = set()
    for cpu in os.sched_getaffinity(0):
        topology = f"/sys/devices/system/cpu/cpu{cpu}/topology"
        seen.add((_text(f"{topology}/physical_package_id"), _text(f"{topology}/core_id") or str(cpu)))
    return len(seen)


def _own_group(name: str) -> list[str]:
    lines = (line.split(":", 2) for line in _text("/proc/self/cgroup").splitlines())
    return [f"/sys/fs/cgroup{path}/{name}" for _, kinds, path in lines if not kinds]


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def give_back() -> None:
    """Return to the system what was freed: a prompt's activations, or what loading took, stay in the allocator's lists
    otherwise, some 40 MiB of them, which small caps need."""
    if _TRIM is not None:
        _TRIM(0)


_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others return memory by themselves


def memory_cap() -> int | None:
    """Bytes that this process's control groups allow it, all told; None where they set no cap."""
    limits = [_number(os.path.join(folder, limit)) for folder, limit, _ in _memory_groups()]
    found = [limit for limit in limits if limit is not None and limit < 1 << 60]  # version 1 writes "none" as a number
    return min(found, default=None)


def _memory_groups() -> Iterable[tuple[str, str, str]]:
    """Folders of the control groups (version 1 and 2) that hold this process, with the names of their two files."""
    with open("/proc/self/cgroup") as lines:
        paths = {kinds: path for _, kinds, path in (line.strip().split(":", 2) for line in lines)}
    with open("/proc/self/mounts") as lines:
        for _, folder, kind, options, *_ in (line.split() for line in lines):
            if kind == "cgroup2" and "" in paths:
                yield folder + paths[""], "memory.max", "memory.current"
            if kind == "cgroup" and "memory" in options.split(","):
                path = next((p for kinds, p in paths.items() if "memory" in kinds.split(",")), None)
                if path is not None:
                    yield folder + path, "memory.limit_in_bytes", "memory.usage_in_bytes"


def _cached_files(group: str) -> int:
    """Bytes of a group's usage that are pages of files: given back as soon as memory is wanted."""
    try:
        with open(os.path.join(group, "memory.stat")) as lines:
            stat = {name: int(value) for name, value in (line.split() for line in lines)}
    except (OSError, ValueError):
        return 0
    whole = "total_" if "total_inactive_file" in stat else ""  # version 1 counts the groups below apart
    return stat.get(f"{whole}inactive_file", 0) + stat.get(f"{whole}active_file", 0)


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):  # no such group here, or "max"
        return None
