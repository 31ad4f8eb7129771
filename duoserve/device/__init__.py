"""The machine, and the only folder that names CUDA, pinned memory, streams or threads.

A device has a compute stream, a copy stream, arenas of memory, and one way to wait for its data (`read`). Work is handed
over as `stream.submit(fn, after=events, behind=events, lane=..., cost=...) -> Event`. How long compute waited for what is
counted always (`device.thread.stalls`), all that happens only while somebody records. Knows nothing of experts or files.

    events <- streams <- cpu    worker threads, a bounded arena in RAM, direct reads
                      <- cuda   one GPU, pinned slabs
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from duoserve.device.cpu import PAGE, ThreadDevice, host_arena
from duoserve.device.cuda import CudaDevice, gpus
from duoserve.device.events import DONE, Event
from duoserve.device.streams import InlineStream, Traffic, WorkerStream

__all__ = [
    "DONE",
    "PAGE",
    "CudaDevice",
    "Device",
    "Event",
    "InlineStream",
    "ThreadDevice",
    "Traffic",
    "WorkerStream",
    "gpus",
    "host_arena",
    "in_background",
    "open_device",
]

Device = ThreadDevice | CudaDevice


def open_device(name: str, link: int | None = None) -> Device:
    """`auto` takes the GPU where there is one. `link` as `ThreadDevice`."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return CudaDevice()
    return ThreadDevice(link=link)


def in_background(fn: Callable[[], Any], name: str) -> Callable[[], None]:
    """Run `fn` on a thread of its own; returns what waits for its end."""
    thread = threading.Thread(target=fn, name=f"duoserve-{name}", daemon=True)
    thread.start()
    return thread.join
