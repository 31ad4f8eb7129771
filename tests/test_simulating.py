"""The command `simulate`, from a model's name and a machine's to figures, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_traces import recorder

from duoserve import cli
from duoserve.core import Phase, Policy, Refusal
from duoserve.estimate import LayerNeeds, Needs, Product
from duoserve.fleet import FOLDER, machine
from duoserve.simulating import Scene, generated, play

# Small enough for seconds: 6 layers of 16 experts of 8 MB, of which a token takes 4.
NEEDS = Needs(
    layers=(LayerNeeds(experts=16, choices=4, slab_bytes=8 << 20, weights=14_000_000),) * 6,
    expert_format="int4",
    trunk=(Product("bf16", 50_000_000, False), Product("bf16", 20_000_000, True)),
    trunk_bytes=140_000_000,
    kv_bytes=1_000_000,
    ops=700,
    context=512,
    token_attention_flops=10_000_000,
    prompt_attention_flops=5_000_000_000,
)
PASSES = generated("toy", NEEDS, prompt=64, new=40, batch=1, seed=0)


def run(*args: object) -> None:
    cli.app([str(a) for a in args], standalone_mode=False)


def scene(policy: Policy, slots: int = 48, **changes: Any) -> Scene:
    return Scene(NEEDS, machine("a5000"), policy, slots, **changes)


def test_generated_passes_are_a_prompt_and_its_tokens() -> None:
    """The prompt's pass makes the first of 40 tokens."""
    assert [(one.phase, one.rows) for one in PASSES] == [(Phase.PREFILL, 64)] + [(Phase.DECODE, 1)] * 39
    assert all(sum(one.chosen[0].values()) == one.rows * 4 for one in PASSES)


@pytest.mark.parametrize("policy", [Policy.DUOSERVE, Policy.LRU, Policy.ON_DEMAND])
def test_nothing_beats_the_limit(policy: Policy) -> None:
    found = play(scene(policy), PASSES)
    assert found.share_of_limit is not None and 0 < found.share_of_limit < 1
    assert found.hits + found.in_flight + found.misses == 39 * 6 * 4
    assert found.prompt_s is not None and found.prompt_s < found.total_s
    assert 0 < found.link_busy < 1


def test_a_slower_link_never_makes_anything_faster() -> None:
    times = [play(scene(Policy.LRU, link=rate), PASSES).total_s for rate in (50e9, 25e9, 5e9)]
    assert times == sorted(times)


def test_more_slots_never_miss_more_and_all_slots_miss_nothing_in_decode() -> None:
    missed = [play(scene(Policy.LRU, slots), PASSES).misses for slots in (8, 24, 48, 96)]
    assert missed == sorted(missed, reverse=True)
    assert missed[0] > 0.5 * 39 * 6 * 4


def test_who_knows_the_future_moves_least() -> None:
    future, *others = (play(scene(p, 32), PASSES) for p in (Policy.BELADY, Policy.DUOSERVE, Policy.LRU, Policy.MIF))
    assert all(future.moved_bytes <= other.moved_bytes for other in others)
    assert all(future.total_s < other.total_s for other in others)


def test_a_good_predictor_helps_where_the_link_is_slow_and_a_bad_one_costs_bytes() -> None:
    """Guessing always, so that the live gate does not hide it."""
    slow = {"slots": 24, "link": 3e9}
    without = play(scene(Policy.DUOSERVE, **slow), PASSES)
    perfect = play(scene(Policy.DUOSERVE, recall=1.0, always=True, **slow), PASSES)
    wrong = play(scene(Policy.DUOSERVE, recall=0.0, always=True, **slow), PASSES)
    assert perfect.total_s < without.total_s
    assert perfect.in_flight + perfect.hits > without.in_flight + without.hits
    assert wrong.moved_bytes >= without.moved_bytes


def test_the_command_prints_rows_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("simulate", "gpt-oss-20b", "--machine", "a5000", "--prompt-tokens", 24, "--new-tokens", 6, "--slots", 96)
    run(*asked, "--policy", "lru")
    said = capsys.readouterr().out
    assert "no measurement" in said and "reached" in said and "tokens/s" in said
    run(*asked, "--policy", "duoserve", "--predictor-recall", 0.88, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["simulated"] is True and found["model"] == "gpt-oss-20b"
    assert found["slots"] == 96 and found["residency"] == pytest.approx(0.125)
    assert found["tokens_per_s"] < found["limit_tokens_per_s"]


def test_a_trace_is_replayed(toy: Any, load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with load(toy("mixtral"), budget="1GiB") as engine:
        watching = recorder(engine, tmp_path / "t")
        watching.expect("one", "test")
        engine.generate(input_ids=torch.arange(20)[None], max_new_tokens=9, eos_token_id=-1)
        watching.close()
    run("simulate", toy("mixtral"), "--machine", "rtx4090", "--trace", tmp_path / "t", "--policy", "lru", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["passes"] == 9 and found["hits"] + found["in_flight"] + found["misses"] == 8 * 3 * 2
    made = ("--like", tmp_path / "t", "--prompt-tokens", 4, "--new-tokens", 5, "--policy", "lru", "--json")
    run("simulate", toy("mixtral"), "--machine", "rtx4090", *made)
    found = json.loads(capsys.readouterr().out)
    assert found["routes"] == "generated" and found["passes"] == 5
    with pytest.raises(Refusal, match=r"E_TRACE: .* is of 3 layers of 6 experts, the model has 24 of 32"):
        run("simulate", "gpt-oss-20b", "--machine", "rtx4090", "--trace", tmp_path / "t")


def test_what_happens_when_is_recorded_in_virtual_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compute and stalls fill the model's thread; the run's file is what `duoserve timeline` reads."""
    pytest.importorskip("duoserve.runfile")
    asked = ("simulate", "gpt-oss-20b", "--machine", "a5000", "--prompt-tokens", 8, "--new-tokens", 3, "--slots", 96)
    run(*asked, "--policy", "lru", "--timeline", tmp_path / "run.json", "--json")
    found = json.loads(capsys.readouterr().out)
    run("timeline", tmp_path / "run.json", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["meta"]["simulated"] == "yes"
    assert shown["seconds"] == pytest.approx(found["total_s"], rel=0.01)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("gpt-oss-20b", "--machine", "a500"), r"E_PROFILE: .*did you mean 'a5000'"),
        (("gpt-oss-20b", "--machine", "a5000", "--policy", "lr"), r"E_OPTION: .*did you mean 'lru'"),
        (("gpt-oss-2b", "--machine", "a5000"), r"E_MODEL: .*"),
        (("gpt-oss-20b", "--machine", "a5000", "--residency", "half"), r"E_SIZE: .*"),
        (("gpt-oss-20b", "--machine", "a5000", "--link", "fast"), r"E_SIZE: link 'fast' is not a size"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(asked: tuple[str, ...], says: str) -> None:
    with pytest.raises(Refusal, match=says) as refused:
        run("simulate", *asked)
    assert "\n" not in str(refused.value)


def test_a_hostile_machine_is_refused_in_one_line(tmp_path: Path) -> None:
    broken = json.loads((FOLDER / "a5000.json").read_bytes()) | {"device": "x" * 500}
    (tmp_path / "m.json").write_text(json.dumps(broken))
    with pytest.raises(Refusal, match=r"E_PROFILE: .* is no machine profile") as refused:
        run("simulate", "gpt-oss-20b", "--machine", tmp_path / "m.json")
    assert "\n" not in str(refused.value)
