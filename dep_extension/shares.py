"""The expert side of a disaggregated run: one rank's share of a store, with slots of its own, and the rows that come to it.
Knows stores, slots and rows; knows nothing of processes or plans.

Experts are numbered anew within a share, so that the schedules of prefill and decode see local experts only; slots may be
fewer than the share, which then streams from the store as on one GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import torch

from dep_extension.rows import arrived
from duoserve.codec import Layout
from duoserve.core import Kernels, Key, Policy
from duoserve.device import Device
from duoserve.experts import expert_function
from duoserve.int4 import Scratch
from duoserve.moe import Runtime, open_runtime
from duoserve.store import Store
from duoserve.transfer import HostTier


class Share:
    """The experts of a store that one rank holds, as the engine sees a store. `held_L`: their ids in each layer."""

    def __init__(self, store: Store, held_L: Sequence[Sequence[int]]):
        self._store, self.held = store, [tuple(held) for held in held_L]
        self.layouts, self.slab_bytes = store.layouts, store.slab_bytes
        self.layers = [replace(layer, n_experts=len(held)) for layer, held in zip(store.layers, self.held, strict=True)]

    @property
    def n_experts(self) -> int:
        return sum(map(len, self.held))

    def layout(self, layer: int) -> Layout:
        return self._store.layout(layer)

    def read_into(self, key: Key, buffer: torch.Tensor) -> None:
        self._store.read_into(Key(key.layer, self.held[key.layer][key.expert]), buffer)


class ExpertRank:
    """Computes what arrives. `specs`: the stock experts modules on meta, which say how; `kernels`: which products of a chunk
    are quicker as one, in `dtype`; without it experts are computed one by one."""

    def __init__(
        self,
        device: Device,
        share: Share,
        slots: int,
        specs: Sequence[Any],
        policy: Policy = Policy.DUOSERVE,
        host: HostTier | None = None,
        scratch: Scratch | None = None,
        kernels: Kernels | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.share = share
        self.runtime: Runtime = open_runtime(
            device, cast(Store, share), max(1, slots), policy, host, scratch, kernels, dtype
        )
        self._functions: list[Callable[..., torch.Tensor]] = [expert_function(spec) for spec in specs]
        self.rows = 0

    def compute(
        self, layer: int, batch: int, chunk: int, rows_PD: torch.Tensor, counts_AL: torch.Tensor
    ) -> torch.Tensor:
        """A chunk's rows, as they came, each through its expert: unweighted, (P, D)."""
        if len(rows_PD) == 0:
            return rows_PD
        self.rows += len(rows_PD)
        with torch.inference_mode():
            ids_P1 = arrived(counts_AL)
            return self.runtime.run(layer, self._functions[layer], rows_PD, ids_P1, rows_PD.new_ones(len(rows_PD), 1))


class Beside:
    """A thread that computes while another issues exchanges, one thing after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="duoserve-experts")

    def submit(self, fn: Callable[[], torch.Tensor]) -> _Later:
        return _Later(self._pool.submit(fn))

    def close(self) -> None:
        """What runs ends first: a walk that is taken up must not meet it."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Later:
    def __init__(self, future: Future[torch.Tensor]):
        self._future = future

    def wait(self) -> torch.Tensor:
        return self._future.result()
