"""`duoserve bench`: complete rows, true figures, the same tokens from everybody, and rows that say why there is nothing.

Contenders are the real ones on toy models. All but one test keep them in this process, which saves the seconds that a child
takes to import torch; what goes over the pipe is the same JSON.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import toys
from test_profile import MACHINE, NEEDS
from tokenizers import Tokenizer

from duoserve import board, cap, cli, contender, contest, prompts, results, tally
from duoserve.contest import PHASES, STEADY, Cell, Contender, Course, Failed, Outcome, Process, Request, compete
from duoserve.core import Refusal
from duoserve.doctor import identity, profile_path
from duoserve.engine import DEMO
from duoserve.profile import write_profile

REQUEST = Request([[5, 6, 7, 8], [0, 0, 9, 10]], [[1, 1, 1, 1], [0, 0, 1, 1]], 0)


class Here:
    """A contender in this process, its answers through JSON as over the pipe."""

    def __init__(self, who: Contender, number: int, stack: ExitStack, patience_s: float):
        self.service = contender.Service(
            contender.Contender(**json.loads(json.dumps(vars(who)))), Path(who.scratch or ".")
        )
        stack.callback(self.service.close)

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        try:
            return json.loads(json.dumps(self.service.answer(json.loads(json.dumps({"do": do} | what)))))
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def bench(cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """`bench("MODEL", ...)`: the command, contenders in this process; what it printed."""
    write_profile(profile_path(str(cache)), replace(MACHINE, machine=identity()))
    monkeypatch.setattr(contest, "Process", Here)

    def call(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["duoserve", "bench", *args, "--cache-dir", str(cache)])
        capfd.readouterr()
        assert cli._guarded() == 0, capfd.readouterr().err
        return capfd.readouterr().out

    yield call
    profile_path(str(cache)).unlink()


def of_engine(toy: Path, cache: Path, **options: Any) -> Contender:
    known = {"budget": "half", "ctx": 128, "dtype": "float32", "cache_dir": str(cache)}
    return Contender("ours", "duoserve", str(toy), str(toy), known | options)


def of_peer(name: str, toy: Path, scratch: Path, memory: int | None = None) -> Contender:
    options = {"dtype": "float32", "device": "cpu", "threads": None, "memory": memory}
    return Contender(name, name, str(toy), str(toy), options, scratch=str(scratch))


def test_every_row_has_every_documented_field_and_the_table_every_row(toy: Any, bench: Any, tmp_path: Path) -> None:
    out, folder = tmp_path / "r.jsonl", str(toy("mixtral"))
    asked = (
        "--new-tokens",
        "4",
        "--repetitions",
        "1",
        "--limit-tokens",
        "12",
        "--prompts",
        "prose",
        "--dtype",
        "float32",
    )
    matrix = ("--policies", "on-demand", "--residency", "50%,100%", "--batch", "1,2", "--peers", "all")
    printed = bench(folder, *asked, *matrix, "-o", str(out))
    rows = results.read(out)
    assert len(rows) == (2 + 3) * 2 * len(PHASES)
    fields = documented()
    for row in rows:
        assert list(row) == list(dict.fromkeys(row)) and set(row) == fields, set(row) ^ fields
        assert row["error"] is None and row["n_gen"] == 4 and row["n_prompt"] == 12
        assert len(row["samples_ts"]) == (3 if row["phase"] == STEADY else 1)
        assert row["e2e_p50_s"] >= row["ttft_s"] > 0 and row["rss_peak_bytes"] > row["model_size"] > 0
        assert row["limit_s"] > 0 and row["share_of_limit"] > 0
        assert row["prompts_sha256"] == prompts.prompt_set("prose").sha256
    lines = printed.splitlines()
    for row, line in zip(rows, lines[1:], strict=False):
        assert line.startswith(row["row"]) and row["phase"] in line and f"{row['ttft_s']:.3f}" in line
    ours = [r for r in rows if r["engine"] == "duoserve"]
    assert {r["hit"] for r in ours if r["residency"] == 1 and r["phase"] == STEADY} == {1.0}
    assert {r["slots"] for r in ours} == {9, 18} and all(r["hit"] + r["in_flight"] + r["miss"] == 1 for r in ours)
    assert all(r["bytes_per_token"] > 0 for r in ours if r["residency"] == 0.5)
    same = {r["tokens_sha256"] for r in rows if r["phase"] == STEADY and r["n_batch"] == 2}
    assert len(same) == 1  # float32: ours, stock and Accelerate agree
    again = bench(folder, *asked, "--policies", "on-demand", "--residency", "50%", "--json", "--compare", str(out))
    assert [json.loads(line)["phase"] for line in again.splitlines()] == list(PHASES)


def documented() -> set[str]:
    """Names at the head of a line of the module's list."""
    text = (results.__doc__ or "").partition("llama-bench's where")[2]
    heads = [re.split(r"\s{2,}", line.strip())[0] for line in text.splitlines() if re.match(r"    [a-z]", line)]
    return {name for head in heads for name in head.split(", ")}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.95, 0.99, 1.0])
