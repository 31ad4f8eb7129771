"""Models fetched from the hub: the command against a real HTTP server that speaks the hub's API, and that can cut
connections, lie about lengths, corrupt bytes and refuse.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hubs import COMMIT, OLDER, Fault, Hub, is_large, reach, serving
from safetensors.torch import load_file, save_file

from duoserve import cli, hub
from duoserve import convert as convert_module
from duoserve.convert import Conversion, convert
from duoserve.core import Refusal
from duoserve.manifest import is_store
from duoserve.store import Store

PROGRESS = re.compile(r"(fetching|checking|converting) .*: \d+ of \d+ MiB(, \d+ s left)?")  # every 5 s


@pytest.fixture
def server(toy: Any, tmp_path: Path) -> Iterator[Hub]:
    """One repository, `org/toy`, with a checkpoint, a tokenizer and files that nobody needs."""
    folder = Path(shutil.copytree(toy("mixtral"), tmp_path / "served"))
    demo = Path(hub.__file__).parent / "demo"
    for file in demo.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "README.md").write_text("a toy")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"twice")
    with serving(Hub({"org/toy": {COMMIT: folder}}, {"main": COMMIT, "v1": COMMIT})) as made:
        yield made


@dataclass(frozen=True)
class Done:
    returncode: int
    stderr: str


def environment(server: Hub, tmp_path: Path, offline: bool = False) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1", "DUOSERVE_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip


def command(server: Hub, tmp_path: Path, *args: str) -> Done:
    """The command in a process of its own, as a user runs it."""
    line = [sys.executable, "-m", "duoserve.cli", *args]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(server, tmp_path), timeout=240)
    return Done(done.returncode, done.stderr)


Run = Callable[..., Done]


@pytest.fixture
def run(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Run:
    """`run("convert", "org/toy", ...)`: the command in this process, which saves the seconds that imports take."""

    def call(*args: str, offline: bool = False) -> Done:
        reach(server, monkeypatch, tmp_path / "hf", offline)
        monkeypatch.setattr(sys, "argv", ["duoserve", *args])
        capfd.readouterr()
        returncode = cli._guarded()
        return Done(returncode, capfd.readouterr().err)

    return call


def refused(done: Done, code: str, status: int) -> str:
    """The one line that a user saw."""
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if not PROGRESS.fullmatch(line)]
    assert len(lines) == 1 and re.match(f"error: {code}: ", lines[0]), done.stderr
    return lines[0]


def fetched(server: Hub) -> set[str]:
    return {name for method, name, _ in server.heard if method == "GET"}


def parts(folder: Path) -> dict[str, bytes]:
    """A store's files, less what says where it came from."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    manifest.pop("sha256")
    manifest.pop("source")
    return files | {"manifest.json": json.dumps(manifest).encode()}


def test_a_hub_model_becomes_the_store_of_the_same_folder(server: Hub, run: Run, tmp_path: Path) -> None:
    served = server.repos["org/toy"][COMMIT]
    done = command(server, tmp_path, "convert", "org/toy", "-o", str(tmp_path / "s"))
    assert done.returncode == 0, done.stderr
    wanted = {file.name for file in served.glob("*") if file.suffix in (".safetensors", ".json", ".jinja")}
    assert fetched(server) == wanted
    assert parts(tmp_path / "s") == parts(convert(served, tmp_path / "local"))
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["source"] == {"repo": "org/toy", "commit": COMMIT}
    server.heard.clear()
    again = run("convert", "org/toy@v1", "-o", str(tmp_path / "s"))
    assert again.returncode == 0 and not fetched(server), "nothing is fetched twice"
    server.heard.clear()
    offline = run("convert", "org/toy", "-o", str(tmp_path / "t"), offline=True)
    assert offline.returncode == 0 and not server.heard, offline.stderr
    assert parts(tmp_path / "t") == parts(tmp_path / "s")


