"""Kills, full disks, failing disks and rivals: what is accepted is never corrupt, and what is rerun ends the same. The slow
versions do the same more often: pytest -m slow tests/test_faults.py
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toys
from faults import Child, Faults, Forks
from stores import SEED, content, flip, layers, often, problems

import duoserve
from duoserve import convert as convert_module
from duoserve.convert import Conversion, convert, write_store
from duoserve.core import Refusal
from duoserve.manifest import is_store


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    server = Forks(tmp_path_factory.mktemp("said"))
    yield server
    server.close()


def until(true: Callable[[], Any], child: Child) -> None:
    """Wait for what a child does; where it does not come, what the child said comes in its place."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, child.said
        time.sleep(0.002)


def check_half_made(out: Path) -> None:
    """Whatever a fault left: no store, or a whole one."""
    if out.exists() and is_store(out):
        assert problems(out) == []


def check_rerun(out: Path, whole: Path, rerun: Any) -> None:
    """The same command goes on: at most one layer is redone, the store is that of an undisturbed run, nothing is left."""
    before = layers(out)
    rerun()
    assert content(out) == content(whole)
    redone = [name for name, inode in before.items() if layers(out)[name] != inode]
    assert len(redone) <= 1, redone


@often(10, 100)
def test_killed_at_random_times_conversions_go_on(
    forks: Forks, model: Path, whole: Path, tmp_path: Path, times: int
) -> None:
    rng, killed = random.Random(SEED), 0
    for name in ("first", "second"):  # the first waits for the server to import
        began = time.monotonic()
        assert forks.run("convert", model, "-o", tmp_path / name)[0] == 0
    lasts = time.monotonic() - began
    for i in range(times):
        out = tmp_path / f"s{i}"
        for _ in range(rng.choice((1, 1, 1, 3))):  # some are killed again when they go on
            child = forks.start("convert", model, "-o", out)
            time.sleep(rng.uniform(0, lasts))
            child.kill()
            killed += child.wait() == -9
            check_half_made(out)
        check_rerun(out, whole, lambda out=out: forks.run("convert", model, "-o", out))
    assert killed > times // 3, f"{killed} kills came before the end (seed {SEED})"


def test_ctrl_c_says_in_one_line_that_the_same_command_goes_on(
    forks: Forks, model: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    child = forks.start("convert", model, "-o", out, slow=0.005)
    until(lambda: layers(out), child)
    child.kill(signal.SIGINT)
    assert child.wait() == 130 and not is_store(out)
    line, counted = child.said.splitlines()  # the second is the server's
    assert line == "error: interrupted; the same command goes on where it stopped" and counted.startswith("moments ")
    check_rerun(out, whole, lambda: forks.run("convert", model, "-o", out))


@often(6, 10_000)
def test_killed_at_every_write_sync_and_rename_conversions_go_on(
    forks: Forks, model: Path, whole: Path, tmp_path: Path, times: int
) -> None:
    status, said = forks.run("convert", model, "-o", tmp_path / "undisturbed")
    moments = int(said.split()[-1])
    assert status == 0 and moments > 100
    every = range(1, moments + 1)
    for moment in every if times >= moments else sorted(random.Random(SEED).sample(every, times)):
        out = tmp_path / f"s{moment}"
        assert forks.run("convert", model, "-o", out, kill_at=moment)[0] == -9, moment
        check_half_made(out)
        check_rerun(out, whole, lambda out=out: forks.run("convert", model, "-o", out))
        shutil.rmtree(out)


@often(15, 10_000)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_moment_leaves_what_was_done(
    model: Path, whole: Path, tmp_path: Path, error: int, times: int
) -> None:
    conversion = Conversion.of(model)
    with Faults(lambda *_: None).installed() as count:
        write_store(conversion, tmp_path / "undisturbed").close()
    every = range(1, count.moments + 1)
    for moment in every if times >= count.moments else sorted(random.Random(SEED).sample(every, times)):
        out, struck = tmp_path / f"s{moment}", []

        def strike(at: int, what: str, moment: int = moment, struck: list[str] = struck) -> None:
            if at >= moment and not struck and what in ("write", "fsync", "replace"):
                struck.append(what)
                raise OSError(error, os.strerror(error))

        with Faults(strike).installed():
            try:
                write_store(conversion, out).close()
            except OSError as failed:
                assert failed.errno == error
        check_half_made(out)
        left = content(out)
        assert not [name for name in left if name.startswith(".")], left.keys()
        wanted = content(whole)
        assert all(data == wanted[name] for name, data in left.items() if name != "conversion.json")
        check_rerun(out, whole, lambda out=out: write_store(conversion, out).close())
        shutil.rmtree(out)


def test_files_are_synced_before_they_get_their_name_and_the_name_after(model: Path, tmp_path: Path) -> None:
    """write < fsync(file) < rename < fsync(folder), for every file of a store; nothing is written once it was synced."""
    events: list[tuple[str, str, int]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size))
        fsync(fd)

    def noted_replace(source: Any, target: Any) -> None:
        events.append(("replace", f"{source} {target}", os.stat(source).st_size))
        replace(source, target)

    out = tmp_path / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(os, "replace", noted_replace)
        convert(model, out)
    named = set()
    for i, (what, paths, n_bytes) in enumerate(events):
        if what == "replace":
            source, target = paths.split()
            assert events[i - 1] == ("fsync", source, n_bytes), f"{target} got its name before it was on the disk"
            assert events[i + 1][:2] == ("fsync", str(out)), f"{target}'s name was not made durable"
            named.add(Path(target).name)
    assert ("fsync", str(tmp_path)) in [event[:2] for event in events], "the folder's own name was not made durable"
    assert named == {file.name for file in out.iterdir()} | {"conversion.json"}
    order = [paths.split()[1] for what, paths, _ in events if what == "replace"]
    assert order[-1] == str(out / "manifest.json"), "the manifest comes last"


