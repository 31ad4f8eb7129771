"""`duoserve dep`: what it prints is what the solver found, its files are read back, and where a machine's costs are derived
it says so.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from dep_extension import calibrate, planfile, testbeds
from dep_extension.cost import Line, Machine, Split
from dep_extension.schedule import timeline
from dep_extension.solver import Cut, Problem, findep, work_of
from duoserve import cli
from duoserve.core import Refusal
from duoserve.deppicture import LANES, events, write_trace
from duoserve.depsubject import CHUNK, Ports, known_loads, known_machine, known_model, whose
from duoserve.profile import read_profile
from duoserve.specimens import SPECIMENS
from traces import record
from traces.store import Traces

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line, in this process; what it printed."""

    def run(*args: str) -> str:
        monkeypatch.setattr("sys.argv", ["duoserve", *args])
        assert cli._guarded() == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_a_plan_is_printed_saved_drawn_and_read_back(say: Any, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("plan.json", "plan.png", "trace.json")]
    options = ("dep", "plan", "deepseek-v2", "-m", "A", "--batch", "24", "--ratio", "3:5", "--max-r1", "4")
    said = say(*options, "--save", str(files[0]), "--png", str(files[1]), "--perfetto", str(files[2]))
    saved = planfile.read(files[0])
    plan = saved.plan
    assert saved.model == "deepseek-v2, 8 layers" and saved.machine == "A: 8 x RTX A6000"
    assert saved.problem is not None and saved.problem.model.name == saved.model, "a loss can be planned for"
    direct = findep(Problem(testbeds.model("deepseek-v2", "A"), testbeds.named("A"), 2048, 24, 4), Split(3, 5))
    assert direct is not None and plan.tokens_per_s >= direct.tokens_per_s and plan.split == Split(3, 5)
    for word in ("no measurement", "published", f"r1 {plan.r1} micro-batches", f"{plan.tokens_per_s:,.0f} tokens/s",
                 "lower bound", "naive DEP", "PPPipe", "FinDEP", "free order", "colocated", "exposed"):  # fmt: skip
        assert word in said, word
    assert files[1].read_bytes().startswith(PNG)
    assert json.loads(files[2].read_text())["otherData"] == {"simulated": True}


def test_the_json_is_a_plan_file_with_the_comparison_beside(say: Any, tmp_path: Path) -> None:
    said = say(
        "dep",
        "plan",
        "qwen3-235b-a22b",
        "-m",
        "C",
        "--batch",
        "16",
        "--max-r1",
        "2",
        "--skew",
        "zipf:1.2",
        "--replicas",
        "2",
        "--json",
    )
    (tmp_path / "plan.json").write_text(said)
    plan, beside = planfile.load(tmp_path / "plan.json"), json.loads(said)["beside"]
    assert plan.replicas == 2 and beside["simulated"] and beside["loads"] == "made: Zipf 1.2"
    assert [row["split"] for row in beside["ratios"]] == [[8 - eg, eg] for eg in range(plan.replicas, 8)]
    lost = beside["after_one_lost"]["one lost"]
    assert lost["split"] == [plan.split.ag, plan.split.eg - 1] and lost["loaded"] == 0, "there are copies"
    assert len(beside["colocated"]) == 2 and beside["gap"] == pytest.approx(plan.gap)
    assert beside["naive"]["tokens_per_s"] <= beside["pppipe"]["tokens_per_s"] <= plan.tokens_per_s * (1 + 1e-9)


def test_a_machine_of_the_fleet_is_derived_and_says_so(say: Any) -> None:
    said = say("dep", "plan", "-m", "rtx4090", "--gpus", "4", "--length", "512", "--batch", "16")
    assert "derived, not measured" in said and "PCIe, pinned" in said and "the demo" in said
    model = known_model(None, "rtx4090")
    machine, profile = known_machine("h200", model, 8, link=450e9), read_profile(HERE / "h200.json")
    assert machine.memory_bytes == 141e9 and "450 GB/s each way (as asked)" in machine.source
    tokens = 1 << 16  # a large product comes to the profile's own rate
    assert machine.gemm(tokens * 4096 * 4096) == pytest.approx(4096**2 * profile.weight_s("bf16", tokens), rel=0.01)
    assert machine.link(Split(4, 4)).b == machine.link(Split(6, 2)).b == 2 / 450e9
    assert machine.link(Split(2, 6)).b == pytest.approx(3 * 2 / 450e9), "two ports send what six receive"
    assert dict(Ports(4, 0.0, 1.0)) == {Split(3, 1): (0, 1), Split(2, 2): (0, 1), Split(1, 3): (0, 3)}