def test_interrupted_and_corrupted_files_are_fetched_again_and_good_ones_kept(
    server: Hub, run: Run, tmp_path: Path
) -> None:
    """Cut in mid-file: goes on from there. One bit wrong: found, named, taken away, and only that file fetched again."""
    served = server.repos["org/toy"][COMMIT]
    shards = sorted(file.name for file in served.glob("*.safetensors"))
    large = load_file(served / shards[0]) | {"unused.weight": torch.zeros(6 << 20)}
    save_file(large, served / shards[0], {"format": "pt"})  # whoever fetches writes 10 MiB at a time
    server.faults = [Fault("cut", shards[0], 12 << 20), Fault("flip", shards[1], 12345)]
    line = refused(run("convert", "org/toy", "-o", str(tmp_path / "s")), "E_CORRUPT", 5)
    assert shards[1] in line and shards[0] not in line
    assert ("GET", shards[0], f"bytes={10 << 20}-") in server.heard, "resumed in mid-file"
    assert not is_store(tmp_path / "s")
    server.heard.clear()
    done = run("convert", "org/toy", "-o", str(tmp_path / "s"))
    assert done.returncode == 0 and fetched(server) == {shards[1]}, (done.stderr, server.heard)
    assert parts(tmp_path / "s") == parts(convert(server.repos["org/toy"][COMMIT], tmp_path / "local"))


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_small_files_are_checked_before_anything_large_is_fetched(
    server: Hub, run: Run, tmp_path: Path, file: str
) -> None:
    server.faults = [Fault("flip", file, 40)]
    line = refused(run("convert", "org/toy", "-o", str(tmp_path / "s")), "E_CORRUPT", 5)
    assert file in line and not any(is_large(name) for name in fetched(server))


@pytest.mark.parametrize("kind", ["short", "long"])
def test_wrong_lengths_are_refused_with_both_numbers(server: Hub, run: Run, tmp_path: Path, kind: str) -> None:
    shard = next(server.repos["org/toy"][COMMIT].glob("*.safetensors"))
    server.faults = [Fault(kind, shard.name, 777, 20)]
    line = refused(run("convert", "org/toy", "-o", str(tmp_path / "s")), "E_HUB", 3)
    assert str(shard.stat().st_size + (7 if kind == "long" else 0)) in line
    server.faults.clear()
    done = run("convert", "org/toy", "-o", str(tmp_path / "s"))
    assert done.returncode == 0, done.stderr


REFUSED = {
    "missing": ("org/none", "E_MODEL", 3, "hf auth login"),
    "gated": ("org/gated", "E_GATED", 3, "ask for access"),
    "revision": ("org/toy@v9", "E_REVISION", 3, "branch, a tag or a commit"),
    "down": ("org/down", "E_HUB", 3, "answered 500"),
    "no weights": ("org/bin", "E_MODEL", 3, "only 2 .bin"),
    "no config": ("org/bare", "E_MODEL", 3, "no config.json"),
    "no such shard": ("org/holes", "E_CORRUPT", 5, "lacks 1 of"),
    "code": ("org/code", "E_REMOTE_CODE", 2, "auto_map"),
    "quantised": ("org/awq", "E_QUANTISED", 2, "awq"),
    "dense": ("org/dense", "E_NOT_MOE", 2, "0 routed experts"),
    "no room": ("org/vast", "E_DISK", 6, "needs 9,0"),
    "no id": ("org--x/y", "E_MODEL", 3, "check the name"),
    "way out": ("org/toy@../../x", "E_MODEL", 3, "no model folder"),
}


