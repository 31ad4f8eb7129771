"""Ranks as processes: started together, ended together, and what the others do when one is killed or no longer answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SUPERVISE = """
import sys
from dep_extension.faults import Bounds
from dep_extension.launch import Job, supervise
ag, eg, stall, *command = sys.argv[1:]
every = tuple(range(int(ag) + int(eg)))
sys.exit(supervise(Job(tuple(command), int(ag), int(eg), every, threads=1, bounds=Bounds(beat=0.1, stall=float(stall)))))
"""
STALL = 3.0


class Run:
    """A launcher with its ranks."""

    def __init__(self, folder: Path, ag: int, eg: int, *command: str):
        self.folder, self.ranks = folder, ag + eg
        env = {**os.environ, "AG": str(ag), "EG": str(eg), "STALL": str(STALL), "PYTHONPATH": str(HERE.parent)}
        full = [sys.executable, "-c", SUPERVISE, str(ag), str(eg), str(STALL), *command]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(full, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)

    @classmethod
    def rounds(cls, folder: Path, ag: int, eg: int, many: int, manner: str) -> Run:
        """Of tests/ranks.py; returns when all ranks have met."""
        run = cls(folder, ag, eg, sys.executable, str(HERE / "ranks.py"), str(folder), str(many), manner)
        run.await_files(*(f"rank-{rank}" for rank in range(ag + eg)))
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
    """Of three expert ranks one is killed, then one stopped; when it wakes it finds itself left out."""
    run = Run.rounds(tmp_path, 2, 3, 200, "recover")
    run.send(4, signal.SIGKILL)
    run.await_files("generation-1-0", "generation-1-1", "generation-1-2", "generation-1-3")
    run.send(3, signal.SIGSTOP)
    run.await_files("generation-2-0", "generation-2-1", "generation-2-2")
    run.send(3, signal.SIGCONT)
    ended = run.end()
    assert ended.status == 0, ended.err
    assert ended.out == "200 rounds, generation 2\n"
    assert "expert rank 2 (rank 4) was killed by signal 9" in ended.err
    assert "lost: expert rank 1 (rank 3) has not answered for" in ended.err
    assert "[expert rank 1 (rank 3)] over: rank 3 was taken for lost: generation 2 is of ranks (0, 1, 2)" in ended.err
    assert "expert rank 1 (rank 3) gave up because another was lost" in ended.err
    assert not any(alive(run.pid(rank)) for rank in range(5))


def test_a_stopped_attention_rank_is_named_and_everybody_ends(tmp_path: Path) -> None:
    run = Run.rounds(tmp_path, 2, 1, 100_000, "recover")
    run.send(1, signal.SIGSTOP)
    ended = run.end()
    assert ended.status == 1 and ended.out == ""
    assert "lost: attention rank 1 (rank 1) has not answered for" in ended.err
    assert "its keys and values are gone" in ended.err
    assert "attention rank 1 (rank 1) no longer answered, and was ended" in ended.err
    assert not any(alive(run.pid(rank)) for rank in range(3))
