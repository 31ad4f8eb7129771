"""What concurrent requests gain: decode throughput and expert bytes a token at 1, 2, 4, 8, 16 at a time, through the service
that `duoserve serve` puts behind HTTP.

    python -m benchmarks.serving [MODEL] [--at-once 1,2,4,8,16] [--residency 50%] [--temperature 0] [--new-tokens 48]
                                 [--prompt-tokens 256] [--rounds 3] [--routes real|uniform] [--format F] [--cache-dir DIR]
                                 [--output FILE.json]

Real prompts of the shipped set (random ids where the model has no tokenizer), as many as the most at once. Every row
answers all of them, in groups, so that all rows make the same tokens; rows take turns within a round. Each answer must equal
the one that was served alone, token for token, also where it is drawn (each request has a seed).

Bytes are counted once per row, apart from the timed rounds, by pass: those of decode passes stand by themselves. Beside them
the least that could be moved: whoever knew all routes beforehand and kept what is needed soonest (Belady) in as many slots.
Different texts at once want different experts, so that this least itself may rise; an answer alone repeats itself, a greedy
one most, and one of random weights wholly: for those, `--routes uniform` draws each row's experts, by what the row holds, so
that it draws the same alone and among others. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import bisect
import json
import queue
import random
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import duoserve
from benchmarks.machine import describe
from duoserve.config import parse_share
from duoserve.core import Phase, Step
from duoserve.moe import OffloadedExperts
from duoserve.prompts import prompt_set
from duoserve.sampling import Sampling
from duoserve.service import End, Limits, Piece, Request, Service

Turn = tuple[int, frozenset[int]]  # a layer of a pass, and the experts that it needs


class Counting:
    """Watches decode passes: the bytes that were moved in them, and what they needed."""

    def __init__(self, engine: duoserve.Engine):
        self._engine, self._moved = engine, engine.stats()["bytes_moved"]
        self._experts = [layer.n_experts for layer in engine.store.layers]
        self.bytes = self.rows = self.passes = 0
        self.turns: list[Turn] = []
        self.decode: list[bool] = []  # of each turn

    def __call__(self, step: Step) -> None:
        moved = self._engine.stats()["bytes_moved"]
        decode = step.phase is Phase.DECODE
        if decode:
            self.bytes, self.rows, self.passes = (
                self.bytes + moved - self._moved,
                self.rows + step.rows,
                self.passes + 1,
            )
        self._moved = moved
        for route in step.routes:
            experts = set(route.ids_TK.unique().tolist()) - {self._experts[route.layer]}
            self.turns.append((route.layer, frozenset(experts)))
            self.decode.append(decode)

    def row(self, slots: int, slab_bytes: int) -> dict[str, float]:
        layers = len(self._experts)
        needed = sum(len(experts) for (_, experts), decode in zip(self.turns, self.decode, strict=True) if decode)
        return {
            "decode_bytes_per_token": self.bytes / self.rows,
            "least_bytes_per_token": least_misses(self.turns, self.decode, slots) * slab_bytes / self.rows,
            "rows_per_pass": self.rows / self.passes,
            "experts_per_layer": needed / (self.passes * layers),
        }


def least_misses(turns: Sequence[Turn], counted: Sequence[bool], slots: int) -> int:
    """Experts that must be moved in the counted turns by whoever knows all: after each turn it keeps those of what it had
    and what passed by that are needed again soonest (Belady's MIN, where what passes by need not stay)."""
    uses: dict[tuple[int, int], list[int]] = defaultdict(list)
    for at, (layer, experts) in enumerate(turns):
        for expert in experts:
            uses[layer, expert].append(at)

    def again(key: tuple[int, int], at: int) -> int:
        known = uses[key]
        following = bisect.bisect_right(known, at)
        return known[following] if following < len(known) else len(turns)

    held: set[tuple[int, int]] = set()
    missed = 0
    for at, (layer, experts) in enumerate(turns):
        needed = {(layer, expert) for expert in experts}
        missed += len(needed - held) if counted[at] else 0
        held = set(sorted(held | needed, key=lambda key: (again(key, at), key))[:slots])
    return missed


class Bench:
    """One engine and its service, and every prompt's answer when it was served alone."""

    def __init__(self, args: argparse.Namespace, most: int):
        self.args, self.most = args, most
        self.engine = open_engine(args, most)
        if args.routes == "uniform":
            uniform_routes(self.engine.model)
        self.service = Service(self.engine, Limits(active=most, queue=4 * most, per_client=4 * most))
        self.prompts = prompts(self.engine, most, args.prompt_tokens)
        self.alone: dict[int, list[int]] = {}

    def count(self, at_once: int) -> dict[str, float]:
        """All prompts in groups, watched and not timed."""
        counting = Counting(self.engine)
        self.engine.runtime.observers.append(counting)
        self.serve(at_once)
        self.engine.runtime.observers.remove(counting)
        return counting.row(self.engine.plan.slots, self.engine.store.slab_bytes)

    def serve(self, at_once: int) -> dict[str, float]:
        """All prompts in groups; each group's are begun together."""
        groups = [range(first, first + at_once) for first in range(0, self.most, at_once)]
        before = self.engine.stats()["bytes_moved"]
        sums = [sum(column) for column in zip(*(self._group(group) for group in groups), strict=True)]
        made, seconds, decoded, decode_s, first_s = sums
        return {
            "tok_s": made / seconds,
            "decode_tok_s": decoded / decode_s,
            "bytes_per_token": (self.engine.stats()["bytes_moved"] - before) / made,
            "first_s": first_s / len(groups),
        }

    def _group(self, numbers: Sequence[int]) -> tuple[float, ...]:
        began = time.perf_counter()
        told: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in numbers]
        for number, inbox in zip(numbers, told, strict=True):
            sampling = Sampling(temperature=self.args.temperature, seed=number)
            request = Request(self.prompts[number], self.args.new_tokens, sampling, ignore_eos=True)
            self.service.submit(request, inbox.put)
        answers = [answer(inbox) for inbox in told]
        seconds = time.perf_counter() - began
        for number, (tokens, _) in zip(numbers, answers, strict=True):
            assert self.alone.setdefault(number, tokens) == tokens, f"answer {number} differs from the one served alone"
        made = sum(len(tokens) for tokens, _ in answers)
        first = max(end.first_s or 0.0 for _, end in answers)  # all prompts are read
        return made, seconds, made - len(numbers), seconds - first, first

    def close(self) -> None:
        self.service.close()
        self.engine.close()


