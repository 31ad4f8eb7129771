"""What a benchmark found: one JSON line for each row, prompt set, batch and phase. Knows the fields, the statistics and how
two files compare; knows nothing of engines, processes or machines. Imports no torch.

Names are llama-bench's where it has one. Its tests read or write tokens; ours do both, and its figures are of our decode:

    build_commit, build_number     of this program; null where it is not a git checkout
    cpu_info, gpu_info, backends   backends: cpu or cuda
    model_filename, model_type, model_size, model_n_params   as named by the user; family and format; bytes; parameters
    n_batch, n_threads             sequences that run together; threads of arithmetic
    n_prompt, n_gen                mean tokens of a prompt, padding apart; tokens made for each
    test_time                      when, UTC
    avg_ns, stddev_ns, samples_ns  nanoseconds of decode, from the first token to the last
    avg_ts, stddev_ts, samples_ts  decoded tokens a second over the batch: tokens after the first

Ours:

    kind, version, row, engine     duoserve, stock (transformers), accelerate or llama.cpp; `row` is the line's name in the
                                   table
    policy, residency, slots, experts, format, trunk, dtype, predictor, routes, link, budget_bytes, cap_bytes
    prompts, prompts_sha256        name of the set, checksum of its bytes
    phase                          cold: the first request after loading, nothing of the model's files in the page cache;
                                   warm: the second, another prompt; steady: from the fourth on
    in_turns                       whether rows took turns; else each ran alone, one after the other
    samples_ttft_s, ttft_s         seconds to the first token, and their median
    samples_e2e_s, e2e_p50_s, e2e_p95_s, e2e_p99_s   seconds of a whole request; percentiles interpolate between samples
    hit, in_flight, miss           shares of the experts that decode asked for; null where nobody counts (peers)
    bytes_per_token, ttft_bytes    bytes moved for a decoded token, for a prompt; of peers what the process read from disk
    paged_bytes                    read from disk beside the copies by ours on a CPU, mean of a request: pages of programs
                                   and files that a cap had dropped; null elsewhere
    link_gbps, link_rate_gbps, link_share   while the link was busy; as measured with nothing else to do; their ratio
    stall_s                        cause -> seconds that a request's compute waited for experts, mean
    load_s, rss_peak_bytes, used_bytes     mean seconds to load; of the process, all told; of the budget
    limit_s, limited_by, share_of_limit    seconds of a decode step that no engine could beat with these bytes (the larger of
                                   bytes moved / link and bytes read / memory), which it is, and limit / median measured
    tokens_sha256                  of all tokens made, in order: the same answers have the same
    error                          why figures are missing, or of fewer requests than asked; null where all is there
    machine                        what it ran on, by name
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from duoserve.core import Refusal
from duoserve.durable import replacing
from duoserve.headers import bounded_json, regular_size, shown

KIND, VERSION = "duoserve-bench", 1
MAX_FILE, MAX_LINE_VALUES, MAX_ROWS, MAX_TEXT, MAX_SAMPLES = 64 << 20, 100_000, 20_000, 2000, 20_000
LEAST = 1e-9  # of a sample: no request takes less, in any of their units
SAMPLES = ("samples_ns", "samples_ts", "samples_ttft_s", "samples_e2e_s")
IDENTITY = (
    "row", "engine", "model_type", "policy", "residency", "format", "trunk", "routes", "link", "cap_bytes", "prompts",
    "n_batch", "n_gen", "phase",
)  # fmt: skip
_REMEDY = "give a file that `duoserve bench --output` wrote"

Record = dict[str, Any]


def percentile(samples: Sequence[float], share: float) -> float:
    """Between the two nearest samples in a straight line, as numpy's default."""
    ordered = sorted(samples)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def deviation(samples: Sequence[float]) -> float:
    """Of a sample; 0 of one."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def write(path: Path, records: Iterable[Record]) -> None:
    """Replace the file at once."""
    with replacing(path) as stream:
        for record in records:
            stream.write(line(record).encode() + b"\n")


def line(record: Record) -> str:
    return json.dumps(record, allow_nan=False)


def read(path: Path) -> list[Record]:
    """The rows of a file of results; refuses one that is none, whoever wrote it."""
    size = regular_size(path)
    if size < 0:
        raise Refusal("E_RESULTS", f"there is no {path}", _REMEDY, 3)
    if size > MAX_FILE:
        raise Refusal("E_RESULTS", f"{path} has {size:,} bytes, at most {MAX_FILE:,} are read", _REMEDY, 5)
    found = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        if text.strip():
            found.append(_record(text, f"{path}:{number}"))
        if len(found) > MAX_ROWS:
            raise Refusal("E_RESULTS", f"{path} has more than {MAX_ROWS:,} rows", _REMEDY, 5)
    if not found:
        raise Refusal("E_RESULTS", f"{path} holds 0 rows", _REMEDY, 5)
    return found


def _record(text: bytes, where: str) -> Record:
    try:
        data = bounded_json(text, where, _REMEDY, MAX_LINE_VALUES)
    except Refusal as refusal:
        raise refusal.under("E_RESULTS") from refusal
    try:
        _check(data)
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal("E_RESULTS", f"{where} is no row of results ({shown(str(error))})", _REMEDY, 5) from error
    return data


def _check(data: Any) -> None:
    """What comparing reads is there and is what it should be."""
    if not isinstance(data, dict) or data.get("kind") != KIND or data.get("version") != VERSION:
        raise ValueError(f"not {KIND} version {VERSION}")
    for name in IDENTITY:
        value = data[name]
        if value is not None and not (_is_text(value) or _is_number(value)):
            raise ValueError(f"{name} {shown(value)}")
    if data["error"] is not None and not _is_text(data["error"]):
        raise ValueError(f"error {shown(data['error'])}")
    if not isinstance(data["machine"], dict) or not all(_is_text(v) for v in (*data["machine"], *_said(data))):
        raise ValueError("machine")
    for name in SAMPLES:
        samples = data[name]
        if not isinstance(samples, list) or len(samples) > MAX_SAMPLES:
            raise ValueError(f"{name} is no list of samples")
        if not all(_is_number(s) and s >= LEAST for s in samples):
            raise ValueError(f"{name} has samples that are no figures")
        if not samples and data["error"] is None:
            raise ValueError(f"{name} has 0 samples")


def _said(data: Record) -> list[str]:
    return [value for value in data["machine"].values() if value is not None]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e18 and math.isfinite(value)


class Ratio(NamedTuple):
    """New over old: of the medians, and between the quartiles that lie furthest apart."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}-{self.high:.2f})"


