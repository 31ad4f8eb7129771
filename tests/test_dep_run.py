"""`torchrun -m dep_extension`: the answers of one process, figures of all ranks, and one line where it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import duoserve
from dep_extension.__main__ import _guarded
from dep_extension.answering import deal
from dep_extension.comm import PeerLost
from dep_extension.cost import Line, Machine, Model, Split
from dep_extension.executor import open_store
from dep_extension.faults import LEFT
from dep_extension.planfile import save
from dep_extension.running import Cutting
from dep_extension.schedule import Order
from dep_extension.solver import Plan, Problem
from dep_extension.spans import Span, Times, Trial, medians, times
from duoserve.config import EngineConfig
from duoserve.core import Refusal

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(ranks: int, *args: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return subprocess.run(
        [*torchrun, "-m", "dep_extension", *args], env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def test_the_demo_answers_over_ranks_as_in_one_process() -> None:
    prompts = ["What is Git?", "How do I copy a file?", "What does ls do?"]
    asked = [arg for prompt in prompts for arg in ("--prompt", prompt)]
    options = ("--max-new-tokens", "8", "--temperature", "0", "--r1", "2", "--r2", "2", "--order", "AASS", "--json")
    done = launch(2, "generate", "--attention-ranks", "1", "--expert-ranks", "1", *asked, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with duoserve.load(None, predictor="none") as engine:
        for answer, prompt in zip(found["answers"], prompts, strict=True):
            want = engine.generate([{"role": "user", "content": prompt}], max_new_tokens=8, do_sample=False)
            assert (answer["text"], answer["new_tokens"], answer["finish"]) == (want.text, want.new_tokens, want.finish)
    assert found["plan"] | {"ag": 1, "eg": 1, "r1": 2, "r2": 2, "order": "AASS"} == found["plan"]
    assert [rank["role"] for rank in found["ranks"]] == ["attention", "expert"]
    assert found["hits"] + found["in_flight"] + found["misses"] > 0


@pytest.mark.slow
def test_a_world_of_another_size_is_refused_with_both_numbers() -> None:
    done = launch(2, "generate", "--attention-ranks", "2", "--expert-ranks", "3", "--prompt", "Hello")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "2 processes were started for 2 attention and 3 expert ranks" in lines[0], done.stderr


@pytest.mark.slow
def test_a_bench_of_four_ranks_accounts_for_its_time() -> None:
    load = ("--samples", "4", "--prompt-tokens", "32", "--new-tokens", "2", "--trials", "1")
    done = launch(4, "bench", "--attention-ranks", "2", "--expert-ranks", "2", *load, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["busy_s"]) == 4 and all(0 < busy <= found["seconds"] for busy in found["busy_s"])
    assert 0 <= found["exposed_s"] < found["seconds"] and found["tokens_per_s"] > 0


def test_a_lost_rank_is_one_line_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    def lose() -> None:
        raise PeerLost((3,), "expert rank 1 was killed by signal 9")

    assert _guarded(lose) == LEFT
    assert capsys.readouterr().err == "error: E_LOST: expert rank 1 was killed by signal 9; start it again\n"


@pytest.mark.parametrize("many,ranks,r1", [(1, 1, 1), (7, 2, 2), (3, 4, 2), (16, 3, 4), (5, 1, 8)])
def test_each_prompt_is_dealt_once_and_shares_differ_by_one(many: int, ranks: int, r1: int) -> None:
    dealt = deal(many, ranks, r1)
    assert [len(batches) for batches in dealt] == [r1] * ranks
    assert sorted(p for batches in dealt for batch in batches for p in batch) == list(range(many))
    sizes = [len(batch) for batches in dealt for batch in batches]
    assert max(sizes) - min(sizes) <= 1


def test_exposed_is_when_nobody_works() -> None:
    attention = [Span("attention", 0.0, 2.0), Span("wait", 2.0, 5.0), Span("attention", 5.0, 6.0)]
    expert = [Span("arriving", 0.0, 3.0), Span("expert", 3.0, 4.0)]
    found = times([attention, expert])
    assert found.seconds == 6.0 and found.exposed_s == 2.0 and found.busy_s == [3.0, 1.0]


def test_runs_that_lost_a_rank_or_have_fewer_ranks_are_told_and_not_counted() -> None:
    def trial(seconds: float, ranks: int, *lost: int) -> Trial:
        return Trial(Times(seconds, seconds / 4, [seconds / 2] * ranks), ranks, lost)

    found = medians([trial(1.0, 3), trial(9.0, 2, 2), trial(4.0, 2), trial(3.0, 3)], tokens=8)
    assert [one["counted"] for one in found["trials"]] == [True, False, False, True]
    assert [one["lost"] for one in found["trials"]] == [[], [2], [], []]
    assert (found["seconds"], found["tokens_per_s"], found["exposed_s"], found["busy_s"]) == (2.0, 4.0, 0.5, [1.0] * 3)
    fewer = medians([trial(9.0, 2, 2), trial(4.0, 2)], tokens=8)
    assert (fewer["seconds"], fewer["runs_s"], len(fewer["busy_s"])) == (4.0, [4.0], 2), "all there are"
    none = medians([trial(9.0, 2, 2)], tokens=8)
    assert (none["seconds"], none["tokens_per_s"], none["runs_s"], none["busy_s"]) == (None, None, [], [])


def saved_plan(folder: Path, problem: Problem | None = None) -> Path:
    plan = Plan("FinDEP", Split(2, 1), 4, 2, 3, 5, (("A", 1), ("A", 0), ("S", 0), ("S", 1)), 1.0, 1.0, 0.0, 1.0)
    save(plan, folder / "plan.json", "a model", "a machine", problem)
    return folder / "plan.json"


def test_a_plan_is_taken_from_its_file_and_from_options(tmp_path: Path) -> None:
    found = Cutting(plan=saved_plan(tmp_path)).settled(3)
    assert (found.ag, found.eg, found.r1, found.r2, found.name) == (2, 1, 2, 3, "FinDEP")
    assert found.order == (("A", 1), ("A", 0), ("S", 0), ("S", 1))
    other = Cutting(plan=saved_plan(tmp_path), r1=4).settled(3)
    assert (other.r1, other.r2, other.order) == (4, 3, Order.ASAS)  # turns are of two micro-batches
    plain = Cutting(attention_ranks=3, order="AASS").settled(5)
    assert (plain.ag, plain.eg, plain.order) == (3, 2, Order.AASS)


def test_a_plan_is_solved_again_with_its_own_costs_or_it_is_said_why_not(toy: Any, cache: Path, tmp_path: Path) -> None:
    line, config = Line(1e-4, 1e-10), EngineConfig.of(dtype="float32", cache_dir=str(cache))
    machine = Machine("m", 3, 1e10, line, line, {Split(2, 1): line})
    costs = Problem(Model("toy", 3, 64, 96, 6, 2, 0, 4, 16, 16), machine, 8)
    opened = open_store(str(toy("mixtral")), config)

    def again(problem: Problem | None, **asked: Any) -> Any:
        return Cutting(plan=saved_plan(tmp_path, problem), **asked).settled(3).again.fitting(opened)

    def of(**other: int) -> Problem:
        return replace(costs, model=replace(costs.model, **other))

    found = again(costs)
    assert found.why == "" and found.replan() is not None
    assert found.digest != again(replace(costs, length=9)).digest, "ranks with other costs are told apart"
    kept = {
        "costs are of 3 layers of 8 experts, the model has 3 of 6": again(of(experts=8)),
        "costs are of 4 layers of 6 experts, the model has 3 of 6": again(of(layers=4)),
        "has no costs: save it again": again(None),
        "--r2, --order was asked for": again(costs, r2=2, order="ASAS"),
        "there is no --plan FILE": Cutting().settled(2).again.fitting(opened),
    }  # fmt: skip
    for why, one in kept.items():
        assert why in one.why and one.replan() is None
    opened.store.close()


def test_options_that_contradict_a_plan_are_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"E_OPTION: 3 attention ranks are asked for, .*plan.json has 2"):
        Cutting(attention_ranks=3, plan=saved_plan(tmp_path)).settled(4)
    with pytest.raises(Refusal, match="unknown order 'ASSA'"):
        Cutting(order="ASSA").settled(2)