@contextlib.contextmanager
def small_disk(at: Path, n_bytes: int) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(at)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_disks_of_20_sizes_are_refused_or_filled_but_never_spoilt(model: Path, whole: Path, tmp_path: Path) -> None:
    conversion = Conversion.of(model)
    all_bytes = sum(map(len, content(whole).values()))
    outcomes = []
    for i in range(20):
        with small_disk(tmp_path / "disk", all_bytes * (i + 1) // 14 // 4096 * 4096) as disk:
            try:
                write_store(conversion, disk / "s").close()
                outcomes.append("made")
                assert content(disk / "s") == content(whole)
            except Refusal as refusal:
                outcomes.append("refused")
                assert refusal.code == "E_DISK" and refusal.status == 6
                assert not list((disk / "s").iterdir()), "refused before the first byte"
    assert outcomes == sorted(outcomes, reverse=True) and {"made", "refused"} == set(outcomes), outcomes


def test_a_disk_that_others_fill_ends_a_conversion_which_goes_on_later(
    forks: Forks, model: Path, whole: Path, tmp_path: Path
) -> None:
    """The space was there when it began. Exit 6; what was finished stays, and what is there is not asked for again."""
    all_bytes = sum(map(len, content(whole).values()))
    with small_disk(tmp_path / "disk", all_bytes * 3) as disk:
        child = forks.start("convert", model, "-o", disk / "s", slow=0.005)
        until(lambda: len(layers(disk / "s")) >= 3, child)
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free // 4096 * 4096))
        assert child.wait() == 6 and "error: E_DISK: " in child.said, child.said
        assert not list((disk / "s").glob(".*"))
        check_half_made(disk / "s")
        done, wanted = layers(disk / "s"), content(whole)
        assert done and all((disk / "s" / name).read_bytes() == wanted[name] for name in done)
        noted = [layer["file"] for layer in json.loads((disk / "s" / "conversion.json").read_text())["layers"]]
        need = convert_module._store_bytes(Conversion.of(model)) - sum(len(wanted[name]) for name in noted) + 4096
        missing = need - shutil.disk_usage(disk).free
        os.truncate(disk / "other", (disk / "other").stat().st_size - missing)
        assert shutil.disk_usage(disk).free < all_bytes, "not even now would the whole store fit"
        check_rerun(disk / "s", whole, lambda: forks.run("convert", model, "-o", disk / "s"))


@often(5, 50)
def test_two_processes_make_one_store_whoever_dies(
    forks: Forks, model: Path, whole: Path, tmp_path: Path, times: int
) -> None:
    rng, waited = random.Random(SEED), 0
    for i in range(times):
        out, victim = tmp_path / f"s{i}", rng.choice((None, 0, 1))
        both = [forks.start("convert", model, "-o", out, slow=0.002)]
        time.sleep(rng.uniform(0, 0.4))
        both.append(forks.start("convert", model, "-o", out, slow=0.002))
        if victim is not None:
            time.sleep(rng.uniform(0.05, 0.4))
            both[victim].kill()
            check_half_made(out)
        for n, child in enumerate(both):
            assert child.wait() in ((0, -9) if n == victim else (0,)), child.said
        waits = [f"waiting for process {both[1 - n].pid}," in child.said for n, child in enumerate(both)]
        assert not all(waits) or victim is not None, "they waited for each other"
        waited += any(waits)
        if victim is None or both[1 - victim].said:
            assert content(out) == content(whole), (i, victim)
    assert waited, f"the two never met (seed {SEED})"


def test_a_damaged_store_of_another_model_is_not_written_over(toy: Any, store: Path) -> None:
    """Its manifest still says whose it is."""
    trunk = bytearray((store / "trunk.safetensors").read_bytes())
    trunk[-1] ^= 1
    (store / "trunk.safetensors").write_bytes(trunk)
    before = content(store)
    with pytest.raises(Refusal, match=r"E_EXISTS: .* holds another store \(int4 of \w{8}, wanted int4 of \w{8}\)"):
        convert(toy("mixtral"), store)
    assert content(store) == before


def test_loading_while_another_process_converts_waits_and_takes_its_store(
    forks: Forks, model: Path, whole: Path, tmp_path: Path
) -> None:
    conversion = Conversion.of(model)
    out = tmp_path / "stores" / conversion.name
    child = forks.start("convert", model, "-o", out, slow=0.005)
    until(lambda: layers(out), child)
    with pytest.raises(Refusal, match=f"E_STORE: .* is not finished; process {child.pid} makes it"):
        duoserve.load(out)
    said: list[str] = []
    with duoserve.load(model, cache_dir=str(tmp_path), progress=lambda done, total, what: said.append(what)) as engine:
        assert engine.model(toys.ids(1, 4)).logits.isfinite().all()
    assert said == [f"waiting for process {child.pid}, which makes the same store"] and child.wait() == 0
    assert content(out) == content(whole)


def test_a_layer_damaged_between_the_kill_and_the_rerun_is_made_again(
    forks: Forks, model: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    child = forks.start("convert", model, "-o", out, slow=0.002)
    until(lambda: len(layers(out)) >= 3, child)
    child.kill()
    assert child.wait() == -9
    flip(out / "experts-000.safetensors", 8 * 5000)
    flip(out / "experts-001.safetensors", 8 * 50)
    assert forks.run("convert", model, "-o", out)[0] == 0
    assert content(out) == content(whole)
