"""What recording a timeline costs decode: windows of the same tokens with and without it take turns in one process.

python -m benchmarks.timeline_cost [--seconds 60] [--predictor none] [--model MODEL] [--budget half]

A window decodes 64 tokens behind a prompt of 32, greedily. All spans of the run so far are kept, up to as many as a
recording holds. Seconds of this thread are given beside those of the clock: on a machine that does other things the clock
says little. The bundled demo is the worst case: its tokens take a few milliseconds, and its layers have as many spans as a
large model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import duoserve
from benchmarks.machine import describe
from benchmarks.trace_cost import PROMPT, WINDOW, window
from duoserve import tracing
from duoserve.timeline import MOST, Timeline


def measure(engine: Any, seconds: float) -> dict[str, Any]:
    prompts = tracing.read_prompts(Path(__file__).parent / "prompts" / "documentation.jsonl")
    rows = [ids for p in prompts if (ids := engine.encode(p.content)[:, :PROMPT]).shape[1] == PROMPT]
    plain: list[tuple[float, float]] = []
    recorded: list[tuple[float, float]] = []
    kept: list[Timeline] = []
    spans = held = 0
    window(engine, rows[0])
    began = time.monotonic()
    while time.monotonic() - began < seconds or len(recorded) < 2:
        row = rows[len(plain) // 2 % len(rows)]  # each twice: which of the two comes first takes turns
        for recording in (False, True) if len(plain) % 2 else (True, False):
            timeline = Timeline() if recording else None
            engine.record(timeline)
            (recorded if recording else plain).append(window(engine, row))
            engine.record(None)
            if timeline is not None:
                n = len(timeline.spans())
                spans, held = spans + n, held + n
                kept.append(timeline)
        if held > MOST:
            kept.clear()
            held = 0
    return {
        "windows": len(plain),
        "spans_a_token": spans / len(recorded) / WINDOW,  # the prompt's among them
        "clock": _compared([p[0] for p in plain], [r[0] for r in recorded]),
        "thread": _compared([p[1] for p in plain], [r[1] for r in recorded]),
    }


def _compared(plain: list[float], recorded: list[float]) -> dict[str, float]:
    pairs = sorted(r / p for r, p in zip(recorded, plain, strict=True))
    return {
        "plain_ms": 1e3 * statistics.median(plain) / WINDOW,
        "recorded_ms": 1e3 * statistics.median(recorded) / WINDOW,
        "ratio_of_pairs": statistics.median(pairs),
        "lower_quartile": pairs[len(pairs) // 4],
        "upper_quartile": pairs[-1 - len(pairs) // 4],
        "ratio_in_all": sum(recorded) / sum(plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--predictor", default="none", help="with one, windows in which guessing pauses differ by that")
    parser.add_argument("--model")
    parser.add_argument("--budget", default="half")
    options = parser.parse_args()
    with duoserve.load(options.model, budget=options.budget, predictor=options.predictor) as engine:
        if options.predictor != "none":
            engine.predict(engine.runtime.ahead.predictor, always=True)
        found = measure(engine, options.seconds)
    names = {"plain_ms": "decode, ms a token", "recorded_ms": "recorded", "ratio_of_pairs": "ratio, median of pairs"}
    names |= {"lower_quartile": "  a quarter is below", "upper_quartile": "  a quarter is above"}
    names |= {"ratio_in_all": "ratio, all windows"}
    print(f"{'':24s} {'clock':>10s} {'thread':>10s}")
    for key, name in names.items():
        print(f"{name:24s} {found['clock'][key]:10.4f} {found['thread'][key]:10.4f}")
    print(f"{found['spans_a_token']:.0f} spans a token, {found['windows']} pairs of windows")
    about = {"predictor": options.predictor, "budget": options.budget}
    print(json.dumps({"benchmark": "timeline_cost", **about, **found, "machine": describe()}))


if __name__ == "__main__":
    main()
