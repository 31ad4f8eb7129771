"""Whether guessing pays, measured while it runs: windows of tokens with and without it, compared. Knows seconds; knows
nothing of experts, predictors or devices, and imports no torch.

A block is four windows, with, without, without, with, so that a machine that drifts favours neither; the first tokens of a
window still live from the other one's transfers and are not counted. A trial is as many blocks as it takes until the median
tokens differ by more than their spread explains, or are sure not to differ by what matters, `BLOCKS` at most; the medians
then decide, for `hold` tokens. Each trial that says the same again doubles the hold, one that says the opposite takes it
back to the shortest.

    |with|without|without|with|--------- decided ---------|with|without|without|with|---- decided, twice as long ---- ...
"""

from __future__ import annotations

from math import sqrt
from statistics import median
from typing import Any

WINDOW, UNCOUNTED = 8, 2  # tokens
BLOCK = (True, False, False, True)
BLOCKS = 6  # of a trial, at most
SURE = 2.5  # standard errors
HOLD, LONGEST_HOLD = 192, 3072  # tokens
LEAST_GAIN = 0.005  # below this share of a token's time, guessing is not worth its memory traffic


class Benefit:
    """Asked before each token (`on`), told after it (`note`)."""

    def __init__(self, always: bool = False):
        self.always = always
        self.pays = True
        self.trials = self.flips = 0
        self.tokens = {True: 0, False: 0}
        self.with_s: float | None = None  # the median token of the last trial
        self.without_s: float | None = None
        self._counted: dict[bool, list[float]] = {True: [], False: []}
        self._at = 0  # tokens into the block, or into the hold
        self._blocks = 0  # of this trial, that are over
        self._trying = True
        self._hold = HOLD

    @property
    def on(self) -> bool:
        """Whether the next token should be guessed for."""
        if self.always:
            return True
        return BLOCK[self._at // WINDOW] if self._trying else self.pays

    def note(self, seconds: float) -> None:
        """The token that `on` was asked for took so long."""
        on = self.on
        self.tokens[on] += 1
        if self.always:
            return
        if self._trying and self._at % WINDOW >= UNCOUNTED:
            self._counted[on].append(seconds)
        self._at += 1
        if self._trying and self._at == len(BLOCK) * WINDOW:
            self._blocks, self._at = self._blocks + 1, 0
            if self._blocks == BLOCKS or self._is_sure():
                self._decide()
        elif not self._trying and self._at == self._hold:
            self._trying, self._at = True, 0

    def _is_sure(self) -> bool:
        """By the standard error of a difference of medians, estimated robustly: a noisy machine has long tails."""
        middle = {on: median(seconds) for on, seconds in self._counted.items()}
        off_middle = [abs(s - middle[on]) for on, seconds in self._counted.items() for s in seconds]
        counts = (len(seconds) for seconds in self._counted.values())
        error = 1.2533 * 1.4826 * median(off_middle) * sqrt(sum(1 / n for n in counts))
        return SURE * error < max(abs(middle[True] - middle[False]), LEAST_GAIN * middle[False])

    def _decide(self) -> None:
        self.with_s, self.without_s = (median(self._counted[on]) for on in (True, False))
        pays = self.with_s < (1 - LEAST_GAIN) * self.without_s
        if self.trials:
            same = pays == self.pays
            self.flips += not same
            self._hold = min(LONGEST_HOLD, 2 * self._hold) if same else HOLD
        self.pays, self.trials = pays, self.trials + 1
        self._counted = {True: [], False: []}
        self._trying, self._at, self._blocks = False, 0, 0

    def to_json(self) -> dict[str, Any]:
        """The decision with its numbers; seconds per token of the last trial, None before the first."""
        return {
            "decision": "always" if self.always else "trying" if not self.trials else "on" if self.pays else "off",
            "with_s": self.with_s,
            "without_s": self.without_s,
            "trials": self.trials,
            "flips": self.flips,
            "tokens_with": self.tokens[True],
            "tokens_without": self.tokens[False],
        }
