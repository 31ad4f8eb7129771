"""The union world of attention and expert ranks: its store, its groups, one generation after another. Knows the environment
that torchrun (or `launch.py`) sets; knows nothing of models or plans.

Everything is bound to one interface: loopback where all ranks are on one machine, else the one that was named. A store that
rank 0 hosts listens on MASTER_ADDR alone; one that a torchrun agent hosts listens where torchrun lets it: on all interfaces.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dep_extension.comm import GroupComm, Handle, PeerLost, Place
from dep_extension.faults import NAP, Bounds, Store, Vigil, agree, name_of, read_log

LOOPBACK = "lo0" if os.uname().sysname == "Darwin" else "lo"


class Loss(NamedTuple):
    """Who is no longer in the world: launch ranks, and their numbers in the expert group as it was before."""

    ranks: tuple[int, ...]
    experts: tuple[int, ...]


class World:
    """A Comm over processes, and over what is left of them after a loss: then `place` and `generation` are new.

    `ranks`: the launch rank of each rank of the union world. Losses are named by launch ranks always. `absent`: those who
    were lost before there was a world.
    """

    blocks = True

    def __init__(
        self, store: Store, place: Place, dtype: torch.dtype, device: torch.device, bounds: Bounds, poison: bool
    ):
        self.place, self.generation = place, -1
        self.ranks = tuple(range(place.ag + place.eg))
        self._me, self._launched = place.rank, place
        self._store, self._dtype, self._device, self._bounds, self._poison = store, dtype, device, bounds, poison
        self._vigil = Vigil(store.clone(), self._me, self.name, bounds)
        try:
            self.absent = self.reform()
        except PeerLost:
            self._vigil.stop(left=False)
            raise

    def counts(self, sent_EW: Tensor | None, width: int) -> Handle:
        return self._comm.counts(sent_EW, width)

    def dispatch(self, rows_PD: Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> Handle:
        return self._comm.dispatch(rows_PD, to, of, width)

    def combine(self, rows_PD: Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> Handle:
        return self._comm.combine(rows_PD, to, of, width)

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """What every rank of the union world says, as many numbers each; waits for all of them."""
        everyone = len(self.ranks)
        mine = torch.tensor(list(numbers) * everyone, dtype=torch.int64).reshape(everyone, -1)
        return self._comm.everyone(mine).tolist()

    def tell(self, text: str) -> list[str]:
        """What every rank says, in words; waits for all of them."""
        said = text.encode()
        lengths = [n for (n,) in self.gather([len(said)])]
        room = -(-max(1, *lengths) // 8) * 8
        numbers = torch.frombuffer(bytearray(said.ljust(room, b"\0")), dtype=torch.int64).tolist()
        heard = torch.tensor(self.gather(numbers)).view(torch.uint8)
        return [bytes(one[:n].tolist()).decode() for one, n in zip(heard, lengths, strict=True)]

    def name(self, rank: int) -> str:
        """What a launch rank is called in messages."""
        return name_of(rank, self._launched.ag, self._launched.eg)

    def close(self) -> None:
        """Leave on good terms: everything that was issued has been waited for."""
        whole = self._vigil.lost() is None
        self._comm.close()
        self._vigil.stop(left=True)
        if whole and dist.is_initialized():
            dist.destroy_process_group()
        else:
            self._end_groups()

    def abandon(self) -> None:
        """Leave because another is lost: without waiting for anything."""
        self._vigil.stop(left=False)
        self._end_groups()

    def see_off(self, rank: int) -> None:
        """Wait until this launch rank has left. Raises PeerLost where somebody is lost before."""
        while not self.has_left(rank):
            if (gone := self._vigil.lost()) is not None and not self.has_left(rank):
                raise gone
            time.sleep(NAP)

    def has_left(self, rank: int) -> bool:
        """On good terms; or the store went with it."""
        try:
            return rank in read_log(self._store).left
        except RuntimeError:
            return True

    def reform(self) -> Loss:
        """After PeerLost, and at first: agree with the others on who is there, and form the next generation with them.

        Exchanges that were under way are void. Raises PeerLost where an attention rank is lost (its keys and values are
        gone) or no expert rank is left, Fenced where the others took this one for lost. Bounded: `join` + `form` seconds
        for each rank that is lost meanwhile.
        """
        before, place = self.ranks, self.place
        while True:
            self._end_groups()
            self._regroup()
            try:
                self._comm = self._form()
                break
            except RuntimeError as error:  # another was lost while the groups were made
                absent = self._absent(error)
                if not absent.ranks:
                    raise absent from error
        lost = tuple(rank for rank in before if rank not in self.ranks)
        return Loss(lost, tuple(before.index(rank) - place.ag for rank in lost))

    def _regroup(self) -> None:
        """The survivors, in their former order, are the ranks of the next generation."""
        generation, members = self.generation + 1, self.ranks
        bound = self._bounds.join if generation else self._bounds.form
        self.ranks = agree(self._store, generation, members, self._me, self._vigil.gone, bound)
        self.generation = generation
        lost = [rank for rank in members if rank not in self.ranks]
        ag = sum(rank < self._launched.ag for rank in self.ranks)
        if ag < self.place.ag or ag == len(self.ranks):
            raise PeerLost(lost, f"{self._why(lost)}: {self._whose(ag)}")
        self.place = Place.of(self.ranks.index(self._me), ag, len(self.ranks) - ag)

    def _whose(self, ag: int) -> str:
        if ag == self.place.ag:
            return "no expert rank is left"
        return "its keys and values are gone" if self.generation else "nobody else attends to its prompts"

    def _why(self, lost: Sequence[int]) -> str:
        known = self._vigil.gone() | read_log(self._store).dead
        return "; ".join(f"{self.name(rank)} {known.get(rank, 'did not join the others')}" for rank in lost)

    def _form(self) -> GroupComm:
        """Both groups, made by every rank; a first tiny exchange in each, since the first needs all of them."""
        store = dist.PrefixStore(f"generation-{self.generation}", self._store)
        backend = "gloo" if self._device.type == "cpu" else "cpu:gloo,cuda:nccl"
        limit, everyone = timedelta(seconds=self._bounds.form), list(range(len(self.ranks)))
        dist.init_process_group(backend, store=store, rank=self.place.rank, world_size=len(self.ranks), timeout=limit)
        groups = dist.new_group(everyone, timeout=limit), dist.new_group(everyone, timeout=limit)
        for group in groups:
            self._greet(group)
            group.set_timeout(timedelta(seconds=self._bounds.exchange))
        self._vigil.follow(self.ranks, self.generation)
        return GroupComm(self.place, self.generation, groups, self._vigil, self._dtype, self._device, self._poison)

    def _greet(self, group: dist.ProcessGroup) -> None:
        for device in sorted({torch.device("cpu"), self._device}, key=str):
            one = torch.zeros(len(self.ranks), dtype=torch.int64, device=device)
            dist.all_to_all_single(torch.empty_like(one), one, group=group)

    def _end_groups(self) -> None:
        """NCCL's exchanges are aborted. Gloo's are not: the destructor of a group would wait for them until the peer's
        connection ends, which a stopped peer's does not; so a group that was lost is never destroyed."""
        if not dist.is_initialized():
            return
        for group in list(dist.distributed_c10d._world.pg_map):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
            group.abort()
        dist.destroy_process_group()

    def _absent(self, error: Exception) -> PeerLost:
        """Whom to name where groups could not be made."""
        came = read_log(self._store)
        missing = [rank for rank in self.ranks if rank in came.dead or not self._store.check([f"beat/{rank}"])]
        missing = missing or [rank for rank in self.ranks if rank in self._vigil.gone()]
        what = "; ".join(
            f"{self.name(rank)} {came.dead.get(rank, f'did not come within {self._bounds.form:g} s')}"
            for rank in missing
        )
        return PeerLost(missing, what or f"groups could not be made: {str(error).splitlines()[0]}")