HERE = Path(__file__).parent.parent / "duoserve" / "machines"


def test_a_calibrated_file_is_taken_as_it_is(say: Any, tmp_path: Path) -> None:
    line = Line(1e-4, 1e-11)
    machine = Machine(
        "four of ours", 4, 8e9, line, line, {Split(2, 2): line, Split(1, 3): line}, 1e-4, source="timed here"
    )
    calibrate.save(machine, tmp_path / "ours.json")
    said = say("dep", "plan", "-m", str(tmp_path / "ours.json"), "--gpus", "4", "--batch", "8", "--length", "128")
    assert "four of ours" in said and "timed here" in said and "derived" not in said
    assert "measured on another machine than this, " + calibrate.named_here()[0] in said, "whose costs are taken"
    calibrate.save(replace(machine, name=calibrate.named_here()[-1]), tmp_path / "here.json")
    assert whose(str(tmp_path / "here.json"), calibrate.load(tmp_path / "here.json")) == "measured on this machine"
    assert whose("A", testbeds.named("A")) is None


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v2-lite", "gpt-oss-20b"])
def test_a_specimen_has_the_sizes_of_its_config(name: str) -> None:
    model, values = known_model(name, "A"), SPECIMENS[name].values
    config = SPECIMENS[name].config
    assert (model.hidden, model.choices) == (config.hidden_size, values["num_experts_per_tok"])
    assert model.layers == config.num_hidden_layers - values.get("first_k_dense_replace", 0)
    assert model.expert_hidden == values.get("moe_intermediate_size", config.intermediate_size)
    assert model.shared == values.get("n_shared_experts", 0) and model.heads == config.num_attention_heads
    if name == "deepseek-v2-lite":
        assert (model.d_k, model.d_v, model.kv_elements) == (192, 128, 576)
        assert model.attention_weights == 2048 * (16 * 192 + 576) + 512 * 16 * 256 + 16 * 128 * 2048
    published = SPECIMENS[name].published
    counted = model.trunk_bytes / 2 + model.experts * model.layers * model.expert_bytes / 2
    assert counted == pytest.approx(published, rel=0.06), "but for embeddings, head and dense layers"


def test_a_folder_is_read_by_its_config(toy: Any) -> None:
    config = json.loads((toy("mixtral") / "config.json").read_text())
    model = known_model(str(toy("mixtral")), "A")
    assert (model.experts, model.choices) == (config["num_local_experts"], config["num_experts_per_tok"])
    assert (model.layers, model.hidden) == (config["num_hidden_layers"], config["hidden_size"])
    assert model.expert_hidden == config["intermediate_size"] and model.shared == 0


def test_loads_come_from_routes_from_a_trace_and_from_a_file(tmp_path: Path) -> None:
    model = known_model("mixtral-8x7b", "A")
    made = known_loads("routes", "mixtral-8x7b", model)
    assert made.experts == 8 and 1.0 < made.skew < 4 and made.loads_CE.mean() == pytest.approx(1.0)
    assert len(made.loads_CE) == 16, f"four layers of 4096 tokens, in chunks of {CHUNK}"
    stays, moves = (known_loads(f"{law}:1", None, model) for law in ("settled", "zipf"))
    first_E, last_E = stays.loads_CE[0], stays.loads_CE[15]
    assert first_E.argmax() == last_E.argmax() and stays.layers == 4 and moves.layers == 1
    assert len({row.argmax() for row in moves.loads_CE}) > 4, "others are hot in each chunk"
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"kind": "duoserve-dep-loads", "version": 1, "loads": [[1, 2, 3, 4, 5, 6, 7, 8]]}))
    assert known_loads(str(path), None, model).loads_CE[0, 7] == pytest.approx(8 / 4.5)


