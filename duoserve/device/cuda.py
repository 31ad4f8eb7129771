"""An NVIDIA GPU as a device: slots in its memory, slabs copied from registered host memory. Knows CUDA; knows nothing of how
streams of work are kept in order.
"""

from __future__ import annotations

import threading
import time
import warnings

import torch

from duoserve.core import Refusal
from duoserve.device.events import Event, marked
from duoserve.device.streams import InlineStream, Streams, WorkerStream
from duoserve.timeline import ModelThread

PIN_CHUNK = 256 << 20  # bytes registered per call: one failing call must not cost the whole pool


class CudaDevice(Streams):
    """One NVIDIA GPU: slots in device memory, slabs copied from registered host memory on a stream of their own."""

    name = "cuda"

    def __init__(self, copy_threads: int = 2):
        if not torch.cuda.is_available():
            raise Refusal("E_DEVICE", "no CUDA GPU can be used here (0 found)", "run with --device cpu", 7)
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.thread = ModelThread(time.perf_counter)
        self.compute = InlineStream(self.thread, cuda=True)
        board = threading.Condition()
        self.copy = WorkerStream("copy", copy_threads, cuda=True, board=board)
        self.disk = WorkerStream("disk", copy_threads, board=board)
        self.predict = WorkerStream("predict", cuda=True)
        self._warned = False

    def arena(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.torch_device)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu")

    def mark(self) -> Event:
        return marked(torch.cuda.current_stream())

    def join(self, event: Event) -> None:
        event.order(torch.cuda.current_stream())

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def pin(self, memory: torch.Tensor) -> int:
        """Register filled host memory for direct copies, in chunks; returns the bytes that could be registered."""
        pinned = 0
        for start in range(0, memory.numel(), PIN_CHUNK):
            chunk = memory[start : start + PIN_CHUNK]
            if not _register(chunk.data_ptr(), chunk.numel()):
                self._warn_pageable(pinned, memory.numel())
                break
            pinned += chunk.numel()
        return pinned

    def _warn_pageable(self, pinned: int, total: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"only {pinned >> 20} of {total >> 20} MiB of host slabs could be pinned; the rest is copied slower",
                stacklevel=3,
            )


def _register(address: int, n_bytes: int) -> bool:
    try:
        from cuda.bindings import runtime  # type: ignore[import-not-found]
    except ImportError:
        return int(torch.cuda.cudart().cudaHostRegister(address, n_bytes, 0)) == 0
    (status,) = runtime.cudaHostRegister(address, n_bytes, 0)
    return int(status) == 0


def gpus() -> list[tuple[str, int, int]]:
    """Name, bytes free and bytes in all of each GPU that torch can use."""
    found = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found.append((torch.cuda.get_device_name(i), free, total))
    return found
