"""Ours against Accelerate with disk offload and stock transformers in the same memory, on a random-weight Mixtral of 1.5 B.

    python -m benchmarks.peers FOLDER [--cap 900MB] [--residency 50%] [--new-tokens 9] [--output FILE.jsonl]

FOLDER takes the model (3 GB, made at first use), its store, and 3 GB more while Accelerate runs. Each row is a process,
those with a cap in a memory control group of that size (needs root), and begins with nothing of its files in the page cache.
Rows take turns. Ours gets uniform random routes, so that a random router that repeats itself cannot fake hits; peers keep
theirs. Shares of the limit are of the bytes that the row moved itself: who moves more than it needs has an easier limit.
Printed: the table of `duoserve bench`, and ours over each peer in decode and to the first token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed import make_model
from duoserve import benching, doctor, results
from duoserve.board import table
from duoserve.config import parse_share, parse_size, size
from duoserve.contest import STEADY, Course
from duoserve.matrix import INTERPRETER, Matrix, ours, peer, study
from duoserve.prompts import prompt_set

PROMPT_TOKENS = 64


def measure(folder: Path, cap: int, share: float, course: Course) -> list[results.Record]:
    """Rows of results: ours and the peers within the cap, and stock transformers without one."""
    options: dict[str, Any] = {"format": "int4", "cache_dir": str(folder / "cache")}
    asked = Matrix(
        policies=["duoserve"], residencies=[share], sets=[prompt_set("all")], batches=[1], peers=["stock", "accelerate"],
        cap=cap, routes="uniform", course=course, limit_tokens=PROMPT_TOKENS,
    )  # fmt: skip
    subject = study(str(folder), asked, options)
    profile, why = doctor.known_profile(str(folder / "cache"))
    if profile is None:
        say(f"measuring this machine: {why}")
        profile = doctor.quick_profile(str(folder / "cache"))
    rest = max(1, cap - INTERPRETER)
    within = size(cap)
    contenders = [
        ours(f"duoserve int4 {share:.0%}, {within}", subject, share, "duoserve", asked, options),
        peer(f"accelerate, {within}", "accelerate", subject, rest, cap, options),
        peer(f"stock, {within}", "stock", subject, None, cap, options),
        peer("stock, no cap", "stock", subject, None, None, options),
    ]
    return benching.run(subject, contenders, asked, profile, options, say)


def ahead(records: list[results.Record]) -> list[str]:
    """Ours over each peer, steady."""
    mine, *others = [r for r in records if r["phase"] == STEADY]
    lines = []
    for other in others:
        if mine["error"] or other["error"]:
            lines.append(f"over {other['row']}: {mine['error'] or other['error']}")
            continue
        decode, first = mine["avg_ts"] / other["avg_ts"], other["ttft_s"] / mine["ttft_s"]
        lines.append(f"over {other['row']}: {decode:.2f}x in decode, {first:.2f}x to the first token")
    return lines


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cap", default="900MB")
    parser.add_argument("--residency", default="50%")
    parser.add_argument("--new-tokens", type=int, default=9)
    parser.add_argument(
        "--steady", type=int, default=2, help="Requests after the cold, the warm and an unmeasured one."
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    course = Course(1, args.steady, args.new_tokens)
    found = measure(make_model(args.folder), parse_size(args.cap), parse_share(args.residency), course)
    for line in [*table(found), *ahead(found)]:
        print(line)
    if args.output is not None:
        results.write(args.output, found)


if __name__ == "__main__":
    main()
