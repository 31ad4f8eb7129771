"""The two exchanges between attention and expert ranks. Knows rows, splits and process groups; knows nothing of models or
plans, nor how the processes came to be (`world.py`), nor why a peer is gone (it asks its `Watch`).

    union world   [ attention 0 .. ag - 1 | expert 0 .. eg - 1 ]      a group over all of it for each direction: A2E, E2A

Both exchanges are `all_to_all_single` with zero splits among ranks of one role: the same call on Gloo and NCCL. A rank with
nothing to send or receive issues it all the same, and all ranks issue all exchanges of a direction in one order.

A result does not exist before `Handle.wait`: on Gloo it blocks the host, on NCCL the current stream. With `poison` that
shows everywhere: `Handle.buffer` holds NaN (-1 in integers) until then, rows must come out of the exchange as they went in,
the two sides' splits are compared, and nothing may be left unwaited for when a Comm is closed. (Gloo takes fewer rows than
expected without a word, and ends the process of a receiver of more.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dep_extension.buffers import Buffers

LOOK = timedelta(milliseconds=50)  # a waiting host looks this often whether somebody was lost
SMALL_FLOATS = {dtype for name in dir(torch) if isinstance(dtype := getattr(torch, name), torch.dtype)
                and dtype.is_floating_point and dtype.itemsize == 1}  # fmt: skip


class Role(Enum):
    ATTENTION = "attention"
    EXPERT = "expert"


@dataclass(frozen=True)
class Place:
    """Where a rank stands: `index` within its group, `ag` and `eg` ranks in the two."""

    role: Role
    index: int
    ag: int
    eg: int

    @classmethod
    def of(cls, rank: int, ag: int, eg: int) -> Place:
        """Of a rank of the union world."""
        if ag < 1 or eg < 1 or not 0 <= rank < ag + eg:
            raise ValueError(f"rank {rank} has no place among {ag} attention and {eg} expert ranks: at least 1 of each")
        return cls(Role.ATTENTION, rank, ag, eg) if rank < ag else cls(Role.EXPERT, rank - ag, ag, eg)

    @property
    def rank(self) -> int:
        """In the union world."""
        return self.index if self.role is Role.ATTENTION else self.ag + self.index

    @property
    def others(self) -> int:
        """Ranks of the other role."""
        return self.eg if self.role is Role.ATTENTION else self.ag

    def spread(self, splits: Sequence[int]) -> list[int]:
        """Splits over the other role, as splits over the union world."""
        assert len(splits) == self.others, f"{len(splits)} splits for {self.others} ranks of the other role"
        if self.role is Role.ATTENTION:
            return [0] * self.ag + [int(n) for n in splits]
        return [int(n) for n in splits] + [0] * self.eg

    def __str__(self) -> str:
        return f"{self.role.value} rank {self.index}"


class PeerLost(RuntimeError):
    """Ranks, by their numbers at launch, that are dead or no longer answer; none where nobody could be named."""

    def __init__(self, ranks: Sequence[int], why: str):
        super().__init__(why)
        self.ranks = tuple(ranks)


class Handle(Protocol):
    """An exchange under way. `buffer`: where the result will be, unreadable before `wait`."""

    buffer: Tensor

    def wait(self) -> Tensor:
        """The result; rows that were sent may be written again. Raises PeerLost."""

    def ended(self) -> bool:
        """Whether `wait` would wait no more, be it for a result or an error."""
        ...


class Comm(Protocol):
    """What a rank exchanges. Rows have the dtype that was named when it was opened."""

    place: Place
    generation: int
    blocks: bool  # a wait stops its thread, and may be made on any; else it lets others of its own thread run

    def counts(self, sent_EW: Tensor | None, width: int) -> Handle:
        """A2E. An attention rank sends (eg, width) int64, a row to each expert rank; an expert rank passes None and
        receives (ag, width). On the host, whatever the device."""

    def dispatch(self, rows_PD: Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> Handle:
        """A2E. An attention rank sends P rows, in order `to[e]` of them to expert rank e; an expert rank passes None and
        receives (sum(of), width), `of[a]` rows of attention rank a after each other."""

    def combine(self, rows_PD: Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> Handle:
        """E2A, the mirror: an expert rank sends `to[a]` rows to attention rank a, which receives `of[e]` of each."""

    def close(self) -> None: ...


class Watch(Protocol):
    """Who knows whether the others live."""

    def lost(self) -> PeerLost | None:
        """Asked while waiting, and before anything is issued."""

    def blame(self, error: Exception) -> PeerLost:
        """Whom to name for a failed exchange."""


class GroupComm:
    """A Comm over two process groups of torch.distributed, each over the whole union world.

    A group carries CPU tensors (counts) as well as those of `device` (rows): Gloo, or `cpu:gloo,cuda:nccl`.
    """

    blocks = True

    def __init__(
        self,
        place: Place,
        generation: int,
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        watch: Watch,
        dtype: torch.dtype,
        device: torch.device,
        poison: bool = False,
    ):
        self.place, self.generation = place, generation
        self._a2e, self._e2a = groups
        self._watch, self._dtype, self._device, self._poison = watch, dtype, device, poison
        self._buffers = Buffers()
        self._waiting: set[Exchange] = set()
        self._failed = False

    def counts(self, sent_EW: Tensor | None, width: int) -> Exchange:
        place, one = self.place, [1] * self.place.others
        none = [0] * place.others
        if place.role is Role.EXPERT:
            assert sent_EW is None, "expert ranks send no counts"
            return self._issue(self._a2e, _rows(width, torch.int64), none, one, width)
        assert sent_EW is not None and sent_EW.shape == (place.eg, width) and sent_EW.dtype == torch.int64
        return self._issue(self._a2e, sent_EW.cpu().contiguous(), one, none, width)

    def dispatch(self, rows_PD: Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> Exchange:
        return self._issue(self._a2e, self._sent(rows_PD, Role.ATTENTION, width), to, of, width)

    def combine(self, rows_PD: Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> Exchange:
        return self._issue(self._e2a, self._sent(rows_PD, Role.EXPERT, width), to, of, width)

    def everyone(self, mine_RW: Tensor) -> Tensor:
        """Between any two ranks, of one role too: row r to rank r of the union world; what came, (R, W) int64. Waits."""
        got = torch.empty_like(mine_RW)
        self._check()
        try:
            work = dist.all_to_all_single(got, mine_RW, group=self._a2e, async_op=True)
        except RuntimeError as error:
            self.fail()
            raise self._watch.blame(error) from error
        self.finish(work, True)
        return got

    def close(self) -> None:
        """The groups stay; whoever made them ends them."""
        left, self._waiting = self._waiting, set()
        assert self._failed or not (self._poison and left), f"{len(left)} exchanges were never waited for"

    def _sent(self, rows_PD: Tensor | None, sender: Role, width: int) -> Tensor:
        if self.place.role is not sender:
            assert rows_PD is None, f"{self.place} sends nothing in this direction"
            return _rows(width, self._dtype, self._device)
        assert rows_PD is not None and rows_PD.dtype == self._dtype and rows_PD.shape[1] == width
        return rows_PD.contiguous()

    def _issue(
        self, group: dist.ProcessGroup, sent: Tensor, to: Sequence[int], of: Sequence[int], width: int
    ) -> Exchange:
        assert sum(to) == len(sent), f"{sum(to)} rows by their splits, {len(sent)} by their tensor"
        self._check()
        got = self._room(sum(of), width, sent)
        splits = self.place.spread(to), self.place.spread(of)
        try:
            told = _tell(group, *splits) if self._poison else None
            work = dist.all_to_all_single(raw(got), raw(sent), splits[1], splits[0], group=group, async_op=True)
        except RuntimeError as error:
            self.fail()
            raise self._watch.blame(error) from error
        exchange = Exchange(self, work, sent, got, told)
        self._waiting.add(exchange)
        return exchange

    def _room(self, many: int, width: int, like: Tensor) -> Tensor:
        """(many, width) for what comes. A GPU's allocator keeps memory by itself."""
        if like.device.type != "cpu":
            return torch.empty(many, width, dtype=like.dtype, device=like.device)
        return self._buffers.rows(many, width, like.dtype)

    def finish(self, work: Any, on_host: bool) -> None:
        """Wait for what was issued: the host where it holds tensors of the host, else the current stream."""
        while not self._ended(work, on_host):
            self._check()

    def _ended(self, work: Any, on_host: bool) -> bool:
        try:
            work.wait(LOOK) if on_host and not work.is_completed() else work.wait()
        except RuntimeError as error:
            if not work.is_completed():
                return False
            return self._ended_well(work, error)
        return True

    def _ended_well(self, work: Any, error: Exception) -> bool:
        """It may have ended between running out of patience and asking."""
        try:
            work.wait()
        except RuntimeError:
            self.fail()
            raise self._watch.blame(error) from error
        return True

    def _check(self) -> None:
        if (gone := self._watch.lost()) is not None:
            self.fail()
            raise gone

    def settle(self, exchange: Exchange) -> None:
        self._waiting.discard(exchange)

    def fail(self) -> None:
        """What is under way will not end any more."""
        self._failed = True


