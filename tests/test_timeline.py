"""A recorded run: every track's time is accounted for, stalls have their causes, files from strangers are refused, and the
pictures open.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from guessers import Dice, Known

from duoserve import cli
from duoserve.chrometrace import events, write_trace
from duoserve.core import Key, Phase, Policy, Refusal, Step
from duoserve.device import ThreadDevice
from duoserve.lanes import by_track, figures, phases
from duoserve.moe import open_runtime
from duoserve.picture import draw
from duoserve.runfile import Run, read_run, write_run
from duoserve.store import Store
from duoserve.timeline import (
    CAUSES,
    COMPUTE,
    COPY,
    DEMAND,
    EXPERT,
    IN_FLIGHT,
    NONE,
    OUTSIDE,
    PREDICTOR,
    RANK,
    READ,
    SLOT,
    STALL,
    TRUNK,
    ModelThread,
    Span,
    Timeline,
)  # fmt: skip
from duoserve.transfer import HostTier

SLOW = 0.002  # seconds
LAYERS, EXPERTS = 3, 6  # of the toy
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


def overlaps(run: Run) -> list[tuple[Span, Span]]:
    """Neighbours on one track of which the second begins before the first ends, by more than a clock's grain."""
    return [
        (a, b) for spans in by_track(run.spans).values() for a, b in pairwise(spans) if b.start < a.end - 2e-9
    ]  # fmt: skip


class Machine:
    """A runtime over a toy's store, driven layer by layer, one part of it slowed."""

    def __init__(self, folder: Path, slow: str, slots: int = 7, policy: Policy = Policy.DUOSERVE, **device: Any):
        self.store, self.device = Store(folder), ThreadDevice(**device)
        self.slow, self.timeline, self.asked = slow, Timeline(), 0
        tier = HostTier(self.device, self.store, 9) if self.device.disk else None
        self.runtime = open_runtime(self.device, self.store, slots, policy, tier)
        read = self.store.read_into
        if slow == "copies":
            self.store.read_into = lambda key, into: time.sleep(SLOW) or read(key, into)  # type: ignore[method-assign]

    def expert(self, x_MD: torch.Tensor, weights: Any) -> torch.Tensor:
        if self.slow == "compute":
            time.sleep(SLOW)
        return x_MD

    def step(self, rows: int, seed: int) -> None:
        ids_TK = torch.rand(rows, EXPERTS, generator=torch.Generator().manual_seed(seed)).topk(2).indices
        self.runtime.begin(Step(seed, Phase.PREFILL if rows > 1 else Phase.DECODE, rows))
        for layer in range(LAYERS):
            time.sleep(SLOW / 2)  # the trunk
            self.runtime.run(layer, self.expert, torch.ones(rows, 4), ids_TK, torch.full((rows, 2), 0.5))
            self.asked += len(ids_TK.unique())
        self.runtime.finish()

    def run(self, steps: int = 12) -> Run:
        self.runtime.record(self.timeline)
        for seed in range(steps):
            time.sleep(SLOW / 2)  # outside
            self.step(rows=12 if seed == 0 else 1, seed=seed)
        self.runtime.record(None)
        self.device.close()
        self.store.close()
        return Run.of(self.timeline, {"model": "toy"}, {"cpu": "test"})