def test_loads_of_a_trace_are_what_its_routers_chose(toy: Any, load: Any, tmp_path: Path) -> None:
    engine = load(toy("mixtral"), dtype="float32", budget="half")
    experts = [layer.n_experts for layer in engine.store.layers]
    about = record.about(engine.store.fingerprint, engine.dtype, experts, [2] * len(experts), False)
    watching = record.Recorder(tmp_path / "t", about, engine.routers())
    engine.runtime.observers.append(watching)
    engine.generate(input_ids=toys.ids(1, 40), max_new_tokens=2, do_sample=False, eos_token_id=None)
    watching.close()
    model = known_model(str(toy("mixtral")), "A")
    found = known_loads(str(tmp_path / "t"), None, model)
    (one,) = Traces(tmp_path / "t").sequences(hidden=False)
    chosen_TK = one.step.routes[1].ids_TK.numpy()
    first_TK = chosen_TK[: len(chosen_TK) // 2]
    expected_E = np.bincount(first_TK.ravel(), minlength=experts[0]) / first_TK.size * experts[0]
    assert len(found.loads_CE) == 2 * len(experts) and found.judged_apart, "short as it is, a layer has two chunks"
    assert np.allclose(found.only(found.layer_C == 1).loads_CE[0], expected_E)
    with pytest.raises(Refusal, match=r"is of \d+ experts, .* has 99; give a trace of this model"):
        known_loads(str(tmp_path / "t"), None, replace(model, experts=99))


def test_a_sweep_solves_every_combination_anew(say: Any, tmp_path: Path) -> None:
    picture = tmp_path / "sweep.png"
    simulated = ("dep", "simulate", "deepseek-v2", "-m", "C")
    options = ("--gpus", "8,16", "--length", "1024,4096", "--link-speed", "4", "--batch", "64", "--max-r1", "2")
    rows = [json.loads(line) for line in say(*simulated, *options, "--png", str(picture), "--json").splitlines()]
    assert [(row["gpus"], row["length"]) for row in rows] == [(8, 1024), (8, 4096), (16, 1024), (16, 4096)]
    assert all(row["simulated"] and row["fits"] and sum(row["plan"]["split"]) == row["gpus"] for row in rows)
    assert picture.read_bytes().startswith(PNG)
    for row in rows:
        rates = row["tokens_per_s_per_gpu"]
        assert rates["naive"] <= rates["pppipe"] <= rates["findep"] * (1 + 1e-6)
    slow = json.loads(say(*simulated, "--length", "1024", "--batch", "64", "--max-r1", "2", "--json"))
    assert slow["tokens_per_s_per_gpu"]["findep"] < rows[0]["tokens_per_s_per_gpu"]["findep"], "its links are slower"
    table = say(
        "dep", "simulate", "deepseek-v2", "-m", "C", "--length", "2048", "--skew", "1", "--ratios", "--batch", "32"
    )
    assert "tokens/s a GPU, simulated" in table and "4:4" in table


def test_thousands_of_gpus_are_solved(say: Any) -> None:
    options = ("--gpus", "4096", "--length", "4096", "--max-r1", "2", "--json")
    row = json.loads(say("dep", "simulate", "deepseek-v2", "-m", "D", *options))
    assert sum(row["plan"]["split"]) == 4096 and row["plan"]["replicas"] > 1, "more GPUs than experts"
    assert row["plan"]["gap"] < 0.05


def test_perfetto_opens_a_plans_trace_with_its_four_lanes(tmp_path: Path) -> None:
    perfetto = pytest.importorskip("perfettos").opened
    problem = Problem(testbeds.model("deepseek-v2", "A"), testbeds.named("A"), 1024)
    tasks = timeline(
        work_of(problem, Split(2, 6), Cut(1, 3, 4)), [("A", 0), ("A", 1), ("S", 0), ("A", 2), ("S", 1), ("S", 2)]
    )
    write_trace(tmp_path / "trace.json", tasks, "toy")
    with perfetto(tmp_path / "trace.json", tmp_path) as ask:
        rows = list(ask("select t.name track, count(*) n, sum(s.dur) ns from slice s join thread_track tt on s.track_id"
                        " = tt.id join thread t using (utid) group by 1"))  # fmt: skip
        problems = list(ask("select name, value from stats where severity != 'info' and value > 0"))
    assert [row.name for row in problems] == []
    assert {row.track: row.n for row in rows} == {
        lane: sum(task.resource.value == lane for task in tasks) for lane in LANES
    }
    mine = [event for event in events(tasks, "toy") if event["ph"] == "X"]
    assert sum(row.ns for row in rows) == pytest.approx(1e3 * sum(event["dur"] for event in mine), abs=2 * len(mine))
