"""Conversion: what lands in the store, what an interruption leaves, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from duoserve import convert as convert_module
from duoserve.checkpoint import Checkpoint
from duoserve.convert import convert
from duoserve.core import Key, Refusal
from duoserve.device import host_arena
from duoserve.durable import exclusive
from duoserve.manifest import is_store
from duoserve.store import Store


def digest(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_the_store_is_safetensors_with_aligned_slabs(toy: Any, tmp_path: Path) -> None:
    folder = convert(toy("gpt_oss"), tmp_path / "s", "int4")
    store = Store(folder)
    for i, layer in enumerate(store.layers):
        with safe_open(folder / layer.file, framework="pt") as file:
            slabs = file.get_tensor("experts")
        assert layer.data_offset % 4096 == 0 and slabs.shape == (layer.n_experts, store.layout(i).slab_bytes)
        buffer = host_arena(store.slab_bytes)
        store.read_into(Key(i, 3), buffer)
        assert torch.equal(buffer, slabs[3])
    with safe_open(store.trunk, framework="pt") as file:
        assert not [name for name in file.keys() if "experts.gate_up_proj" in name or "experts.down_proj" in name]
    store.close()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_those_of_the_stock_model(toy: Any, tmp_path: Path, family: str) -> None:
    """Stored (out, in), whatever the checkpoint's orientation, fused or one tensor per expert."""
    import toys

    checkpoint, stock = Checkpoint(toy(family)), toys.stock(toy(family))
    state = stock.state_dict()
    for spec in checkpoint.specs:
        for param in spec.parameters:
            for e in range(spec.n_experts):
                assert torch.equal(checkpoint.expert(spec, param, e), state[f"{spec.name}.{param}"][e])


def test_an_interrupted_conversion_goes_on_and_ends_the_same(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digest(convert(toy("qwen3_moe"), tmp_path / "whole", "int4"))
    write, written = convert_module.write_safetensors, []

    def interrupted(path: Path, entries: Any) -> int:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, entries)

    monkeypatch.setattr(convert_module, "write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(toy("qwen3_moe"), tmp_path / "s", "int4")
    assert not is_store(tmp_path / "s")
    written.clear()
    monkeypatch.setattr(
        convert_module, "write_safetensors", lambda path, entries: (written.append(path.name), write(path, entries))[1]
    )
    assert digest(convert(toy("qwen3_moe"), tmp_path / "s", "int4")) == whole
    assert written == ["experts-002.safetensors", "trunk.safetensors"], "finished layers are kept"


def test_waiting_for_another_process_is_said_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    holder = "import sys, time; from pathlib import Path; from duoserve.durable import exclusive\n"
    holder += "with exclusive(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    killer = threading.Timer(0.5, process.kill)
    killer.start()
    with exclusive(tmp_path, said.append):
        assert said == [f"waiting for process {process.pid}, which makes the same store"]
    process.wait()


def test_converting_again_does_nothing(toy: Any, tmp_path: Path) -> None:
    folder = convert(toy("mixtral"), tmp_path / "s", "int4")
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    convert(toy("mixtral"), folder, "int4")
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_another_store_or_other_files_are_never_overwritten(toy: Any, tmp_path: Path) -> None:
    folder = convert(toy("mixtral"), tmp_path / "s", "int4")
    with pytest.raises(Refusal, match="E_EXISTS"):
        convert(toy("mixtral"), folder, "bf16")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(Refusal, match="E_EXISTS"):
        convert(toy("mixtral"), tmp_path / "notes", "int4")


def test_a_full_disk_is_refused_before_the_first_byte(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(Refusal, match=r"E_DISK.*5,000 are free") as refusal:
        convert(toy("mixtral"), tmp_path / "s", "int4")
    assert refusal.value.status == 6 and not list((tmp_path / "s").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest"])
def test_damaged_stores_are_refused_with_the_file(toy: Any, tmp_path: Path, damage: str) -> None:
    folder = convert(toy("mixtral"), tmp_path / "s", "int4")
    victim = folder / ("manifest.json" if damage == "manifest" else "experts-001.safetensors")
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-4096])
    with pytest.raises(Refusal, match="E_STORE") as refusal:
        Store(folder)
    assert victim.name in str(refusal.value) and refusal.value.status == 5


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "E_REMOTE_CODE"),
        ({"model_type": "no_such_model"}, "E_CONFIG"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "E_QUANTISED"),
    ],
)
def test_configs_we_cannot_serve_are_refused(toy: Any, tmp_path: Path, change: dict[str, Any], code: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(toy("mixtral"), folder)
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match=code):
        Checkpoint(folder)
    assert not canary.exists(), "code of the checkpoint was run"


def test_shard_indexes_cannot_reach_outside(toy: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(toy("mixtral"), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../../etc/passwd.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refusal, match="E_CORRUPT"):
        Checkpoint(folder)


def test_a_missing_expert_is_named(toy: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(toy("mixtral"), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    victim = next(name for name in index["weight_map"] if "experts.3.w1" in name)
    from safetensors.torch import load_file, save_file

    shard = folder / index["weight_map"][victim]
    save_file({name: value for name, value in load_file(shard).items() if name != victim}, shard)
    with pytest.raises(Refusal, match="needs 6 experts, the checkpoint has 5"):
        Checkpoint(folder)


def trunk_without(folder: Path, to: Path, name: str) -> Path:
    """A copy of a checkpoint in one file, one tensor left out."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("model*"))
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    del tensors[name]
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
)
def test_a_trunk_that_lacks_a_tensor_is_refused_before_anything_is_written(toy: Any, tmp_path: Path, name: str) -> None:
    """An output matrix, a norm, and a buffer."""
    with pytest.raises(Refusal, match=rf"E_CORRUPT: 1 trunk tensors are missing, {name} first; fetch"):
        convert(trunk_without(toy("deepseek_v3"), tmp_path / "m", name), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_trunk_may_leave_out_what_is_tied(toy: Any, tmp_path: Path) -> None:
    tied = toy("mixtral", tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint(tied)._tensors
    convert(tied, tmp_path / "s")
    with pytest.raises(Refusal, match=r"E_CORRUPT: 2 trunk tensors are missing, lm_head.weight first"):
        Checkpoint(trunk_without(tied, tmp_path / "m", "model.embed_tokens.weight"))


def test_the_fingerprint_follows_the_weights(toy: Any, tmp_path: Path) -> None:
    import toys

    same = Checkpoint(toy("mixtral")).fingerprint
    assert Checkpoint(toy("mixtral")).fingerprint == same
    assert Checkpoint(toys.make(tmp_path / "other", "mixtral", seed=1)).fingerprint != same
