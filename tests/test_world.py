"""Ranks as processes: started together, ended together, and what the others do when one is killed or no longer answers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist

from dep_extension.comm import Place, Role
from dep_extension.faults import Bounds, Fenced, Log, agree, note
from dep_extension.launch import launch
from dep_extension.world import bind, here, host_store, join_store

HERE = Path(__file__).parent
SUPERVISE = """
import sys
from dep_extension.faults import Bounds
from dep_extension.launch import Job, supervise
ag, eg, stall, *command = sys.argv[1:]
every = tuple(range(int(ag) + int(eg)))
sys.exit(supervise(Job(tuple(command), int(ag), int(eg), every, threads=1, bounds=Bounds(beat=0.1, stall=float(stall)))))
"""
STALL = 5.0


def environment(ag: int, eg: int, never: int) -> dict[str, str]:
    ours = {"AG": str(ag), "EG": str(eg), "STALL": str(STALL), "NEVER": str(never), "PYTHONPATH": str(HERE.parent)}
    return {**os.environ, **ours}


class Run:
    """A launcher with its ranks."""

    def __init__(self, folder: Path, ag: int, eg: int, *command: str, never: int = -1):
        self.folder, self.ranks = folder, ag + eg
        full = [sys.executable, "-c", SUPERVISE, str(ag), str(eg), str(STALL), *command]
        self.process = started(full, ag, eg, never)

    @classmethod
    def rounds(cls, folder: Path, ag: int, eg: int, many: int, manner: str, never: int = -1) -> Run:
        """Of tests/ranks.py; returns when all ranks have met but the one that never comes."""
        command = (sys.executable, str(HERE / "ranks.py"), str(folder), str(many), manner)
        run = cls(folder, ag, eg, *command, never=never)
        run.await_files(*(f"rank-{rank}" for rank in range(ag + eg) if rank != never))
        return run

    def await_files(self, *names: str) -> None:
        deadline = time.monotonic() + 120
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline and self.process.poll() is None, self.end()
            time.sleep(0.02)

    def pid(self, rank: int) -> int:
        return int((self.folder / f"rank-{rank}").read_text())

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pid(rank), number)

    def end(self) -> Ended:
        """Waits for it; it has a bound, and this one is beyond it."""
        try:
            out, err = self.process.communicate(timeout=120)
        finally:
            self.process.kill()
        return Ended(self.process.returncode, out, err)


def started(command: list[str], ag: int, eg: int, never: int = -1) -> subprocess.Popen[str]:
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, env=environment(ag, eg, never), stdin=none, stdout=pipe, stderr=pipe, text=True)


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_and_stopped_expert_ranks_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    """Of four expert ranks one is killed before it comes, one later, then one stopped; when it wakes it finds itself left
    out."""
    run = Run.rounds(tmp_path, 2, 4, 120, "recover", never=5)
    run.send(4, signal.SIGKILL)
    run.await_files("generation-1-0", "generation-1-1", "generation-1-2", "generation-1-3")
    run.send(3, signal.SIGSTOP)
    run.await_files("generation-2-0", "generation-2-1", "generation-2-2")
    run.send(3, signal.SIGCONT)
    ended = run.end()
    assert ended.status == 0, ended.err
    assert ended.out == "120 rounds, generation 2\n"
    for name in ("expert rank 3 (rank 5)", "expert rank 2 (rank 4)"):
        assert f"{name} was killed by signal 9" in ended.err
    assert "lost: expert rank 1 (rank 3) has not answered for" in ended.err
    assert "[expert rank 1 (rank 3)] over: rank 3 was taken for lost: generation 2 is of ranks (0, 1, 2)" in ended.err
    assert "expert rank 1 (rank 3) gave up because another was lost" in ended.err
    assert not any(alive(run.pid(rank)) for rank in range(5))


@pytest.mark.slow
def test_a_stopped_attention_rank_is_named_and_everybody_ends(tmp_path: Path) -> None:
    run = Run.rounds(tmp_path, 2, 1, 100_000, "recover")
    run.send(1, signal.SIGSTOP)
    ended = run.end()
    assert ended.status == 1 and ended.out == ""
    assert "lost: attention rank 1 (rank 1) has not answered for" in ended.err
    assert "its keys and values are gone" in ended.err
    assert "attention rank 1 (rank 1) no longer answered, and was ended" in ended.err
    assert not any(alive(run.pid(rank)) for rank in range(3))


@pytest.mark.slow
def test_an_attention_rank_that_never_comes_is_named_and_everybody_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, 1, sys.executable, str(HERE / "ranks.py"), str(tmp_path), "9", "recover", never=1)
    ended = run.end()
    assert ended.status == 1 and ended.out == ""
    assert "attention rank 1 (rank 1) was killed by signal 9: nobody else attends to its prompts" in ended.err


@pytest.mark.slow
def test_a_killed_attention_rank_is_named_and_everybody_ends(tmp_path: Path) -> None:
    run = Run.rounds(tmp_path, 2, 1, 100_000, "recover")
    run.send(1, signal.SIGKILL)
    ended = run.end()
    assert ended.status == 1 and ended.out == ""
    assert "over: attention rank 1 (rank 1) was killed by signal 9: its keys and values are gone" in ended.err
    assert not any(alive(run.pid(rank)) for rank in range(3))


@pytest.mark.slow
def test_two_launchers_are_one_run(tmp_path: Path) -> None:
    """As on two machines: the second has no store, and its expert rank is killed."""
    port = free_port()
    program = [sys.executable, str(HERE / "ranks.py"), str(tmp_path), "200", "recover"]
    args = [(f"(0, 1), port={port}"), (f"(2, 3), port={port}")]
    text = SUPERVISE.replace("every, threads", "PART, threads")
    both = [
        started([sys.executable, "-c", text.replace("PART", part), "2", "2", str(STALL), *program], 2, 2)
        for part in args
    ]
    run = Run.__new__(Run)
    run.folder, run.process = tmp_path, both[0]
    run.await_files(*(f"rank-{rank}" for rank in range(4)))
    run.send(3, signal.SIGKILL)
    outs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 1], outs
    assert outs[0][0] == "200 rounds, generation 1\n"
    assert "expert rank 1 (rank 3) was killed by signal 9" in outs[1][1]


@pytest.mark.slow
def test_single_worker_agents_of_torchrun_outlive_a_rank(tmp_path: Path) -> None:
    port = free_port()
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "3",
        "--nproc-per-node",
        "1",
        "--rdzv-id",
        "1",
    ]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    torchrun += ["--max-restarts", "0", str(HERE / "ranks.py"), str(tmp_path), "200", "recover"]
    agents = [started(torchrun, 1, 2) for _ in range(3)]
    run = Run.__new__(Run)
    run.folder, run.process = tmp_path, agents[0]
    run.await_files(*(f"rank-{rank}" for rank in range(3)))
    run.process = next(agent for agent in agents if agent.pid != parent(run.pid(2)))  # ranks go by who comes first
    run.send(2, signal.SIGKILL)
    try:
        run.await_files("done-0", "done-1")  # the agents themselves wait five minutes more for the one that failed
        assert (tmp_path / "done-0").read_text() == "200 rounds, generation 1"
    finally:
        for agent in agents:
            agent.terminate()
            agent.communicate(timeout=60)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SPEAK = """
