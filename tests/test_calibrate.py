"""Measured costs: a fit finds the line under noise and says when there is none, a calibration of real processes comes back
from its file as it was, and nothing else gets in through that file.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dep_extension import calibrate, testbeds
from dep_extension.calibrate import GOOD, Calibration, fit, load, measure, read, save, split_of, this_machine, verdict
from dep_extension.cost import Line, Machine, Split
from dep_extension.solver import Problem, findep
from dep_extension.timing import Order, Sizes

SMALL: dict[str, Any] = {
    "hidden": 64,
    "expert_hidden": 32,
    "experts": 2,
    "heads": 2,
    "head_dim": 16,
    "longest_s": 0.002,
}


@pytest.fixture(scope="module")
def measured() -> tuple[Calibration, list[str]]:
    """Of two real processes that exchange over Gloo, and what was said meanwhile."""
    said: list[str] = []
    return measure([Split(1, 1)], say=said.append, **SMALL), said


@pytest.mark.parametrize("seed", range(5))
def test_a_fit_finds_the_line_under_noise(seed: int) -> None:
    rng = random.Random(seed)
    a, b = rng.uniform(1e-4, 1e-3), rng.uniform(1e-13, 1e-11)
    xs = [part * 1e-2 / b / 8 for part in range(1, 9)]
    found = fit([(x, (a + b * x) * (1 + rng.gauss(0, 0.005))) for x in xs])
    assert found.line.b == pytest.approx(b, rel=0.02) and found.line.a == pytest.approx(a, abs=1e-4)
    assert GOOD < found.r2 < 1
    assert fit([(x, a + b * x) for x in xs]) == (pytest.approx((a, b)), pytest.approx(1.0))


def test_no_fit_is_below_zero() -> None:
    down = fit([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)])
    assert down.line == Line(2.0, 0.0) and down.r2 == 0.0
    below = fit([(1.0, 0.5), (2.0, 2.0), (3.0, 3.5)])
    assert below.line.a == 0 and below.line.b == pytest.approx(15 / 14) and below.r2 < 1
    with pytest.raises(ValueError, match="1 points are no line: time at least 2 sizes"):
        fit([(1.0, 1.0)])


def test_a_poor_fit_is_said_not_hidden() -> None:
    curve = fit([(x, x**3) for x in map(float, range(1, 9))])
    assert curve.r2 < GOOD and f"below {GOOD}: no straight line" in verdict("gemm", curve)
    straight = fit([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)])
    assert "below" not in verdict("gemm", straight) and "R^2 1.000000" in verdict("gemm", straight)


def test_two_processes_are_measured(measured: tuple[Calibration, list[str]]) -> None:
    found, said = measured
    machine = found.machine
    assert machine.name == this_machine() and machine.gpus == 2 and set(machine.links) == {Split(1, 1)}
    assert set(found.r2) == {"gemm", "attention", "experts", "link 1:1"}
    assert machine.gemm.b > 0 and machine.link(Split(1, 1)).b > 0 and machine.experts is not None
    assert machine.count_s > 0 and machine.overlap >= 1 <= machine.both_ways and machine.memory_bytes > 1e8
    assert any(row.startswith("both ways") for row in said)
    for line in ("gemm", "experts", "attention", "a2e 1:1", "e2a 1:1"):
        assert any(row.startswith(line) and "R^2" in row for row in said), line
    assert "worst R^2" in said[-1] and found.seconds < 120


def test_a_measured_machine_is_planned_for(measured: tuple[Calibration, list[str]]) -> None:
    model = testbeds.model("deepseek-v2", "B")
    roomy = Machine(**{**vars(measured[0].machine), "memory_bytes": 100e9})
    plan = findep(Problem(model, roomy, 128), Split(1, 1))
    assert plan is not None and plan.tokens_per_s > 0


def test_a_file_brings_back_what_was_saved(measured: tuple[Calibration, list[str]], tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    save(measured[0].machine, path, measured[0].r2)
    assert load(path) == load(path, this_machine()) == measured[0].machine
    assert read(path).r2 == measured[0].r2 and list(tmp_path.iterdir()) == [path]
    for name in testbeds.names():
        save(testbeds.named(name), path)
        assert load(path) == testbeds.named(name)


def test_a_file_from_before_directions_were_timed_at_once_is_still_one(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    save(replace(testbeds.named("A"), both_ways=1.5), path)
    assert load(path).both_ways == 1.5
    data = json.loads(path.read_text())
    del data["both_ways"]
    path.write_text(json.dumps(data))
    assert load(path) == testbeds.named("A")


def test_a_file_of_another_machine_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    save(testbeds.named("A"), path)
    with pytest.raises(
        ValueError, match=r"was measured on 'A: 8 x RTX A6000', this is 'here': calibrate here"
    ) as refused:
        load(path, "here")
    assert "\n" not in str(refused.value)


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data.update({name: value})


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "kind": (_set("kind", "duoserve-kernel-table"), "not kind duoserve-dep-machine"),
    "version": (_set("version", 2), "version 1"),
    "missing": (lambda data: data.pop("gemm"), r"missing \['gemm'\]"),
    "unknown": (_set("hook", "x"), r"unknown \['hook'\]"),
    "nan": (_set("count_s", math.nan), "NaN is no number of seconds"),
    "infinite": (_set("memory_bytes", math.inf), "Infinity is no number"),
    "huge": (_set("gemm", [10**400, 1]), "gemm"),
    "overflow": (_set("count_s", "1e999"), "count_s is no finite number"),
    "negative": (_set("attention", [0, -1e-9]), "attention.b of machine .* is -1e-09"),
    "faster": (_set("both_ways", 0.5), "both_ways of machine .* is 0.5, a cost is finite and at least 1"),
    "bool": (_set("gpus", True), "gpus is no whole number"),
    "many": (_set("gpus", 1 << 40), "gpus is no whole number"),
    "short": (_set("gemm", [1.0]), r"gemm is not \[a, b\]"),
    "text": (_set("gemm", ["0", "1"]), "gemm is no finite number"),
    "links": (_set("links", []), "links are no list"),
    "link": (_set("links", [[1, 7, 0.0]]), r"a link is not \[ag, eg, a, b\]"),
    "zero": (_set("links", [[0, 7, 0.0, 1e-9]]), "ag is no whole number from 1"),
    "twice": (_set("links", [[1, 7, 0.0, 1e-9]] * 2), "link 1:7 is there twice"),
    "name": (_set("name", "a\nb"), "name is no line of at most 1000 characters"),
    "long": (_set("source", "x" * 2000), "source is no line"),
    "r2": (_set("r2", [1]), "r2 is no table"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    path, (change, says) = tmp_path / "machine.json", HOSTILE[case]
    save(testbeds.named("A"), path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=says) as refused:
        load(path)
    assert (
        "\n" not in str(refused.value) and str(path) in str(refused.value) and "calibrate again" in str(refused.value)
    )


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"kind": 1}', "\x00", "\udcff"])
def test_what_is_no_file_of_costs_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="is no machine's costs") as refused:
        load(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    path.write_bytes(b" " * (calibrate.MAX_BYTES + 1))
    with pytest.raises(ValueError, match="a machine at most 4,194,304: calibrate again"):
        load(path)


@pytest.mark.parametrize("text", ["", "1", "1:", ":1", "0:1", "1:0", "-1:2", "1:2:3", "a:b", "9999:1", "1;2"])
def test_what_is_no_split_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no split: write attention ranks, a colon, expert ranks"):
        split_of(text)
    assert split_of("12:3") == Split(12, 3)


def test_what_cannot_be_measured_is_refused_before_anything_starts() -> None:
    for splits, device, sizes, says in (
        ([], "cpu", {}, "0 splits, of at least 1 attention"),
        ([Split(0, 2)], "cpu", {}, "at least 1 attention and 1 expert rank"),
        ([Split(60, 60)], "cpu", {}, "a split of 120 ranks on 64 devices"),
        ([Split(1, 1)], "tpu", {}, "device 'tpu' is not one that is timed"),
        ([Split(1, 1)], "cpu", {"hidden": 0}, "hidden is 0: what is timed has more than 0 and at most 65,536"),
        (
            [Split(1, 1)],
            "cpu",
            {"experts": 512, "hidden": 65536, "expert_hidden": 256},
            "8,589,934,592 weights of a rank",
        ),
        ([Split(1, 1)], "cpu", {"longest_s": math.nan}, "longest_s is nan"),
        ([Split(1, 1)], "cpu", {"dtype": "int8"}, "dtype 'int8' is not timed"),
    ):
        with pytest.raises(ValueError, match=says):
            measure(splits, device, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("splits", "meet", "patience_s", "says"),
    [
        (((1, 2),), "meet", 60, r"rank \d of 2 failed while it was timed: .*ValueError: the new group's"),
        (((1, 1),), "none/meet", 3, "it took longer than it may"),
    ],
)
def test_a_process_that_fails_is_named_and_none_is_left(
    splits: Any, meet: str, patience_s: int, says: str, tmp_path: Path
) -> None:
    meet = str(tmp_path / meet)
    orders = [Order(rank, 2, meet, "cpu", splits, Sizes(**SMALL), patience_s).text() for rank in range(2)]
    with pytest.raises(RuntimeError, match=says) as refused:
        list(calibrate._said(orders, tmp_path))
    assert "\n" not in str(refused.value)
    left = subprocess.run(["pgrep", "-f", meet], capture_output=True, text=True)
    assert left.stdout == ""


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dep_extension.calibrate", "--out", str(tmp_path / "m.json"), "--splits"]
    done = subprocess.run([*command, "1:1:1"], capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: '1:1:1' is no split") and done.stderr.count("\n") == 1
    )
