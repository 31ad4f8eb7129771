"""The two ordering edges (design D5): a reader waits for the copy, a writer waits for the last reader.

Every expert's slab is filled with its own number and every row carries the number of the expert it was sent to, so a
slot that is read too early, or overwritten too early, shows. Copies and compute are slowed separately, and each edge is
taken away once to see that its loss is caught.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from guessers import Dice

from duoserve.cache import ExpertCache
from duoserve.codec import Layout, Param
from duoserve.core import Kernels, Key, Phase, Policy, Step
from duoserve.device import DONE, ThreadDevice
from duoserve.future import Future
from duoserve.manifest import TRUNK, write_manifest
from duoserve.moe import Runtime, open_runtime
from duoserve.store import Entry, Store, file_checksum, header_checksum, slab_checksums, write_safetensors
from duoserve.transfer import HostTier, Transfer

LAYERS, EXPERTS, WIDTH = 3, 8, 64
OTHERS = [Policy.LFP, Policy.MIF, Policy.PAPER, Policy.BELADY]
ASKING = {Policy.MIF, Policy.PAPER}  # a predictor


def number(key: Key) -> float:
    return float(key.layer * EXPERTS + key.expert + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real store whose experts are constant matrices of their own number."""
    folder = tmp_path_factory.mktemp("numbered")
    layout = Layout.of("bf16", [Param("w", WIDTH, WIDTH)], "float32")

    def slabs(layer: int) -> Iterator[torch.Tensor]:
        for e in range(EXPERTS):
            slab = torch.zeros(layout.slab_bytes, dtype=torch.uint8)
            layout.encode("w", torch.full((WIDTH, WIDTH), number(Key(layer, e))), slab)
            yield slab

    layers = []
    for i in range(LAYERS):
        entry = Entry("experts", "U8", (EXPERTS, layout.slab_bytes), lambda i=i: slabs(i))
        path = folder / f"experts-{i:03d}.safetensors"
        start = write_safetensors(path, [entry])
        layers.append({"module": f"layers.{i}", "file": f"experts-{i:03d}.safetensors", "n_experts": EXPERTS,
                       "layout": 0, "data_offset": start, "header_crc32": header_checksum(path, start),
                       "crc32": slab_checksums(path, start, EXPERTS)})  # fmt: skip
    write_safetensors(folder / TRUNK, [])
    write_manifest(folder, {"format": "bf16", "plain": "float32", "fingerprint": "0", "dtype": "float32", "bf16_bytes": 1,
                            "layouts": [layout.to_json()], "layers": layers,
                            "files": {TRUNK: file_checksum(folder / TRUNK)}})  # fmt: skip
    return folder


def some_future(seed: int) -> Future:
    """Not that of the routes that will be: whoever believes it moves much in vain."""
    rng = random.Random(seed)
    passes = [[rng.sample(range(EXPERTS), rng.choice([1, 2, 6])) for _ in range(LAYERS)] for _ in range(60)]
    return Future([EXPERTS] * LAYERS, passes)


class Machine:
    """A runtime over the numbered store, with one part slowed and, if asked, one edge taken away."""

    def __init__(
        self,
        folder: Path,
        slots: int,
        slow: str,
        without: str | None = None,
        host: int = 0,
        guessing: bool = False,
        policy: Policy = Policy.DUOSERVE,
        kernels: Kernels | None = None,
    ):
        self.store, self.corrupt, self.slow = Store(folder), 0, slow
        self.device = ThreadDevice(copy_threads=2, threaded_compute=True, host_tier=host > 0)
        tier = HostTier(self.device, self.store, host) if host else None
        self.runtime = open_runtime(self.device, self.store, slots, policy, tier, kernels=kernels, dtype=torch.float32)
        transfer = self.runtime.transfer
        if slow == "copies":
            self._slow_copies()
        if without == "ready":
            fetch = transfer.fetch
            transfer.fetch = lambda slot, lane: setattr(fetch(slot, lane), "ready", DONE) or slot
        if without == "released":
            release = transfer.release
            transfer.release = lambda slot, read: release(slot, DONE)
        if guessing:
            self.runtime.predict(Dice(EXPERTS), always=True)
        if policy is Policy.BELADY:
            self.runtime.foresee(some_future(slots))

    def _slow_copies(self) -> None:
        """Half a slab, a pause, the whole slab: whoever reads too early sees the former tenant's second half."""
        read = self.store.read_into

        def slowly(key: Key, buffer: torch.Tensor) -> None:
            time.sleep(0.0005)
            read(key, buffer)

        self.store.read_into = slowly

    def expert(self, x_MD: torch.Tensor, weights: Any) -> torch.Tensor:
        """Reads the weights before and after a pause; both must be the number in the rows."""
        w = weights["w"].w_NK
        want = x_MD[0, 0].item()
        before = bool((w == want).all())
        if self.slow == "compute":
            time.sleep(0.0005)
        after = bool((w == want).all())
        self.corrupt += not (before and after)
        return x_MD

    def step(self, rng: random.Random, rows: int) -> None:
        phase = Phase.DECODE if rows <= 2 else Phase.PREFILL
        self.runtime.begin(Step(0, phase, rows))
        for layer in range(LAYERS):
            ids = torch.tensor([[rng.randrange(EXPERTS)] for _ in range(rows)])
            x = torch.tensor([[number(Key(layer, int(e)))] * WIDTH for e in ids])
            y = self.runtime.run(layer, self.expert, x, ids, torch.ones(rows, 1))
            self.corrupt += not torch.equal(y, x)
        self.runtime.finish()

    def run(self, steps: int, seed: int = 0) -> int:
        rng = random.Random(seed)
        for _ in range(steps):
            self.step(rng, rng.choice([1, 2, 12, 24]))
        self.runtime.cache.check()
        self.device.close()
        self.store.close()
        return self.corrupt


