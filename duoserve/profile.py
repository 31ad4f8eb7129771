"""What a machine does in a second, as plain numbers that were measured or said of it. Knows its own file format and how to
read between measured points; knows nothing of how anything is measured. Other machines are described by the same JSON.

    disk     [request bytes, threads, bytes/s], ...       direct reads of whole requests at random offsets
    memory   bytes/s that all cores together read
    matrix   format -> [rows, seconds per weight], ...    one matrix product, by how many rows share it
    attention  FLOP/s of one query over a long context, and of a prompt over itself
    launch   seconds per operation of a stock model, per MoE layer and per chosen expert, beside the bytes they read:
             `warm` with everything else in the caches, `cold` with the weights streaming through them
    link     host to device, bytes/s from pinned and from pageable memory; null where slots are host memory
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from duoserve.core import Refusal
from duoserve.durable import replacing

KIND, VERSION, FILE = "duoserve-machine-profile", 1, "machine.json"
MAX_BYTES, MAX_POINTS, MAX_TEXT, MAX_SOURCE = 64 << 10, 64, 200, 1000
RATE, SECONDS = (1e3, 1e15), (1e-16, 10.0)  # what a bytes/s and a duration can be


class DiskRate(NamedTuple):
    request_bytes: int
    threads: int
    bytes_per_s: float


class Launch(NamedTuple):
    """Seconds that work costs apart from the bytes it reads."""

    op_s: float
    layer_s: float
    expert_s: float


class Link(NamedTuple):
    pinned: float  # bytes/s
    pageable: float


class Attention(NamedTuple):
    decode: float  # FLOP/s, four for each head, query, key and dimension
    prompt: float


@dataclass(frozen=True)
class Profile:
    """See the file's head. `machine` names what it was measured on; `sources` says of each part where it comes from."""

    device: str
    machine: dict[str, str]
    disk: tuple[DiskRate, ...]
    memory: float
    matrix: dict[str, tuple[tuple[int, float], ...]]
    attention: Attention
    warm: Launch
    cold: Launch
    link: Link | None
    sources: dict[str, str]

    def disk_rate(self, request_bytes: int, threads: int) -> float:
        """Bytes/s of `threads` at once, or of the most that were measured below."""
        most = max((r.threads for r in self.disk if r.threads <= threads), default=min(r.threads for r in self.disk))
        return _between([(r.request_bytes, r.bytes_per_s) for r in self.disk if r.threads == most], request_bytes)

    def weight_s(self, format: str, rows: int) -> float:
        """Seconds per weight of a product with `rows` rows. Half precisions are alike."""
        return _between(self.matrix["bf16" if format == "float16" else format], rows)

    def knows(self, format: str) -> bool:
        return ("bf16" if format == "float16" else format) in self.matrix

    def differs(self, machine: dict[str, str]) -> list[str]:
        """In what this machine is another than the one it was measured on."""
        return [f"{name} {self.machine.get(name, '?')}" for name in machine if self.machine.get(name) != machine[name]]

    def to_json(self) -> dict[str, Any]:
        said = self.sources
        return {
            "kind": KIND,
            "version": VERSION,
            "device": self.device,
            "machine": self.machine,
            "disk": {"source": said["disk"], "rates": [list(rate) for rate in self.disk]},
            "memory": {"source": said["memory"], "bytes_per_s": self.memory},
            "matrix": {"source": said["matrix"], "seconds_per_weight": self.matrix},
            "attention": {"source": said["attention"], **self.attention._asdict()},
            "launch": {"source": said["launch"], "warm": self.warm._asdict(), "cold": self.cold._asdict()},
            "link": {"source": said["link"], **self.link._asdict()} if self.link else None,
        }

    @classmethod
    def from_json(cls, data: Any) -> Profile:
        """Raises ValueError or its kin where anything is missing, unknown or beyond what a machine can do."""
        _only(data, {"kind", "version", "device", "machine", "disk", "memory", "matrix", "attention", "launch", "link"})
        if data["kind"] != KIND or data["version"] != VERSION:
            raise ValueError(f"{data['kind']!r} version {data['version']!r}, not {KIND!r} version {VERSION}")
        parts = {"disk": {"rates"}, "memory": {"bytes_per_s"}, "matrix": {"seconds_per_weight"}}
        parts |= {"attention": set(Attention._fields), "launch": {"warm", "cold"}}
        parts |= {"link": set(Link._fields)} if data["link"] is not None else {}
        for name, fields in parts.items():
            _only(data[name], fields | {"source"})
        return cls(
            device=_text(data["device"]),
            machine={_text(name): _text(value) for name, value in _few(data["machine"]).items()},
            disk=tuple(_disk_rate(*item) for item in _few(data["disk"]["rates"])),
            memory=_number(data["memory"]["bytes_per_s"], RATE),
            matrix={_text(n): _points(p) for n, p in _few(data["matrix"]["seconds_per_weight"]).items()},
            attention=Attention(*(_number(data["attention"][n], RATE) for n in Attention._fields)),
            warm=_launch(data["launch"]["warm"]),
            cold=_launch(data["launch"]["cold"]),
            link=Link(*(_number(data["link"][n], RATE) for n in Link._fields)) if data["link"] else None,
            sources={name: _source(data[name]["source"]) for name in parts},
        )


