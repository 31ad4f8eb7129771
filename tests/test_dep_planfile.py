"""A plan as a file: what was written is read, and nothing that could not be run."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dep_extension.cost import Line, Machine, Model, Split
from dep_extension.imbalance import zipf
from dep_extension.plainjson import write_json
from dep_extension.planfile import MAX_BYTES, load, read, save, to_json
from dep_extension.problemfile import MAX_CHUNKS, problem_to_json
from dep_extension.schedule import every_order
from dep_extension.solver import Plan, Problem, findep, recut

ORDER = (("A", 0), ("A", 1), ("S", 0), ("S", 1))
PLAN = Plan("FinDEP", Split(3, 5), 2, 2, 4, 77, ORDER, 0.5, 0.25, 0.125, 1e4, replicas=2)


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    rng = random.Random(1)
    for _ in range(100):
        r1 = rng.randint(1, 5)
        seconds = rng.uniform(1e-6, 100)
        plan = replace(
            PLAN, split=Split(rng.randint(1, 99), rng.randint(2, 99)), r1=r1, r2=rng.randint(1, 64),
            order=tuple(rng.choice(list(every_order(r1)))), makespan_s=seconds, bound_s=seconds * rng.uniform(0.1, 1),
            exposed_s=seconds * rng.random(), tokens_per_s=rng.uniform(1, 1e9),
        )  # fmt: skip
        save(plan, tmp_path / "plan.json", model="a model", machine="a machine")
        assert load(tmp_path / "plan.json") == plan
        assert read(tmp_path / "plan.json")[1:] == ("a model", "a machine", None)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"], "nothing is left beside it"


def test_a_file_that_does_not_fit_leaves_the_old_one_and_says_how_much_it_takes(tmp_path: Path) -> None:
    write_json(tmp_path / "table.json", {"old": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"for 20,0\d\d bytes: .*table\.json"):
            write_json(tmp_path / "table.json", {"new": "x" * 20_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads((tmp_path / "table.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_what_cannot_be_written_as_numbers_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        save(replace(PLAN, makespan_s=float("nan")), tmp_path / "plan.json", model="m", machine="m")
    assert not (tmp_path / "plan.json").exists()


def problem(loads: bool) -> Problem:
    line = Line(1e-4, 3e-10)
    links = {Split(3, 5): line, Split(2, 6): Line(2e-4, 5e-10), Split(3, 2): Line(1e-4, 7e-10)}
    machine = Machine("some", 8, 48e9, Line(2e-4, 9e-14), Line(2e-4, 2e-14), links, 1e-5, 1.1, "measured", line)
    model = Model("some", 4, 2048, 1024, 16, 4, 1, 16, 128, 128, kv_elements=512)
    return Problem(model, machine, 512, 24, max_r1=4, skew=zipf(16, 0.8, MAX_CHUNKS + 70) if loads else None)


@pytest.mark.parametrize("loads", [False, True])
def test_what_a_plan_was_solved_for_comes_back_and_is_solved_alike_for_whatever_a_loss_leaves(
    tmp_path: Path, loads: bool
) -> None:
    asked, split = problem(loads), Split(3, 5)
    plan = findep(asked, split)
    assert plan is not None
    save(plan, tmp_path / "plan.json", "a model", "a machine", asked)
    found = read(tmp_path / "plan.json").problem
    assert found is not None and found.model == asked.model
    assert (found.length, found.samples, found.max_r1, found.max_r2) == (512, 24, 4, asked.max_r2)
    for eg in range(1, 6):
        at = Split(3, eg)
        assert found.machine.link(at) == asked.machine.link(at), "links between fitted ones are there by themselves"
        if not loads:
            assert recut(found, at, plan.samples, plan.r1) == recut(asked, at, plan.samples, plan.r1)
    if loads:
        assert found.skew is not None and len(found.skew.loads_CE) == MAX_CHUNKS, "as many as a file may have"


def test_files_of_the_first_version_are_read_and_have_no_costs(tmp_path: Path) -> None:
    data = to_json(PLAN, "m", "m") | {"version": 1}
    del data["problem"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert read(tmp_path / "plan.json") == (PLAN, "m", "m", None)


def harmed(*at: str | int, to: Any) -> Callable[[dict[str, Any]], Any]:
    """A change within a problem."""

    def harm(data: dict[str, Any]) -> Any:
        inner = data["problem"] = problem_to_json(problem(True), Split(3, 5))
        for name in at[:-1]:
            inner = inner[name]  # type: ignore[index]
        inner[at[-1]] = to  # type: ignore[index]
        return data

    return harm


def changed(**plan: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data | {"plan": data["plan"] | plan}


HARMED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda data: [], "has 'list', not"),
    (lambda data: data | {"kind": "duoserve-run"}, "is 'duoserve-run' version 2, not duoserve-dep-plan 1 to 2"),
    (lambda data: data | {"version": 3}, "version 3"),
    (lambda data: data | {"version": 1}, "has .*'problem'"),
    (lambda data: {k: v for k, v in data.items() if k != "problem"}, "has no problem, as version 2 has"),
    (lambda data: data | {"problem": []}, "has 'list', not .*'max_r1'"),
    (harmed("aside", to=1), "has .*'aside'"),
    (harmed("length", to=0), "length 0 is no whole number from 1"),
    (harmed("samples", to=-1), "samples -1 is no whole number"),
    (harmed("max_r2", to=1 << 13), "max_r2 8192 is no whole number from 1 to 4,096"),
    (harmed("model", to=None), "has 'NoneType', not .*'kv_elements'"),
    (harmed("model", "experts", to=15), "loads are of 16 experts, some has 15"),
    (harmed("model", "experts", to=1.5), "experts 1.5 is no whole number"),
    (harmed("model", "kv_elements", to=0), "kv_elements 0 is no whole number"),
    (harmed("machine", "gemm", to=[1]), r"gemm is \[1\], not 2 values"),
    (harmed("machine", "gemm", to=[1, -1]), "gemm -1 is not between"),
    (harmed("machine", "overlap", to=0.5), "overlap of machine 'some' is 0.5"),
    (harmed("machine", "gpus", to=1), "1 GPUs and 5 links"),
    (harmed("machine", "links", to=[]), r"links is \[\], not 1 to"),
    (harmed("machine", "links", 0, to=[1, 2, 3]), "a link is .* not 4 values"),
    (harmed("machine", "links", 0, to=[0, 2, 3, 4]), "ag 0 is no whole number"),
    (harmed("loads", "chunks", to=[]), r"loads is \[\], not 1 to"),
    (harmed("loads", "chunks", 0, to=[0.0]), "give as many in each"),
    (harmed("loads", "chunks", 0, to=[0] * 16), "give finite ones, some above 0"),
    (harmed("loads", "layers", to=[0]), "layers is .*not 128 values"),
    (harmed("loads", "layers", 0, to=5), "from 0 without gaps"),
    (harmed("loads", "chunks", 0, 0, to="1"), "a load '1' is not between"),
    (lambda data: data | {"version": True}, "version True"),
    (lambda data: data | {"more": 1}, "has .*'more'"),
    (lambda data: {k: v for k, v in data.items() if k != "model"}, "has .*not"),
    (lambda data: data | {"model": "two\nlines"}, "model is no short text"),
    (lambda data: data | {"machine": "x" * 10_000}, "machine is no short text"),
    (lambda data: data | {"plan": None}, "has 'NoneType'"),
    (changed(more=1), "has .*'more'"),
    (changed(split=[3, 0]), "split 0 is no whole number from 1"),
    (changed(split=[3]), r"split is \[3\], not 2 values"),
    (changed(split="35"), "split is '35', not 2 values"),
    (changed(r1=0), "r1 0 is no whole number"),
    (changed(r1=3), "order is .* not 6 values"),
    (changed(r1=True), "r1 True is no whole number"),
    (changed(r2=1.0), "r2 1.0 is no whole number"),
    (changed(r2=10**9), "r2 1000000000 is no whole number from 1 to 4,096"),
    (changed(tokens=-1), "tokens -1"),
    (changed(samples="2"), "samples '2'"),
    (changed(samples=10**4000), "samples .* is no whole number"),
    (changed(replicas=6), "replicas 6 is no whole number from 1 to 5"),
    (changed(makespan_s=1e300), "makespan_s 1e.300 is not between"),
    (changed(makespan_s=None), "makespan_s None is not between"),
    (changed(bound_s=0.6), "bound_s 0.6 is not between 0 and makespan_s 0.5"),
    (changed(bound_s=0), "bound_s 0 is not between 0 and makespan_s 0.5"),
    (changed(exposed_s=0.6), "exposed_s 0.6 is more than makespan_s 0.5"),
    (changed(tokens_per_s=-1), "tokens_per_s -1 is not between"),
    (changed(order=[["A", 0], ["A", 1], ["S", 0], ["S", 0]]), "4 turns are not"),
    (changed(order=[["S", 0], ["A", 0], ["A", 1], ["S", 1]]), "come before its attention"),
    (changed(order=[["A", 0], ["A", 1], ["S", 0], ["S", 2]]), "micro-batch 2 is no whole number from 0 to 1"),
    (changed(order=[["A", 0], ["A", 1], ["S", 0], ["X", 1]]), "a turn is 'X', not A or S"),
    (changed(order=[["A", 0], ["A", 1], ["S", 0], [["S"], 1]]), "a turn is "),
    (changed(order={"A": 0}), "order is "),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "says"), HARMED, ids=[says for _, says in HARMED])
def test_a_harmed_plan_is_refused_in_one_line(tmp_path: Path, harm: Callable[[dict[str, Any]], Any], says: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(harm(to_json(PLAN, "m", "m"))))
    refused(path, says)


RAW: list[tuple[str | bytes, str]] = [
    ("", "Expecting value"),
    ("{", "Expecting"),
    (b"\xff\xfe\x00", "decode"),
    ("[" * 100_000, "recursion|nested|Recursion"),
    ('{"kind": 1, "kind": 2}', "2 names, 1 of them different"),
    ('{"plan": NaN}', "NaN is no number"),
    ('{"plan": -Infinity}', "-Infinity is no number"),
    ('{"a": 1' + "0" * 5000 + "}", "limit|digits"),
    (" " * (MAX_BYTES + 1), "more than the 8,388,608 bytes"),
]


@pytest.mark.parametrize(("raw", "says"), RAW, ids=[says for _, says in RAW])
def test_what_is_no_plan_at_all_is_refused_in_one_line(tmp_path: Path, raw: str | bytes, says: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    refused(path, says)


def test_an_infinite_second_that_json_can_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(to_json(PLAN, "m", "m")).replace("0.5", "1e999"))
    refused(path, "makespan_s inf is not between")


def test_no_file_a_folder_and_a_pipe_are_refused_at_once(tmp_path: Path) -> None:
    refused(tmp_path / "none.json", "there is no such file")
    refused(tmp_path, "a folder|no plain file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no plain file")


def refused(path: Path, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        load(path)
    line = str(raised.value)
    assert len(line.splitlines()) == 1 and len(line) < 500 and str(path) in line
    assert line.endswith("make one with `duoserve dep plan --save FILE`")