def test_percentiles_are_numpys(share: float) -> None:
    rng = random.Random(7)
    for n in (1, 2, 3, 10, 101):
        samples = [rng.lognormvariate(0, 1) for _ in range(n)]
        assert results.percentile(samples, share) == pytest.approx(np.percentile(samples, 100 * share))
        assert results.deviation(samples) == pytest.approx(np.std(samples, ddof=1) if n > 1 else 0)


def test_ours_and_peers_make_the_stock_models_tokens(toy: Any, cache: Path, scratch: Path) -> None:
    folder, new = toy("mixtral"), 6
    import torch

    stock = toys.stock(folder)
    wanted = stock.generate(
        input_ids=torch.tensor(REQUEST.ids), attention_mask=torch.tensor(REQUEST.mask), max_new_tokens=new,
        min_new_tokens=new, do_sample=False, pad_token_id=0,
    )[:, 4:].tolist()  # fmt: skip
    for who in (
        of_engine(folder, cache),
        of_engine(folder, cache, policy="on-demand", budget="min"),
        of_peer("stock", folder, scratch),
        of_peer("accelerate", folder, scratch, memory=200_000),
    ):
        with ExitStack() as stack:
            process = Here(who, 0, stack, 60)
            about = process.ask("open")
            found = process.ask("run", **REQUEST._asdict(), new_tokens=new)
            model = process.service._subject.model
            assert found["tokens"] == wanted, who.row
            assert found["steps"] == new - 1 and found["prompt_tokens"] == 3
            if who.engine == "accelerate":
                assert "disk" in model.hf_device_map.values()
            if who.engine == "duoserve":
                assert found["decode"]["misses"] > 0 and found["decode"]["moved"] > 0
                assert about["residency"] == pytest.approx(0.5 if "policy" not in who.options else 2 / 18)


