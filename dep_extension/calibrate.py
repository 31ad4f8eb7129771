"""Costs of the machine at hand: straight lines through what was timed, each with its R^2, kept in a file. Starts a process
for each rank (timing.py says what they do); knows lines, files and processes; knows no plans.

    python -m dep_extension.calibrate --splits 1:1 1:3 2:2 --out machine.json

FinDEP, section "cost models": 10 runs to warm up and 20 that count for each size, least squares, links fitted for each
split by itself, all in under 2 minutes. Medians here; and, which the paper leaves out, the exchange of counts, how much
slower the two directions are at once, and compute beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dep_extension.cost import Line, Machine, Split
from dep_extension.plainjson import write_json

KIND, VERSION = "duoserve-dep-machine", 1
MAX_BYTES, MAX_LINKS, MAX_NAME = 4 << 20, 100_000, 1000
GOOD = 0.994  # R^2 of the paper's worst line
CUDA = {"dtype": "bfloat16", "longest_s": 0.01, "hidden": 4096, "expert_hidden": 1536, "heads": 32, "head_dim": 128}
POOR = 0.9  # below it a line says next to nothing
BUSY = ": measure again when the machine has nothing else to do, or with a longer --longest"
PATIENCE_S = 300  # then a process ends itself
LARGE = 1e300
APART = (
    1.05  # directions that slow each other by less are taken for two links: no more than noise, and solved much faster
)


class Fit(NamedTuple):
    """A line through points, and how much of their variance it explains."""

    line: Line
    r2: float


@dataclass(frozen=True)
class Calibration:
    """A measured machine, R^2 by the name of each line, and how long measuring took."""

    machine: Machine
    r2: Mapping[str, float]
    seconds: float = 0.0


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """Least squares of seconds over work, neither launch nor slope below zero."""
    if len(points) < 2 or len({x for x, _ in points}) < 2:
        raise ValueError(f"{len(points)} points are no line: time at least 2 sizes")
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    b = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    a = mean_y - b * mean_x
    if b < 0:
        a, b = mean_y, 0.0
    elif a < 0:
        a, b = 0.0, sum(x * y for x, y in points) / sum(x * x for x, _ in points)
    total = sum((y - mean_y) ** 2 for _, y in points)
    left = sum((y - a - b * x) ** 2 for x, y in points)
    return Fit(Line(a, b), 1.0 - left / total if total > 0 else 1.0)


def verdict(name: str, found: Fit) -> str:
    """A line's row for whoever waits: what it is, its R^2, and that it is a poor one where it is."""
    a, b = found.line
    poor = "" if found.r2 >= GOOD else f"  below {GOOD}: no straight line, plans from it are off by as much"
    return f"{name:12} {a * 1e3:9.4f} ms + {b * 1e9:.4g} ns x   R^2 {found.r2:.6f}{poor}"


def measure(
    splits: Sequence[Split],
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    **sizes: Any,
) -> Calibration:
    """Time this machine, a process for each rank. `sizes` are those of `timing.Sizes`: shapes like the model's.

    ValueError where the splits or sizes cannot be; RuntimeError where a process failed.
    """
    from dep_extension.timing import Order, Sizes

    world = _world(splits, device)
    usual: dict[str, Any] = CUDA if device == "cuda" else {}
    shapes = Sizes(**usual | sizes)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="duoserve-") as folder:
        meet, asked = str(Path(folder) / "meet"), tuple(splits)
        orders = [Order(rank, world, meet, device, asked, shapes, PATIENCE_S).text() for rank in range(world)]
        found = _gathered(_said(orders, Path(folder)), say)
    took = time.monotonic() - began
    cores = os.cpu_count() or 1
    if device == "cpu" and world > cores:
        say(f"{world} processes share {cores} cores: their exchanges are slower than those of {world} machines")
    source = f"measured: {shapes.dtype}, hidden {shapes.hidden}, expert {shapes.expert_hidden}, {shapes.experts} a rank"
    return _calibration(found, this_machine(device), source, world, device, took, say)


def _world(splits: Sequence[Split], device: str) -> int:
    if not splits or any(min(split) < 1 for split in splits):
        raise ValueError(
            f"{len(splits)} splits, of at least 1 attention and 1 expert rank each: name some, like 1:1 2:2"
        )
    world = max(sum(split) for split in splits)
    most = _devices(device)
    if world > most:
        raise ValueError(f"a split of {world} ranks on {most} devices: ask for at most {most}, or --device cpu")
    return world


