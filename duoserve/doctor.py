"""What this machine is, what it does in a second, and what of it will hurt. Knows where a system says such things; measures
nothing itself, and changes nothing but the machine profile that `plan` reads.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from duoserve.codec import int4_order
from duoserve.core import Refusal
from duoserve.device import gpus
from duoserve.measure import Found, measure
from duoserve.plan import size
from duoserve.profile import FILE, Profile, read_profile, write_profile
from duoserve.shelf import cache_dir
from duoserve.system import available_ram, memory_cap, usable_cores
from duoserve.version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "huggingface_hub", "numpy", "triton")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
SLOW_DISK, LITTLE_RAM, LITTLE_DISK = 0.5e9, 4 << 30, 0.05  # bytes/s, bytes, share of the disk
ROUNDS, QUICK = 5, 1


def profile_path(asked: str | None = None) -> Path:
    return cache_dir(asked).parent / FILE


def known_profile(asked: str | None) -> tuple[Profile | None, str | None]:
    """The profile that `doctor` left, or None with the reason why there is none to use."""
    try:
        found = read_profile(profile_path(asked))
    except Refusal as refusal:
        return None, str(refusal)
    other = found.differs(identity())
    return (None, f"the machine profile is of another machine ({', '.join(other)})") if other else (found, None)


def quick_profile(asked: str | None) -> Profile:
    """Measured in a few seconds, for this once."""
    with _folder(asked) as folder:
        return measure(folder, identity(), QUICK).profile


def examine(asked: str | None = None, say: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Everything `doctor` knows, JSON-ready; the profile is written where `plan` looks for it."""
    with _folder(asked) as folder:
        report: dict[str, Any] = {
            "versions": versions(),
            "cpu": cpu(),
            "memory": memory(),
            "gpus": [{"name": name, "free_bytes": free, "total_bytes": total} for name, free, total in gpus()],
            "disk": disk(folder),
        }
        found, trouble = _measured(folder, say)
    if found is not None:
        write_profile(profile_path(asked), found.profile)
        report["disk"] |= {"direct": found.disk.direct, "buffered_bytes_per_s": found.disk.buffered}
        report["profile_file"], report["profile"] = str(profile_path(asked)), found.profile.to_json()
    return report | {"hints": [*([trouble] if trouble else []), *hints(report, found, os.environ)]}


def _measured(folder: Path, say: Callable[[str], None]) -> tuple[Found | None, str | None]:
    try:
        return measure(folder, identity(), ROUNDS, say), None
    except Refusal as refusal:
        return None, f"nothing was measured: {refusal}"


@contextlib.contextmanager
def _folder(asked: str | None) -> Iterator[Path]:
    folder = profile_path(asked).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-", suffix=".tmp") as scratch:
        yield Path(scratch)


