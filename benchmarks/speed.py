"""Decode and prefill on a random-weight Mixtral of 1.5 B parameters: ours, stock transformers, Accelerate disk offload.

    python -m benchmarks.speed FOLDER [--rows stock,bf16:all,int4:all,int4:half,int4:0.2,accelerate] [--rounds 3]

FOLDER takes the model (3 GB, made at first use) and its stores. Each row is a process of its own. A random router repeats
itself and fakes hits, so ours gets uniform random routes (hits then equal residency); the peers keep the routes they
have, and the page cache, which ours does not use. Every round runs every row, so that a slow minute slows all of them;
printed are medians over rounds, and of each round's ratio to its own stock row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    "max_position_embeddings": 4096, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
NEW_TOKENS = 32
ROWS = "stock,bf16:all,int4:all,int4:half,int4:0.2,accelerate"


def make_model(folder: Path) -> Path:
    """A random-weight Mixtral of 1.5 B parameters in the hub's layout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model("mixtral", **SHAPE)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def uniform_routes(engine: Any) -> None:
    """Replace every route by distinct experts drawn uniformly."""
    import torch

    def redraw(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, ids, weights = args
        drawn = torch.rand(ids.shape[0], module.num_experts).topk(ids.shape[1], dim=1).indices
        return x, drawn.to(ids), weights

    from duoserve.moe import OffloadedExperts

    for module in engine.model.modules():
        if isinstance(module, OffloadedExperts):
            module.register_forward_pre_hook(redraw)


def clock(model: Any, prompt: int) -> tuple[float, float]:
    """Seconds of prefill, and decode tokens per second."""
    import torch

    ids = torch.randint(0, SHAPE["vocab_size"], (1, prompt))
    with torch.inference_mode():
        began = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(NEW_TOKENS):
            ids = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
        return prefill, NEW_TOKENS / (time.perf_counter() - began)


def run_row(row: str, folder: Path, prompt: int) -> dict[str, Any]:
    """Measure one row in this process."""
    model, engine = _open(row, folder)
    clock(model, prompt)
    before = engine.stats() if engine else {}
    ttft_s, rate = clock(model, prompt)
    found = {"row": row, "n_prompt": prompt, "n_gen": NEW_TOKENS, "ttft_s": ttft_s, "avg_ts": rate}
    return found | (_traffic(before, engine.stats()) if engine else {})


def _open(row: str, folder: Path) -> tuple[Any, Any]:
    import torch

    torch.set_num_threads(2)
    if row in ("stock", "accelerate"):
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {}
        if row == "accelerate":
            # everything but the embeddings may go to disk; "half" of the 3 GB stays in memory
            options = {"device_map": "auto", "max_memory": {"cpu": "1500MB"}, "offload_folder": str(folder / "offload")}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval(), None
    import duoserve
    from duoserve.convert import Conversion
    from duoserve.plan import Sizes

    format, _, residency = row.partition(":")
    size = Conversion.of(folder, format).size
    sizes = Sizes(Conversion.of(folder, format).checkpoint.config, torch.bfloat16)
    share = {"all": 1.0, "half": 0.5}.get(residency) or float(residency)
    budget = sizes.trunk_bytes + sizes.kv_bytes(1024) + round(share * size.n_experts) * size.slab_bytes
    engine = duoserve.load(folder, format=format, budget=budget, ctx=1024, cache_dir=str(folder / "cache"))
    uniform_routes(engine)
    return engine.model, engine


def _traffic(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    asked = sum(after[k] - before[k] for k in ("hits", "in_flight", "misses"))
    moved, busy = after["bytes_moved"] - before["bytes_moved"], after["link_busy_s"] - before["link_busy_s"]
    return {
        "residency": after["residency"],
        "hit_rate": (after["hits"] - before["hits"]) / asked,
        "bytes_disk": moved,
        "link_gbps": moved / busy / 1e9 if busy else None,
        "budget_bytes": after["budget_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = make_model(options.folder)
    if options.row:
        print(json.dumps(run_row(options.row, folder, options.prompt)))
        return
    names = options.rows.split(",")
    rounds = [{row: _row_process(row, options) for row in names} for _ in range(options.rounds)]
    found = [_over_rounds(row, rounds) for row in names]
    print(f"{'row':12s} {'TTFT s':>8s} {'tok/s':>8s} {'x stock':>8s} {'hit':>6s} {'GB/s':>6s}")
    for r in found:
        ratio = f"{r['x_stock']:8.2f}" if r["x_stock"] else " " * 8
        hit = f"{r['hit_rate']:6.0%}" if r.get("hit_rate") is not None else " " * 6
        link = f"{r['link_gbps']:6.2f}" if r.get("link_gbps") else " " * 6
        print(f"{r['row']:12s} {r['ttft_s']:8.2f} {r['avg_ts']:8.2f} {ratio} {hit} {link}")
    print(json.dumps({"benchmark": "speed", "rounds": options.rounds, "machine": describe(), "rows": found}))


def _over_rounds(row: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one row's figures, with the samples they come from."""
    samples = [r[row] for r in rounds]
    found = {name: _median([s[name] for s in samples]) for name in samples[0]}
    ratios = [r[row]["avg_ts"] / r["stock"]["avg_ts"] for r in rounds if "stock" in r]
    return found | {
        "x_stock": statistics.median(ratios) if ratios else None,
        "samples_ts": [s["avg_ts"] for s in samples],
    }


def _median(values: list[Any]) -> Any:
    return statistics.median(values) if all(isinstance(v, int | float) for v in values) else values[0]


def _row_process(row: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed", str(options.folder), "--prompt", str(options.prompt)]
    done = subprocess.run([*command, "--row", row], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"row {row} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