@pytest.mark.parametrize("slow", ["copies", "compute"])
def test_no_corrupt_read_in_1000_steps(folder: Path, slow: str) -> None:
    for slots in (2, 5, 7, 20):
        assert Machine(folder, slots, slow).run(250, seed=slots) == 0


@pytest.mark.parametrize("slow", ["copies", "compute"])
def test_no_corrupt_read_with_a_host_tier_between(folder: Path, slow: str) -> None:
    assert Machine(folder, 5, slow, host=9).run(100) == 0


@pytest.mark.parametrize("slow", ["copies", "compute"])
@pytest.mark.parametrize("host", [0, 9])
def test_no_corrupt_read_while_dice_guess(folder: Path, slow: str, host: int) -> None:
    for slots in (2, 5, 7):
        machine = Machine(folder, slots, slow, host=host, guessing=True)
        assert machine.run(150, seed=slots) == 0
        counts = machine.runtime.transfer.counts()
        assert slots == 2 or (counts.guesses and counts.wrong), counts


@pytest.mark.parametrize("policy", OTHERS, ids=lambda p: p.value)
@pytest.mark.parametrize("slow", ["copies", "compute"])
@pytest.mark.parametrize("host", [0, 9])
def test_no_corrupt_read_under_any_policy(folder: Path, policy: Policy, slow: str, host: int) -> None:
    for slots in (2, 5, 17):
        machine = Machine(folder, slots, slow, host=host, policy=policy, guessing=policy in ASKING)
        assert machine.run(40, seed=slots) == 0
        counts = machine.runtime.transfer.counts()
        assert slots == 2 or counts.guesses, (policy, counts)


def test_a_reader_that_does_not_wait_for_the_copy_is_caught(folder: Path) -> None:
    assert Machine(folder, 5, "copies", without="ready").run(20) > 0


def test_a_writer_that_does_not_wait_for_the_reader_is_caught(folder: Path) -> None:
    assert Machine(folder, 5, "compute", without="released").run(20) > 0


def test_a_failed_read_on_the_cpu_is_fetched_again_once_the_disk_has_healed(folder: Path) -> None:
    """The device as shipped: compute on the calling thread."""
    store = Store(folder)
    device = ThreadDevice()
    transfer = Transfer(device, store, cache := ExpertCache(4, [EXPERTS] * LAYERS))
    runtime, read, bad = Runtime(device, cache, transfer), store.read_into, Key(1, 3)

    def fail(key: Key, buffer: torch.Tensor) -> None:
        if key == bad:
            raise OSError("the disk says no")
        read(key, buffer)

    def expert(x: torch.Tensor, weights: Any) -> torch.Tensor:
        assert (weights["w"].w_NK == x[0, 0]).all()
        return x

    ids = torch.tensor([[2], [3], [4], [5], [6]])
    x = torch.tensor([[number(Key(1, int(e)))] * WIDTH for e in ids])
    store.read_into = fail  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk says no"):
            runtime.run(1, expert, x, ids, torch.ones(5, 1))
        cache_is_whole(runtime)
    store.read_into = read  # type: ignore[method-assign]
    assert torch.equal(runtime.run(1, expert, x, ids, torch.ones(5, 1)), x)
    cache_is_whole(runtime)
    device.close()
    store.close()


def cache_is_whole(runtime: Runtime) -> None:
    """Copies that were under way may still be: only pins must be gone."""
    runtime.cache.check()


def test_a_failed_read_rises_and_leaves_the_pool_whole(folder: Path) -> None:
    machine = Machine(folder, 4, "nothing")
    read, bad = machine.store.read_into, Key(1, 3)

    def fail(key: Key, buffer: torch.Tensor) -> None:
        if key == bad:
            raise OSError("the disk says no")
        read(key, buffer)

    machine.store.read_into = fail
    ids = torch.tensor([[3], [4]])
    x = torch.tensor([[number(Key(1, int(e)))] * WIDTH for e in ids])
    for _ in range(2):
        with pytest.raises(OSError, match="the disk says no"):
            machine.runtime.run(1, machine.expert, x, ids, torch.ones(2, 1))
        machine.runtime.cache.check()
    machine.store.read_into = read
    assert machine.run(20) == 0
