"""Starts a rank per process and outlives them all. Knows processes and the store that it hosts; knows nothing of what they
compute.

    launcher (store) -+- rank 0, attention   its output is the launcher's
                      +- rank 1, ...         what they write goes to standard error, each line with its rank
    another machine's launcher (no store) -- its ranks

An agent of torchrun ends all its workers when one dies. This one tells the others through the store, and ends them only
where nothing can go on: an attention rank is lost, and they had time to say so. When the launcher itself is killed, the
kernel ends its ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch.distributed as dist

from dep_extension.comm import Place
from dep_extension.faults import LEFT, Bounds, Log, Store, name_of, note, read_log
from dep_extension.world import host_store, is_loopback, listen

BOUNDS = Bounds()
ENDING = 60.0  # seconds that an interpreter may take to end
LOOK = 0.02  # seconds between two looks at the ranks
DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


@dataclass
class Rank:
    """A process that was started here. `status`: its exit status, once it has one; negative: the signal that ended it."""

    number: int
    name: str
    process: subprocess.Popen[bytes]
    status: int | None = None
    ended: bool = False  # by the launcher, since it no longer answered
    half: dict[int, bytes] = field(default_factory=dict)  # of a line, by file descriptor

    @property
    def fate(self) -> str:
        if self.ended:
            return "no longer answered, and was ended"
        assert self.status is not None
        if self.status < 0:
            return f"was killed by signal {-self.status}"
        return "gave up because another was lost" if self.status == LEFT else f"ended with status {self.status}"


@dataclass(frozen=True)
class Job:
    """What to start: `ranks` of the `ag + eg` here, the others by launchers elsewhere. `address`, `port`: where all meet;
    port 0: any that is free. `threads`: for each rank's arithmetic."""

    command: tuple[str, ...]
    ag: int
    eg: int
    ranks: tuple[int, ...]
    address: str = "127.0.0.1"
    port: int = 0
    threads: int | None = None
    interface: str | None = None
    bounds: Bounds = BOUNDS

    @property
    def hosts(self) -> bool:
        """The launcher of rank 0 hosts the store."""
        return 0 in self.ranks


def supervise(job: Job) -> int:
    """Start all, wait for all; the exit status: 0 where every attention rank here ended well, else 1.

    Ranks that died are named on standard error. SIGTERM and SIGINT end all ranks first.
    """
    listener = listen(job.address, job.port) if job.hosts else None
    port = job.port if listener is None else listener.getsockname()[1]
    ranks: list[Rank] = []
    try:
        for number in job.ranks:  # before there are threads: a fork of one thread is safe
            ranks.append(_start(job, number, port))
        store = _store(job, port, listener)
        with _signals(ranks):
            _wait(ranks, job, store)
    finally:
        _end(ranks)
    return _report(ranks, job.ag)


def _store(job: Job, port: int, listener: socket.socket | None) -> Store:
    if listener is not None:
        hosted = host_store(job.address, port, job.bounds.form, listener)
    else:
        hosted = dist.TCPStore(job.address, port, is_master=False)
    store = dist.PrefixStore("dep/0", hosted)
    note(store, "here launcher")  # so that there is a log
    return store


def _start(job: Job, number: int, port: int) -> Rank:
    place = Place.of(number, job.ag, job.eg)
    first = number == 0
    process = subprocess.Popen(
        job.command,
        env={**os.environ, **_environment(job, number, port)},
        stdin=None if first else subprocess.DEVNULL,
        stdout=None if first else subprocess.PIPE,
        stderr=None if first else subprocess.PIPE,
        preexec_fn=dies_with(os.getpid()),
    )
    return Rank(number, name_of(place.rank, job.ag, job.eg), process)


