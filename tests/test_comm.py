"""The exchanges: rows arrive where they were sent, in order, in every dtype, and a result cannot be had too early.

One spawn of four processes (two attention, two expert ranks) runs all checks over Gloo; the same checks run in one process
over the local exchange. Values say where a row comes from, so a row in the wrong place shows.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dep_extension.buffers import SMALL, Buffers
from dep_extension.comm import Comm, Exchange, Place, Role
from dep_extension.faults import Bounds
from dep_extension.local import LocalHandle, local_world, together
from dep_extension.world import host_store, open_world

AG, EG, WIDTH = 2, 2, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn]
SPLITS = [[[3, 1], [0, 5]], [[0, 0], [2, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]]  # [attention rank][expert rank]


def rows(source: int, many: int, dtype: torch.dtype) -> Tensor:
    """Each row carries its sender and its number in a way that every dtype can hold."""
    number = torch.arange(many * WIDTH).reshape(many, WIDTH) % 8 + 8 * source
    return number.to(torch.float32).to(dtype)


def expected(sizes: Sequence[int], before: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a rank receives: of each sender, the rows behind those for the ranks before it."""
    return torch.cat(
        [rows(s, skip + n, dtype)[skip:].float() for s, (n, skip) in enumerate(zip(sizes, before, strict=True))]
    )


