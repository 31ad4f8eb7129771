"""Memory of received rows is used again, and never while anybody can still read them."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor

from dep_extension.buffers import KEPT, SMALL, Buffers

WIDTH = SMALL // 4  # one row of float32 is large enough to be kept


def test_memory_is_lent_again_once_the_last_view_is_gone_and_no_sooner() -> None:
    buffers = Buffers()
    first = buffers.rows(2, WIDTH, torch.float32).fill_(7)
    where, view = first.data_ptr(), first[1:]
    del first
    other = buffers.rows(2, WIDTH, torch.float32).fill_(8)
    assert other.data_ptr() != where and view.eq(7).all()
    del view
    assert buffers.rows(2, WIDTH, torch.float32).data_ptr() == where


def test_what_is_lent_at_once_never_overlaps_whatever_is_dropped_in_between() -> None:
    buffers, held = Buffers(), dict[int, Tensor]()
    draw = torch.Generator().manual_seed(0)
    for number in range(200):
        many, drop = torch.randint(1, 6, (2,), generator=draw).tolist()
        held[number] = buffers.rows(many, WIDTH, torch.float32).fill_(number)[:, ::2]
        for gone in list(held)[: max(0, len(held) - 2 * drop)]:
            del held[gone]
        assert all(rows.eq(value).all() for value, rows in held.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.float8_e4m3fn], ids=str)
def test_rows_of_any_dtype_lie_in_the_same_memory(dtype: torch.dtype) -> None:
    buffers = Buffers()
    where = buffers.rows(1, WIDTH, torch.float32).data_ptr()
    rows = buffers.rows(4 // dtype.itemsize or 1, WIDTH * 4 // max(4, dtype.itemsize), dtype)
    assert rows.dtype == dtype and rows.is_contiguous() and rows.data_ptr() == where


def test_memory_let_go_of_on_another_thread_is_lent_again() -> None:
    buffers = Buffers()
    rows = [buffers.rows(1, WIDTH, torch.float32)]
    where = rows[0].data_ptr()
    thread = threading.Thread(target=rows.clear)
    thread.start()
    thread.join()
    assert buffers.rows(1, WIDTH, torch.float32).data_ptr() == where


def test_what_is_no_longer_wanted_is_let_go() -> None:
    """A prompt's large rows do not stay for all of the decoding."""
    buffers = Buffers()
    buffers.rows(64, WIDTH, torch.float32)
    assert buffers.free_bytes >= 64 * SMALL
    for _ in range(KEPT + 2):
        buffers.rows(1, WIDTH, torch.float32)
    gc.collect()
    assert SMALL <= buffers.free_bytes <= 2 * SMALL
