"""What a runtime tells whoever brings experts before they are needed, in the order of a pass. Knows Steps and predictors;
knows no slots and decides nothing.

    begin | enter layer 0, router speaks, experts computed (push, push, ...) | enter layer 1, ... | finish
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from duoserve.core import Predictor, Refusal, Step
from duoserve.future import Future


class Foresight:
    """Told of everything; by itself it foresees nothing."""

    predictor: Predictor | None = None

    @property
    def n_bytes(self) -> int:
        """Of memory that the predictor holds on the device."""
        return self.predictor.n_bytes if self.predictor is not None else 0

    def use(self, predictor: Predictor | None, always: bool) -> None:
        """From the next pass on; unless `always`, only while it is measured to pay."""
        if predictor is not None:
            what = f"this policy asks 0 predictors, {predictor.name!r} is given"
            raise Refusal("E_OPTION", what, "take policy duoserve, duoserve-paper or mif")

    def foresee(self, future: Future) -> None:
        """The passes from the next one on will choose so."""
        raise Refusal(
            "E_OPTION", f"a future of {future.turns} turns is given, this policy looks at 0", "take policy belady"
        )

    def begin(self, step: Step) -> None:
        """A pass begins."""

    def entered(self, step: Step, layer: int) -> None:
        """What enters a layer's attention is known."""

    def spoken(self, step: Step | None, layer: int, tokens: Mapping[int, int]) -> None:
        """A layer's router has spoken, its route is noted; `tokens`: expert -> rows."""

    def ask(self) -> None:
        """The needs of the layer whose router has spoken are on their way."""

    def push(self) -> None:
        """Something may have changed: go on with what found no slot before; quick where there is nothing."""

    def finish(self, step: Step, seconds: float) -> None:
        """The pass took so long."""

    def stats(self) -> dict[str, Any] | None:
        """What a person wants to know of it; None where there is nothing to tell."""
        return None
