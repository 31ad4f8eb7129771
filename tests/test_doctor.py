"""`duoserve doctor`: what it says of this machine is what the system says, its hints come when they should, and `plan`
takes what it measured. No test asserts a rate.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from duoserve import cli, doctor
from duoserve.measure import measure_disk
from duoserve.outlook import look, table
from duoserve.profile import DiskRate, read_profile


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One quick examination for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "ROUNDS", 1)
        return doctor.examine(str(tmp_path_factory.mktemp("doctor")))


def test_a_report_is_one_json_object_of_what_the_system_says(report: dict[str, Any]) -> None:
    again = json.loads(json.dumps(report))
    assert again["versions"]["torch"] == torch.__version__ and again["versions"]["bitsandbytes"]
    assert again["cpu"]["usable_cores"] <= len(os.sched_getaffinity(0))
    assert 0 < again["memory"]["available_bytes"] <= again["memory"]["total_bytes"]
    assert 0 < again["disk"]["free_bytes"] <= again["disk"]["total_bytes"]
    assert set(again["profile"]["matrix"]["seconds_per_weight"]) == {"bf16", "float32", "int4", "nf4"}
    assert len(doctor.table(report)) <= 40


def test_doctor_leaves_nothing_but_the_profile(report: dict[str, Any]) -> None:
    path = Path(report["profile_file"])
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]
    assert json.dumps(read_profile(path).to_json()) == json.dumps(report["profile"])


def test_plan_takes_what_doctor_measured(report: dict[str, Any]) -> None:
    profile, why = doctor.known_profile(str(Path(report["profile_file"]).parent))
    assert profile is not None, why
    found = look(None, profile)
    assert found.estimate is not None and 0 < found.estimate.limit_s <= found.estimate.token_s
    assert found.estimate.misses == 12 and json.dumps(found.to_json())
    assert any(name == "decode" for name, _ in table(found))


def test_a_profile_of_another_machine_is_not_believed(report: dict[str, Any], tmp_path: Path) -> None:
    data = json.loads(json.dumps(report["profile"]))
    data["machine"]["cpu"] = "abacus"
    (tmp_path / "machine.json").write_text(json.dumps(data))
    assert doctor.known_profile(str(tmp_path)) == (None, "the machine profile is of another machine (cpu abacus)")
    (tmp_path / "machine.json").write_text("{}")
    assert "E_PROFILE" in str(doctor.known_profile(str(tmp_path))[1])


def test_the_command_prints_the_plan_with_a_broken_profile_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]
) -> None:
    (tmp_path / "machine.json").write_text("{}")
    monkeypatch.setattr(doctor, "quick_profile", lambda asked: read_profile(Path(report["profile_file"])))
    monkeypatch.setattr("sys.argv", ["duoserve", "plan", "--json", "--cache-dir", str(tmp_path)])
    assert cli._guarded() == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["estimate"]["misses"] == 12
    assert "E_PROFILE" in said.err and len(said.err.splitlines()) == 1


def changed(report: dict[str, Any], part: str, **values: Any) -> dict[str, Any]:
    found = copy.deepcopy(report)
    found[part] |= values
    return found


HINTS = [
    ("cpu", {"features": ["avx2"]}, "AVX2 only"),
    ("cpu", {"features": []}, "not even AVX2"),
    ("cpu", {"torch_threads": 64, "usable_cores": 2.0}, "64 threads on 2 cores: set OMP_NUM_THREADS=2"),
    ("memory", {"available_bytes": 1 << 30}, "only 1.00 GiB"),
    ("memory", {"cap_bytes": 1 << 30}, "caps this process at 1.00 GiB"),
    ("memory", {"large_pages": "never"}, "large pages are off"),
    ("disk", {"free_bytes": 1 << 30, "total_bytes": 1 << 40}, "1.00 GiB of 1024.00 GiB are free"),
    ("versions", {"bitsandbytes": None}, "bitsandbytes is not installed"),
]


@pytest.mark.parametrize(("part", "values", "says"), HINTS, ids=[hint[2] for hint in HINTS])
def test_what_will_hurt_is_hinted_at_and_only_then(
    report: dict[str, Any], part: str, values: dict[str, Any], says: str
) -> None:
    fine = changed(report, "cpu", features=["avx2", "avx512f"], torch_threads=1, usable_cores=2.0)
    fine = changed(fine, "memory", available_bytes=8 << 30, cap_bytes=None, large_pages="madvise")
    fine = changed(fine, "disk", free_bytes=1 << 40, total_bytes=1 << 40)
    assert not any(says in hint for hint in doctor.hints(fine, None, {}))
    assert any(says in hint for hint in doctor.hints(changed(fine, part, **values), None, {}))


def test_the_environment_and_a_slow_disk_are_hinted_at(report: dict[str, Any]) -> None:
    slow: Any = SimpleNamespace(disk=SimpleNamespace(rates=(DiskRate(1 << 20, 1, 1e8),), direct=False))
    said = " ".join(doctor.hints(report, slow, {"ATEN_CPU_CAPABILITY": "default", "HF_HUB_OFFLINE": "1"}))
    assert "ATEN_CPU_CAPABILITY=default" in said and "HF_HUB_OFFLINE is on" in said
    assert "reads 0.10 GB/s, under 0.5" in said and "no direct reads" in said


def test_a_disk_without_room_is_a_hint_not_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=50 << 20))
    found = doctor.examine(str(tmp_path))
    assert "profile" not in found and "nothing was measured: E_DISK" in found["hints"][0]
    assert doctor.table(found) and not list(tmp_path.iterdir())


def test_the_disk_is_read_by_whole_requests(tmp_path: Path) -> None:
    found = measure_disk(tmp_path, 1)
    assert {rate.threads for rate in found.rates} == {1, 2} and min(r.bytes_per_s for r in found.rates) > 0
    assert not list(tmp_path.iterdir())
