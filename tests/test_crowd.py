"""Passes of many sequences: they move what they need and no more, and what fits stays."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from test_policies import Costs

from benchmarks.serving import Turn, least_misses
from duoserve.core import Phase, Policy
from duoserve.simulate import Link, Outcome, Pass, Shape, simulate

LAYERS, EXPERTS, SLOTS, ROWS = 4, 16, 32, 12


def run(passes: Sequence[Pass], policy: Policy = Policy.DUOSERVE) -> Outcome:
    shape = Shape((EXPERTS,) * LAYERS, (1 << 20,) * LAYERS, SLOTS)
    return simulate(shape, Costs(), Link(1e9), policy, passes, asynchronous=True)


def crowd(chosen: Sequence[dict[int, int]]) -> Pass:
    return Pass(Phase.DECODE, ROWS, chosen)


def test_a_crowd_moves_only_what_it_needs_while_prompts_guess() -> None:
    dice = random.Random(3)
    layers = [[dict.fromkeys(dice.sample(range(EXPERTS), 11), 1) for _ in range(LAYERS)] for _ in range(40)]
    crowds = run([crowd(chosen) for chosen in layers]).counts
    assert crowds.guesses == 0 and crowds.misses > 0
    prompts = run([Pass(Phase.PREFILL, ROWS, chosen) for chosen in layers]).counts
    assert prompts.guesses > 0 and crowds.misses < prompts.misses + prompts.guesses


def test_a_crowd_that_needs_everything_leaves_in_place_what_fits() -> None:
    """Least recently used would hit nothing, and who takes slots for a whole layer at once holds less for the others."""
    everything = [dict.fromkeys(range(EXPERTS), 1)] * LAYERS
    few, many = (run([crowd(everything)] * n) for n in (2, 12))
    hits = (many.counts.hits - few.counts.hits) / 10
    assert SLOTS - 8 < hits < SLOTS
    assert run([crowd(everything)] * 12, Policy.LRU).counts.hits == 0


def by_trying(turns: Sequence[Turn], slots: int) -> int:
    """Whatever may be kept after each turn, tried."""
    least = {frozenset[tuple[int, int]](): 0}
    for layer, experts in turns:
        needed = frozenset((layer, expert) for expert in experts)
        found: dict[frozenset[tuple[int, int]], int] = {}
        for held, missed in least.items():
            for kept in itertools.combinations(sorted(held | needed), min(slots, len(held | needed))):
                key = frozenset(kept)
                found[key] = min(found.get(key, 99), missed + len(needed - held))
        least = found
    return min(least.values())


def test_the_least_that_a_benchmark_names_is_the_least() -> None:
    dice = random.Random(11)
    for _ in range(40):
        layers = [at % 2 for at in range(8)]
        turns = [(layer, frozenset(dice.sample(range(3), dice.choice([1, 2])))) for layer in layers]
        for slots in (1, 2, 3):
            assert least_misses(turns, [True] * len(turns), slots) == by_trying(turns, slots), turns
