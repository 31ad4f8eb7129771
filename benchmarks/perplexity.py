"""Held-out perplexity of the demo in every format, beside the stock model's. Windows of 512 tokens.

python -m benchmarks.perplexity [--tokens 20000] [--text FILE]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import duoserve
from duoserve.engine import DEMO

TEXT = Path(__file__).parent.parent / "tests" / "data" / "heldout.txt"
WINDOW = 512


def windows(tokens: int, text: Path = TEXT) -> torch.Tensor:
    """The first `tokens` tokens of the text, as rows of WINDOW."""
    ids = AutoTokenizer.from_pretrained(DEMO)(text.read_text(), return_tensors="pt")["input_ids"][0]
    rows = min(tokens, len(ids)) // WINDOW
    return ids[: rows * WINDOW].view(rows, WINDOW)


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood per token."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, row[1:], reduction="sum").item()
    return math.exp(total / (rows.shape[0] * (WINDOW - 1)))


def measure(tokens: int, text: Path = TEXT) -> dict[str, float]:
    rows = windows(tokens, text)
    found = {"stock bf16": perplexity(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).eval(), rows)}
    for format, trunk in (("bf16", "bf16"), ("int4", "bf16"), ("int4", "int4"), ("nf4", "bf16"), ("nf4", "nf4")):
        with duoserve.load(format=format, trunk=trunk, budget="half") as engine:
            found[format if trunk == "bf16" else f"{format}, trunk {trunk}"] = perplexity(engine.model, rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--text", type=Path, default=TEXT)
    options = parser.parse_args()
    found = measure(options.tokens, options.text)
    for name, value in found.items():
        print(f"{name:18s} {value:8.4f}  {value / found['bf16'] - 1:+.2%}")
    print(json.dumps({"benchmark": "perplexity", "tokens": options.tokens, "perplexity": found}))


if __name__ == "__main__":
    main()