def here(ag: int, eg: int, env: Mapping[str, str] = os.environ) -> Place:
    """The place of this process among `ag` attention and `eg` expert ranks, by torchrun's environment."""
    if "RANK" not in env or "WORLD_SIZE" not in env:
        raise ValueError("RANK and WORLD_SIZE are not set - start with torchrun or `python -m dep_extension launch`")
    if int(env["WORLD_SIZE"]) != ag + eg:
        raise ValueError(
            f"{env['WORLD_SIZE']} processes were started for {ag} attention and {eg} expert ranks - start {ag + eg}"
        )
    return Place.of(int(env["RANK"]), ag, eg)


def open_world(
    place: Place,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    interface: str | None = None,
    bounds: Bounds | None = None,
    poison: bool | None = None,
    env: Mapping[str, str] = os.environ,
) -> World:
    """Join the world that the environment names; returns when all ranks are there.

    `poison` None: as DEP_POISON says; `bounds` None: as usual, `stall` as DEP_STALL says. Raises ValueError of one
    line for an environment that cannot be, PeerLost where somebody does not come.
    """
    bounds = bounds or Bounds(stall=float(env.get("DEP_STALL", Bounds.stall)))
    bind(place, interface, env)
    poison = env.get("DEP_POISON", "") not in ("", "0") if poison is None else poison
    return World(join_store(env, bounds), place, dtype, torch.device(device), bounds, poison)


def bind(place: Place, interface: str | None, env: Mapping[str, str]) -> None:
    """Gloo and NCCL talk over this interface only."""
    alone = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE") or is_loopback(env.get("MASTER_ADDR", ""))
    named = interface or env.get("GLOO_SOCKET_IFNAME") or (LOOPBACK if alone else None)
    if named is None:
        raise ValueError(f"ranks meet at {env['MASTER_ADDR']}, over no named interface - name one: --interface eth0")
    if named not in (known := [name for _, name in socket.if_nameindex()]):
        raise ValueError(f"no interface {named} here - there are {', '.join(known)}")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = named


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(address)).is_loopback
    except OSError:
        return False


def join_store(env: Mapping[str, str], bounds: Bounds) -> Store:
    """The store of this run: an agent or a launcher hosts it, else rank 0 does."""
    address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if not address or not port:
        raise ValueError(
            "MASTER_ADDR and MASTER_PORT are not set - start with torchrun or `python -m dep_extension launch`"
        )
    limit = timedelta(seconds=bounds.form)
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and env["RANK"] == "0":
        store: Store = host_store(address, int(port), bounds.form)
    else:
        store = dist.TCPStore(address, int(port), is_master=False, timeout=limit)
    return dist.PrefixStore(f"dep/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def host_store(address: str, port: int, timeout_s: float, listener: socket.socket | None = None) -> dist.TCPStore:
    """A store that listens on this address only; left to itself it would on all. Port 0: any, see its `port`.

    `listener`: a socket that listens there already."""
    listener = listener or listen(address, port)
    return dist.TCPStore(
        address,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def listen(address: str, port: int) -> socket.socket:
    family, kind, proto, _, at = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(at)
    listener.listen(256)
    return listener
