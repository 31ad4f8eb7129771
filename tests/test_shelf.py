"""`duoserve ls` and `duoserve rm`: what is in the cache, and that nothing else is ever removed."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from duoserve import shelf
from duoserve.convert import Conversion, convert
from duoserve.core import Refusal
from duoserve.durable import exclusive, holder

COMMAND = [sys.executable, "-m", "duoserve.cli"]


@pytest.fixture(scope="module")
def made(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of three stores, named as loading names them."""
    cache = tmp_path_factory.mktemp("made") / "stores"
    for family, format in (("mixtral", "int4"), ("mixtral", "bf16"), ("qwen3_moe", "int4")):
        convert(toy(family), cache / Conversion.of(toy(family), format).name, format)
    return cache


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """What --cache-dir is given; the stores lie in `stores` below it."""
    shutil.copytree(made, tmp_path / "c" / "stores")
    return tmp_path / "c"


def run(cache: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *args, "--cache-dir", str(cache)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, **options)


def names(cache: Path) -> list[str]:
    return sorted(os.listdir(cache / "stores"))


def everything(folder: Path) -> dict[str, Any]:
    return {str(p): p.read_bytes() if p.is_file() else p.is_symlink() for p in sorted(folder.rglob("*"))}


def half_made(cache: Path, name: str = "half-int4") -> Path:
    """As a kill after the first layer leaves it."""
    folder = cache / "stores" / name
    whole = next(path for path in (cache / "stores").iterdir() if path.name.endswith("int4"))
    data = json.loads((whole / "manifest.json").read_text())
    job = {key: data[key] for key in ("fingerprint", "format", "plain", "int4_order")}
    note = {"kind": data["kind"], "version": 2, "job": job, "model_type": "mixtral", "layers": data["layers"][:1]}
    folder.mkdir()
    (folder / "conversion.json").write_text(json.dumps(note))
    shutil.copy(whole / "experts-000.safetensors", folder)
    (folder / ".lock").write_text("999999")
    return folder


def test_ls_tells_name_model_format_size_state_and_use(cache: Path) -> None:
    half, now = half_made(cache), time.time()
    for i, name in enumerate(names(cache)):
        os.utime(cache / "stores" / name, (now - 100 * i,) * 2)
    found = json.loads(run(cache, "ls", "--json").stdout)
    assert [item["name"] for item in found["stores"]] == names(cache), "the last used first"
    by_name = {item["name"]: item for item in found["stores"]}
    assert {item["state"] for item in found["stores"]} == {"whole", "partial"}
    assert by_name[half.name]["format"] == "int4" and by_name[half.name]["model_type"] == "mixtral"
    for name, item in by_name.items():
        assert item["n_bytes"] == sum(f.stat().st_size for f in (cache / "stores" / name).iterdir())
        assert abs(item["used"] - (cache / "stores" / name).stat().st_mtime) < 1
    assert {(item["model_type"], item["format"]) for item in found["stores"]} == {
        ("mixtral", "int4"), ("mixtral", "bf16"), ("qwen3_moe", "int4"),
    }  # fmt: skip
    assert found["total_bytes"] == sum(item["n_bytes"] for item in found["stores"])
    said = run(cache, "ls").stdout
    assert all(name in said for name in by_name) and "partial" in said and "4 stores" in said


def test_ls_of_nothing_makes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path / "c", "ls")
    assert done.returncode == 0 and done.stdout.startswith("0 stores, 0 B") and not (tmp_path / "c").exists()


@pytest.mark.parametrize("args", [("ls",), ("rm", "--all", "--yes")])
def test_ls_and_rm_import_no_torch(cache: Path, args: tuple[str, ...]) -> None:
    code = f"import sys; sys.argv = ['duoserve', *{args!r}, '--cache-dir', {str(cache)!r}]\n"
    code += "from duoserve.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip().endswith("[]") and "3 stores" in out.stdout, out.stdout + out.stderr


def test_ls_shows_a_store_from_another_version_or_damaged(cache: Path) -> None:
    first, second, _ = names(cache)
    (cache / "stores" / first / "manifest.json").write_text('{"kind": "duoserve-expert-store", "version": 1}')
    (cache / "stores" / second / "manifest.json").write_bytes(b"[" * 10_000)
    states = {item.name: item.state for item in shelf.on_shelf(cache / "stores")}
    assert states[first] == states[second] == "damaged" and list(states.values()).count("whole") == 1


