"""Ours against Accelerate with disk offload, stock transformers and llama.cpp in the same memory, on a random-weight Mixtral
of 1.5 B.

    python -m benchmarks.peers FOLDER [--cap 900MB] [--residency 50%] [--new-tokens 9] [--output FILE.jsonl]
    python -m benchmarks.peers FOLDER --cap none --residency 100% --prompt-tokens 512 --peers stock,llama.cpp

FOLDER takes the model (3 GB, made at first use), its store, 3 GB more while Accelerate runs, and a GGUF for llama.cpp
(0.9 GB, 3 GB more while it is made) where the packages llama-cpp-python and gguf are installed. Each row is a process, those
with a cap in a memory control group of that size (needs root), and begins with nothing of its files in the page cache. Rows
take turns. Ours gets uniform random routes, so that a random router that repeats itself cannot fake hits; peers keep theirs,
and so does one more row of ours. Shares of the limit are of the bytes that the row moved itself: who moves more than it
needs has an easier limit. Printed: the table of `duoserve bench`, and ours over each peer in decode and to the first token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import gguf_file
from benchmarks.speed import make_model
from duoserve import benching, doctor, results
from duoserve.board import table
from duoserve.config import parse_share, parse_size, size
from duoserve.contest import STEADY, Contender, Course
from duoserve.matrix import INTERPRETER, Matrix, Subject, llama_cpp, ours, peer, study
from duoserve.peers import LLAMA_CPP, chosen
from duoserve.prompts import Prompt, PromptSet, prompt_set


def measure(
    folder: Path, cap: int | None, share: float, course: Course, prompt_tokens: int, wanted: str
) -> list[results.Record]:
    """Rows of results: ours and the peers within the cap, and stock transformers without one."""
    options: dict[str, Any] = {"format": "int4", "cache_dir": str(folder / "cache")}
    asked = Matrix(
        policies=["duoserve"], residencies=[share], sets=[long_prompts(prompt_tokens)], batches=[1], peers=["stock"],
        cap=cap, routes="uniform", course=course, limit_tokens=prompt_tokens,
    )  # fmt: skip
    subject = study(str(folder), asked, options)
    profile, why = doctor.known_profile(str(folder / "cache"))
    if profile is None:
        say(f"measuring this machine: {why}")
        profile = doctor.quick_profile(str(folder / "cache"))
    contenders = [*our_rows(subject, asked, options), *peer_rows(subject, asked, options, _peers(wanted, folder))]
    return benching.run(subject, contenders, asked, profile, options, say)


def long_prompts(length: int) -> PromptSet:
    """The shipped prompts in turn, each with those behind it until it has so many letters: a byte is a token here."""
    known = prompt_set("all")
    texts = [p.content if isinstance(p.content, str) else p.content[-1]["content"] for p in known.prompts]
    whole = ["\n\n".join(texts[i:] + texts[:i])[:length] for i in range(len(texts))]
    joined = [Prompt(p.id, p.domain, text) for p, text in zip(known.prompts, whole, strict=True)]
    return PromptSet("all, joined", known.sha256, joined)


def our_rows(subject: Subject, asked: Matrix, options: dict[str, Any]) -> Iterator[Contender]:
    """The first is what peers are compared with."""
    (share,) = asked.residencies
    name = f"duoserve int4 {share:.0%}"
    yield ours(f"{name}, {_within(asked.cap)}", subject, share, "duoserve", asked, options)
    real = replace(asked, routes="real")
    if share < 1:  # else all routes hit
        yield ours(f"{name}, {_within(asked.cap)}, its own routes", subject, share, "duoserve", real, options)


def peer_rows(
    subject: Subject, asked: Matrix, options: dict[str, Any], wanted: dict[str, Path | None]
) -> Iterator[Contender]:
    for name, gguf in wanted.items():
        for cap in dict.fromkeys((asked.cap, None)):
            row = f"{name}, {_within(cap)}"
            if gguf is not None:
                yield llama_cpp(row, subject, gguf, cap, options)
            elif name == "stock":
                yield peer(row, name, subject, None, cap, options)
            elif cap is not None:
                yield peer(row, name, subject, max(1, cap - INTERPRETER), cap, options)


def _within(cap: int | None) -> str:
    return size(cap) if cap is not None else "no cap"


def _peers(wanted: str, folder: Path) -> dict[str, Path | None]:
    """Names, llama.cpp's with its file of the model; of "all", those that are installed."""
    able = all(find_spec(package) for package in ("llama_cpp", "gguf"))
    llama = LLAMA_CPP in wanted or (wanted == "all" and able)
    gguf = gguf_file.make(folder, folder / "q4_0.gguf") if llama else None
    return {name: gguf if name == LLAMA_CPP else None for name in chosen(wanted, gguf)}


def ahead(records: list[results.Record]) -> list[str]:
    """Our first row over each peer, steady."""
    mine, *others = [r for r in records if r["phase"] == STEADY]
    lines = []
    for other in (other for other in others if other["engine"] != "duoserve"):
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
    parser.add_argument("--cap", default="900MB", help="Or none.")
    parser.add_argument("--residency", default="50%")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=9)
    parser.add_argument("--peers", default="all", help="All that are installed, or such as stock,llama.cpp.")
    parser.add_argument(
        "--steady", type=int, default=2, help="Requests after the cold, the warm and an unmeasured one."
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    course = Course(1, args.steady, args.new_tokens)
    cap = None if args.cap == "none" else parse_size(args.cap)
    share = parse_share(args.residency)
    found = measure(make_model(args.folder), cap, share, course, args.prompt_tokens, args.peers)
    for line in [*table(found), *ahead(found)]:
        print(line)
    if args.output is not None:
        results.write(args.output, found)


if __name__ == "__main__":
    main()
