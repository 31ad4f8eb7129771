"""lm-eval's `local-completions`, unmodified, on an offline task against a running `duoserve serve`: each item's logprobs
beside those that the same store gives in this process.

    python -m benchmarks.lm_eval_items [--python PYTHON] [--items 200] [--at-once 4]

`--python` is of an environment with `lm-eval[api]` and transformers (the extra `clients`); no torch is needed there. The
task is made here of the shipped prose: go on with the right one of four endings. A line, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import duoserve
from benchmarks.machine import describe
from benchmarks.served import serving
from duoserve.engine import DEMO
from duoserve.prompts import prompt_set

TASK = "duoserve_endings"
BEFORE, ENDING, STRIDE = 24, 5, 12  # words
YAML = f"""\
task: {TASK}
dataset_path: json
dataset_kwargs:
  data_files:
    test: FILE
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{before}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1
"""


def items(count: int) -> list[dict[str, Any]]:
    """Of the shipped prose: some words, and four endings, of which one is the text's."""
    words = [
        w
        for p in prompt_set("all").prompts
        if p.domain == "prose" and isinstance(p.content, str)
        for w in p.content.split()
    ]
    starts = range(BEFORE, len(words) - ENDING, STRIDE)[:count]
    if len(starts) < count:
        raise ValueError(f"the prose makes {len(starts)} items, not {count}")
    endings = [" ".join(words[at : at + ENDING]) for at in starts]
    found = []
    for n, at in enumerate(starts):
        others = [endings[(n + step) % count] for step in (count // 7 or 1, count // 3 or 1, count // 2 or 1)]
        right = n % 4
        shown = [*others[:right], endings[n], *others[right:]]
        found.append({"before": " ".join(words[at - BEFORE : at]), "endings": shown, "right": right})
    return found


def evaluated(python: str, port: int, made: list[dict[str, Any]], folder: Path, at_once: int) -> list[dict[str, Any]]:
    """What lm-eval noted of each item, in order. RuntimeError with its last words where it fails."""
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in made))
    (folder / f"{TASK}.yaml").write_text(YAML.replace("FILE", str(data)))
    about = f"base_url=http://127.0.0.1:{port}/v1/completions,model=demo,tokenizer={DEMO},tokenizer_backend=huggingface"
    command = [python, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", TASK]
    command += ["--model_args", f"{about},num_concurrent={at_once},max_retries=1", "--include_path", str(folder)]
    command += ["--log_samples", "--output_path", str(folder / "out")]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OPENAI_API_KEY": "none",
    }
    done = subprocess.run(command, env=os.environ | offline, cwd=folder, capture_output=True, text=True)
    logs = list((folder / "out").rglob("samples_*.jsonl"))
    if done.returncode or not logs:
        raise RuntimeError(done.stderr[-2000:])
    found = [json.loads(line) for line in logs[0].read_text().splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


def compare(engine: Any, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each ending's logprob and whether it is greedy, by lm-eval and by the engine itself on the same tokens."""
    worst, differ, right = 0.0, 0, 0
    for sample in samples:
        own = [scored(engine, *arguments) for arguments in pairs(sample)]
        theirs = [(float(value), str(greedy) == "True") for ((value, greedy),) in sample["resps"]]
        worst = max(worst, *(abs(a[0] - b[0]) for a, b in zip(own, theirs, strict=True)))
        differ += own != theirs
        best = max(range(len(own)), key=lambda n: own[n][0])
        right += best == sample["doc"]["right"]
        if (best == sample["doc"]["right"]) != bool(sample["acc"]):
            raise RuntimeError(f"item {sample['doc_id']}: lm-eval counts it otherwise")
    return {"items": len(samples), "differ": differ, "worst": worst, "acc": right / len(samples)}


def pairs(sample: dict[str, Any]) -> list[tuple[str, str]]:
    given = sample["arguments"]
    rows = given.values() if isinstance(given, dict) else given
    return [tuple(row.values() if isinstance(row, dict) else row)[:2] for row in rows]


def scored(engine: Any, before: str, ending: str) -> tuple[float, bool]:
    """The ending's tokens by one pass of the engine's model, summed one after the other as lm-eval sums them."""
    tokenizer = engine.tokenizer
    whole = tokenizer(before + ending, add_special_tokens=False)["input_ids"]
    skip = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        logits = engine.model(input_ids=torch.tensor([whole])).logits[0]
    rows = [logits[at - 1].float().log_softmax(-1) for at in range(skip, len(whole))]
    tokens = whole[skip:]
    values = [float(row[token]) for row, token in zip(rows, tokens, strict=True)]
    return sum(values), all(value == float(row.max()) for value, row in zip(values, rows, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving("--predictor", "none", "--per-client", "64") as served:
        samples = evaluated(args.python, served.port, items(args.items), Path(folder), args.at_once)
    with duoserve.load(None, predictor="none") as engine:
        found = compare(engine, samples)
    print(
        f"{found['items']} items: {found['differ']} differ, by at most {found['worst']:.2e}; accuracy {found['acc']:.3f}"
    )
    print(json.dumps({"benchmark": "lm_eval_items", **vars(args), "machine": describe(), **found}))


if __name__ == "__main__":
    main()