import os, sys, time
rank = os.environ["RANK"]
print("out of", rank, flush=True)
print("err of", rank, file=sys.stderr, flush=True)
sys.exit(3 if rank == sys.argv[1] else 0)
"""


def test_the_first_rank_speaks_for_all_and_others_are_named_in_front_of_what_they_write(tmp_path: Path) -> None:
    ended = Run(tmp_path, 1, 2, sys.executable, "-c", SPEAK, "2").end()
    assert ended.status == 0, "every attention rank ended well"
    assert ended.out == "out of 0\n"
    for line in ("err of 0", "[expert rank 0 (rank 1)] out of 1", "[expert rank 1 (rank 2)] err of 2"):
        assert line in ended.err.splitlines()
    assert ended.err.splitlines()[-1] == "expert rank 1 (rank 2) ended with status 3"


SLEEP = """
import os, sys, time
from pathlib import Path
(Path(sys.argv[1]) / ("rank-" + os.environ["RANK"])).write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize(
    "what", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=lambda s: s.name
)
def test_ranks_end_with_their_launcher(tmp_path: Path, what: signal.Signals) -> None:
    run = Run(tmp_path, 1, 1, sys.executable, "-c", SLEEP, str(tmp_path))
    run.await_files("rank-0", "rank-1")
    time.sleep(0.1)  # the file is there before its text
    pids = [run.pid(rank) for rank in range(2)]
    assert all(alive(pid) for pid in pids)
    run.process.send_signal(what)
    run.process.communicate(timeout=30)
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "an orphan"
        time.sleep(0.05)
    assert run.process.returncode == (-9 if what is signal.SIGKILL else 128 + what)