def test_every_policy_has_as_many_slots_whether_or_not_it_asks_a_predictor(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    asked = ("--policies", "duoserve,lru", "--residency", "25%", "--new-tokens", "2", "--repetitions", "1")
    bench(*asked, "--prompts", "questions", "-o", str(out))
    rows = results.read(out)
    assert {(r["row"], r["slots"], r["predictor"]) for r in rows} == {
        ("duoserve 25%", 48, "head"),
        ("lru 25%", 48, None),
    }
    assert [r["error"] for r in rows] == [None] * 6 and {r["model_filename"] for r in rows} == {"demo"}


def test_who_knows_the_future_is_a_row_like_the_others(bench: Any, toy: Any, tmp_path: Path) -> None:
    """Its routes are recorded in a pass of their own; the same tokens, and fewest bytes."""
    out = tmp_path / "r.jsonl"
    bench(str(toy("mixtral")), "--policies", "belady,lru", "--residency", "50%", "--prompts", "prose", "--new-tokens", "6",
          "--repetitions", "1", "--limit-tokens", "4", "--dtype", "float32", "-o", str(out))  # fmt: skip
    belady, lru = ([r for r in results.read(out) if r["policy"] == policy] for policy in ("belady", "lru"))
    assert all(r["error"] is None for r in belady) and len(belady) == len(lru) == len(PHASES)
    assert [r["slots"] for r in belady] == [r["slots"] for r in lru]
    assert [r["tokens_sha256"] for r in belady] == [r["tokens_sha256"] for r in lru]
    assert sum(r["miss"] for r in belady) < sum(r["miss"] for r in lru)
    assert sum(r["bytes_per_token"] for r in belady) < sum(r["bytes_per_token"] for r in lru)


def test_uniform_routes_hit_as_often_as_residency(toy: Any, cache: Path) -> None:
    with ExitStack() as stack:
        process = Here(replace(of_engine(toy("mixtral"), cache, policy="lru"), routes="uniform"), 0, stack, 60)
        process.ask("open")
        found = process.ask("run", **REQUEST._asdict(), new_tokens=28)["decode"]
    asked = found["hits"] + found["misses"] + found["in_flight"]
    assert 0.3 < (found["hits"] + found["in_flight"]) / asked < 0.7


class Told:
    """A contender that only notes what it was asked."""

    def __init__(self, who: Contender, number: int, stack: ExitStack, patience_s: float):
        self.row = who.row

    calls: ClassVar[list[Any]] = []

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        if do != "ready":
            self.calls.append((self.row, do, what.get("ids")))
        return {"load_s": 1.0}


def cell(n: int = 30) -> Cell:
    return Cell("made up", 1, tuple(Request([[i]], [[1]], 0) for i in range(n)))


def test_rows_take_turns_with_the_same_prompts_and_load_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "Process", Told)
    monkeypatch.setattr(Told, "calls", [])
    rows = [Contender(name, "duoserve", None, ".", {}) for name in "abc"]
    found = compete(rows, [cell()], Course(3, 2, 4), True, lambda what: None)
    runs = {name: [ids for row, do, ids in Told.calls if (row, do) == (name, "run")] for name in "abc"}
    assert runs["a"] == runs["b"] == runs["c"] and len(runs["a"]) == len({str(ids) for ids in runs["a"]}) == 3 * 5
    first = [row for row, do, _ in Told.calls if do == "run"]
    assert [first[i] for i in (0, 15, 30)] == ["a", "b", "c"]  # each repetition begins with another
    assert [do for row, do, _ in Told.calls if row == "a"] == ["open", *["run"] * 5] * 3
    assert all(len(o.samples["cold"]) == 3 and len(o.samples[STEADY]) == 6 and len(o.load_s) == 3 for o in found)
    Told.calls.clear()
    compete(rows, [cell()], Course(1, 1, 4), False, lambda what: None)
    assert [row for row, do, _ in Told.calls if do == "open"] == ["a", "b", "c"]
    assert "".join(row for row, *_ in Told.calls) == "aaaaabbbbbccccc"


def test_a_real_process_answers_over_the_pipe(toy: Any, cache: Path) -> None:
    with ExitStack() as stack:
        process = Process(of_engine(toy("mixtral"), cache), 0, stack)
        assert process.ask("open")["slots"] == 9
        assert len(process.ask("run", **REQUEST._asdict(), new_tokens=3)["tokens"][1]) == 3
        with pytest.raises(Failed, match="E_CTX: 2 x"):
            process.ask("run", **REQUEST._asdict(), new_tokens=900)
        assert len(process.ask("run", **REQUEST._asdict(), new_tokens=3)["tokens"]) == 2


def doing(code: str) -> list[str]:
    return [sys.executable, "-c", f"import sys\nsys.stdin.readline()\nsys.stdin.readline()\n{code}"]


