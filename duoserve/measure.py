"""What this machine does in a second, measured with the engine's own parts: its reads, its arenas, its weights, its layers.
Knows how to time; knows nothing of what is planned or printed. Every figure is a median over rounds.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch

from duoserve.checkpoint import quiet, read_config
from duoserve.codec import Layout, Param
from duoserve.core import Refusal
from duoserve.device import PAGE, Device, WorkerStream, host_arena, open_device
from duoserve.engine import load
from duoserve.needs import count_passes
from duoserve.plan import Sizes, size
from duoserve.profile import Attention, DiskRate, Launch, Link, Profile
from duoserve.sizing import CACHE
from duoserve.store import open_direct
from duoserve.version import __version__

MIB = 1 << 20
REQUESTS = tuple(n * MIB for n in (1, 2, 4, 8, 16))  # slabs of real models, in any format
READERS = (1, 2)  # threads; the engine has two
FILE_BYTES, LEAST_FILE = 256 * MIB, 32 * MIB
WRITE_S, BURST_S, DISK_S = 3.0, 0.05, 4.0  # at most, about, at most unless one round takes longer
ROWS = (1, 4, 16, 64, 128, 512)
SIDE = 2048  # of the matrices: as experts have
CALL_S = 0.04  # per round of one kind of product
STEPS = 30
_LAYERS = 8
_HEADS, _KEYS, _HEAD_DIM = 16, 512, 64  # attention as mid-sized models have it
_TOY = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": _LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 512, "eos_token_id": None,
    "pad_token_id": None, "bos_token_id": None,
}  # fmt: skip
_FEW, _MANY, _EXPERTS = 2, 6, 8  # experts chosen by the two toys, of so many


class Disk(NamedTuple):
    rates: tuple[DiskRate, ...]
    direct: bool  # past the page cache
    buffered: float  # bytes/s through it, cold


class Found(NamedTuple):
    profile: Profile
    disk: Disk


def measure(
    folder: Path, machine: dict[str, str], rounds: int = 5, say: Callable[[str], None] = lambda what: None
) -> Found:
    """The profile of this machine, with the disk that holds `folder`; `say` is told what is being measured."""
    quiet()
    device = open_device("auto")
    source = f"measured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by duoserve {__version__}"
    try:
        say("disk")
        disk = measure_disk(folder, rounds)
        say("memory and products")
        memory = measure_memory(device, rounds)
        matrix = {name: _products(device, *kind, rounds) for name, kind in _formats().items()}
        attention = measure_attention(device, rounds)
        say("operations")
        warm, cold = measure_launch(folder, device, rounds)
        link = measure_link(device, rounds)
        profile = Profile(
            device=device.name,
            machine=machine,
            disk=disk.rates,
            memory=memory,
            matrix=matrix,
            attention=attention,
            warm=warm,
            cold=cold,
            link=link,
            sources=dict.fromkeys(
                ("disk", "memory", "matrix", "attention", "launch", *(("link",) if link else ())), source
            ),
        )
    finally:
        device.close()
    return Found(profile, disk)


def measure_disk(folder: Path, rounds: int) -> Disk:
    """Random whole requests past the page cache, as slabs are read, by one and by two workers; and the page cache's way."""
    with _file_of_noise(folder) as path:
        sizes = [n for n in REQUESTS if 2 * n <= path.stat().st_size]
        memory = host_arena(2 * len(READERS) * sizes[-1])
        memory.fill_(0)  # the engine's slots are touched memory too
        fd = open_direct(path)
        try:
            rates = _over_rounds(fd, path.stat().st_size, sizes, memory, rounds)
            direct = bool(os.O_DIRECT & _flags(fd))
        finally:
            os.close(fd)
        return Disk(rates, direct, statistics.median(_buffered(path) for _ in range(min(3, rounds))))


def _over_rounds(fd: int, length: int, sizes: list[int], memory: torch.Tensor, rounds: int) -> tuple[DiskRate, ...]:
    samples: dict[tuple[int, int], list[float]] = {(n, threads): [] for n in sizes for threads in READERS}
    began, place = time.perf_counter(), random.Random(0)
    for _ in range(rounds):
        for (n, threads), rates in samples.items():
            rates.append(_burst(fd, length, n, threads, memory, place, rates[-1] if rates else 0.0))
        if time.perf_counter() - began > DISK_S:
            break
    return tuple(DiskRate(*at, statistics.median(rates)) for at, rates in samples.items())


