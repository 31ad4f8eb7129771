"""Whether guessing pays, measured while it runs: windows of tokens with and without it, compared. Knows seconds; knows
nothing of experts, predictors or devices, and imports no torch.

A trial is four windows, with, without, without, with, so that a machine that drifts favours neither; the first tokens of a
window still live from the other one's transfers and are not counted. The median token decides, for `hold` tokens; each
trial that says the same again doubles the hold, one that says the opposite takes it back to the shortest.

    |with|without|without|with|--------- decided ---------|with|without|without|with|---- decided, twice as long ---- ...
"""

from __future__ import annotations

from statistics import median
from typing import Any

WINDOW, UNCOUNTED = 8, 2  # tokens
TRIAL = (True, False, False, True)
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
        self._at = 0  # tokens into the trial, or into the hold
        self._trying = True
        self._hold = HOLD

    @property
    def on(self) -> bool:
        """Whether the next token should be guessed for."""
        if self.always:
            return True
        return TRIAL[self._at // WINDOW] if self._trying else self.pays

    def note(self, seconds: float) -> None:
        """The token that `on` was asked for took so long."""
        on = self.on
        self.tokens[on] += 1
        if self.always:
            return
        if self._trying and self._at % WINDOW >= UNCOUNTED:
            self._counted[on].append(seconds)
        self._at += 1
        if self._trying and self._at == len(TRIAL) * WINDOW:
            self._decide()
        elif not self._trying and self._at == self._hold:
            self._trying, self._at = True, 0

    def _decide(self) -> None:
        self.with_s, self.without_s = (median(self._counted[on]) for on in (True, False))
        pays = self.with_s < (1 - LEAST_GAIN) * self.without_s
        if self.trials:
            same = pays == self.pays
            self.flips += not same
            self._hold = min(LONGEST_HOLD, 2 * self._hold) if same else HOLD
        self.pays, self.trials = pays, self.trials + 1
        self._counted = {True: [], False: []}
        self._trying, self._at = False, 0

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
