"""`python -m dep_extension` with a rank that is killed: the answers of a run that lost nobody, its figures, its status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
SUPERVISE = """
import sys
from dep_extension.faults import Bounds
from dep_extension.launch import Job, supervise
ag, eg, *command = sys.argv[1:]
every = tuple(range(int(ag) + int(eg)))
sys.exit(supervise(Job(tuple(command), int(ag), int(eg), every, threads=1, bounds=Bounds(beat=0.1, stall=20.0))))
"""
PROMPTS = [arg for prompt in ("What is Git?", "What does ls do?", "Who?", "Why?") for arg in ("--prompt", prompt)]
GENERATE = ["generate", *PROMPTS, "--max-new-tokens", "6", "--temperature", "0", "--json"]


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def found(self) -> dict[str, Any]:
        assert self.status == 0, self.err
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


def launched(ag: int, eg: int, doomed: dict[int, tuple[str, int]], *args: str) -> Ended:
    """With one rank or several of another fate."""
    sizes = ("--attention-ranks", str(ag), "--expert-ranks", str(eg))
    command = [sys.executable, "-c", SUPERVISE, str(ag), str(eg), sys.executable, str(ROOT / "tests" / "doomed.py")]
    env = os.environ | {"DOOMED": json.dumps(doomed), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, args[0], *sizes, *args[1:]], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the demo on two and three ranks."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    options = ["-m", "A", "--gpus", "5", "--ratio", "2:3", "--batch", "4", "--length", "512", "--save", str(path)]
    subprocess.run([sys.executable, "-m", "duoserve.cli", "dep", "plan", *options], check=True, cwd=ROOT)
    return path


@pytest.fixture(scope="module")
def want() -> Any:
    found = launched(2, 3, {}, *GENERATE).found
    assert found["replanned"] == [] and found["kept"].startswith("there is no --plan FILE")
    return [answer["text"] for answer in found["answers"]]


MOMENTS: list[tuple[str, int]] = [
    ("running:open_store", 1),  # before there is a world
    ("executor:ExpertSide.__init__", 1),
    ("world:World.tell", 3),  # as all agree that they can begin
    ("world:World.dispatch", 1),
    ("world:World.combine", 40),
    ("recovery:Company.last_words", 1),  # all tokens are made
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment[0])
def test_an_expert_rank_killed_at_any_time_is_outlived(moment: tuple[str, int], plan: Path, want: Any) -> None:
    ended = launched(2, 3, {3: moment}, *GENERATE, "--plan", str(plan))
    found = ended.found
    assert [answer["text"] for answer in found["answers"]] == want
    assert "expert rank 1 (rank 3) was killed by signal 9" in ended.err
    (after,) = found["replanned"]
    assert (after["lost"], after["eg"], found["kept"]) == ([3], 2, None) and after["solved_s"] > 0
    assert [rank["role"] for rank in found["ranks"]] == ["attention"] * 2 + ["expert"] * 2
    assert sum(rank["experts"] for rank in found["ranks"][2:]) == found["experts"]


@pytest.mark.parametrize("moment", [MOMENTS[0], MOMENTS[2]], ids=lambda moment: moment[0])
def test_an_attention_rank_killed_at_the_start_is_named_and_all_end(moment: tuple[str, int]) -> None:
    ended = launched(2, 2, {1: moment}, *GENERATE)
    assert ended.status == 1 and ended.out == ""
    assert "E_LOST: attention rank 1 (rank 1) was killed by signal 9" in ended.err


def test_all_expert_ranks_killed_at_the_start_are_named_and_all_end() -> None:
    ended = launched(1, 2, {1: ("running:open_store", 1), 2: ("running:open_store", 1)}, *GENERATE)
    assert ended.status == 1
    assert "E_LOST: expert rank 0 (rank 1) was killed by signal 9; expert rank 1 (rank 2)" in ended.err
    assert "no expert rank is left" in ended.err


def test_a_bench_tells_which_runs_lost_a_rank_and_does_not_count_them(plan: Path) -> None:
    load = ("--samples", "4", "--prompt-tokens", "8", "--new-tokens", "3", "--trials", "4", "--json")
    ended = launched(2, 3, {4: ("executor:ExpertSide.walk", 3)}, "bench", *load, "--plan", str(plan))
    found = ended.found
    assert [(trial["lost"], trial["ranks"], trial["counted"]) for trial in found["trials"]] == [
        ([], 5, True),
        ([4], 4, False),
        ([], 4, False),
        ([], 4, False),
    ]
    assert found["runs_s"] == [found["trials"][0]["seconds"]] == [found["seconds"]]
    assert len(found["busy_s"]) == 5 and [one["lost"] for one in found["replanned"]] == [[4]]