def _burst(
    fd: int, length: int, n_bytes: int, threads: int, memory: torch.Tensor, place: random.Random, before: float
) -> float:
    """Bytes/s of a few requests at once; as many as take about BURST_S at the rate seen `before`."""
    views = [memory[i * n_bytes : (i + 1) * n_bytes].numpy().data for i in range(2 * threads)]
    count = max(len(views), min(256, int(before * BURST_S / n_bytes)))
    offsets = [place.randrange((length - n_bytes) // PAGE + 1) * PAGE for _ in range(count)]
    stream = WorkerStream("probe", threads)
    try:
        began = time.perf_counter()
        jobs = [partial(_read, fd, views[i % len(views)], at) for i, at in enumerate(offsets)]
        events = [stream.submit(job) for job in jobs]
        for event in events:
            event.wait()
        return count * n_bytes / (time.perf_counter() - began)
    finally:
        stream.close()


def _read(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], offset + done)
        if n <= 0:
            raise OSError(f"the file ended at byte {offset + done}, {len(view) - done} more were there")
        done += n


def _buffered(path: Path) -> float:
    """Bytes/s of a plain reader from the start of the file, nothing of it cached."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer, total, began = bytearray(4 * MIB), 0, time.perf_counter()
        while (n := file.readinto(buffer)) and time.perf_counter() - began < BURST_S * 4:
            total += n
        return total / (time.perf_counter() - began)


@contextmanager
def _file_of_noise(folder: Path) -> Iterator[Path]:
    """A file that is on the disk: noise, because some file systems compress; smaller where space or time is short."""
    room = shutil.disk_usage(folder).free // 4
    if room < LEAST_FILE:
        what = f"measuring the disk takes {size(LEAST_FILE)} and leaves three times that, {size(room * 4)} are free"
        raise Refusal("E_DISK", f"{what} in {folder}", "free some, or name another --cache-dir", 6)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", suffix=".tmp") as file:
        began = time.perf_counter()
        for done in range(0, min(FILE_BYTES, room) // LEAST_FILE):
            file.write(os.urandom(LEAST_FILE))
            file.flush()
            os.fsync(file.fileno())
            if done and time.perf_counter() - began > WRITE_S:
                break
        yield Path(file.name)


def _flags(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETFL)


def measure_memory(device: Device, rounds: int) -> float:
    """Bytes/s that all cores (or the GPU) read of what no cache holds: a sum over four-byte numbers."""
    numbers = device.arena(_beyond_caches()).fill_(0).view(torch.float32)
    seconds = [_seconds(lambda: device.read(numbers.sum())) for _ in range(2 + 2 * rounds)]
    return numbers.numel() * 4 / statistics.median(seconds[2:])


def _formats() -> dict[str, tuple[str, str]]:
    """Name in the profile -> format of a slab, dtype of what is not quantised."""
    names = {"bf16": ("bf16", "bfloat16"), "float32": ("bf16", "float32"), "int4": ("int4", "bfloat16")}
    try:
        Layout.of("nf4", [Param("w", 64, 64)]).encode("w", torch.zeros(64, 64), torch.empty(4096, dtype=torch.uint8))
    except Refusal:  # bitsandbytes is not there
        return names
    return names | {"nf4": ("nf4", "bfloat16")}


def _products(device: Device, format: str, plain: str, rounds: int) -> tuple[tuple[int, float], ...]:
    """(rows, seconds per weight) of products with matrices as they lie in slots, too many for any cache."""
    layout = Layout.of(format, [Param("w", SIDE, SIDE)], plain)
    slab = torch.empty(layout.slab_bytes, dtype=torch.uint8)
    layout.encode("w", torch.randn(SIDE, SIDE), slab)
    slabs = device.arena(_beyond_caches() // layout.slab_bytes * layout.slab_bytes).view(-1, layout.slab_bytes)
    slabs[:] = slab.to(device.torch_device)
    weights = [layout.weights(one)["w"] for one in slabs]
    points = []
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, SIDE).to(device.torch_device, getattr(torch, plain))
            points.append((rows, _per_call(device, weights, x, rounds) / SIDE**2))
    return tuple(points)


def _per_call(device: Device, weights: list[Any], x: torch.Tensor, rounds: int) -> float:
    """Median over short bursts, which other programs' turns disturb one by one."""
    turn = cycle(weights)

    def burst(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            y = next(turn).linear(x)
        device.read(y[:1, :1])
        return (time.perf_counter() - began) / calls

    burst(1)
    calls = max(1, int(BURST_S / 10 / burst(2)))
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - began < CALL_S * rounds:
        samples.append(burst(calls))
    return statistics.median(samples)


def measure_attention(device: Device, rounds: int) -> Attention:
    """As transformers calls it in bfloat16, over keys that no cache holds."""
    shape = (1, _HEADS, _KEYS, _HEAD_DIM)
    sets = _beyond_caches() // (4 * _HEADS * _KEYS * _HEAD_DIM)
    keys = [torch.randn(shape).to(device.torch_device, torch.bfloat16) for _ in range(sets)]
    flops = 4 * _HEADS * _KEYS * _HEAD_DIM

    def rate(queries: int) -> float:
        x = keys[0][:, :, :queries]
        pairs = cycle(zip(keys, reversed(keys), strict=True))

        def attend() -> None:
            k, v = next(pairs)
            device.read(torch.nn.functional.scaled_dot_product_attention(x, k, v, is_causal=queries > 1)[0, 0, :1, :1])

        return queries * flops / statistics.median([_seconds(attend) for _ in range(4 + 4 * rounds)][4:])

    with torch.inference_mode():
        return Attention(rate(1), rate(_KEYS))


def measure_launch(folder: Path, device: Device, rounds: int) -> tuple[Launch, Launch]:
    """Seconds apart from bytes, from three models too small to have any: a dense one for the stock operations, two with
    few and many chosen experts for a layer of ours and for one expert. Caches warm, then emptied before every step.
    """
    with ExitStack() as opened:
        scratch = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-", suffix=".tmp")))
        dense_ops, dense = _dense(device)
        moe_ops, few = _moe(scratch / "few", _FEW, device, opened)
        _, many = _moe(scratch / "many", _MANY, device, opened)
        steps = [_Step(model, device) for model in (dense, few, many)]
        return _launch(steps, dense_ops, moe_ops, 0, rounds), _launch(
            steps, dense_ops, moe_ops, _beyond_caches(), rounds
        )


def _launch(steps: list[_Step], dense_ops: int, moe_ops: int, emptied: int, rounds: int) -> Launch:
    """The three take turns, so that a slow moment slows all of them."""
    other = torch.zeros(emptied // 4)
    samples: list[list[float]] = [[] for _ in steps]
    for _ in range(4 + STEPS * rounds // 5):
        for step, seconds in zip(steps, samples, strict=True):
            other.sum()
            seconds.append(_seconds(step))
    dense, few, many = (statistics.median(seconds[4:]) for seconds in samples)
    op_s = dense / dense_ops
    expert_s = max(0.0, (many - few) / _LAYERS / (_MANY - _FEW))
    return Launch(op_s, max(0.0, (few - moe_ops * op_s) / _LAYERS - _FEW * expert_s), expert_s)


def _dense(device: Device) -> tuple[int, Any]:
    with torch.device("meta"):
        ops = count_passes(_toy("llama", {}), 16).ops
    return ops, _toy("llama", {}).to(device.torch_device)


def _moe(folder: Path, choices: int, device: Device, opened: ExitStack) -> tuple[int, Any]:
    """A toy in the engine itself, every expert resident."""
    _toy("mixtral", {"num_local_experts": _EXPERTS, "num_experts_per_tok": choices}).save_pretrained(folder)
    ops = count_passes(Sizes(read_config(folder), torch.bfloat16).model, 16).ops
    engine = opened.enter_context(
        load(folder, budget="1GiB", ctx=512, cache_dir=str(folder), device=device.name, format="int4")
    )
    return ops, engine.model


def _toy(kind: str, more: dict[str, int]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **(_TOY | more))
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


class _Step:
    """One decoded token of a model, again and again."""

    def __init__(self, model: Any, device: Device):
        self.model, self.device = model, device
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device.torch_device)
        with torch.inference_mode():
            self.cache = model(input_ids=self.token.expand(1, 16), use_cache=True)[CACHE]

    @torch.inference_mode()
    def __call__(self) -> None:
        self.device.read(self.model(input_ids=self.token, use_cache=True, **{CACHE: self.cache}).logits)


def measure_link(device: Device, rounds: int) -> Link | None:
    """Host to device as slabs cross it, from memory that is registered and from memory that is not; None on the CPU."""
    if device.disk is None:
        return None
    source, into = host_arena(FILE_BYTES).fill_(0), device.arena(FILE_BYTES)

    def copy() -> None:
        pieces = zip(source.split(8 * MIB), into.split(8 * MIB), strict=True)
        events = [device.copy.submit(partial(b.copy_, a, non_blocking=True)) for a, b in pieces]
        for event in events:
            event.wait()

    pageable = statistics.median([_seconds(copy) for _ in range(rounds + 1)][1:])
    device.pin(source)
    pinned = statistics.median([_seconds(copy) for _ in range(rounds + 1)][1:])
    return Link(FILE_BYTES / pinned, FILE_BYTES / pageable)


def _seconds(fn: Callable[[], Any]) -> float:
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


def _beyond_caches() -> int:
    """Bytes that no cache of the processor holds: three times the largest, within reason."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    largest = max((int(text[:-1]) << 10 for text in sizes if text.endswith("K")), default=0)
    return min(max(3 * largest, 96 * MIB), 512 * MIB) // PAGE * PAGE
