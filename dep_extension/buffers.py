"""Memory that received rows lie in, used again once nobody can read them. Knows bytes and who still refers to them; knows
nothing of exchanges.

Memory fresh from the system costs a page fault every 4 KB, and of a large exchange within one machine those are about half.

    free block -> lent, as an array of its own -> a tensor's storage holds the array -> the last tensor, view or transport
       ^                                                                                lets go of that storage
       '------------------------------------------------------------------------------------------'

So nobody hands a buffer back, and none can be handed out while rows in it may still be read.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

SMALL = 1 << 17  # bytes below which malloc keeps what it frees
KEPT = 64  # a free block that was not wanted for as many lendings is let go
ROOMY = 2  # a block may be so many times as large as what is asked for


class _Block:
    """Bytes, and the lending at which they were last used."""

    def __init__(self, size: int, turn: int):
        self.bytes_N: Any = torch.empty(size, dtype=torch.uint8).numpy()
        self.turn = turn


class Buffers:
    """Host memory for rows. May be asked, and let go of, on any thread."""

    def __init__(self) -> None:
        self._free: list[_Block] = []
        self._turn = 0

    def rows(self, many: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """(many, width), holding whatever was there before."""
        size = many * width * dtype.itemsize
        if size < SMALL:
            return torch.empty(many, width, dtype=dtype)
        block = self._take(size)
        lent_N = block.bytes_N[:size]
        weakref.finalize(lent_N, self._free.append, block).atexit = False
        return torch.from_numpy(lent_N).view(dtype).view(many, width)

    @property
    def free_bytes(self) -> int:
        """Kept for those to come."""
        return sum(block.bytes_N.nbytes for block in list(self._free))

    def _take(self, size: int) -> _Block:
        """The smallest free block that will do, else a new one, a little larger so that the next, uneven one fits too."""
        self._turn += 1
        self._let_go()
        for block in sorted(self._free, key=lambda block: block.bytes_N.nbytes):
            if size <= block.bytes_N.nbytes <= ROOMY * size and self._claim(block):
                block.turn = self._turn
                return block
        step = 1 << max(0, size.bit_length() - 4)
        return _Block(-(-size // step) * step, self._turn)

    def _let_go(self) -> None:
        for block in list(self._free):
            if block.turn < self._turn - KEPT:
                self._claim(block)

    def _claim(self, block: _Block) -> bool:
        """Whether it was still free."""
        try:
            self._free.remove(block)
        except ValueError:
            return False
        return True