DEATHS = {
    "is killed": ("import os; os.kill(os.getpid(), 9)", r"killed by signal 9 \(out of memory\?\)"),
    "raises": ("raise OSError('no such tensor')", r"ended with status 1: OSError: no such tensor"),
    "hangs": ("import time; time.sleep(60)", r"gave no answer in 1 s and was ended"),
    "says nonsense": ("print('Loading...', flush=True); sys.stdin.readline()", r"answered no JSON: 'Loading\.\.\.'"),
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_peer_that_dies_gives_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    code, why = DEATHS[how]
    monkeypatch.setattr(Process, "command", doing(code))
    who = Contender("stock", "stock", "m", ".", {})
    (outcome,) = compete([who], [cell()], Course(2, 1, 4, patience_s=1), True, lambda what: None)
    rows = [tally.record(outcome, phase, SETTING) for phase in PHASES]
    assert all(re.fullmatch(why, row["error"]) and row["samples_ts"] == [] for row in rows), rows[0]["error"]
    assert results.read(written(rows, tmp_path / "r.jsonl")) == rows
    table = list(board.table(rows))
    assert all(row["error"] in line for row, line in zip(rows, table[1:], strict=False)) and "no figures" in table[-1]


def test_a_row_whose_contender_died_on_the_way_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers the first repetition in full, and then its process is gone."""
    answer = json.dumps(sample())
    lines = ["{}", '{"load_s": 1.0}', *[answer] * 4]
    code = f"for line in {lines!r}:\n    print(line, flush=True)\n    sys.stdin.readline()"
    monkeypatch.setattr(Process, "command", doing(code))
    who = Contender("stock", "stock", "m", ".", {})
    (outcome,) = compete([who], [cell()], Course(2, 1, 5, patience_s=30), True, lambda what: None)
    rows = [tally.record(outcome, phase, SETTING) for phase in PHASES]
    assert [len(row["samples_ts"]) for row in rows] == [1, 1, 1]
    assert all(row["error"].startswith("ended with status 0") for row in rows)
    assert sum("ended with status 0" in line for line in board.table(rows)) == 3


def test_a_peer_beyond_its_cap_gives_a_row_that_names_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        with cap.memory_group(64 << 20, "test"):
            pass
    except Refusal as refusal:
        pytest.skip(str(refusal))
    monkeypatch.setattr(Process, "command", doing("x = bytearray(b'1') * (256 << 20)\nprint('{}', flush=True)"))
    who = Contender("stock", "stock", "m", ".", {}, cap=64 << 20)
    (outcome,) = compete([who], [cell()], Course(1, 1, 4, patience_s=30), True, lambda what: None)
    assert outcome.error == "killed: out of memory under a cap of 64.0 MiB"


STOPPED = """
import json, sys
from duoserve.contest import Cell, Contender, Course, Process, Request, Stopped, compete, stoppable
folder, most = sys.argv[1], int(sys.argv[2])
Process.command = [sys.executable, "-c", '''
import os, sys, time
for line in sys.stdin:
    open(sys.argv[1] + "/" + str(os.getpid()), "w")
    if "[[107]]" in line:
        open(sys.argv[1] + "/stuck", "w")
        time.sleep(60)
    if "do" in line: print('{"load_s": 1.0}', flush=True)
''', folder]
rows = [Contender(name, "stock", "m", ".", {}, cap=most or None) for name in "ab"]
cells = [Cell(str(at), 1, tuple(Request([[at + i]], [[1]], 0) for i in range(9))) for at in (0, 100)]
with stoppable():
    try:
        compete(rows, cells, Course(2, 1, 2), True, lambda what: None)
    except Stopped as stopped:
        print(json.dumps([(o.contender.row, o.cell.prompts, o.error, len(o.samples["cold"])) for o in stopped.outcomes]))
        sys.exit(128 + stopped.number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stopped_benchmark_keeps_what_was_answered_and_leaves_nothing_behind(number: int, tmp_path: Path) -> None:
    """Stuck in the second repetition of its second cell. The signal goes to all of its group, as a terminal sends it."""
    try:
        with cap.memory_group(most := 64 << 20, "test"):
            pass
    except Refusal:
        most = 0  # this user can make no groups
    bench = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path), str(most)], stdout=subprocess.PIPE,
                             text=True, start_new_session=True)  # fmt: skip
    until = time.monotonic() + 60
    while not (tmp_path / "stuck").exists() and time.monotonic() < until:
        time.sleep(0.01)
    begun = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(begun) == 2 and bench.poll() is None
    groups = [line for pid in begun for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    assert sum(f"duoserve-{bench.pid}-" in line for line in groups) == (2 if most else 0)
    os.killpg(bench.pid, number)
    said, _ = bench.communicate(timeout=60)
    assert bench.returncode == 128 + number
    kept = [[row, cell, None, cold] for row in "ab" for cell, cold in (("0", 2), ("100", 1))]
    assert json.loads(said) == kept
    assert not any(Path(f"/proc/{pid}").exists() for pid in begun)
    assert f"duoserve-{bench.pid}-" not in memory_groups()


def memory_groups() -> str:
    """The names of all, whatever version the kernel has."""
    unified = [path.name for path in Path("/sys/fs/cgroup").rglob("duoserve-*")]
    with ExitStack() as stack:
        try:
            root, _ = stack.enter_context(cap._root())
        except Refusal:
            return " ".join(unified)
        return " ".join([*unified, *(path.name for path in root.iterdir())])


SETTING = tally.Setting(
    model="m", machine={"cpu": "a test"}, build={"build_commit": "abc", "build_number": 1}, checksums={},
    in_turns=True, time="now", new_tokens=5, profile=MACHINE, needs=NEEDS, peer_needs=NEEDS,
)  # fmt: skip
ABOUT = {"slab_bytes": 4 << 20, "device": "cpu", "model_type": "mixtral", "format": "int4"}


def sample(decode_s: float = 1.0, moved: int = 40_000_000, read: int = 0, **counts: int) -> dict[str, Any]:
    none = {"hits": 0, "in_flight": 0, "misses": 0, "moved": 0, "busy_s": 0.0, "read": 0}
    decode = none | {"moved": moved, "busy_s": 0.1, "read": read} | counts
    return {
        "ttft_s": 0.5, "decode_s": decode_s, "e2e_s": 0.5 + decode_s, "steps": 4, "prompt_tokens": 9.0, "prefill": none,
        "decode": decode, "stall_s": {"demand": 0.2, "slot": 0.1}, "tokens": [[1, 2]], "rss_peak_bytes": 9,
        "used_bytes": 8,
    }  # fmt: skip


def made(*samples: dict[str, Any], engine: str = "duoserve", batch: int = 1, **changes: Any) -> dict[str, Any]:
    outcome = Outcome(Contender("r", engine, None, ".", {}), Cell("p", batch, ()), dict(ABOUT), load_s=[1.0])
    outcome.samples[STEADY] = list(samples)
    return tally.record(outcome, STEADY, replace(SETTING, **changes))


def test_figures_by_hand() -> None:
    row = made(sample(1.0, hits=24, in_flight=2, misses=6), sample(3.0, hits=32), batch=2)
    assert (row["hit"], row["in_flight"], row["miss"]) == (56 / 64, 2 / 64, 6 / 64)
    assert row["samples_ts"] == [8.0, 8 / 3] and row["samples_ns"] == [10**9, 3 * 10**9] and row["avg_ns"] == 2 * 10**9
    assert row["bytes_per_token"] == 80_000_000 / 16 and row["e2e_p50_s"] == 2.5
    assert row["stall_s"] == {"demand": pytest.approx(0.2), "slot": pytest.approx(0.1)}
    assert row["link_gbps"] == pytest.approx(0.4) and row["link_rate_gbps"] == pytest.approx(4.0)
    assert row["link_share"] == pytest.approx(0.1) and row["paged_bytes"] == 0
    assert made(sample(moved=5, read=9), sample(moved=5, read=5))["paged_bytes"] == 2


def test_the_limit_is_of_the_bytes_that_moved_and_were_read() -> None:
    """8 experts of 4 MiB a step asked for, 30 MB of trunk, 1 MB of keys and values; memory 20 GB/s, disk 4 GB/s."""
    row = made(sample(1.0, moved=4 * 40_000_000, hits=32))
    assert row["limit_s"] == pytest.approx(40e6 / 4e9) and row["limited_by"] == "disk"
    assert row["share_of_limit"] == pytest.approx(0.01 / 0.25)
    row = made(sample(1.0, moved=400, hits=32))
    assert row["limit_s"] == pytest.approx((8 * (4 << 20) + 31e6) / 20e9) and row["limited_by"] == "memory"
    row = made(sample(1.0, moved=4_000_000, hits=32), link=10_000_000)
    assert row["limit_s"] == pytest.approx(0.1) and row["limited_by"] == "link"
    row = made(sample(1.0, moved=0, read=4 * 40_000_000), engine="accelerate")  # what the process read from disk
    assert row["limit_s"] == pytest.approx(40e6 / 4e9) and row["bytes_per_token"] == 40_000_000
    assert made(sample(), profile=None)["share_of_limit"] is None


def written(rows: list[dict[str, Any]], path: Path) -> Path:
    results.write(path, rows)
    return path


def test_comparing_says_how_much_faster_and_how_sure(tmp_path: Path) -> None:
    old = [made(*(sample(s) for s in (1.0, 1.1, 1.2))), made(sample(), engine="accelerate")]
    new = [made(*(sample(s) for s in (0.5, 0.55, 0.6))) | {"machine": {"cpu": "another"}}]
    before, now = (results.read(written(rows, tmp_path / "x")) for rows in (old, new))
    (change,) = results.compare(now, before)
    assert change.decode is not None and change.decode.middle == pytest.approx(2)
    assert change.decode.low < 2 < change.decode.high
    assert change.e2e is not None and change.e2e.middle == pytest.approx(1.6 / 1.05)
    assert results.compare(before, before)[0].decode.middle == 1
    said = "\n".join(board.compared(now, before))
    assert "another machine: cpu: a test -> another" in said and "2.00 (1.8" in said
    assert results.compare(before, now)[1].error == "no such row before"


def test_no_file_of_results_does_harm(tmp_path: Path) -> None:
    good = made(sample())
    path, rng = tmp_path / "r.jsonl", random.Random(3)
    bad = [
        b"", b"\n", b"[]", b"null", b"{}", b"\xff", b"[" * 50_000, b"0" * 70_000, json.dumps(good).encode()[:-1],
        *(json.dumps(good | change).encode() for change in (
            {"kind": "x"}, {"version": 2}, {"samples_ts": []}, {"samples_ts": [0]}, {"samples_ts": ["1"]}, {"machine": 3},
            {"samples_ts": [1e300]}, {"samples_ts": None}, {"row": ["a"]}, {"row": "\x1b[2J"}, {"row": "x" * 9999},
            {"machine": {"\x1b": "a"}}, {"error": 5}, {"samples_e2e_s": [True]}, {"samples_ttft_s": [-1]},
        )),
        json.dumps(good).replace('"samples_ts": [4.0]', '"samples_ts": [NaN]').encode(),
    ]  # fmt: skip
    for text in bad:
        path.write_bytes(text)
        with pytest.raises(Refusal, match="E_RESULTS") as refused:
            results.read(path)
        assert len(str(refused.value)) < 1000 and "\n" not in str(refused.value)
    text = json.dumps(good).encode()
    for _ in range(400):
        at = rng.randrange(len(text))
        path.write_bytes(text[:at] + bytes([rng.randrange(256)]) + text[at + rng.randrange(3) :])
        try:
            rows = results.read(path)
        except Refusal:
            continue
        list(board.compared(rows, rows))


def test_the_prompt_sets_are_whole_and_many_and_some_are_long() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    sets = [prompts.prompt_set(name) for name in prompts.NAMES]
    mixed = prompts.prompt_set("all")
    assert len(mixed.prompts) == sum(len(s.prompts) for s in sets) >= 60
    assert [p.domain for p in mixed.prompts[:6]] == [*prompts.NAMES, *prompts.NAMES]
    assert len({p.id for p in mixed.prompts}) == len(mixed.prompts)
    for found in sets[:2]:
        lengths = [len(tokenizer.encode(p.content).ids) for p in found.prompts]
        assert sum(n >= 512 for n in lengths) >= 6 and max(lengths) < 900
    assert sum((prompts.SETS / f"{name}.jsonl").stat().st_size for name in prompts.NAMES) < 200_000


def test_files_that_were_dropped_are_not_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))

    def cached() -> int:
        return int(subprocess.check_output(["fincore", "-bnro", "RES", str(path)]))

    try:
        if not cached():
            pytest.skip("this file system keeps nothing in the page cache")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no fincore: {error}")
    cap.forget_files(tmp_path)
    assert cached() == 0
