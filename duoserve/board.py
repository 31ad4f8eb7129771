"""A benchmark's results as tables for people. Knows rows of results; knows nothing of how they came about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from duoserve.results import Change, Ratio, Record, compare, machine_differs


def table(records: Sequence[Record]) -> Iterator[str]:
    """One line a row; a row without figures says why. Seconds are medians unless a percentile is named."""
    titles = [title for title, _ in COLUMNS]
    yield from _aligned([titles, *(_cells(r) for r in records)], {i: r["error"] for i, r in enumerate(records, 1)})
    for prompts, batch in dict.fromkeys((r["prompts"], r["n_batch"]) for r in records):
        of = [r for r in records if (r["prompts"], r["n_batch"]) == (prompts, batch) and not r["error"]]
        yield f"{prompts}, batch {batch}: {_said(of)}" if of else f"{prompts}, batch {batch}: no figures"


def _said(records: Sequence[Record]) -> str:
    """What the rows of one cell share."""
    first = records[0]
    n = len(first["samples_e2e_s"])
    ours = {r["tokens_sha256"] for r in records if r["engine"] == "duoserve" and r["phase"] == first["phase"]}
    answers = "the same tokens from all policies and residencies" if len(ours) == 1 else f"{len(ours)} kinds of answers"
    turns = "rows took turns" if first["in_turns"] else "rows ran one after the other"
    limit = first["link_rate_gbps"]
    road = f"; a plain reader gets {limit:.2f} GB/s" if limit else ""
    read = sum(r["n_prompt"] for r in records) / len(records)
    return f"{read:.0f} tokens read and {first['n_gen']} made, {n} to a phase or more; {turns}; {answers}{road}"


def _cells(r: Record) -> list[str]:
    return ["" if r["error"] and i >= KEYS else show(r) for i, (_, show) in enumerate(COLUMNS)]


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[Record], str]:
    return lambda r: "" if r[name] is None else form.format(r[name] * scale)


def _rate(r: Record) -> str:
    return "" if r["avg_ts"] is None else f"{r['avg_ts']:.1f} ± {r['stddev_ts']:.1f}"


def _link(r: Record) -> str:
    share = "" if r["link_share"] is None else f" {r['link_share']:.0%}"
    return "" if r["link_gbps"] is None else f"{r['link_gbps']:.2f}{share}"


def _stall(r: Record) -> str:
    """In all, and the cause that costs most."""
    if not r["stall_s"]:
        return ""
    total, (cause, most) = sum(r["stall_s"].values()), max(r["stall_s"].items(), key=lambda item: item[1])
    return f"{total:.2f} {cause}" if most > 0 else "0.00"


def _limit(r: Record) -> str:
    return "" if r["share_of_limit"] is None else f"{r['share_of_limit']:.0%} {r['limited_by']}"


KEYS = 4  # columns that name a row
COLUMNS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("row", lambda r: str(r["row"])),
    ("prompts", lambda r: str(r["prompts"])),
    ("batch", lambda r: str(r["n_batch"])),
    ("phase", lambda r: str(r["phase"])),
    ("load s", _number("load_s", "{:.1f}")),
    ("ttft s", _number("ttft_s", "{:.3f}")),
    ("e2e p50", _number("e2e_p50_s", "{:.3f}")),
    ("p95", _number("e2e_p95_s", "{:.3f}")),
    ("p99", _number("e2e_p99_s", "{:.3f}")),
    ("decode tok/s", _rate),
    ("hit", _number("hit", "{:.0%}")),
    ("flight", _number("in_flight", "{:.0%}")),
    ("miss", _number("miss", "{:.0%}")),
    ("MB/tok", _number("bytes_per_token", "{:.2f}", 1e-6)),
    ("GB/s, of link", _link),
    ("stall s", _stall),
    ("peak MB", _number("rss_peak_bytes", "{:.0f}", 1e-6)),
    ("of limit", _limit),
)


def compared(new: Sequence[Record], old: Sequence[Record]) -> Iterator[str]:
    """How much faster than before (more is better), with the ratio between the quartiles that lie furthest apart."""
    yield "against before; ratios of medians (between quartiles), above 1 is faster"
    for difference in machine_differs(new, old):
        yield f"another machine: {difference}"
    changes = compare(new, old)
    rows = [["row", "prompts", "batch", "phase", "decode", "ttft", "e2e"], *(_change(c) for c in changes)]
    yield from _aligned(rows, {i: change.error for i, change in enumerate(changes, 1)})


def _change(change: Change) -> list[str]:
    keys = [show(change.record) for _, show in COLUMNS[:KEYS]]
    return [*keys, *(_ratio(ratio) for ratio in (change.decode, change.ttft, change.e2e))]


def _ratio(ratio: Ratio | None) -> str:
    return str(ratio) if ratio else ""


def _aligned(rows: list[list[str]], notes: dict[int, str | None]) -> Iterator[str]:
    """Keys on the left, figures on the right; a note stands where a row has no figures."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = [c.ljust(w) if i < KEYS else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        note = notes.get(number)
        yield ("  ".join(cells[:KEYS]) + f"  {note}" if note else "  ".join(cells)).rstrip()