def test_the_store_listens_on_the_named_address_only() -> None:
    store = host_store("127.0.0.1", 0, 10)
    listening = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{store.port:04X}")
    ]
    assert [line[1] for line in listening] == [f"0100007F:{store.port:04X}"]


@pytest.fixture
def store() -> dist.TCPStore:
    found = host_store("127.0.0.1", 0, 10)
    note(found, "here test")
    return found


def test_survivors_agree_on_the_same_members_and_a_latecomer_is_fenced(store: dist.TCPStore) -> None:
    """Ranks 0, 1 and 3 of four hold different opinions of who is gone; the first word holds for all."""
    opinions = {0: {2}, 1: {2}, 3: {0, 2}}
    with ThreadPoolExecutor() as pool:
        clients = {rank: dist.TCPStore("127.0.0.1", store.port, is_master=False) for rank in opinions}
        asked = [
            pool.submit(agree, clients[rank], 1, range(4), rank, lambda gone=gone: gone, 30.0)
            for rank, gone in opinions.items()
        ]
    found = [one.exception() or one.result() for one in asked]
    said = {one for one in found if not isinstance(one, Fenced)}
    assert len(said) == 1 and said <= {(0, 1, 3), (1, 3)}
    assert [isinstance(one, Fenced) for one in found] == [0 not in next(iter(said)), False, False]
    with pytest.raises(Fenced, match=r"rank 2 was taken for lost: generation 1 is of ranks \("):
        agree(store, 1, range(4), 2, lambda: set(), 30.0)


def test_who_lives_but_does_not_come_is_left_out_after_the_bound(store: dist.TCPStore) -> None:
    assert agree(store, 1, (0, 1), 0, lambda: set(), 0.05) == (0,)


def test_the_log_is_read_by_its_first_word() -> None:
    text = (
        "here 0\ndead 3 was killed by signal 9\ndead 3 later\nmembers 1 0,1\nmembers 1 0,2\njoin 2 1\nleft 4\nover 0\n"
    )
    log = Log.read(text)
    assert log.dead == {3: "was killed by signal 9"} and log.left == {4} and log.over == {0}
    assert log.members == {1: (0, 1)} and log.joined == {2: {1}} and log.latest == 2


REFUSED = [
    ([], "nothing to launch - write it behind --"),
    (["--ranks", "2-9", "--", "generate"], "--ranks 2-9 is no part of 0-1"),
    (["--rendezvous", "host", "--", "generate"], "--rendezvous host is no HOST:PORT"),
    (["--rendezvous", "192.0.2.1:29500", "--", "generate"], "over no named interface - name one: --interface"),
    (["--attention-ranks", "0", "--", "generate"], "among 0 attention and 1 expert ranks"),
]


@pytest.mark.parametrize(("argv", "said"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_cannot_be_launched_is_refused_in_a_line(argv: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        launch(argv)
    assert "\n" not in str(caught.value)


def test_a_place_is_read_from_torchruns_environment() -> None:
    env = {"RANK": "2", "WORLD_SIZE": "3"}
    assert here(2, 1, env) == Place(Role.EXPERT, 0, 2, 1)
    with pytest.raises(ValueError, match="3 processes were started for 2 attention and 2 expert ranks - start 4"):
        here(2, 2, env)
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE are not set"):
        here(2, 1, {})


def test_ranks_talk_over_the_named_interface_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    place = Place.of(0, 1, 1)
    away = {"MASTER_ADDR": "192.0.2.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(ValueError, match=r"ranks meet at 192.0.2.1, over no named interface - name one: --interface"):
        bind(place, None, away)
    with pytest.raises(ValueError, match=r"no interface wire7 here - there are .*lo"):
        bind(place, "wire7", away)
    bind(place, None, away | {"MASTER_ADDR": "127.0.0.1"})
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT are not set"):
        join_store({"RANK": "0"}, Bounds())
