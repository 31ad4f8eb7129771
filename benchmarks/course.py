"""Passes with known routes through a model whose routers are forced to make them. Knows the benchmark's model and its
courses; measures nothing but the seconds of a pass.

The model is a random-weight Mixtral (0.9 GB, made at first use) and its store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import duoserve
from benchmarks import speed
from duoserve.core import Key, Phase, Route, Step
from duoserve.device import host_arena
from duoserve.moe import OffloadedExperts
from duoserve.simulate import Pass, counted
from duoserve.sizing import CACHE
from predictor.stated import StatedPredictor

MODEL = {
    "hidden_size": 1024, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "num_local_experts": 24, "num_experts_per_tok": 4, "vocab_size": 8192,
    "max_position_embeddings": 2048, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LAYERS, EXPERTS, CHOICES = MODEL["num_hidden_layers"], MODEL["num_local_experts"], MODEL["num_experts_per_tok"]
ROOM = 1024  # tokens of keys and values
PROMPT = 48


def make_model(folder: Path) -> Path:
    return speed.make_model(folder, MODEL)


def open_engine(folder: Path, slots: int, policy: str, rate: int | None, **more: Any) -> Any:
    engine = duoserve.load(folder, cache_dir=str(folder / "cache"), slots=slots, budget="4GiB", ctx=ROOM, threads=1,
                           policy=policy, link=rate, **more)  # fmt: skip
    buffer = host_arena(engine.store.slab_bytes)
    for layer, expert in np.ndindex(LAYERS, EXPERTS):  # first reads also compute a checksum
        engine.store.read_into(Key(layer, expert), buffer)
    return engine


def course(rounds: int, tokens: int, seed: int) -> list[Pass]:
    """Prompts and their answers, by routers that have favourites."""
    rng = np.random.default_rng(seed)
    weight = 1 / (np.arange(EXPERTS) + 4.0)
    favourites = np.random.default_rng(1)  # of all courses the same: what is measured on one holds for another
    weights = [favourites.permutation(weight) for _ in range(LAYERS)]
    passes: list[Pass] = []
    for _ in range(rounds):
        for number in range(tokens + 1):
            rows = PROMPT if number == 0 else 1
            step = Step(0, Phase.PREFILL if number == 0 else Phase.DECODE, rows)
            chosen = []
            for layer in range(LAYERS):
                noise = rng.gumbel(size=(rows, EXPERTS)) + np.log(weights[layer])
                ids_TK = np.argsort(-noise, axis=1)[:, :CHOICES]
                chosen.append(counted(ids_TK.ravel().tolist(), EXPERTS))
                step.routes.append(Route(layer, torch.from_numpy(ids_TK.copy()), torch.empty(0)))
            passes.append(Pass(step.phase, rows, chosen, step))
    return passes


class Forced:
    """A model whose routers choose what a course says."""

    def __init__(self, engine: Any):
        self.engine, self.passes = engine, list[Pass]()
        self.number = -1
        for module in engine.model.modules():
            if isinstance(module, OffloadedExperts):
                module.register_forward_pre_hook(self._redraw)

    def run(self, passes: Sequence[Pass]) -> list[float]:
        """Seconds of each pass."""
        first, seconds = len(self.passes), []
        self.passes.extend(passes)
        out: Any = None
        for number in range(first, len(self.passes)):
            self.number, one = number, self.passes[number]
            began = time.perf_counter()
            with torch.inference_mode():
                past = {} if one.phase is Phase.PREFILL else {CACHE: out[CACHE]}
                ids = torch.zeros((1, one.rows), dtype=torch.long)
                out = self.engine.model(input_ids=ids, use_cache=True, logits_to_keep=1, **past)
            seconds.append(time.perf_counter() - began)
        return seconds

    def _redraw(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, ids, weights = args
        step = self.passes[self.number].step
        assert step is not None, self.number
        return x, step.routes[module._layer].ids_TK.to(ids), weights


def foreseen(passes: Sequence[Pass], first: int = 0) -> StatedPredictor:
    """An oracle of these passes, the first of which is a runtime's number `first`."""
    steps = []
    for number, one in enumerate(passes, first):
        assert one.step is not None, number
        steps.append(Step(number, one.phase, one.rows))
        steps[-1].routes = one.step.routes
    return StatedPredictor(steps, [EXPERTS] * LAYERS, first=True)