def open_engine(args: argparse.Namespace, most: int) -> duoserve.Engine:
    """With so many of the experts in slots."""
    options: dict[str, Any] = {"threads": 1, "sequences": most, "ctx": 1024, "format": args.format}
    options |= {"cache_dir": args.cache_dir, "predictor": "none"}
    with duoserve.load(args.model, budget="min", **options) as engine:
        experts, smallest, slab = engine.plan.experts, engine.plan.budget_bytes, engine.store.slab_bytes
    slots = max(2, round(parse_share(args.residency, "residency") * experts))
    return duoserve.load(args.model, budget=smallest + slots * slab, slots=slots, **options)


def uniform_routes(model: Any) -> None:
    """Replace every route by distinct experts that follow from the row alone, and otherwise from nothing."""

    def redraw(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD, ids_TK, weights_TK = args
        rows = x_TD.float().numpy()
        dice = (np.random.default_rng(zlib.crc32(row.tobytes())) for row in rows)
        drawn = np.stack([one.permutation(module.num_experts)[: ids_TK.shape[1]] for one in dice])
        return x_TD, torch.from_numpy(drawn).to(ids_TK), weights_TK

    for module in model.modules():
        if isinstance(module, OffloadedExperts):
            module.register_forward_pre_hook(redraw)


def prompts(engine: duoserve.Engine, n: int, tokens: int) -> list[list[int]]:
    if engine.tokenizer is None:
        dice, vocabulary = random.Random(0), engine.model.config.get_text_config().vocab_size
        return [[dice.randrange(vocabulary) for _ in range(tokens)] for _ in range(n)]
    texts = [prompt.content for prompt in prompt_set("prose").prompts if isinstance(prompt.content, str)][:n]
    return [engine.encode(text)[0].tolist()[:tokens] for text in texts]


def answer(inbox: queue.SimpleQueue[Any]) -> tuple[list[int], End]:
    tokens: list[int] = []
    while not isinstance(event := inbox.get(timeout=600), End):
        if isinstance(event, Piece):
            tokens += event.tokens
    if event.error is not None:
        raise event.error
    return tokens, event


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--at-once", default="1,2,4,8,16")
    parser.add_argument("--residency", default="50%")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--routes", choices=["real", "uniform"], default="real")
    parser.add_argument("--format")
    parser.add_argument("--cache-dir")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rows = [int(n) for n in args.at_once.split(",")]
    most = max(rows)
    if any(most % n for n in rows):
        raise SystemExit(
            f"--at-once {args.at_once}: {most} prompts cannot be served in equal groups; use divisors of it"
        )
    bench = Bench(args, most)
    bench.serve(1)  # alone, once: what each must answer whoever is beside it; also warms up
    counted = {n: bench.count(n) for n in rows}
    samples: dict[int, list[dict[str, float]]] = {n: [] for n in rows}
    for _ in range(args.rounds):
        for n in rows:
            samples[n].append(bench.serve(n))
    plan = bench.engine.plan
    about = {"model": args.model or "demo", "slots": plan.slots, "experts": plan.experts}
    about |= {
        name: getattr(args, name)
        for name in ("routes", "format", "residency", "temperature", "new_tokens", "prompt_tokens", "rounds")
    }
    bench.close()
    found = {n: counted[n] | _medians(samples[n]) for n in rows}
    for line in table(found):
        print(line)
    record = json.dumps({"benchmark": "serving", **about, "machine": describe(), "rows": found, "samples": samples})
    print(record)
    if args.output is not None:
        args.output.write_text(record + "\n")


def _medians(samples: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(s[name] for s in samples) for name in samples[0]} if samples else {}


def table(found: dict[int, dict[str, float]]) -> list[str]:
    """Bytes in kB a token: those of decode passes, the least possible, and all with the prompts'."""
    columns = ["decode_tok_s", "tok_s", "decode_bytes_per_token", "least_bytes_per_token", "bytes_per_token", "first_s"]
    names = ["decode tok/s", "tok/s", "kB/token", "least", "with prompts", "first s"]
    lines = ["at once" + "".join(f"{name:>14s}" for name in names) + f"{'experts/layer':>15s}"]
    for n, row in found.items():
        values = [row.get(c, float("nan")) / (1e3 if "bytes" in c else 1) for c in columns]
        lines.append(f"{n:7d}" + "".join(f"{v:14.2f}" for v in values) + f"{row['experts_per_layer']:15.1f}")
    return lines


if __name__ == "__main__":
    main()