def test_loading_moves_a_store_to_the_front(cache: Path, toy: Any) -> None:
    import duoserve

    for name in names(cache):
        os.utime(cache / "stores" / name, (1000, 1000))
    duoserve.load(toy("qwen3_moe"), cache_dir=str(cache)).close()
    first = shelf.on_shelf(cache / "stores")[0]
    assert first.model_type == "qwen3_moe" and time.time() - first.used < 60 and len(names(cache)) == 3


def test_rm_takes_names_and_beginnings_that_only_one_has(cache: Path) -> None:
    before = names(cache)
    wanted = next(name for name in before if "qwen" in name or name.startswith("qwen3_moe"))
    size = sum(file.stat().st_size for file in (cache / "stores" / wanted).iterdir())
    items = shelf.on_shelf(cache / "stores")
    done = run(cache, "rm", wanted[:5], "--yes")
    assert done.returncode == 0 and "1 store removed" in done.stdout, done.stderr
    assert names(cache) == [name for name in before if name != wanted]
    assert f"{size / 1024:.1f} KiB freed" in done.stdout
    assert [item.name for item in shelf.choose(items, [before[0], before[0]])] == [before[0]]


CASES = [
    (("rm", "mixtral", "--yes"), 2, "could be 2 stores"),
    (("rm", "mixtarl", "--yes"), 3, "did you mean"),
    (("rm", "", "--yes"), 3, "none of 3 stores"),
    (("rm", "..", "--yes"), 3, "none of 3 stores"),
    (("rm", ".", "--yes"), 3, "none of 3 stores"),
    (("rm", "../../precious", "--yes"), 3, "none of 3 stores"),
    (("rm", "/", "--yes"), 3, "none of 3 stores"),
    (("rm", "link", "--yes"), 3, "none of 3 stores"),
    (("rm", "documents", "--yes"), 3, "none of 3 stores"),
    (("rm", "a\nb", "--yes"), 3, "none of 3 stores"),
    (("rm", "mixtral0", "--all"), 2, "one of the three"),
    (("rm",), 2, "one of the three"),
    (("rm", "--all"), 2, "add --yes"),
    (("rm", "qwen"), 2, "add --yes"),
]


@pytest.mark.parametrize(("args", "status", "says"), CASES, ids=lambda v: " ".join(v) if isinstance(v, tuple) else None)
def test_rm_refuses_in_one_line_and_removes_nothing(
    cache: Path, tmp_path: Path, args: tuple[str, ...], status: int, says: str
) -> None:
    surround(cache, tmp_path)
    before = everything(tmp_path)
    done = run(cache, *args)
    assert done.returncode == status and says in done.stderr, done.stderr
    assert done.stderr.startswith("error: E_") and len(done.stderr.splitlines()) == 1
    assert everything(tmp_path) == before


def surround(cache: Path, tmp_path: Path) -> None:
    """Things in the cache that are no stores, and a store that is not in it."""
    shutil.copytree(cache / "stores" / names(cache)[0], tmp_path / "precious")
    (cache / "stores" / "link").symlink_to(tmp_path / "precious")
    (cache / "stores" / "documents").mkdir()
    (cache / "stores" / "documents" / "thesis.txt").write_text("years")
    (cache / "stores" / "file").write_text("x")


def test_rm_all_removes_stores_and_nothing_else(cache: Path, tmp_path: Path) -> None:
    surround(cache, tmp_path)
    half_made(cache)
    inside = cache / "stores" / names(cache)[-1] / "link.bin"
    inside.symlink_to(tmp_path / "precious" / "config.json")
    before = everything(tmp_path / "precious")
    done = run(cache, "rm", "--all", "--yes")
    assert done.returncode == 0 and "4 stores removed" in done.stdout, done.stderr
    assert names(cache) == ["documents", "file", "link"] and everything(tmp_path / "precious") == before
    said = run(cache, "ls").stdout
    assert "documents is no store" in said and "link is no store" in said


def test_rm_leaves_a_store_that_holds_a_folder(cache: Path) -> None:
    name = names(cache)[0]
    (cache / "stores" / name / "mine").mkdir()
    before = everything(cache)
    done = run(cache, "rm", name, "--yes")
    assert done.returncode == 2 and "'mine'" in done.stderr and everything(cache) == before


