"""What concurrent requests gain: decode throughput and expert bytes a token at 1, 2, 4, 8, 16 at a time, through the service
that `duoserve serve` puts behind HTTP.

    python -m benchmarks.serving [MODEL] [--at-once 1,2,4,8,16] [--new-tokens 48] [--rounds 3] [--budget half]

Real prompts of the shipped set, greedy, all rows in one process and taking turns within a round. Each answer must equal the
one that was served alone, token for token. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import time
from collections.abc import Sequence
from typing import Any

import duoserve
from benchmarks.machine import describe
from duoserve.prompts import prompt_set
from duoserve.sampling import Sampling
from duoserve.service import End, Limits, Piece, Request, Service


class Bench:
    """One engine and its service, and every prompt's answer when it was served alone."""

    def __init__(self, args: argparse.Namespace, most: int):
        self.args = args
        options = {"budget": args.budget, "threads": 1, "sequences": most, "ctx": 1024}
        self.engine = duoserve.load(args.model, predictor="none", **options)
        self.service = Service(self.engine, Limits(active=most, queue=4 * most, per_client=4 * most))
        self.prompts = [self.engine.encode(text)[0].tolist()[:256] for text in texts(most)]
        self.alone: dict[int, list[int]] = {}

    def serve(self, numbers: Sequence[int]) -> dict[str, float]:
        """Serve these prompts at once, all begun together."""
        before, began = self.engine.stats(), time.perf_counter()
        told: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in numbers]
        sampling = Sampling(temperature=0)
        for number, inbox in zip(numbers, told, strict=True):
            request = Request(self.prompts[number], self.args.new_tokens, sampling, ignore_eos=True)
            self.service.submit(request, inbox.put)
        answers = [answer(inbox) for inbox in told]
        seconds, after = time.perf_counter() - began, self.engine.stats()
        for number, (tokens, _) in zip(numbers, answers, strict=True):
            assert self.alone.setdefault(number, tokens) == tokens, f"answer {number} differs from the one served alone"
        made = sum(len(tokens) for tokens, _ in answers)
        first = max(end.first_s or 0.0 for _, end in answers)  # all prompts are read
        return {
            "tok_s": made / seconds,
            "decode_tok_s": (made - len(numbers)) / (seconds - first),
            "bytes_per_token": (after["bytes_moved"] - before["bytes_moved"]) / made,
            "first_s": first,
        }

    def close(self) -> None:
        self.service.close()
        self.engine.close()


def texts(n: int) -> list[str]:
    return [prompt.content for prompt in prompt_set("prose").prompts if isinstance(prompt.content, str)][:n]


def answer(inbox: queue.SimpleQueue[Any]) -> tuple[list[int], End]:
    tokens: list[int] = []
    while not isinstance(event := inbox.get(timeout=600), End):
        if isinstance(event, Piece):
            tokens += event.tokens
    if event.error is not None:
        raise event.error
    return tokens, event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--at-once", default="1,2,4,8,16")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", default="half")
    args = parser.parse_args()
    rows = [int(n) for n in args.at_once.split(",")]
    bench = Bench(args, max(rows))
    for number in range(max(rows)):
        bench.serve([number])  # alone, once: what it must answer whoever is beside it
    samples: dict[int, list[dict[str, float]]] = {n: [] for n in rows}
    for _ in range(args.rounds):
        for n in rows:
            samples[n].append(bench.serve(range(n)))
    bench.close()
    found = {n: {name: statistics.median(s[name] for s in samples[n]) for name in samples[n][0]} for n in rows}
    print(f"{'at once':>8s}{'tok/s':>9s}{'decode':>9s}{'kB/token':>10s}{'first s':>9s}")
    for n, row in found.items():
        kb = row["bytes_per_token"] / 1e3
        print(f"{n:8d}{row['tok_s']:9.1f}{row['decode_tok_s']:9.1f}{kb:10.1f}{row['first_s']:9.2f}")
    about = {"model": args.model or "demo", "new_tokens": args.new_tokens, "rounds": args.rounds, "budget": args.budget}
    print(json.dumps({"benchmark": "serving", **about, "machine": describe(), "rows": found, "samples": samples}))


if __name__ == "__main__":
    main()