@pytest.fixture
def bad_repos(server: Hub, tmp_path: Path) -> Hub:
    good = server.repos["org/toy"][COMMIT]

    def repo(name: str, *drop: str, **config: Any) -> Path:
        folder = tmp_path / "repos" / name
        shutil.copytree(good, folder, ignore=shutil.ignore_patterns(*drop))
        if config:
            said = json.loads((folder / "config.json").read_text()) | config
            (folder / "config.json").write_text(json.dumps(said))
        server.repos[f"org/{name}"] = {COMMIT: folder}
        return folder

    server.status = {"org/gated": (403, "GatedRepo"), "org/down": (500, "")}
    (repo("bin", "*safetensors*") / "more.bin").write_bytes(b"x")
    repo("bare", "config.json")
    shards = sorted(file.name for file in good.glob("*.safetensors"))
    repo("holes", shards[0])
    repo("code", auto_map={"AutoConfig": "evil.Config"})
    repo("awq", quantization_config={"quant_method": "awq"})
    repo("dense", model_type="llama", architectures=["LlamaForCausalLM"])
    server.big = {}
    return server


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_one_line(bad_repos: Hub, run: Run, tmp_path: Path, case: str) -> None:
    model, code, status, said = REFUSED[case]
    if case == "no room":
        bad_repos.repos["org/vast"] = bad_repos.repos["org/toy"]
        bad_repos.big = {next(bad_repos.repos["org/toy"][COMMIT].glob("*.safetensors")).name: 9 * 10**15}
    line = refused(run("convert", model, "-o", str(tmp_path / "s")), code, status)
    assert said in line, line
    assert not any(is_large(name) for name in fetched(bad_repos)), "refused before anything large was fetched"


def test_offline_and_no_network_say_so(server: Hub, run: Run, tmp_path: Path) -> None:
    line = refused(run("convert", "org/toy", "-o", str(tmp_path / "s"), offline=True), "E_OFFLINE", 3)
    assert "HF_HUB_OFFLINE" in line and not server.heard
    url, server.url = server.url, "http://127.0.0.1:9"
    refused(run("convert", "org/toy", "-o", str(tmp_path / "s")), "E_HUB", 3)
    server.url = url
    assert run("convert", "org/toy", "-o", str(tmp_path / "s")).returncode == 0
    server.url = "http://127.0.0.1:9"
    with pytest.warns(UserWarning, match=f"going on with commit {COMMIT[:12]} from the hub cache"):
        assert run("convert", "org/toy", "-o", str(tmp_path / "t")).returncode == 0


def test_an_interrupted_download_ends_at_once(server: Hub, tmp_path: Path) -> None:
    """Ctrl-C while the hub is silent; the server would go on only after the process has ended."""
    shard = next(server.repos["org/toy"][COMMIT].glob("*.safetensors"))
    server.faults = [Fault("stall", shard.name)]
    line = [sys.executable, "-m", "duoserve.cli", "convert", "org/toy", "-o", str(tmp_path / "s")]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment(server, tmp_path))
    assert server.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    lines = [line for line in said.splitlines() if not PROGRESS.fullmatch(line)]
    assert process.returncode == 130, said
    assert lines == ["error: interrupted; the same command goes on where it stopped"], said
    assert not server.go_on.is_set()


def test_files_never_come_from_two_commits(server: Hub, run: Run, tmp_path: Path, toy: Any) -> None:
    """The branch moves between two runs, the first of which broke off: the second fetches all of the new commit."""
    served = server.repos["org/toy"]
    served[OLDER] = Path(shutil.copytree(served[COMMIT], tmp_path / "older"))
    for file in served[OLDER].glob("model*"):
        file.unlink()
    for file in toy("mixtral", num_hidden_layers=2).glob("*"):
        shutil.copy(file, served[OLDER])
    server.refs["main"] = OLDER
    last = sorted(file.name for file in served[OLDER].glob("*.safetensors"))[-1]
    server.faults = [Fault("short", last, 5, 20)]
    refused(run("convert", "org/toy", "-o", str(tmp_path / "s")), "E_HUB", 3)
    server.refs["main"], server.faults = COMMIT, []
    done = run("convert", "org/toy", "-o", str(tmp_path / "s"))
    assert done.returncode == 0, done.stderr
    assert parts(tmp_path / "s") == parts(convert(served[COMMIT], tmp_path / "local"))
    pinned = run("convert", f"org/toy@{OLDER}", "-o", str(tmp_path / "old"))
    assert pinned.returncode == 0, pinned.stderr
    assert json.loads((tmp_path / "old" / "manifest.json").read_text())["source"]["commit"] == OLDER