def _devices(device: str) -> int:
    if device == "cpu":
        return 64  # processes
    if device != "cuda":
        raise ValueError(f"device {device!r} is not one that is timed: cpu or cuda")
    import torch

    return torch.accelerator.device_count()


def _said(orders: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """What rank 0 says, as it comes; RuntimeError with the last words of the process that failed."""
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": _loopback()}
    errors = [folder / f"error{rank}" for rank in range(len(orders))]
    started: list[subprocess.Popen[str]] = []
    try:
        for rank, order in enumerate(orders):
            command = [sys.executable, "-m", "dep_extension.timing", order]
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            with errors[rank].open("w") as stderr:
                started.append(subprocess.Popen(command, stdout=out, stderr=stderr, text=True, env=environment))
        assert started[0].stdout is not None
        for line in started[0].stdout:
            yield json.loads(line)
        failed = [rank for rank, process in enumerate(started) if process.wait() != 0]
        if failed:
            first = min(failed, key=lambda rank: errors[rank].stat().st_mtime)  # others lost it and failed in turn
            last = " ".join(errors[first].read_text().strip().splitlines()[-1:])
            slow = started[first].returncode == -signal.SIGALRM
            why = "it took longer than it may" if slow else last[:200]
            raise RuntimeError(f"rank {first} of {len(orders)} failed while it was timed: {why}")
    finally:
        for process in started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _loopback() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


def _gathered(said: Iterator[dict[str, Any]], say: Callable[[str], None]) -> dict[str, list[tuple[float, float]]]:
    """Points by line, each fitted and shown as soon as it is complete."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in said:
        name, points = str(row["line"]), [(float(x), float(y)) for x, y in row["points"]]
        found[name] = points
        if len(points) > 1:
            say(verdict(name, fit(points)))
    return found


def _calibration(
    found: Mapping[str, list[tuple[float, float]]],
    name: str,
    source: str,
    world: int,
    device: str,
    took: float,
    say: Callable[[str], None],
) -> Calibration:
    fits = {line: fit(found[line]) for line in ("gemm", "attention", "experts")}
    links: dict[Split, Line] = {}
    for line, points in found.items():
        way, _, split = line.partition(" ")
        if way == "a2e":
            both = fit([*points, *found[f"e2a {split}"]])
            fits[f"link {split}"] = both
            links[split_of(split)] = both.line
    counts = statistics.median(points[0][1] for line, points in found.items() if line.startswith("counts"))
    slower = statistics.median(y / x for line, ((x, y), *_) in found.items() if line.startswith("beside"))
    slowed = statistics.median(y / x for line, ((x, y), *_) in found.items() if line.startswith("both"))
    machine = Machine(
        name,
        max(2, world),
        memory_bytes(device, world),
        fits["gemm"].line,
        fits["attention"].line,
        links,
        counts,
        max(1.0, slower),
        source,
        fits["experts"].line,
        slowed if slowed >= APART else 1.0,
    )
    say(f"{'both ways':12} exchanges take {slowed:.2f} of their time alone while as much goes the other way")
    say(f"{'counts':12} {counts * 1e3:9.4f} ms; products beside an exchange take {slower:.2f} of their time alone")
    worst = min(found.r2 for found in fits.values())
    say(f"{len(fits)} lines in {took:.0f} s; worst R^2 {worst:.6f}, the paper's {GOOD}{'' if worst >= POOR else BUSY}")
    return Calibration(machine, {line: found.r2 for line, found in fits.items()}, took)


def split_of(text: str) -> Split:
    """From words like 2:6. ValueError of one line."""
    ag, colon, eg = text.partition(":")
    if not colon or not ag.isdecimal() or not eg.isdecimal() or not 0 < int(ag) <= 4096 or not 0 < int(eg) <= 4096:
        raise ValueError(f"{text[:40]!r} is no split: write attention ranks, a colon, expert ranks, like 2:6")
    return Split(int(ag), int(eg))


def this_machine(device: str = "cpu") -> str:
    """By which a file is known to be of here."""
    if device == "cuda":
        import torch

        return f"{torch.cuda.get_device_name()}, NCCL"
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {os.cpu_count()} cores, Gloo"


def named_here() -> list[str]:
    """What files of this machine are called: as processes, and as GPUs where there are some."""
    import torch

    return [this_machine(device) for device in ("cuda", "cpu") if device == "cpu" or torch.cuda.is_available()]


def memory_bytes(device: str, world: int) -> float:
    """Of one rank: a card's, or a process's share of the machine's."""
    if device == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world


def save(machine: Machine, path: Path, r2: Mapping[str, float] | None = None) -> None:
    """As JSON, whole or not at all."""
    links = [[split.ag, split.eg, *line] for split, line in sorted(machine.links.items())]
    fields = {name: getattr(machine, name) for name in Machine.__dataclass_fields__} | {"links": links}
    write_json(path, {"kind": KIND, "version": VERSION, **fields, "r2": dict(r2 or {})}, indent=1)


def load(path: Path, here: str | Collection[str] | None = None) -> Machine:
    """The machine of a file. ValueError of one line where it is none, or not of the machine (or one of those) called
    `here`."""
    return read(path, here).machine


def read(path: Path, here: str | Collection[str] | None = None) -> Calibration:
    """With the R^2 of its lines; errors as of `load`."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, a machine at most {MAX_BYTES:,}: calibrate again")
    try:
        found = _parsed(json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse))
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is no machine's costs ({said}): calibrate again") from error
    names = [here] if isinstance(here, str) else list(here or ())
    if names and found.machine.name not in names:
        raise ValueError(f"{path} was measured on {found.machine.name!r}, this is {names[0]!r}: calibrate here")
    return found


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number of seconds")


def _parsed(data: Any) -> Calibration:
    if not isinstance(data, dict) or (data.get("kind"), data.get("version")) != (KIND, VERSION):
        raise ValueError(f"it is not kind {KIND} version {VERSION}")
    fields = {*Machine.__dataclass_fields__, "kind", "version", "r2"}
    data = {"both_ways": 1.0} | data  # files from before it was measured
    if data.keys() != fields:
        missing, unknown = sorted(fields - data.keys()), sorted(data.keys() - fields)
        raise ValueError(f"missing {missing[:5]}, unknown {unknown[:5]}")
    experts = None if data["experts"] is None else _line(data["experts"], "experts")
    machine = Machine(
        name=_text(data["name"], "name"),
        gpus=_whole(data["gpus"], "gpus"),
        memory_bytes=_number(data["memory_bytes"], "memory_bytes"),
        gemm=_line(data["gemm"], "gemm"),
        attention=_line(data["attention"], "attention"),
        links=_links(data["links"]),
        count_s=_number(data["count_s"], "count_s"),
        overlap=_number(data["overlap"], "overlap"),
        source=_text(data["source"], "source"),
        experts=experts,
        both_ways=_number(data["both_ways"], "both_ways"),
    )
    if not isinstance(data["r2"], dict) or len(data["r2"]) > MAX_LINKS:
        raise ValueError("r2 is no table")
    return Calibration(machine, {_text(k, "r2"): _number(v, "r2") for k, v in data["r2"].items()})


def _links(rows: Any) -> dict[Split, Line]:
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_LINKS:
        raise ValueError(f"links are no list of 1 to {MAX_LINKS:,}")
    found: dict[Split, Line] = {}
    for row in rows:
        if not isinstance(row, list) or len(row) != 4:
            raise ValueError("a link is not [ag, eg, a, b]")
        split = Split(_whole(row[0], "ag"), _whole(row[1], "eg"))
        if split in found:
            raise ValueError(f"link {split.ag}:{split.eg} is there twice")
        found[split] = _line(row[2:], f"link {split.ag}:{split.eg}")
    return found


def _line(row: Any, what: str) -> Line:
    if not isinstance(row, list) or len(row) != 2:
        raise ValueError(f"{what} is not [a, b]")
    return Line(_number(row[0], what), _number(row[1], what))


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGE < value < LARGE:
        raise ValueError(f"{what} is no finite number")
    return float(value)


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise ValueError(f"{what} is no whole number from 1 to {1 << 20:,}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME or not value.isprintable():
        raise ValueError(f"{what} is no line of at most {MAX_NAME} characters")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--splits", nargs="+", default=["1:1"], help="attention and expert ranks: 1:1 1:3 2:2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hidden", type=int, help="of the model that is to be planned")
    parser.add_argument("--expert-hidden", type=int)
    parser.add_argument("--experts", type=int, help="of one rank")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--longest", dest="longest_s", type=float, help="seconds of a line's longest run")
    parser.add_argument("--out", type=Path, required=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dep_extension.calibrate", description=__doc__.split("\n")[0])
    add_options(parser)
    asked = vars(parser.parse_args(words))
    words_of_splits, device, out = asked.pop("splits"), asked.pop("device"), asked.pop("out")
    try:
        splits = [split_of(word) for word in words_of_splits]
        sizes = {name: value for name, value in asked.items() if value is not None}
        found = measure(splits, device, lambda line: print(line, flush=True), **sizes)
        save(found.machine, out, found.r2)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {found.machine.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