def identity() -> dict[str, str]:
    """What a profile must share with a machine to be believed there."""
    found = {
        "cpu": cpu_model(),
        "cores": f"{usable_cores():g}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    return found | {f"gpu{i}": name for i, (name, _, _) in enumerate(gpus())}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "duoserve": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda, "linux": platform.release()}


def cpu() -> dict[str, Any]:
    flags = set(_after("/proc/cpuinfo", "flags").split())
    return {
        "model": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "features": [name for name in FEATURES if name in flags],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "int4_order": int4_order(),
        "torch_threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    return (_after("/proc/cpuinfo", "model name") or platform.processor() or platform.machine())[:200]


def memory() -> dict[str, Any]:
    total = int((_after("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) * 1024
    pages = _text("/sys/kernel/mm/transparent_hugepage/enabled")
    huge = pages[pages.index("[") + 1 : pages.index("]")] if "[" in pages and "]" in pages else "unknown"
    return {"total_bytes": total, "available_bytes": available_ram(), "cap_bytes": memory_cap(), "large_pages": huge}


def disk(folder: Path) -> dict[str, Any]:
    usage = shutil.disk_usage(folder)
    return {
        "folder": str(folder.parent),
        "file_system": _file_system(folder),
        "free_bytes": usage.free,
        "total_bytes": usage.total,
    }


def hints(report: dict[str, Any], found: Found | None, environment: Any) -> list[str]:
    """One line for each thing that will hurt, with its number and what to do."""
    return [
        *_cpu_hints(report["cpu"], environment),
        *_memory_hints(report["memory"]),
        *_gpu_hints(report),
        *_disk_hints(report["disk"], found),
        *_version_hints(report["versions"], environment),
    ]


def _cpu_hints(cpu: dict[str, Any], environment: Any) -> Iterator[str]:
    forced = environment.get("ATEN_CPU_CAPABILITY")
    if forced:
        yield f"ATEN_CPU_CAPABILITY={forced} keeps torch from this CPU's best kernels: unset it"
    if "avx512f" not in cpu["features"]:
        has = "AVX2 only" if "avx2" in cpu["features"] else "not even AVX2"
        yield f"this CPU has {has}: int4 kernels are slower and stores are packed in another order"
    if cpu["torch_threads"] > cpu["usable_cores"]:
        yield (
            f"torch uses {cpu['torch_threads']} threads on {cpu['usable_cores']:g} cores: "
            f"set OMP_NUM_THREADS={max(1, int(cpu['usable_cores']))}"
        )


def _memory_hints(memory: dict[str, Any]) -> Iterator[str]:
    if memory["available_bytes"] < LITTLE_RAM:
        yield f"only {size(memory['available_bytes'])} of memory are free: give --budget, or close other programs"
    if memory["cap_bytes"] is not None and memory["cap_bytes"] < memory["total_bytes"]:
        yield f"a control group caps this process at {size(memory['cap_bytes'])} of {size(memory['total_bytes'])}"
    if memory["large_pages"] == "never":
        yield "transparent large pages are off: bf16 decode and direct reads lose up to a third; set them to madvise"


def _gpu_hints(report: dict[str, Any]) -> Iterator[str]:
    present = Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()
    if present and not report["gpus"]:
        build = report["versions"]["cuda"]
        why = f"was built for CUDA {build} but can use none" if build else "was built without CUDA"
        yield f"there is an NVIDIA GPU, but torch {report['versions']['torch']} {why}: install a matching torch or driver"
    if not report["gpus"]:
        yield "no GPU: experts are multiplied by the CPU, and slots are host memory"


def _disk_hints(disk: dict[str, Any], found: Found | None) -> Iterator[str]:
    if disk["free_bytes"] < LITTLE_DISK * disk["total_bytes"]:
        yield f"{size(disk['free_bytes'])} of {size(disk['total_bytes'])} are free in {disk['folder']}: stores may not fit"
    if found is None:
        return
    best = max(rate.bytes_per_s for rate in found.disk.rates)
    if best < SLOW_DISK:
        yield f"the disk reads {best / 1e9:.2f} GB/s, under 0.5: keep stores on an SSD (--cache-dir) or raise --budget"
    if not found.disk.direct:
        yield f"{disk['file_system']} has no direct reads: the page cache keeps experts a second time, outside the budget"


def _version_hints(versions: dict[str, str | None], environment: Any) -> Iterator[str]:
    if versions["bitsandbytes"] is None:
        yield "bitsandbytes is not installed: --format nf4 is refused; pip install bitsandbytes"
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if environment.get(name, "").lower() in ("1", "true", "yes", "on"):
            yield f"{name} is on: hub ids are found in the hub's cache or not at all"


def table(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for people; hints last."""
    v, c, m, d = report["versions"], report["cpu"], report["memory"], report["disk"]
    cap = f", capped at {size(m['cap_bytes'])}" if m["cap_bytes"] is not None else ""
    rows = [
        ("duoserve", f"{v['duoserve']} on Python {v['python']}, Linux {v['linux']}"),
        ("torch", f"{v['torch']}, CUDA {v['cuda'] or 'none'}, triton {v['triton'] or 'none'}"),
        ("libraries", ", ".join(f"{n} {v[n] or 'missing'}" for n in PACKAGES if n not in ("torch", "triton"))),
        (
            "cpu",
            f"{c['model']}, {c['usable_cores']:g} of {c['cores']} cores usable, {c['torch_threads']} torch threads",
        ),
        (
            "",
            f"{' '.join(c['features']) or 'no vector features'}; torch uses {c['capability']}, int4 {c['int4_order']}",
        ),
        (
            "memory",
            f"{size(m['available_bytes'])} free of {size(m['total_bytes'])}{cap}; large pages: {m['large_pages']}",
        ),
        *[("gpu", f"{g['name']}, {size(g['free_bytes'])} free of {size(g['total_bytes'])}") for g in report["gpus"]],
        ("disk", f"{d['file_system']}, {size(d['free_bytes'])} free of {size(d['total_bytes'])} in {d['folder']}"),
    ]
    if "profile" in report:
        rows += [*_rates(Profile.from_json(report["profile"]), d), ("profile", report["profile_file"])]
    return [*rows, *(("hint", hint) for hint in report["hints"])]


def _rates(p: Profile, disk: dict[str, Any]) -> list[tuple[str, str]]:
    how = "direct reads" if disk["direct"] else "reads through the page cache"
    rows = []
    for threads in sorted({rate.threads for rate in p.disk}):
        each = [f"{r.request_bytes >> 20} MiB {r.bytes_per_s / 1e9:.2f}" for r in p.disk if r.threads == threads]
        rows.append((f"  {threads} reader{'s' * (threads > 1)}", f"{', '.join(each)} GB/s ({how})"))
    rows.append(("  page cache", f"{disk['buffered_bytes_per_s'] / 1e9:.2f} GB/s, cold, from the start of a file"))
    rows.append(("memory reads", f"{p.memory / 1e9:.1f} GB/s"))
    for name, points in p.matrix.items():
        first, last = points[0], points[-1]
        rate = f"{1e-9 / first[1]:.1f} G weights/s with {first[0]} row"
        rate += f", {2e-9 * last[0] / last[1]:.0f} GFLOP/s with {last[0]}"
        rows.append((f"{name} products", rate))
    attention = f"{p.attention.decode / 1e9:.1f} GFLOP/s with one query, {p.attention.prompt / 1e9:.0f} with a prompt's"
    rows.append(("attention", attention))
    rows.append(("an operation", f"{1e6 * p.warm.op_s:.1f} to {1e6 * p.cold.op_s:.1f} us beside its bytes"))
    layers = f"{1e6 * p.warm.layer_s:.0f} to {1e6 * p.cold.layer_s:.0f} us"
    each_s = f"{1e6 * p.warm.expert_s:.0f} to {1e6 * p.cold.expert_s:.0f} us"
    rows.append(("a MoE layer", f"{layers}, and {each_s} for each expert"))
    if p.link is not None:
        rows.append(("link", f"{p.link.pinned / 1e9:.1f} GB/s pinned, {p.link.pageable / 1e9:.1f} GB/s pageable"))
    return rows


def _file_system(folder: Path) -> str:
    """Of the mount that holds `folder`."""
    whole, found = str(folder.resolve()), ("", "unknown")
    for line in _text("/proc/self/mounts").splitlines():
        _, mount, kind, *_ = line.split()
        mount = mount.replace("\\040", " ")
        inside = whole == mount or whole.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(found[0]):
            found = (mount, kind)
    return found[1]


def _after(path: str, name: str) -> str:
    lines = (line.partition(":") for line in _text(path).splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _text(path: str) -> str:
    """Empty where this system does not say."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