def test_damage_in_the_cache_is_found_when_it_is_converted(server: Hub, run: Run, tmp_path: Path) -> None:
    """In a header, which cannot be read then, and in a tensor, which could."""
    assert run("convert", "org/toy", "-o", str(tmp_path / "s")).returncode == 0
    snapshot = tmp_path / "hf" / "hub" / "models--org--toy" / "snapshots" / COMMIT
    shards = sorted(snapshot.glob("*.safetensors"))
    for shard, at in ((shards[0], 3), (shards[1], -100)):
        data = bytearray(shard.read_bytes())
        data[at] ^= 0x40
        shard.resolve().write_bytes(bytes(data))
    with pytest.raises(Refusal, match=rf"E_CORRUPT: 2 of \d+ files .* {shards[0].name}, {shards[1].name}; taken away"):
        convert(snapshot, tmp_path / "t")
    assert not shards[0].is_symlink() and shards[2].is_file() and not is_store(tmp_path / "t")


def test_cheap_refusals_come_before_the_weights_are_read(
    server: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("dear")
    assert run("convert", "org/toy", "-o", str(tmp_path / "s")).returncode == 0
    monkeypatch.setattr(convert_module, "check", lambda *args: pytest.fail("every byte was read"))
    refused(run("convert", "org/toy", "-o", str(tmp_path / "diary")), "E_EXISTS", 2)
    refused(run("convert", "org/toy", "-o", str(tmp_path / "s"), "--format", "bf16"), "E_EXISTS", 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(run("convert", "org/toy", "-o", str(tmp_path / "t")), "E_DISK", 6)


@pytest.mark.parametrize("begun", ["whole", "half"])
def test_damage_since_the_last_time_is_not_taken_for_another_model(
    server: Hub, run: Run, tmp_path: Path, begun: str
) -> None:
    """Beside a store of the same commit, whole or under way: the wrong bytes are named, and the right ones go on."""
    out = tmp_path / "s"
    assert run("convert", "org/toy", "-o", str(out)).returncode == 0
    whole = parts(out)
    if begun == "half":
        convert_module._reopen(out, Conversion.of(hub.resolve("org/toy")))
    snapshot = tmp_path / "hf" / "hub" / "models--org--toy" / "snapshots" / COMMIT
    shard = min(snapshot.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 0x40
    shard.resolve().write_bytes(bytes(data))
    line = refused(run("convert", "org/toy", "-o", str(out)), "E_CORRUPT", 5)
    assert shard.name in line and "taken away" in line
    done = run("convert", "org/toy", "-o", str(out))
    assert done.returncode == 0 and parts(out) == whole, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_random_faults_never_let_a_bad_file_in(server: Hub, run: Run, tmp_path: Path, seed: int) -> None:
    """Any faults on any files: each run ends in one line or in the right store, and without faults it is the right store."""
    rng = random.Random(seed)
    served = server.repos["org/toy"][COMMIT]
    names = [file.name for file in served.glob("*") if file.suffix in (".safetensors", ".json")]
    kinds = ["cut", "short", "long", "flip", "flip", "500"]
    want = parts(convert(served, tmp_path / "local"))
    for _ in range(2):
        server.faults = [
            Fault(rng.choice(kinds), rng.choice(names), rng.randrange(1 << 20), rng.randrange(1, 4)) for _ in range(4)
        ]
        done = run("convert", "org/toy", "-o", str(tmp_path / "s"))
        if done.returncode == 0:
            assert parts(tmp_path / "s") == want
        else:
            assert "INTERNAL" not in refused(done, "E_[A-Z]+", done.returncode)
            assert not is_store(tmp_path / "s")
    server.faults = []
    for _ in range(2):  # what was taken away, and then all is well
        done = run("convert", "org/toy", "-o", str(tmp_path / "s"))
    assert done.returncode == 0, done.stderr
    assert parts(tmp_path / "s") == want
    Store(tmp_path / "s").close()
