"""Decode and prefill on a random-weight Mixtral of 1.5 B parameters, beside stock transformers and a plain disk reader.

    python -m benchmarks.speed FOLDER [--rows stock,bf16:all,int4:all,int4:half@900MB,int4:0.2@700MB] [--rounds 9]

FOLDER takes the model (3 GB, made at first use) and its stores. A row is FORMAT:RESIDENCY[@CAP], or a peer; each is a
process of its own, with CAP in a memory control group of that size (needs root). Pages cached of files are dropped before
each starts. All stay loaded and take short turns, so that a slow minute slows all of them. A random router repeats itself
and fakes hits, so ours gets uniform random routes (hits then equal residency); the peers keep their routes, and their page
cache, which ours does not use. Printed are medians over rounds, of figures and of each round's ratios:

    x stock    against the stock row of the round           plain      GB/s that two threads get reading such slabs, no more
    decode /   step / (resident step + plain read of what it missed)                 at most 1.15
    prefill /  pass / the larger of (resident pass, plain read of what it missed)    at most 1.15
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from duoserve.cap import drop_page_cache, memory_group

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    "max_position_embeddings": 4096, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
PROMPTS = (64, 512)
STEPS = 24  # of decode behind each prompt
PLAIN_READS = 96  # slabs
ROWS = "stock,bf16:all,int4:all,int4:half@900MB,int4:0.2@700MB"
ROOM = 1024  # tokens of keys and values


def make_model(folder: Path, shape: dict[str, Any] = SHAPE) -> Path:
    """A random-weight Mixtral in the hub's layout, of 1.5 B parameters unless the shape says otherwise."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model("mixtral", **shape)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def serve(row: str, folder: Path) -> None:
    """One row in this process: measures a prompt length whenever a line on stdin names one; a line of JSON each."""
    import torch

    model, engine = _open(row, folder)
    with torch.inference_mode():
        for prompt in PROMPTS:  # first touches, first checksums
            _prompt(model, engine, prompt)
        print("ready", flush=True)
        for line in sys.stdin:
            found = _prompt(model, engine, int(line))
            if engine:
                stats = engine.stats()
                found |= {name: stats[name] for name in ("residency", "budget_bytes", "used_bytes")}
                found["plain_gbps"] = _plain_rate(engine) / 1e9
            print(json.dumps(found | {"rss_peak_bytes": _peak_rss()}), flush=True)


def _prompt(model: Any, engine: Any, prompt: int) -> dict[str, Any]:
    import torch

    from duoserve.sizing import CACHE

    ids = torch.randint(0, SHAPE["vocab_size"], (1, prompt))
    before = _read_bytes(engine)
    began = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    ttft_s = time.perf_counter() - began
    read, counts, steps = _read_bytes(engine), _counts(engine), []
    for _ in range(STEPS):
        ids = out.logits[:, -1:].argmax(-1)
        began = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, **{CACHE: out[CACHE]})
        steps.append(time.perf_counter() - began)
    hits, asked = (now - then for now, then in zip(_counts(engine), counts, strict=True))
    return {
        "ttft_s": ttft_s,
        "ttft_bytes": read - before,
        "step_s": _middle(steps),
        "avg_ts": 1 / _middle(steps),
        "step_bytes": (_read_bytes(engine) - read) / STEPS,
        "hit_rate": hits / asked if asked else None,
        "misses": (asked - hits) / STEPS,
    }


def _middle(seconds: list[float]) -> float:
    """Mean of the middle half: steps differ in what they miss, and now and then the machine was busy elsewhere."""
    quarter = len(seconds) // 4
    return statistics.mean(sorted(seconds)[quarter : len(seconds) - quarter])


def _read_bytes(engine: Any) -> int:
    return int(engine.stats()["bytes_moved"]) if engine else 0