def _environment(job: Job, number: int, port: int) -> dict[str, str]:
    """As torchrun sets it."""
    env = {
        "RANK": str(number),
        "WORLD_SIZE": str(job.ag + job.eg),
        "LOCAL_RANK": str(job.ranks.index(number)),
        "LOCAL_WORLD_SIZE": str(len(job.ranks)),
        "MASTER_ADDR": job.address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if job.threads is not None:
        env["OMP_NUM_THREADS"] = str(job.threads)
    env["DEP_STALL"] = str(job.bounds.stall)
    if job.interface is not None:
        env["GLOO_SOCKET_IFNAME"] = job.interface
    return env


def dies_with(parent: int) -> Callable[[], None]:
    """Run in the child before its program: the kernel kills it when its parent is gone, however that ends."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux alone has it

    def ask() -> None:
        if prctl is not None:
            prctl(DIES_WITH_PARENT, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    return ask


def _wait(ranks: Sequence[Rank], job: Job, store: Store) -> None:
    """Until all have ended. Once the run is over those who still run have time to notice, and are ended then."""
    looked, over = 0.0, math.inf  # when the run was last looked at; since when it is over
    with selectors.DefaultSelector() as pipes:
        for rank in ranks:
            for pipe in filter(None, (rank.process.stdout, rank.process.stderr)):
                os.set_blocking(pipe.fileno(), False)
                pipes.register(pipe, selectors.EVENT_READ, rank)
        while any(rank.status is None for rank in ranks):
            _forward(pipes)
            for rank in filter(_just_ended, ranks):
                _tell(rank, job, store)
                looked = 0.0
            if (now := time.monotonic()) - looked > job.bounds.beat:
                looked, log = now, _look(store)
                over = min(over, now) if _is_over(log, job) else math.inf
                _give_up([rank for rank in ranks if now - over > _patience(rank, log, job)])
        _forward(pipes)


def _look(store: Store) -> Log | None:
    """None where the store was another launcher's, and is gone with it."""
    try:
        return read_log(store)
    except RuntimeError:
        return None


def _is_over(log: Log | None, job: Job) -> bool:
    """Every attention rank has left, or one of them is lost: whoever still runs is of no more use."""
    attention = set(range(job.ag))
    return log is None or attention <= log.left or bool(attention & (log.dead.keys() | log.over))


def _patience(rank: Rank, log: Log | None, job: Job) -> float:
    """Seconds. Who has left has an interpreter to end; the others had better notice that somebody is lost."""
    return ENDING if log is not None and rank.number in log.left else job.bounds.stall + 10 * job.bounds.beat + 2


def _give_up(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        if rank.status is None and not rank.ended:
            rank.ended = True
            rank.process.kill()


def _just_ended(rank: Rank) -> bool:
    if rank.status is not None:
        return False
    rank.status = rank.process.poll()
    return rank.status is not None


def _tell(rank: Rank, job: Job, store: Store) -> None:
    """Tell the others what became of a rank."""
    with contextlib.suppress(RuntimeError):  # the store was another launcher's, and is gone with it
        if rank.status not in (0, LEFT):
            note(store, f"dead {rank.number} {rank.fate}")
        elif rank.status == LEFT and rank.number < job.ag:
            note(store, f"over {rank.number}")
        else:
            note(store, f"left {rank.number}")


def _forward(pipes: selectors.BaseSelector) -> None:
    """What ranks wrote, in whole lines, to standard error."""
    if not pipes.get_map():
        time.sleep(LOOK)
    for key, _ in pipes.select(LOOK):
        pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
        while data := pipe.read(65536):
            *lines, rest = (key.data.half.get(key.fd, b"") + data).split(b"\n")
            key.data.half[key.fd] = rest
            _write(key.data, lines)
        if data is not None:  # the end, not a pause
            _write(key.data, [rest for rest in [key.data.half.pop(key.fd, b"")] if rest])
            pipes.unregister(pipe)


def _write(rank: Rank, lines: Sequence[bytes]) -> None:
    for line in lines:
        print(f"[{rank.name}] {line.decode(errors='replace')}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals(ranks: Sequence[Rank]) -> Iterator[None]:
    """A signal to the launcher ends the ranks, then the launcher."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(ranks: Sequence[Rank]) -> None:
    """Kill what still runs, or is stopped, and reap it."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
    for rank in ranks:
        rank.process.wait()


def _report(ranks: Sequence[Rank], ag: int) -> int:
    for rank in ranks:
        if rank.status != 0:
            print(f"{rank.name} {rank.fate}", file=sys.stderr)
    vital = [rank for rank in ranks if rank.number < ag] or list(ranks)
    return 0 if all(rank.status == 0 for rank in vital) else 1


def launch(argv: Sequence[str]) -> int:
    """`--attention-ranks A --expert-ranks E [...] -- COMMAND ...`: runs `python -m dep_extension COMMAND ...` on every rank.

    Returns the exit status; raises ValueError of one line for what cannot be.
    """
    own, _, command = _split(argv)
    options = _parser().parse_args(own)
    if not command:
        raise ValueError("nothing to launch - write it behind --, like: launch ... -- generate --prompt Hello")
    ag, eg = options.attention_ranks, options.expert_ranks
    sizes = ("--attention-ranks", str(ag), "--expert-ranks", str(eg))
    address, port = _meeting(options.rendezvous, options.interface)
    ranks = _some(options.ranks, ag + eg)
    program = (sys.executable, "-m", "dep_extension", command[0], *sizes, *command[1:])
    bounds = Bounds(stall=options.stall)
    return supervise(Job(program, ag, eg, ranks, address, port, options.threads, options.interface, bounds))


def _split(argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), "--", list(argv[at + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dep_extension launch", allow_abbrev=False)
    parser.add_argument("--attention-ranks", type=int, default=1)
    parser.add_argument("--expert-ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of each rank's arithmetic")
    parser.add_argument("--ranks", help="the ranks to start here, like 0-1; all by default")
    parser.add_argument("--rendezvous", default="127.0.0.1:0", help="HOST:PORT; the launcher of rank 0 listens there")
    parser.add_argument(
        "--stall", type=float, default=BOUNDS.stall, help="seconds of silence after which a rank is lost"
    )
    parser.add_argument("--interface", help="the network that ranks talk over, like eth0; loopback by default")
    return parser


def _meeting(text: str, interface: str | None) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"--rendezvous {text} is no HOST:PORT - write it like 10.0.0.1:29500")
    if interface is None and not is_loopback(host):
        raise ValueError(f"ranks would meet at {host}, over no named interface - name one: --interface eth0")
    return host, int(port)


def _some(text: str | None, many: int) -> tuple[int, ...]:
    """The ranks to start here: "2-3" or "2"."""
    if text is None:
        return tuple(range(many))
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or not int(first) <= int(last or first) < many:
        raise ValueError(f"--ranks {text} is no part of 0-{many - 1} - write it like 0-{max(0, many // 2 - 1)}")
    return tuple(range(int(first), int(last or first) + 1))
