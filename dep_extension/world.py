"""The union world of attention and expert ranks: its store, its groups, one generation after another. Knows the environment
that torchrun (or `launch.py`) sets; knows nothing of models or plans.

Everything is bound to one interface: loopback where all ranks are on one machine, else the one that was named. A store that
rank 0 hosts listens on MASTER_ADDR alone; one that a torchrun agent hosts listens where torchrun lets it: on all interfaces.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dep_extension.comm import GroupComm, Handle, PeerLost, Place

LOOPBACK = "lo0" if os.uname().sysname == "Darwin" else "lo"


@dataclass(frozen=True)
class Bounds:
    """Seconds. `group`: after which an exchange fails however alive its peers are."""

    group: float = 600.0
    store: float = 60.0


class World:
    """A Comm over processes. `ranks`: the launch rank of each rank of the union world."""

    def __init__(
        self, store: dist.Store, place: Place, dtype: torch.dtype, device: torch.device, bounds: Bounds, poison: bool
    ):
        self.place, self.generation = place, 0
        self.ranks = tuple(range(place.ag + place.eg))
        self._store, self._dtype, self._device, self._bounds, self._poison = store, dtype, device, bounds, poison
        self._comm = self._form()

    def counts(self, sent_EW: Tensor | None, width: int) -> Handle:
        return self._comm.counts(sent_EW, width)

    def dispatch(self, rows_PD: Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> Handle:
        return self._comm.dispatch(rows_PD, to, of, width)

    def combine(self, rows_PD: Tensor | None, to: Sequence[int], of: Sequence[int], width: int) -> Handle:
        return self._comm.combine(rows_PD, to, of, width)

    def close(self) -> None:
        self._comm.close()
        dist.destroy_process_group()

    def _form(self) -> GroupComm:
        """Both groups, made by every rank; a first tiny exchange in each, since the first needs all of them."""
        store = dist.PrefixStore(f"generation-{self.generation}", self._store)
        backend = "gloo" if self._device.type == "cpu" else "cpu:gloo,cuda:nccl"
        limit = timedelta(seconds=self._bounds.group)
        dist.init_process_group(backend, store=store, rank=self.place.rank, world_size=len(self.ranks), timeout=limit)
        everyone = list(range(len(self.ranks)))
        groups = dist.new_group(everyone, timeout=limit), dist.new_group(everyone, timeout=limit)
        comm = GroupComm(self.place, self.generation, groups, _Nobody(), self._dtype, self._device, self._poison)
        for group in groups:
            self._greet(group)
        return comm

    def _greet(self, group: dist.ProcessGroup) -> None:
        devices = {torch.device("cpu"), self._device}
        for device in sorted(devices, key=str):
            one = torch.zeros(len(self.ranks), dtype=torch.int64, device=device)
            dist.all_to_all_single(torch.empty_like(one), one, group=group)


class _Nobody:
    def lost(self) -> PeerLost | None:
        return None

    def blame(self, error: Exception) -> PeerLost:
        return PeerLost((), f"an exchange failed - {error}".splitlines()[0])


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

    `poison` None: as DEP_POISON says. Raises ValueError of one line for an environment that cannot be, PeerLost where
    somebody does not come.
    """
    bounds = bounds or Bounds()
    bind(place, interface, env)
    poison = env.get("DEP_POISON", "") not in ("", "0") if poison is None else poison
    return World(join_store(env, bounds), place, dtype, torch.device(device), bounds, poison)


def bind(place: Place, interface: str | None, env: Mapping[str, str]) -> None:
    """Gloo and NCCL talk over this interface only."""
    alone = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE") or _is_loopback(env.get("MASTER_ADDR", ""))
    named = interface or env.get("GLOO_SOCKET_IFNAME") or (LOOPBACK if alone else None)
    if named is None:
        raise ValueError(f"ranks meet at {env['MASTER_ADDR']}, over no named interface - name one: --interface eth0")
    if named not in (known := [name for _, name in socket.if_nameindex()]):
        raise ValueError(f"no interface {named} here - there are {', '.join(known)}")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = named


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(address)).is_loopback
    except OSError:
        return False


def join_store(env: Mapping[str, str], bounds: Bounds) -> dist.Store:
    """The store of this run: an agent or a launcher hosts it, else rank 0 does."""
    address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if not address or not port:
        raise ValueError(
            "MASTER_ADDR and MASTER_PORT are not set - start with torchrun or `python -m dep_extension launch`"
        )
    limit = timedelta(seconds=bounds.store)
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and env["RANK"] == "0":
        store: dist.Store = host_store(address, int(port), bounds.store)
    else:
        store = dist.TCPStore(address, int(port), is_master=False, timeout=limit)
    return dist.PrefixStore(f"dep/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def host_store(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """A store that listens on this address only; left to itself it would on all. Port 0: any, see its `port`."""
    listener = listen(address, port)
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
