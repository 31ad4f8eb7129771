"""What recording a trace costs decode: windows of the same tokens with and without the recorder take turns in one process.

python -m benchmarks.trace_cost [--seconds 60] [--hidden] [--model MODEL] [--budget half]

A window decodes 64 tokens behind a prompt of 32, greedily. The recorder flushes as it does for `duoserve trace`, by a clock
that also runs while the windows without it do: it flushes about twice as often for each token as it would. Seconds of the
processor are given beside those of the clock: on a machine that does other things the clock says little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import duoserve
from benchmarks.machine import describe
from duoserve import tracing
from duoserve.sizing import CACHE
from traces.record import Recorder, about

PROMPT, WINDOW = 32, 64  # tokens


@torch.inference_mode()
def window(engine: Any, ids_1S: torch.Tensor) -> tuple[float, float]:
    """Seconds of decoding WINDOW tokens, by the clock and of this thread; reading the prompt is not counted."""
    out = engine.model(ids_1S, use_cache=True)
    began, thread = time.perf_counter(), time.thread_time()
    for _ in range(WINDOW):
        token = out.logits[:, -1:].argmax(-1)
        out = engine.model(token, use_cache=True, **{CACHE: out[CACHE]})
    return time.perf_counter() - began, time.thread_time() - thread


def measure(engine: Any, folder: Path, seconds: float, hidden: bool) -> dict[str, Any]:
    prompts = tracing.read_prompts(Path(__file__).parent / "prompts" / "documentation.jsonl")
    rows = [ids for p in prompts if (ids := engine.encode(p.content)[:, :PROMPT]).shape[1] == PROMPT]
    experts = [layer.n_experts for layer in engine.store.layers]
    batch = tracing._Batch(prompts[:1], rows[0], torch.ones_like(rows[0]), 1, 0)
    choices = tracing._choices(engine, batch)
    recorder = Recorder(
        folder, about(engine.store.fingerprint, engine.dtype, experts, choices, hidden), engine.routers()
    )
    plain: list[tuple[float, float]] = []
    traced: list[tuple[float, float]] = []
    window(engine, rows[0])
    began = time.monotonic()
    while time.monotonic() - began < seconds or len(traced) < 2:
        row = rows[len(plain) // 2 % len(rows)]  # each twice: which of the two comes first takes turns
        for with_recorder in (False, True) if len(plain) % 2 else (True, False):
            engine.runtime.observers[:] = [recorder] if with_recorder else []
            (traced if with_recorder else plain).append(window(engine, row))
    engine.runtime.observers.clear()
    recorder.close()
    return {
        "windows": len(plain),
        "rows": recorder.rows,
        "clock": _compared([p[0] for p in plain], [t[0] for t in traced]),
        "processor": _compared([p[1] for p in plain], [t[1] for t in traced]),
    }


def _compared(plain: list[float], traced: list[float]) -> dict[str, float]:
    return {
        "plain_ms": 1e3 * statistics.median(plain) / WINDOW,
        "traced_ms": 1e3 * statistics.median(traced) / WINDOW,
        "ratio_of_pairs": statistics.median(t / p for t, p in zip(traced, plain, strict=True)),
        "ratio_in_all": sum(traced) / sum(plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--hidden", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--budget", default="half")
    options = parser.parse_args()
    with (
        duoserve.load(options.model, budget=options.budget, predictor="none") as engine,
        tempfile.TemporaryDirectory() as aside,
    ):
        found = measure(engine, Path(aside) / "trace", options.seconds, options.hidden)
    names = {"plain_ms": "decode, ms a token", "traced_ms": "with the recorder"}
    names |= {"ratio_of_pairs": "ratio, median of pairs", "ratio_in_all": "ratio, flushes and all"}
    print(f"{'':22s} {'clock':>10s} {'processor':>10s}")
    for key, name in names.items():
        print(f"{name:22s} {found['clock'][key]:10.3f} {found['processor'][key]:10.3f}")
    print(json.dumps({"benchmark": "trace_cost", "hidden": options.hidden, **found, "machine": describe()}))


if __name__ == "__main__":
    main()