class Change(NamedTuple):
    """One row against the same row of before; ratios of speeds, so that more is better. None without figures."""

    record: Record
    decode: Ratio | None
    ttft: Ratio | None
    e2e: Ratio | None
    error: str | None  # why there is nothing to compare


def compare(new: Sequence[Record], old: Sequence[Record]) -> list[Change]:
    """Every new row against the old one of the same settings."""
    before = {_identity(record): record for record in old}
    return [_change(record, before.get(_identity(record))) for record in new]


def machine_differs(new: Sequence[Record], old: Sequence[Record]) -> list[str]:
    """In what the two machines differ, as "name: old -> new"."""
    now, then = new[0]["machine"], old[0]["machine"]
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [f"{name}: {then.get(name)} -> {now.get(name)}" for name in names]


def _identity(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in IDENTITY)


def _change(now: Record, then: Record | None) -> Change:
    error = "no such row before" if then is None else now["error"] or then["error"]
    if then is None or error:
        return Change(now, None, None, None, error)
    return Change(
        now,
        _ratio(now["samples_ts"], then["samples_ts"]),
        _ratio(then["samples_ttft_s"], now["samples_ttft_s"]),
        _ratio(then["samples_e2e_s"], now["samples_e2e_s"]),
        None,
    )


def _ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    (a25, a50, a75), (b25, b50, b75) = ([percentile(s, q) for q in (0.25, 0.5, 0.75)] for s in (over, under))
    return Ratio(a50 / b50, a25 / b75, a75 / b25)