def read_profile(path: Path) -> Profile:
    """The profile in `path`; refuses a file that is not one, of whatever make."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise Refusal("E_PROFILE", f"no machine profile {path}", "run `duoserve doctor`", 3) from error
    if size > MAX_BYTES:
        raise Refusal("E_PROFILE", f"{path} has {size} bytes, at most {MAX_BYTES} are read", _AGAIN, 5)
    try:
        return Profile.from_json(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_TEXT]
        raise Refusal("E_PROFILE", f"{path} is no machine profile ({reason})", _AGAIN, 5) from error


_AGAIN = "run `duoserve doctor` again"


def write_profile(path: Path, profile: Profile) -> None:
    """Replace the file at once: a reader sees the old one or the new one."""
    with replacing(path) as stream:
        stream.write(json.dumps(profile.to_json(), indent=1).encode())


def _between(points: Any, at: float) -> float:
    """Straight lines between points in logarithms of both; beyond the ends, the ends."""
    points = sorted(points)
    i = bisect_left([x for x, _ in points], at)
    if i == 0 or i == len(points):
        return float(points[min(i, len(points) - 1)][1])
    (x0, y0), (x1, y1) = points[i - 1 : i + 1]
    share = math.log(at / x0) / math.log(x1 / x0)
    return float(y0 * (y1 / y0) ** share)


def _only(data: Any, names: set[str]) -> None:
    if not isinstance(data, dict) or set(data) != names:
        found = sorted(map(str, data))[:MAX_POINTS] if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"has {found}, not {sorted(names)}")


def _few(items: Any) -> Any:
    if not isinstance(items, (list, tuple, dict)) or not 1 <= len(items) <= MAX_POINTS:
        raise ValueError(f"not 1 to {MAX_POINTS} items")
    return items


def _text(value: Any, most: int = MAX_TEXT) -> str:
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise ValueError("not a short text")
    return value


def _source(value: Any) -> str:
    if not _text(value, MAX_SOURCE).strip():
        raise ValueError("a part without a source")
    return str(value)


def _number(value: Any, between: tuple[float, float]) -> float:
    if type(value) not in (int, float) or not between[0] <= value <= between[1]:
        raise ValueError(f"{str(value)[:40]} is not between {between[0]:g} and {between[1]:g}")
    return float(value)


def _count(value: Any, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{str(value)[:40]} is not between 1 and {most}")
    return value


def _disk_rate(request_bytes: Any, threads: Any, rate: Any) -> DiskRate:
    return DiskRate(_count(request_bytes, 1 << 40), _count(threads, 1024), _number(rate, RATE))


def _points(items: Any) -> tuple[tuple[int, float], ...]:
    points = tuple((_count(rows, 1 << 24), _number(seconds, SECONDS)) for rows, seconds in _few(items))
    if any(a >= b for (a, _), (b, _) in pairwise(points)):
        raise ValueError("rows do not rise")
    return points


def _launch(data: Any) -> Launch:
    _only(data, set(Launch._fields))
    return Launch(*(_number(data[name], (0.0, SECONDS[1])) for name in Launch._fields))