@pytest.fixture(scope="module")
def folder(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from duoserve.convert import convert

    return convert(toy("mixtral"), tmp_path_factory.mktemp("store") / "toy")


DEVICES = {
    "as shipped": {},
    "compute on a thread of its own": {"threaded_compute": True},
    "three tiers": {"threaded_compute": True, "host_tier": True},
    "a slow link": {"link": 20_000_000},
}


@pytest.mark.parametrize("slow", ["copies", "compute"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guessing", [False, True])
def test_busy_plus_stall_plus_idle_is_the_wall_time_of_every_track_and_nothing_overlaps(
    folder: Path, slow: str, device: str, guessing: bool
) -> None:
    machine = Machine(folder, slow, **DEVICES[device])
    if guessing:
        machine.runtime.predict(Dice(EXPERTS), always=True)
    run = machine.run()
    found = {item.track: item for item in figures(run)}
    assert overlaps(run) == []
    for item in found.values():
        assert item.busy_s + item.stalled_s + item.idle_s == pytest.approx(run.seconds, rel=0.01), item
        assert item.overlap_s < 1e-6 and item.unknown_s < 0.01 * run.seconds, item
    computed = [span for span in run.spans if span.kind == EXPERT]
    assert len(computed) == machine.asked, "every expert that was asked for was computed once"
    for kind, times in ((TRUNK, LAYERS), (OUTSIDE, 1)):  # what sleeps there is found there, not in what comes after
        slept = [span for span in run.spans if span.kind == kind and span.end - span.start >= SLOW / 2]
        assert len(slept) >= times * len(run.passes), kind
    if slow == "compute":
        assert all(span.end - span.start >= SLOW for span in computed)
    counts = machine.runtime.transfer.counts()
    copied = [span for span in run.spans if span.kind == COPY]
    assert len(copied) == counts.misses + counts.guesses == round(machine.device.copy.cost_done / slab(machine))
    assert found[COMPUTE].stall_s.get(DEMAND, 0) > 0


def slab(machine: Machine) -> int:
    return machine.store.layout(0).slab_bytes


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_recorded_is_what_is_counted_without_recording(folder: Path, device: str) -> None:
    machine = Machine(folder, "copies", **DEVICES[device])
    machine.runtime.predict(Dice(EXPERTS), always=True)
    run = machine.run()
    on = {item.track: item for item in figures(run)}
    seen = dict(on[COMPUTE].stall_s)
    if "model" in on:  # where another thread computes, this one ranks
        seen[PREDICTOR] = on["model"].stall_s.get(PREDICTOR, 0)
    for cause in CAUSES:
        assert seen.get(cause, 0) == pytest.approx(machine.runtime.stalls[cause], rel=0.01, abs=1e-4), cause


@pytest.mark.parametrize("device", DEVICES)
def test_a_stall_ends_when_the_copy_that_it_names_has_ended(folder: Path, device: str) -> None:
    machine = Machine(folder, "copies", **DEVICES[device])
    machine.runtime.predict(Dice(EXPERTS), always=True)
    run = machine.run()
    stalls = [s for s in run.spans if s.lane == COMPUTE and s.kind == STALL and s.cause in (DEMAND, IN_FLIGHT, SLOT)]
    assert stalls
    for stall in stalls:
        key = (stall.layer, stall.expert)
        ends = [s.end for s in run.spans if s.kind == COPY and (s.layer, s.expert) == key]
        assert any(stall.start <= end <= stall.end for end in ends), (stall, ends)
        after = next(s for s in run.spans if s.lane == COMPUTE and s.start >= stall.end and s.kind == EXPERT)
        assert (after.layer, after.expert) == key


CAUSED: dict[str, tuple[dict[str, Any], Callable[[], Any] | None, set[str]]] = {
    "synchronous on-demand waits for what it fetches": ({"policy": Policy.ON_DEMAND}, None, {DEMAND}),
    "strong on-demand": ({"policy": Policy.LRU, "slots": 18}, None, {DEMAND}),
    "two slots for six experts": ({"policy": Policy.LRU, "slots": 2}, None, {DEMAND, SLOT}),
    "guesses": ({"slots": 9}, lambda: Dice(EXPERTS), {DEMAND, IN_FLIGHT, PREDICTOR}),
}


@pytest.mark.parametrize("case", CAUSED)
def test_stalls_have_their_causes(folder: Path, case: str) -> None:
    options, predictor, causes = CAUSED[case]
    machine = Machine(folder, "copies", **options)
    if predictor is not None:
        machine.runtime.predict(predictor(), always=True)
    machine.run(16)
    found = {cause for cause, seconds in machine.runtime.stalls.items() if seconds > 0}
    assert found - {SLOT} == causes - {SLOT}
    assert (SLOT in found) == (SLOT in causes) or predictor, (
        "a need may take the slot of a guess, whose copy then ends first"
    )


def test_disk_reads_and_what_waits_for_them_have_a_lane(folder: Path) -> None:
    run = Machine(folder, "copies", threaded_compute=True, host_tier=True).run()
    kinds = {(span.lane.partition(" ")[0], span.kind, span.cause) for span in run.spans}
    assert ("disk", READ, DEMAND) in kinds and ("demand", STALL, "disk") in kinds


def test_the_models_thread_is_followed_without_gaps_on_any_clock() -> None:
    clock = iter(range(100))
    thread = ModelThread(lambda: float(next(clock)))
    timeline = Timeline()
    thread.record(timeline, COMPUTE)
    thread.turn(TRUNK, 0)
    thread.turn(EXPERT, 0, 3)
    thread.wait(lambda: None, DEMAND, Key(0, 4))
    thread.turn(OUTSIDE)
    thread.record(None, COMPUTE)
    spans = timeline.spans()
    assert [(s.kind, s.layer, s.expert, s.cause) for s in spans] == [
        (OUTSIDE, NONE, NONE, None), (TRUNK, 0, NONE, None), (EXPERT, 0, 3, None), (STALL, 0, 4, DEMAND),
        (EXPERT, 0, 3, None), (OUTSIDE, NONE, NONE, None),
    ]  # fmt: skip
    assert all(a.end == b.start for a, b in pairwise(spans)) and spans[0].start == timeline.began
    assert thread.stalls[DEMAND] > 0


def test_a_guess_is_known_by_what_became_of_it(toy: Any, load: Any) -> None:
    engine = load(toy("mixtral"), budget="half")
    known, wrong = Known(EXPERTS), Known(EXPERTS, wrong=True)
    engine.runtime.observers += [known.note, wrong.note]
    engine.model.generate(toys.ids(1), **GREEDY)
    engine.runtime.observers.clear()
    for predictor, became in ((known, "ready"), (wrong, "wrong")):
        timeline = Timeline()
        engine.predict(predictor, always=True)
        before = engine.runtime.transfer.counts()
        engine.record(timeline)
        engine.model.generate(toys.ids(1), **GREEDY)
        engine.record(None)
        after = engine.runtime.transfer.counts()
        said = [s.cause for s in timeline.spans() if s.kind == COPY and s.lane.startswith("ahead")]
        assert said.count(became) > 0 and set(said) <= {"ready", "wrong", "in flight", "guess"}
        assert said.count("wrong") == after.wrong - before.wrong
        assert all(span.lane == "predictor quick" for span in timeline.spans() if span.kind == RANK)


def test_recording_changes_no_token(toy: Any, load: Any) -> None:
    engine = load(toy("qwen3_moe"), budget="half")
    engine.predict(Dice(EXPERTS), always=True)
    ids = toys.ids(2)
    plain = engine.model.generate(ids, **GREEDY)
    timeline = Timeline()
    engine.record(timeline)
    assert torch.equal(engine.model.generate(ids, **GREEDY), plain)
    engine.record(None)
    n = len(timeline.spans())
    engine.model.generate(ids, **GREEDY)
    assert n and len(timeline.spans()) == n, "what was stopped stays as it was"


def test_a_full_timeline_takes_no_further_pass(toy: Any, load: Any) -> None:
    engine = load(toy("mixtral"), budget="half")
    timeline = Timeline(most=100)
    engine.record(timeline)
    engine.model.generate(toys.ids(1), **GREEDY)
    assert engine.runtime.timeline is None
    run = Run.of(timeline, {}, {})
    assert run.cut and 0 < len(run.passes) < 12
    assert all(item.unknown_s < 0.01 * run.seconds for item in figures(run))


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    machine = Machine(folder, "copies")
    machine.runtime.predict(Dice(EXPERTS), always=True)
    return machine.run(20)


def test_a_run_file_says_what_was_recorded(run: Run, tmp_path: Path) -> None:
    write_run(tmp_path / "run.json", run)
    again = read_run(tmp_path / "run.json")
    assert (again.meta, again.machine, again.cut) == (run.meta, run.machine, run.cut)
    assert len(again.spans) == len(run.spans) and again.seconds == pytest.approx(run.seconds, abs=1e-8)
    assert [s._replace(start=0, end=0) for s in again.spans] == [s._replace(start=0, end=0) for s in run.spans]
    for a, b in zip(again.spans, run.spans, strict=True):
        assert a.start == pytest.approx(b.start, abs=1e-8) and a.end == pytest.approx(b.end, abs=1e-8)
    assert overlaps(again) == []


HARMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another kind": lambda d: d.update(kind="machine"),
    "another version": lambda d: d.update(version=2),
    "no names": lambda d: d.pop("names"),
    "a name that is a number": lambda d: d["names"]["lane"].append(7),
    "a name with a line break": lambda d: d["names"]["kind"].__setitem__(0, "a\nb"),
    "a long name": lambda d: d["names"]["cause"].append("x" * 300),
    "many names": lambda d: d["names"].update(lane=["x"] * 300),
    "a column that is no list": lambda d: d["spans"].update(start={}),
    "a column of texts": lambda d: d["spans"].update(start=["1"] * len(d["spans"]["start"])),
    "a column of fractions": lambda d: d["spans"]["start"].__setitem__(0, 0.5),
    "a column of lists": lambda d: d["spans"].update(start=[[1]] * len(d["spans"]["start"])),
    "a huge number": lambda d: d["spans"]["start"].__setitem__(0, 1 << 80),
    "a shorter column": lambda d: d["spans"]["cause"].pop(),
    "a lane that has no name": lambda d: d["spans"]["lane"].__setitem__(0, 99),
    "a negative place": lambda d: d["spans"]["kind"].__setitem__(0, -1),
    "a layer beyond reason": lambda d: d["spans"]["layer"].__setitem__(0, 1 << 40),
    "a span before the start": lambda d: d["spans"]["start"].__setitem__(0, -5),
    "a span of negative length": lambda d: d["spans"]["length"].__setitem__(0, -5),
    "a span beyond the end": lambda d: d["spans"]["length"].__setitem__(-1, d["ns"]),
    "a duration that is none": lambda d: d.update(ns="long"),
    "facts that are none": lambda d: d.update(meta=[1]),
    "a fact that is a list": lambda d: d.update(machine={"cpu": ["x"]}),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_run_file_that_is_not_as_it_must_be_is_refused_in_one_line(run: Run, tmp_path: Path, harm: str) -> None:
    path = tmp_path / "run.json"
    write_run(path, run)
    data = json.loads(path.read_text())
    HARMS[harm](data)
    path.write_text(json.dumps(data))
    with pytest.raises(Refusal, match=r"E_RUN: .*is no recorded run") as raised:
        read_run(path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"null", b'{"kind": "duoserve-run", "kind": 1}', b"\xff"])
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(Refusal, match="E_RUN"):
        read_run(tmp_path / "run.json")
    with pytest.raises(Refusal, match="E_RUN"):
        read_run(tmp_path)


def test_the_trace_is_in_the_trace_event_format(run: Run, tmp_path: Path) -> None:
    """As published: complete events with ph, name, cat, pid, tid, ts and dur in microseconds; metadata names the tracks."""
    write_trace(tmp_path / "trace.json", run)
    data = json.loads((tmp_path / "trace.json").read_text())
    assert set(data) == {"traceEvents", "displayTimeUnit", "otherData"} and data["displayTimeUnit"] in ("ms", "ns")
    names = {e["tid"]: e["args"]["name"] for e in data["traceEvents"] if e["name"] == "thread_name"}
    last: dict[int, float] = {}
    for event in data["traceEvents"]:
        assert event["ph"] in ("M", "X") and type(event["pid"]) is int and type(event["tid"]) is int
        if event["ph"] == "X":
            assert set(event) - {"cname"} == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
            assert event["ts"] >= 0 and event["dur"] > 0 and event["tid"] in names
            assert event["ts"] > last.get(event["tid"], 0.0) - 1e-4, "neighbours on a track do not overlap"
            last[event["tid"]] = event["ts"] + event["dur"]
    assert sorted(names.values()) == sorted({span.lane for span in run.spans})


def test_long_and_short_runs_and_one_of_nothing_have_a_picture(run: Run, tmp_path: Path) -> None:
    token = run.passes[-1]
    for name, part in {"long": run, "short": run.between(token.start, token.end), "none": Run(1.0, [], {}, {})}.items():
        for zoom in (True, False):
            draw(part, tmp_path / f"{name}.png", zoom)
            assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_part_of_a_run_accounts_for_its_time_too(run: Run) -> None:
    span = run.passes[5]
    part = run.between(span.start, span.end)
    assert part.seconds == pytest.approx(span.end - span.start)
    for item in figures(part):
        assert item.busy_s + item.stalled_s + item.idle_s == pytest.approx(part.seconds, rel=0.01)
    assert [phase.name for phase in phases(run)] == ["prefill", "decode"] and phases(run)[1].passes == 19
    assert sum(s for phase in phases(run) for s in phase.stall_s.values()) == pytest.approx(
        next(item for item in figures(run) if item.track == COMPUTE).stalled_s
    )


def command(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr("sys.argv", ["duoserve", *args])
    return cli._guarded()


def test_a_chat_is_recorded_and_shown(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DUOSERVE_CACHE", str(cache))
    path, trace, png = tmp_path / "run.json", tmp_path / "trace.json", tmp_path / "run.png"
    asked = (
        "chat",
        "-p",
        "A list is",
        "--max-new-tokens",
        "5",
        "--temperature",
        "0",
        "--json",
        "--timeline",
        str(path),
    )
    assert command(monkeypatch, *asked) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(said["stall_s"]) == set(CAUSES) and all(s >= 0 for s in said["stall_s"].values())
    assert command(monkeypatch, "timeline", str(path), "-o", str(trace), "--png", str(png), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["meta"]["policy"] == "duoserve" and "cpu" in shown["machine"]
    assert [phase["passes"] for phase in shown["phases"]] == [1, 4]
    assert trace.stat().st_size > 1000 and png.stat().st_size > 10_000
    for more in ([], ["--step", "2"], ["--from", "1", "--to", "3"]):
        assert command(monkeypatch, "timeline", str(path), *more) == 0
        text = capsys.readouterr().out
        assert "compute" in text and "unknown" in text


def test_a_chats_stats_name_the_stalls() -> None:
    from duoserve.repl import _stalls

    assert _stalls({DEMAND: 0.25, IN_FLIGHT: 1.5, SLOT: 0.0, PREDICTOR: 0.0}) == "1.500 s in flight, 0.250 s demand"
    assert _stalls(dict.fromkeys(CAUSES, 0.0)) == "never"


def test_perfetto_opens_the_trace_and_finds_every_span(run: Run, tmp_path: Path) -> None:
    perfetto = pytest.importorskip("perfettos").opened
    write_trace(tmp_path / "trace.json", run)
    with perfetto(tmp_path / "trace.json", tmp_path) as ask:
        rows = list(ask("select t.name track, count(*) n, sum(s.dur) ns from slice s join thread_track tt on s.track_id"
                        " = tt.id join thread t using (utid) group by 1"))  # fmt: skip
        problems = list(ask("select name, value from stats where severity != 'info' and value > 0"))
    assert [row.name for row in problems] == []
    mine = [event for event in events(run) if event["ph"] == "X"]
    assert {row.track: row.n for row in rows} == {
        track: sum(1 for s in spans if round(1e9 * s.end) > round(1e9 * s.start))
        for track, spans in ({"passes": run.passes} | by_track(run.spans)).items()
    }
    assert sum(row.ns for row in rows) == pytest.approx(1e3 * sum(event["dur"] for event in mine), abs=2 * len(mine))


def test_perfetto_would_say_that_spans_overlap(tmp_path: Path) -> None:
    perfetto = pytest.importorskip("perfettos").opened
    spans = [Span(COMPUTE, TRUNK, 0, NONE, 0.0, 0.5, None), Span(COMPUTE, TRUNK, 1, NONE, 0.4, 1.0, None)]
    write_trace(tmp_path / "trace.json", Run(1.0, spans, {}, {}))
    with perfetto(tmp_path / "trace.json", tmp_path) as ask:
        problems = list(ask("select name, value from stats where severity != 'info' and value > 0"))
    assert problems
