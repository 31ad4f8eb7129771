"""Machines and models by name: profiles that cite everything they say, configs that count to what their publishers say, and
the prices of pieces."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from duoserve.core import Phase, Refusal
from duoserve.costing import MachineCosts, limit_s
from duoserve.fleet import FOLDER, machine, machines
from duoserve.specimens import SPECIMENS, count, needs_of, parameters, specimen

ALL = ("a5000", "a6000", "h200", "rtx4090", "rtx5090")


def test_the_fleet_has_the_machines_that_were_promised() -> None:
    assert machines() == sorted(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_constant_of_a_machine_has_a_source(name: str) -> None:
    said = json.loads((FOLDER / f"{name}.json").read_bytes())
    parts = [part for part in said.values() if isinstance(part, dict) and "source" in part]
    assert len(parts) == 6
    for part in parts:
        assert "estimate" in part["source"] or "data sheet" in part["source"] or "measured" in part["source"], part
    assert json.loads(json.dumps(machine(name).to_json())) == said


@pytest.mark.parametrize("name", ALL)
def test_a_machine_obeys_its_own_roofline(name: str) -> None:
    """Wider formats take longer at one row, more rows never less, and nothing reads faster than the memory does."""
    profile = machine(name)
    bits = {"float32": 32, "bf16": 16, "fp8": 8, "int4": 4.5}
    one = [profile.weight_s(format, 1) for format in bits]
    assert one == sorted(one, reverse=True)
    for format, width in bits.items():
        by_rows = [profile.weight_s(format, rows) for rows in (1, 8, 64, 512, 8192)]
        assert by_rows == sorted(by_rows)
        assert by_rows[0] >= width / 8 / profile.memory
    assert profile.link is not None and profile.link.pageable < profile.link.pinned < profile.memory


def test_machines_are_what_their_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    import machines as script

    for card in script.CARDS:
        assert machine(card.file) == script.profile(card)


def test_a_hostile_profile_is_refused_in_one_line(tmp_path: Path) -> None:
    good = json.loads((FOLDER / "a5000.json").read_bytes())
    for harm in (
        {"link": {**good["link"], "pinned": 1e400}},
        {"link": {**good["link"], "source": ""}},
        {"link": {**good["link"], "source": "a\nb"}},
        {"memory": {"source": "x" * 2000, "bytes_per_s": 1e9}},
        {"matrix": {"source": "x", "seconds_per_weight": {"bf16": [[1, -1.0]]}}},
        {"surprise": 1},
    ):
        (tmp_path / "m.json").write_text(json.dumps(good | harm))
        with pytest.raises(Refusal, match="E_PROFILE: ") as refused:
            machine(str(tmp_path / "m.json"))
        assert "\n" not in str(refused.value)
    with pytest.raises(Refusal, match="did you mean 'rtx4090'"):
        machine("rtx4091")


@pytest.mark.parametrize("name", SPECIMENS)
def test_a_specimen_counts_to_what_its_publisher_says(name: str) -> None:
    model = specimen(name)
    assert parameters(model) == pytest.approx(model.published, rel=0.02)
    assert model.source.endswith("config.json")


def test_what_was_counted_beforehand_is_what_is_counted_now() -> None:
    model = specimen("deepseekmoe-16b")
    assert count(model, model.experts, model.trunk) == needs_of("deepseekmoe-16b")


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIMENS)
def test_all_that_was_counted_beforehand_is_what_is_counted_now(name: str) -> None:
    model = specimen(name)
    assert count(model, model.experts, model.trunk) == needs_of(name)


def test_an_unknown_specimen_names_the_nearest() -> None:
    with pytest.raises(Refusal, match="did you mean 'gpt-oss-20b'"):
        specimen("gpt-oss-20")


def test_a_needs_bytes_are_those_of_the_paper() -> None:
    """papers.md 1.9: FP8 experts of Qwen3-30B-A3B have 4.7 MB, 0.60 GB a layer."""
    needs = needs_of("qwen3-30b-a3b")
    assert needs.layers[0].slab_bytes == pytest.approx(4.7e6, rel=0.01)
    assert 128 * needs.layers[0].slab_bytes == pytest.approx(0.60e9, rel=0.02)
    assert (len(needs.layers), needs.layers[0].choices) == (48, 8)


def test_pieces_of_a_pass_add_up_to_the_estimates_parts() -> None:
    needs, profile = needs_of("qwen3-30b-a3b"), machine("h200")
    costs = MachineCosts(needs, profile, context=needs.context)
    stretches = [costs.trunk_s(layer, 1, Phase.DECODE) for layer in range(len(needs.layers) + 1)]
    host = needs.ops * profile.cold.op_s
    head = sum(p.weights * profile.weight_s(p.format, 1) for p in needs.trunk if p.last_row_only)
    assert sum(stretches) == pytest.approx(host + head)  # launches take longer than an H200's arithmetic
    slow = replace(profile, memory=profile.memory / 1000)
    assert sum(MachineCosts(needs, slow, needs.context).trunk_s(0, 1, Phase.DECODE) for _ in needs.layers) > host
    layer = needs.layers[0]
    assert costs.expert_s(0, 64) == pytest.approx(layer.weights * profile.weight_s("fp8", 64))


def test_a_long_prompt_costs_more_than_its_tokens() -> None:
    costs = MachineCosts(needs_of("qwen3-30b-a3b"), machine("a5000"), context=512)
    short, long = (costs.trunk_s(0, rows, Phase.PREFILL) for rows in (4096, 16384))
    assert long > 4 * short


def test_the_limit_is_what_moved_or_what_was_read() -> None:
    needs, profile = needs_of("qwen3-30b-a3b"), machine("a5000")
    assert profile.link is not None
    assert limit_s(needs, profile, 10 * profile.link.pinned, 1, 512) == (10.0, "link")
    seconds, by = limit_s(needs, profile, 0, 10, needs.context)
    assert by == "memory"
    assert seconds == pytest.approx(10 * (needs.trunk_bytes + needs.active_bytes + needs.kv_bytes) / profile.memory)