def test_rm_partial_takes_what_is_not_finished(cache: Path) -> None:
    whole = names(cache)
    half_made(cache)
    (cache / "stores" / "just-begun").mkdir()
    (cache / "stores" / "just-begun" / ".conversion.json.77.tmp").write_text("{")
    done = run(cache, "rm", "--partial", "--yes")
    assert done.returncode == 0 and "2 stores removed" in done.stdout and names(cache) == whole


def test_a_store_that_is_being_made_is_shown_with_its_process_and_kept(cache: Path) -> None:
    half = half_made(cache)
    holding = "import sys, time; from pathlib import Path; from duoserve.durable import exclusive\n"
    holding += "with exclusive(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holding, str(half)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    item = next(item for item in shelf.on_shelf(cache / "stores") if item.name == half.name)
    assert item.state == "being made" and item.pid == process.pid == holder(half)
    assert f"being made by {process.pid}" in run(cache, "ls").stdout
    before = everything(cache)
    for args in ([half.name], ["--all"]):
        done = run(cache, "rm", *args, "--yes")
        assert done.returncode == 2 and f"E_BUSY: {half.name} is being made by process {process.pid}" in done.stderr
    assert everything(cache) == before
    process.kill()
    process.wait()
    assert holder(half) is None and run(cache, "rm", half.name, "--yes").returncode == 0 and not half.exists()


def test_whoever_waits_for_a_store_that_is_removed_makes_it_anew(toy: Any, cache: Path) -> None:
    import threading

    name = next(name for name in names(cache) if name.startswith("qwen"))
    folder, made = cache / "stores" / name, threading.Event()
    item = next(item for item in shelf.on_shelf(cache / "stores") if item.name == name)
    waiting = threading.Event()

    def make() -> None:
        with exclusive(folder, lambda _: waiting.set()):
            assert not (folder / "manifest.json").exists(), "it took the lock of what was removed"
        made.set()

    with exclusive(folder, print):
        thread = threading.Thread(target=make)
        thread.start()
        assert waiting.wait(30)
        os.rename(folder, folder.with_name(".removed-it"))
    assert made.wait(30)
    thread.join()
    assert item.name in names(cache)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 6])
def test_a_removal_that_is_killed_leaves_nothing_that_opens(cache: Path, after: int) -> None:
    name = names(cache)[0]
    code = "import os, sys; from pathlib import Path; from duoserve import shelf\n"
    code += "left, real = [int(sys.argv[3])], os.unlink\n"
    code += "def unlink(*a, **k):\n    if not left[0]: os.kill(os.getpid(), 9)\n    left[0] -= 1; real(*a, **k)\n"
    code += "os.unlink = unlink\nitems = shelf.on_shelf(Path(sys.argv[1]))\n"
    code += "shelf.remove(shelf.choose(items, [sys.argv[2]])[0])"
    done = subprocess.run([sys.executable, "-c", code, str(cache / "stores"), name, str(after)], timeout=60)
    assert done.returncode == -9 and name not in names(cache)
    left = next(path for path in (cache / "stores").iterdir() if path.name.startswith(".removed-"))
    assert after == 0 or not (left / "manifest.json").exists()
    assert [item.state for item in shelf.on_shelf(cache / "stores")].count("partial") == 1
    assert run(cache, "rm", "--partial", "--yes").returncode == 0 and len(names(cache)) == 2


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("n", False), ("", False), ("\x04", False)])
def test_rm_asks_in_a_terminal(cache: Path, answer: str, removed: bool) -> None:
    name = names(cache)[0]
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*COMMAND, "rm", name, "--cache-dir", str(cache)])
    said = b""
    while b"[y/N]" not in said:
        said += os.read(fd, 4096)
    os.write(fd, answer.encode() + (b"" if answer == "\x04" else b"\n"))
    try:
        while os.read(fd, 4096):
            pass
    except OSError:  # the other end closed
        pass
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert name.encode() in said and (name not in names(cache)) == removed and status == (0 if removed else 130)


def test_names_that_are_no_text_are_shown_as_text(cache: Path) -> None:
    odd = cache / "stores" / "odd\n\x1b[2J"
    shutil.copytree(cache / "stores" / names(cache)[0], odd)
    done = run(cache, "ls")
    assert done.returncode == 0 and "\x1b" not in done.stdout and "odd\\n\\x1b[2J" in done.stdout
    with pytest.raises(Refusal, match="E_NAME"):
        shelf.choose(shelf.on_shelf(cache / "stores"), ["od\n"])