def _counts(engine: Any) -> tuple[int, int]:
    stats = engine.stats() if engine else dict.fromkeys(("hits", "in_flight", "misses"), 0)
    return stats["hits"], stats["hits"] + stats["in_flight"] + stats["misses"]


def _plain_rate(engine: Any) -> float:
    """Bytes/s of the engine's own two threads with nothing else to do: whole slabs at random, into touched memory."""
    from duoserve.core import Key

    transfer, layers = engine.runtime.transfer, engine.store.layers
    slabs = [transfer.slab(slot) for slot in engine.runtime.cache.slots[:8]]
    keys = [Key(random.randrange(len(layers)), random.randrange(layers[0].n_experts)) for _ in range(PLAIN_READS)]

    def read(i: int) -> Any:
        return lambda: engine.store.read_into(keys[i], slabs[i % len(slabs)])

    rates = []
    for start in range(0, PLAIN_READS, 32):
        began = time.perf_counter()
        for event in [engine.device.copy.submit(read(i)) for i in range(start, start + 32)]:
            event.wait()
        rates.append(32 * engine.store.slab_bytes / (time.perf_counter() - began))
    return statistics.median(rates)


def _peak_rss() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _open(row: str, folder: Path) -> tuple[Any, Any]:
    import torch

    if row in ("stock", "accelerate"):
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {}
        if row == "accelerate":
            # everything but the embeddings may go to disk; half of the 3 GB stays in memory
            options = {"device_map": "auto", "max_memory": {"cpu": "1500MB"}, "offload_folder": str(folder / "offload")}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval(), None
    import duoserve
    from duoserve.contender import uniform_routes

    engine = duoserve.load(folder, cache_dir=str(folder / "cache"), **_options(row, folder))
    uniform_routes(engine.model)
    return engine.model, engine


def _options(row: str, folder: Path) -> dict[str, Any]:
    """Format and the budget that holds the row's share of the experts, by the plan's own arithmetic."""
    import torch

    from duoserve.config import EngineConfig
    from duoserve.convert import Conversion
    from duoserve.plan import make_plan, trunk_format

    format, _, share = row.partition("@")[0].partition(":")
    conversion = Conversion.of(folder, format)
    trunk = trunk_format(EngineConfig(), format, torch.bfloat16, "cpu")
    config = EngineConfig(budget="min", ctx=ROOM)
    least = make_plan(conversion.size, conversion.checkpoint.config, torch.bfloat16, config, 0, trunk=trunk)
    slots = round(({"all": 1.0, "half": 0.5}.get(share) or float(share)) * conversion.size.n_experts)
    budget = least.planned_bytes + (slots - least.slots) * conversion.size.slab_bytes
    return {"format": format, "budget": budget, "ctx": ROOM}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = make_model(options.folder)
    if options.row:
        serve(options.row, folder)
        return
    names = options.rows.split(",")
    for format in {row.partition(":")[0] for row in names if ":" in row}:
        if not any((folder / "cache" / "stores").glob(f"*-{format}")):  # it needs more memory than caps give
            with ExitStack() as stack:
                _started(f"{format}:all", folder, stack)
    with ExitStack() as stack:
        rows = {row: _started(row, folder, stack) for row in names}
        rounds = [
            {row: {f"prompt_{n}": _asked(process, n) for n in PROMPTS} for row, process in rows.items()}
            for _ in range(options.rounds)
        ]
    found = [_over_rounds(row, prompt, rounds) for prompt in PROMPTS for row in names]
    _print(found)
    print(json.dumps({"benchmark": "speed", "rounds": options.rounds, "machine": describe(), "rows": found}))


def _started(row: str, folder: Path, stack: ExitStack) -> subprocess.Popen[str]:
    """A process for one row, within its cap, its model loaded and warm; it ends with the stack."""
    command = [sys.executable, "-m", "benchmarks.speed", str(folder), "--row", row]
    drop_page_cache()
    cap = row.partition("@")[2]
    if cap:
        group = stack.enter_context(memory_group(_bytes(cap), row))
        command = ["sh", "-c", f'echo $$ > "{group.procs}" && exec "$@"', "sh", *command]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(_ended, process)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        sys.exit(f"row {row} ended with {process.wait()} before it was ready")
    return process