class _Told(NamedTuple):
    """What the two sides of an exchange say of its splits, per rank of the union world."""

    work: Any
    mine: Tensor
    theirs: Tensor


class Exchange:
    """The handle of a GroupComm. Keeps what was sent until it is waited for: the transport still reads it."""

    def __init__(self, comm: GroupComm, work: Any, sent: Tensor, got: Tensor, told: _Told | None):
        self._comm, self._work, self._sent, self._got, self._told = comm, work, sent, got, told
        self._was = None if told is None else raw(sent).clone()
        self.buffer = got if told is None else poisoned(got)

    def wait(self) -> Tensor:
        if self._work is None:
            return self.buffer
        if self._told is not None:
            self._compare(self._told)
        self._comm.finish(self._work, self._got.device.type == "cpu")
        if self._was is not None:
            self._expect(
                torch.equal(raw(self._sent), self._was), "rows were written while their exchange was under way"
            )
            raw(self.buffer).copy_(raw(self._got))
        self._work = self._was = None
        self._comm.settle(self)
        del self._sent, self._got
        return self.buffer

    def ended(self) -> bool:
        return self._work is None or self._work.is_completed()

    def _compare(self, told: _Told) -> None:
        self._comm.finish(told.work, True)
        mine, theirs = told.mine.tolist(), told.theirs.tolist()
        self._expect(mine == theirs, f"{self._comm.place} expects splits {mine}, the others {theirs}")

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            self._comm.fail()
        assert holds, what


def _tell(group: dist.ProcessGroup, to: Sequence[int], of: Sequence[int]) -> _Told:
    """Tell every rank what is sent to it, or expected of it, and hear what it says: the same number if all is well."""
    mine = torch.tensor([a + b for a, b in zip(to, of, strict=True)])
    theirs = torch.full_like(mine, -1)
    return _Told(dist.all_to_all_single(theirs, mine.clone(), group=group, async_op=True), mine, theirs)


def _rows(width: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    return torch.empty(0, width, dtype=dtype, device=device)


def raw(rows: Tensor) -> Tensor:
    """As a transport takes it: Gloo knows no floats of eight bits."""
    return rows.view(torch.uint8) if rows.dtype in SMALL_FLOATS else rows


def poisoned(rows: Tensor) -> Tensor:
    """The same shape, with what no result holds: NaN, or -1 (all ones) in integers."""
    if not rows.is_floating_point():
        return torch.full_like(rows, 255 if rows.dtype == torch.uint8 else -1)
    nan = torch.full((1,), float("nan")).to(rows.dtype)
    bad = torch.empty_like(rows)
    raw(bad).copy_(raw(nan).to(rows.device).expand_as(raw(rows)))
    return bad