def dispatched(comm: Comm, splits: list[list[int]], dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The handle, and what must come out of it."""
    place = comm.place
    if place.role is Role.ATTENTION:
        to = splits[place.index]
        return comm.dispatch(rows(place.index, sum(to), dtype), to, [0] * EG, WIDTH), torch.empty(0, WIDTH)
    of = [to[place.index] for to in splits]
    before = [sum(to[: place.index]) for to in splits]
    return comm.dispatch(None, [0] * AG, of, WIDTH), expected(of, before, dtype)


def combined(comm: Comm, splits: list[list[int]], dtype: torch.dtype) -> tuple[Any, Tensor]:
    place = comm.place
    if place.role is Role.EXPERT:
        to = [s[place.index] for s in splits]
        return comm.combine(rows(place.index, sum(to), dtype), to, [0] * AG, WIDTH), torch.empty(0, WIDTH)
    of = splits[place.index]
    before = [sum(s[e] for s in splits[: place.index]) for e in range(EG)]
    return comm.combine(None, [0] * EG, of, WIDTH), expected(of, before, dtype)


def check_both_ways(comm: Comm, dtype: torch.dtype) -> None:
    for splits in SPLITS:
        for way in (dispatched, combined):
            handle, want = way(comm, splits, dtype)
            assert torch.equal(handle.wait().float(), want), (way, splits)


def check_many_in_flight(comm: Comm, dtype: torch.dtype) -> None:
    """Both directions at once, waited for in another order than they were issued in."""
    handles = [way(comm, splits, dtype) for splits in SPLITS for way in (dispatched, combined)]
    for handle, want in reversed(handles):
        assert torch.equal(handle.wait().float(), want)


def check_counts(comm: Comm, dtype: torch.dtype) -> None:
    place, width = comm.place, 5
    if place.role is Role.ATTENTION:
        sent = torch.arange(EG * width).reshape(EG, width) + 100 * place.index
        assert comm.counts(sent, width).wait().shape == (0, width)
        return
    got = comm.counts(None, width).wait()
    assert got.tolist() == [[100 * a + width * place.index + k for k in range(width)] for a in range(AG)]


def check_unreadable_before_wait(comm: Comm, dtype: torch.dtype) -> None:
    handle, want = dispatched(comm, SPLITS[0], dtype)
    dist.barrier() if dist.is_initialized() else None  # by now the rows have most likely arrived
    early = handle.buffer.float().clone()
    assert handle.buffer.shape == want.shape
    bad = early.isnan() if dtype.is_floating_point else early == (255 if dtype == torch.uint8 else -1)
    assert bad.all()
    assert torch.equal(handle.wait().float(), want)


CHECKS = [check_both_ways, check_many_in_flight, check_counts, check_unreadable_before_wait]


def check_a_removed_wait_is_caught(comm: Comm, kind: Any) -> None:
    """A wait that only hands over the buffer: rows are poison, and the exchanges are missed at the end."""
    wait, kind.wait = kind.wait, lambda self: self.buffer
    try:
        handle, want = dispatched(comm, SPLITS[0], torch.float32)
        assert not len(want) or not torch.equal(handle.wait(), want)
    finally:
        kind.wait = wait
    with pytest.raises(AssertionError, match="1 exchanges were never waited for"):
        comm.close()
    handle.wait()


def check_rows_written_under_way_are_caught(comm: Comm) -> None:
    if comm.place.role is Role.EXPERT:
        comm.dispatch(None, [0] * AG, [1] * AG, WIDTH).wait()
        return
    mine = rows(0, EG, torch.float32)
    handle = comm.dispatch(mine, [1] * EG, [0] * EG, WIDTH)
    mine.zero_()
    with pytest.raises(AssertionError, match="written while their exchange was under way"):
        handle.wait()


def check_splits_that_differ_are_caught(comm: Comm) -> None:
    """Fewer rows than expected, which Gloo itself would not tell: attention rank 1 sends two, expert ranks expect three."""
    if comm.place.role is Role.ATTENTION:
        handle = comm.dispatch(rows(0, 4, torch.float32), [2, 2], [0, 0], WIDTH)
        said = "attention rank 1 expects splits [0, 0, 2, 2], the others [0, 0, 3, 3]" if comm.place.index else ""
    else:
        handle = comm.dispatch(None, [0, 0], [2, 3], WIDTH)
        said = f"expert rank {comm.place.index} expects splits [2, 3, 0, 0], the others [2, 2, 0, 0]"
    with pytest.raises(AssertionError, match=re.escape(said)) if said else nullcontext():
        handle.wait()


def check_received_rows_outlive_later_exchanges(comm: Comm, buffers: Buffers) -> None:
    """Large ones, whose memory is used again: what is kept stays, what is not kept comes back."""
    width, kept = SMALL, dict[int, Tensor]()
    for number in range(8):
        value = float(number)
        if comm.place.role is Role.ATTENTION:
            comm.dispatch(torch.full((EG, width), value), [1] * EG, [0] * EG, width).wait()
            continue
        came = comm.dispatch(None, [0] * AG, [1] * AG, width).wait()
        assert came.eq(value).all()
        if number % 3 == 0:
            kept[number] = came[1:]
        assert all(rows.eq(float(then)).all() for then, rows in kept.items())
        del came
    until = time.monotonic() + 20  # the transport's thread lets go of the last ones in its own time
    while comm.place.role is Role.EXPERT and buffers.free_bytes < 4 * AG * width:
        assert time.monotonic() < until, buffers.free_bytes
        time.sleep(0.01)


def check_what_must_fail(rank: int) -> None:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "99"
    comm = open_world(Place.of(rank, AG, EG), torch.float32, bounds=Bounds(form=30), poison=True)
    check_received_rows_outlive_later_exchanges(comm, comm._comm._buffers)
    check_a_removed_wait_is_caught(comm._comm, Exchange)
    check_rows_written_under_way_are_caught(comm)
    dist.barrier()
    check_splits_that_differ_are_caught(comm)
    dist.barrier()  # nobody leaves while another still reads
    comm.close()


def check_memory_is_used_again(rank: int) -> None:
    """Without poison, which would hand out copies: what is read is the memory itself."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "98"
    comm = open_world(Place.of(rank, AG, EG), torch.float32, bounds=Bounds(form=30), poison=False)
    check_received_rows_outlive_later_exchanges(comm, comm._comm._buffers)
    dist.barrier()
    comm.close()


def everyone(rank: int, port: int, reports: Any) -> None:
    """One rank: all checks in all dtypes; the first that fails is reported."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")  # fmt: skip
    try:
        for dtype in DTYPES:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(DTYPES.index(dtype))
            comm = open_world(Place.of(rank, AG, EG), dtype, bounds=Bounds(form=30), poison=True)
            for check in CHECKS:
                check(comm, dtype)
            comm.close()
        check_memory_is_used_again(rank)
        check_what_must_fail(rank)
    except BaseException:
        reports.put((rank, traceback.format_exc()))
        raise
    reports.put((rank, ""))


def spawn(function: Callable[..., None], ranks: int = AG + EG) -> dict[int, str]:
    """What each rank reports, "" where all went well."""
    store = host_store("127.0.0.1", 0, 60)
    context = mp.get_context("spawn")
    reports = context.Queue()
    running = [context.Process(target=function, args=(rank, store.port, reports)) for rank in range(ranks)]
    try:
        for process in running:
            process.start()
        return dict(reports.get(timeout=120) for _ in running)
    finally:
        for process in running:
            process.join(10)
            process.kill()


def test_rows_arrive_over_gloo_in_every_dtype_and_no_sooner_than_waited_for() -> None:
    for rank, failure in sorted(spawn(everyone).items()):
        assert not failure, f"rank {rank}: {failure}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_rows_arrive_within_one_process(check: Any, dtype: torch.dtype) -> None:
    comms = local_world(AG, EG, dtype, poison=True)
    together(comms, *[lambda comm=comm: check(comm, dtype) for comm in comms])
    for comm in comms:
        comm.close()


def test_what_must_fail_fails_within_one_process() -> None:
    comms = local_world(AG, EG, torch.float32, poison=True)
    together(comms, *[lambda comm=comm: check_a_removed_wait_is_caught(comm, LocalHandle) for comm in comms])


def test_splits_that_differ_are_refused_within_one_process() -> None:
    comms = local_world(AG, EG, torch.float32)
    with pytest.raises(AssertionError, match=r"rows of \[2, 2\] came where \[1, 1\] were expected"):
        together(
            comms,
            *[lambda c=c: c.dispatch(rows(0, 4, torch.float32), [2, 2], [0, 0], WIDTH).wait() for c in comms[:AG]],
            *[lambda c=c: c.dispatch(None, [0, 0], [1, 1], WIDTH).wait() for c in comms[AG:]],
        )


def test_ranks_that_wait_for_each_other_are_named_not_hung() -> None:
    comms = local_world(1, 1, torch.float32)
    with pytest.raises(AssertionError, match="all wait for each other"):
        together(
            comms,
            lambda: comms[0].combine(None, [0], [1], WIDTH).wait(),
            lambda: comms[1].dispatch(None, [0], [1], WIDTH).wait(),
        )


def test_a_place_is_refused_outside_its_world() -> None:
    with pytest.raises(ValueError, match="rank 4 has no place among 2 attention and 2 expert ranks"):
        Place.of(4, 2, 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_cross_two_streams_of_one_gpu(dtype: torch.dtype) -> None:
    """What makes the rows is slow, and each side has a stream of its own: only the events order them."""
    comms = local_world(1, 1, dtype, "cuda", poison=True)
    want = rows(0, 4, dtype)

    def attention() -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)
            mine = want.cuda(non_blocking=True)
            handle = comms[0].dispatch(mine, [4], [0], WIDTH)
            back = comms[0].combine(None, [0], [4], WIDTH).wait()
            handle.wait()
            return back.cpu()

    def expert() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            got = comms[1].dispatch(None, [0], [4], WIDTH).wait()
            torch.cuda._sleep(50_000_000)
            comms[1].combine(got.clone(), [4], [0], WIDTH).wait()

    back, _ = together(comms, attention, expert)
    assert torch.equal(back.float(), want.float())
    for comm in comms:
        comm.close()
