"""The CPU as a device: slots in RAM, copies by worker threads. Knows memory and streams; knows no GPU."""

from __future__ import annotations

import mmap
import threading
import time

import torch

from duoserve.device.events import DONE, Event
from duoserve.device.streams import InlineStream, Streams, WorkerStream
from duoserve.system import available_ram
from duoserve.timeline import ModelThread

PAGE = 4096  # direct reads want addresses, offsets and lengths in multiples of this


def host_arena(n_bytes: int) -> torch.Tensor:
    """Page-aligned host memory as a flat uint8 tensor, taken once and untouched until used."""
    if n_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no large pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class ThreadDevice(Streams):
    """The CPU as a device: slots are a bounded arena in RAM, copies are direct reads by worker threads.

    Compute runs on the calling thread. `threaded_compute` gives it a worker of its own and `host_tier` puts host slabs
    between disk and slots, as on a GPU: so that both edges and all three tiers are tested without one. `link` slows copies
    to so many bytes per second, one at a time: for experiments on what a slower link would do.
    """

    name = "cpu"
    torch_device = torch.device("cpu")

    def __init__(
        self, copy_threads: int = 2, threaded_compute: bool = False, host_tier: bool = False, link: int | None = None
    ):
        board = threading.Condition() if threaded_compute or host_tier else None
        self.thread = ModelThread(time.perf_counter)
        self.compute = InlineStream(self.thread)
        if threaded_compute:
            self.compute = WorkerStream("compute", in_order=True, board=board, stalls=self.thread.stalls)
        self.copy = WorkerStream("copy", copy_threads, board=board, rate=link)
        self.disk = WorkerStream("disk", copy_threads, board=board) if host_tier else None
        self.predict = WorkerStream("predict")

    def arena(self, n_bytes: int) -> torch.Tensor:
        return host_arena(n_bytes)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's values on the host: the only way to wait for device data."""
        return tensor

    def mark(self) -> Event:
        """Happens once all that this thread computed so far is done."""
        return DONE

    def join(self, event: Event) -> None:
        """What this thread computes next follows `event`."""
        event.wait()

    def free_bytes(self) -> int:
        return available_ram()

    def pin(self, memory: torch.Tensor) -> int:
        """Nothing to register: copies between host memory need none."""
        return 0
