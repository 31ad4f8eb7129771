"""Whether guessing pays is measured; here the clock is ours."""

from __future__ import annotations

import random

from duoserve.benefit import BLOCK, BLOCKS, HOLD, LONGEST_HOLD, WINDOW, Benefit


def run(benefit: Benefit, tokens: int, with_s: float, without_s: float, noise: float = 0.0, seed: int = 0) -> float:
    """Seconds for so many tokens."""
    rng, total = random.Random(seed), 0.0
    for _ in range(tokens):
        seconds = (with_s if benefit.on else without_s) * (1 + noise * rng.random())
        seconds *= 5 if rng.random() < noise / 10 else 1
        benefit.note(seconds)
        total += seconds
    return total


def test_what_pays_stays_on() -> None:
    benefit = Benefit()
    run(benefit, 4000, 0.8, 1.0, noise=0.3)
    assert benefit.pays and benefit.flips == 0 and benefit.tokens[True] > 3500


def test_what_does_not_pay_is_switched_off_and_costs_little() -> None:
    benefit = Benefit()
    total = run(benefit, 4000, 1.5, 1.0)
    assert not benefit.pays and total < 1.03 * 4000


def test_what_changes_nothing_is_off() -> None:
    benefit = Benefit()
    run(benefit, 1000, 1.0, 1.0)
    assert benefit.to_json()["decision"] == "off"


def test_it_comes_back_on_when_it_pays_again_and_goes_off_again() -> None:
    benefit = Benefit()
    run(benefit, 2000, 1.2, 1.0, noise=0.1)
    assert not benefit.pays
    run(benefit, 2 * LONGEST_HOLD, 0.7, 1.0, noise=0.1)
    assert benefit.pays and benefit.flips == 1
    run(benefit, 2 * LONGEST_HOLD, 1.2, 1.0, noise=0.1)
    assert not benefit.pays and benefit.flips == 2


def test_a_machine_that_slows_down_steadily_favours_neither() -> None:
    benefit, speed = Benefit(), 1.0
    for _ in range(BLOCKS * len(BLOCK) * WINDOW):
        speed *= 1.002
        benefit.note(speed * (0.9 if benefit.on else 1.0))
    assert benefit.trials == 1 and benefit.pays


def test_small_gains_and_losses_are_told_apart_on_a_noisy_machine() -> None:
    """5 % either way under noise of 30 %, with one token in thirty taking five times as long."""
    right = 0
    for seed in range(40):
        for with_s in (0.95, 1.05):
            benefit = Benefit()
            while not benefit.trials:
                run(benefit, 1, with_s, 1.0, noise=0.3, seed=seed * 1000 + benefit.tokens[True] + benefit.tokens[False])
            right += benefit.pays == (with_s < 1)
    assert right >= 72


def test_a_clear_loss_is_seen_in_one_block() -> None:
    benefit = Benefit()
    run(benefit, len(BLOCK) * WINDOW, 1.5, 1.0, noise=0.2)
    assert benefit.trials == 1 and not benefit.pays


def test_trials_become_rarer_while_they_agree() -> None:
    benefit = Benefit()
    run(benefit, 3 * (HOLD + len(BLOCK) * WINDOW), 0.5, 1.0)
    early = benefit.trials
    run(benefit, 3 * (HOLD + len(BLOCK) * WINDOW), 0.5, 1.0)
    assert early == 3 and benefit.trials == early


def test_always_asks_nothing() -> None:
    benefit = Benefit(always=True)
    run(benefit, 500, 9.0, 1.0)
    assert benefit.on and benefit.trials == 0 and benefit.to_json()["decision"] == "always"
