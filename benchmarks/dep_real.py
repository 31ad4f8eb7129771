"""Real compute, disaggregated or not, on the same machine: naive DEP, PPPipe and FinDEP over 2+2 processes of one thread
each, beside what the same prompts take colocated. Whoever wins. Prints one JSON line.

    python -m benchmarks.dep_real [--samples 16 --prompt-tokens 128 --new-tokens 1 --trials 3] [--machine FILE]

    exposed      seconds in which no rank attends or computes experts: rows travel, or a process waits for its core
    colocated    one process with all cores; and four of one thread, each with all experts and a quarter of the prompts

Plans come from the solver for the calibrated machine (--machine FILE, else it is measured first). The model is a random
qwen2_moe in float32, made in a temporary folder: routing of random weights, shapes of a small real one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine as machines
from dep_extension import planfile
from dep_extension.cost import Machine, Model, Split
from dep_extension.solver import Plan, Problem, findep, naive, pppipe

SPLIT = Split(2, 2)
SHAPE = {
    "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8,
    "intermediate_size": 512, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 4096, "max_position_embeddings": 4096, "decoder_sparse_step": 1,
}  # fmt: skip


def make(folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2_moe", **SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def model_costs() -> Model:
    s = SHAPE
    head = s["hidden_size"] // s["num_attention_heads"]
    return Model(
        "qwen2_moe", s["num_hidden_layers"], s["hidden_size"], s["moe_intermediate_size"], s["num_experts"],
        s["num_experts_per_tok"], 1, s["num_attention_heads"], head, head, weight_bytes=4.0, kv_bytes=4.0,
    )  # fmt: skip


def calibrated(path: Path | None) -> Machine:
    from dep_extension import calibrate

    if path is not None:
        return calibrate.load(path)
    shapes = {"hidden": SHAPE["hidden_size"], "expert_hidden": SHAPE["moe_intermediate_size"]}
    shapes |= {"experts": SHAPE["num_experts"] // SPLIT.eg, "heads": SHAPE["num_attention_heads"]}
    return calibrate.measure([SPLIT], "cpu", lambda line: print(line, file=sys.stderr), **shapes).machine


def disaggregated(folder: Path, plan: Plan, load: Sequence[str], cache: Path) -> dict[str, Any]:
    """What `python -m dep_extension bench` reports of a plan."""
    path = folder / "plan.json"
    planfile.save(plan, path, "qwen2_moe", "this machine")
    ranks = str(sum(SPLIT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command += [
        "-m",
        "dep_extension",
        "bench",
        str(folder),
        "--plan",
        str(path),
        "--dtype",
        "float32",
        "--threads",
        "1",
    ]
    command += ["--cache-dir", str(cache), "--json", *load]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    kept = ("tokens_per_s", "seconds", "exposed_s", "busy_s", "runs_s")
    cut = {"r1": plan.r1, "r2": plan.r2, "order": "".join(what for what, _ in plan.order)}
    predicted = {"predicted_s": plan.makespan_s, "predicted_exposed_s": plan.exposed_s}
    return {"name": plan.name, **cut, **predicted} | {name: found[name] for name in kept}


def colocated(folder: Path, processes: int, threads: int, options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """The same prompts over processes that each hold everything; seconds from the common start to the last one's end."""
    context = multiprocessing.get_context("spawn")
    barrier, out = context.Barrier(processes), context.Queue()
    each = options.samples // processes
    args = (
        str(folder),
        str(cache),
        each,
        options.prompt_tokens,
        options.new_tokens,
        options.trials,
        threads,
        barrier,
        out,
    )
    workers = [context.Process(target=_alone, args=(n, *args)) for n in range(processes)]
    for worker in workers:
        worker.start()
    said = [out.get(timeout=600) for _ in range(processes * (options.trials + 1))]
    for worker in workers:
        worker.join()
    runs = []
    for trial in range(1, options.trials + 1):
        spans = [(began, ended) for at, began, ended in said if at == trial]
        runs.append(max(e for _, e in spans) - min(b for b, _ in spans))
    seconds = statistics.median(runs)
    tokens = each * processes * (options.prompt_tokens + options.new_tokens - 1)
    name = f"colocated, {processes} x {threads} threads"
    return {"name": name, "tokens_per_s": tokens / seconds, "seconds": seconds, "exposed_s": 0.0, "runs_s": runs}


def _alone(
    number: int, folder: str, cache: str, samples: int, length: int, new: int, trials: int, threads: int, barrier: Any,
    out: Any,
) -> None:  # fmt: skip
    import duoserve

    with duoserve.load(folder, dtype="float32", cache_dir=cache, threads=threads, predictor="none") as engine:
        ids_BS = torch.randint(SHAPE["vocab_size"], (samples, length), generator=torch.Generator().manual_seed(number))
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        for trial in range(trials + 1):
            barrier.wait()
            began = time.perf_counter()
            with torch.inference_mode():
                engine.model.generate(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), **options)
            out.put((trial, began, time.perf_counter()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Disaggregated and colocated, real compute.")
    for name, default in (("samples", 16), ("prompt-tokens", 128), ("new-tokens", 1), ("trials", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--machine", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="duoserve-") as temporary:
        folder, cache = make(Path(temporary) / "model"), Path(temporary) / "cache"
        problem = Problem(model_costs(), calibrated(options.machine), options.prompt_tokens, options.samples, 4, 4)
        load = ["--samples", str(options.samples), "--prompt-tokens", str(options.prompt_tokens)]
        load += ["--new-tokens", str(options.new_tokens), "--trials", str(options.trials)]
        rows = [colocated(folder, 1, os.cpu_count() or 1, options, cache), colocated(folder, 4, 1, options, cache)]
        for solver in (naive, pppipe, findep):
            plan = solver(problem, SPLIT)
            if plan is not None:
                rows.append(disaggregated(folder, plan, load, cache))
        for row in rows:
            cut = f"r1={row['r1']} r2={row['r2']}" if "r1" in row else ""
            figures = f"{row['seconds']:7.3f} s  {row['tokens_per_s']:8.0f} tokens/s  exposed {row['exposed_s']:.3f} s"
            print(f"{row['name']:26} {cut:10} {figures}", file=sys.stderr)
        about = {"benchmark": "dep_real", "split": list(SPLIT), "shape": SHAPE, **machines.describe()}
        print(json.dumps(about | {"options": vars(options) | {"machine": str(options.machine)}, "rows": rows}))


if __name__ == "__main__":
    main()