def _ended(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _asked(process: subprocess.Popen[str], prompt: int) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{prompt}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{process.args!r} ended with {process.wait()}")
    return json.loads(line)


def _bytes(text: str) -> int:
    from duoserve.config import parse_size

    return parse_size(text)


def _over_rounds(row: str, prompt: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one row behind one prompt length, and of its ratios round by round, with the samples."""
    samples = [r[row][f"prompt_{prompt}"] for r in rounds]
    found: dict[str, Any] = {"row": row, "n_prompt": prompt, "n_gen": STEPS}
    found |= {name: _median([s[name] for s in samples]) for name in samples[0]}
    found["rss_peak_bytes"] = max(s["rss_peak_bytes"] for s in samples)
    ratios = [_ratios(row, prompt, r) for r in rounds]
    found |= {name: _median([ratio[name] for ratio in ratios]) for name in ratios[0]}
    return found | {"samples_ts": [s["avg_ts"] for s in samples], "samples_ttft_s": [s["ttft_s"] for s in samples]}


def _ratios(row: str, prompt: int, rows: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """One row of one round against its peers of the same round."""
    mine = rows[row][f"prompt_{prompt}"]
    stock = rows.get("stock", {}).get(f"prompt_{prompt}")
    resident = rows.get(row.partition(":")[0] + ":all", {}).get(f"prompt_{prompt}")
    found: dict[str, float | None] = dict.fromkeys(("x_decode", "x_prefill", "decode_bound", "prefill_bound"))
    if stock:
        found["x_decode"] = stock["step_s"] / mine["step_s"]
        found["x_prefill"] = stock["ttft_s"] / mine["ttft_s"]
    if resident and mine.get("plain_gbps"):
        rate = mine["plain_gbps"] * 1e9
        found["decode_bound"] = mine["step_s"] / (resident["step_s"] + mine["step_bytes"] / rate)
        found["prefill_bound"] = mine["ttft_s"] / max(resident["ttft_s"], mine["ttft_bytes"] / rate)
    return found


def _median(values: list[Any]) -> Any:
    return statistics.median(values) if all(isinstance(v, int | float) for v in values) else values[0]


COLUMNS = (
    ("prompt", "n_prompt", "{:6d}"), ("prefill s", "ttft_s", "{:9.3f}"), ("x stock", "x_prefill", "{:7.2f}"),
    ("prefill /", "prefill_bound", "{:9.2f}"), ("tok/s", "avg_ts", "{:6.1f}"), ("x stock", "x_decode", "{:7.2f}"),
    ("decode /", "decode_bound", "{:8.2f}"), ("hit", "hit_rate", "{:5.0%}"), ("misses", "misses", "{:6.1f}"),
    ("MB/tok", "step_bytes", "{:6.0f}"), ("plain", "plain_gbps", "{:5.2f}"), ("peak MB", "rss_peak_bytes", "{:7.0f}"),
)  # fmt: skip


def _print(found: list[dict[str, Any]]) -> None:
    print(" ".join([f"{'row':16s}", *(f"{title:>{len(form.format(1))}s}" for title, _, form in COLUMNS)]))
    for r in found:
        shown = r | {"step_bytes": r["step_bytes"] / 1e6, "rss_peak_bytes": r["rss_peak_bytes"] / 1e6}
        cells = [form.format(shown[key]) if shown.get(key) is not None else "" for _, key, form in COLUMNS]
        widths = [max(len(title), len(form.format(1))) for title, _, form in COLUMNS]
        print(" ".join([f"{r['row']:16s}", *(f"{cell:>{width}s}" for cell, width in zip(cells, widths, strict=True))]))


if __name__ == "__main__":
    main()
