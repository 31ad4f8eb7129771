"""What decode guesses ahead (DuoServe-MoE, section "decode"): a predictor ranks beside the compute, on a stream of its own
(a quick one at once, where that is a thread of this interpreter), its ranking becomes guesses, and what the router then
contradicts is given up. Chooses; moves no bytes itself.

    layer l     router | experts compute ............. | attention of l + 1 | router of l + 1
    predictor          '- rank(l + 1) -.                                    |
    ahead lane                         '- guess - guess - guess ...         '- begun copies end, the others are withdrawn

How many: as many as were begun before the router spoke in the passes before, and one more; a guess that nobody began
costs nothing, since its slot still holds what it held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from duoserve.benefit import Benefit
from duoserve.cache import ExpertCache
from duoserve.core import Key, Phase, Predictor, Step, When
from duoserve.decisions import Decisions
from duoserve.foresight import Foresight
from duoserve.transfer import Transfer

TIMED = 16  # rankings that are made at once, to see what one takes
QUICK_S = (
    1e-3  # one that takes less, beside copies, stays on the model's thread: on another it takes more than twice as long
)
LIKELY = 0.5  # a guess that is more likely wrong takes time from a link that others need
FEW_ROWS = 16  # of a pass; more of them choose most experts anyway
SLOWLY = 0.1  # weight of the newest count in the running one of guesses that began in time


class Ranking:
    """The predictor's answer for one layer: experts, likeliest first, and how far they were turned into guesses."""

    def __init__(self, layer: int):
        self.layer = layer
        self.error: Exception | None = None
        self.experts: list[int] | None = None
        self.next = self.issued = 0
        self.over = False  # the router has spoken


def _likely(scores_E: torch.Tensor, most: int) -> list[int]:
    """At most so many experts that are likelier than not, likeliest first. Without torch operations: each of them hands the
    interpreter to whoever copies."""
    scores = scores_E.numpy()
    order = (-scores).argsort(kind="stable")[:most]
    return [e for e, score in zip(order.tolist(), scores[order].tolist(), strict=True) if score > LIKELY]


class Ahead(Foresight):
    """One predictor's guesses for the passes of one model. Its state is guarded by the transfer's lock."""

    def __init__(
        self,
        cache: ExpertCache,
        transfer: Transfer,
        experts_per_layer: list[int],
        think: Callable[[Callable[[], None], int, int, bool], object],
    ):
        self._cache, self._transfer, self._experts, self._think = cache, transfer, experts_per_layer, think
        self.predictor: Predictor | None = None
        self.benefit = Benefit()
        self.error: str | None = None
        self._guessing = False
        self._asked: list[Ranking] = []  # in this pass
        self._due: list[Ranking] = []  # of those, the ones that may still become guesses
        self._rank_s: float | None = None  # the lower quartile of the first rankings
        self._timed: list[float] = []
        self._begun: float | None = None  # guesses per layer that began in time, a running mean
        self._spoken: tuple[Step, int] | None = None
        self._choices = 1  # experts that the running pass's rows choose in a layer, at most
        self.asked = self.in_time = self.too_late = 0  # rankings

    def use(self, predictor: Predictor | None, always: bool) -> None:
        """From the next pass on; unless `always`, only while it is measured to pay."""
        self._drop()
        self.predictor, self.benefit, self.error = predictor, Benefit(always), None
        self._begun, self._rank_s, self._timed = None, None, []
        self.asked = self.in_time = self.too_late = 0

    @property
    def _decisions(self) -> Decisions:
        return self._transfer.decisions

    def begin(self, step: Step) -> None:
        """A pass begins: decode passes of few rows are guessed for, while that pays."""
        self._drop()
        decode = step.phase is Phase.DECODE and step.rows <= FEW_ROWS
        self._guessing = self.predictor is not None and decode and self._decisions.said("on", self.benefit.on)
        if self._guessing and self._when(0) is When.START:
            self._ask(step, 0)

    def entered(self, step: Step, layer: int) -> None:
        """What enters a layer's attention is known."""
        if self._guessing and self._when(layer) is When.INPUT:
            self._ask(step, layer)

    def spoken(self, step: Step | None, layer: int, tokens: Mapping[int, int]) -> None:
        """A layer's router has spoken, its route is noted: withdraw what else was guessed about it."""
        with self._transfer.lock:
            began, withdrawn = self._transfer.settle(layer, tokens)
            if not self._guessing or step is None:
                return
            self._learn(layer, began, withdrawn)
        self._choices = max(1, len(tokens))
        self._spoken = (step, layer)

    def ask(self) -> None:
        """The needs of the layer whose router has spoken are on their way: ask about the layers after it."""
        if self._spoken is None:
            return
        (step, layer), self._spoken = self._spoken, None
        lead = self.predictor.lead if self.predictor is not None else 1
        if layer + lead < len(self._experts) and self._when(layer + lead) is When.ROUTE:
            self._ask(step, layer + lead)
        if layer + 1 < len(self._experts) and self._when(layer + 1) is When.START:
            self._ask(step, layer + 1)

    def push(self) -> None:
        """Go on with rankings that found no slot for a guess before; quick where there are none."""
        if self._due:
            with self._transfer.lock:
                self._decisions.tick()
                self._due = [ranking for ranking in self._due if not self._guess(ranking)]

    def finish(self, step: Step, seconds: float) -> None:
        """The pass took so long."""
        for ranking in self._asked:
            if ranking.error is not None:
                self._fail(ranking.error)
        self._asked.clear()
        self._drop()
        if self.predictor is None:
            return
        if step.phase is Phase.DECODE and step.rows <= FEW_ROWS:
            self.benefit.note(seconds)
        self.predictor.observe(step)

    def stats(self) -> dict[str, Any] | None:
        """The decision with its numbers, and what became of rankings; None without a predictor."""
        if self.predictor is None and self.error is None:
            return None
        return {
            "predictor": self.predictor.name if self.predictor is not None else None,
            "error": self.error,
            **self.benefit.to_json(),
            "rank_s": self._rank_s,
            "rankings": self.asked,
            "rankings_in_time": self.in_time,
            "rankings_too_late": self.too_late,
            "guesses_begun_per_layer": self._begun,
        }

    def _when(self, layer: int) -> When | None:
        return self.predictor.when(layer) if self.predictor is not None else None

    def _room(self) -> int:
        return self._choices if self._begun is None else int(self._begun + 0.5) + 1

    def _ask(self, step: Step, layer: int) -> None:
        if self._decisions.said("whole", self._cache.whole(layer)):
            return
        predictor, ranking = self.predictor, Ranking(layer)
        assert predictor is not None, layer
        n = min(self._choices, self._experts[layer])

        def rank() -> None:  # on the predictor's thread
            if ranking.over:
                return
            began = self._transfer.device.now()
            try:
                experts = _likely(predictor.rank(step, layer), n)
            except Exception as error:  # tokens do not depend on it
                ranking.error = error
                return
            self._took(self._transfer.device.now() - began)
            with self._transfer.lock:
                ranking.experts = self._decisions.ranked(number, experts)
                self._guess(ranking)

        self.asked += 1
        number = self.asked
        self._asked.append(ranking)
        self._due.append(ranking)
        quick = self._decisions.said("quick", len(self._timed) < TIMED or (self._rank_s or 0) < QUICK_S)
        self._think(rank, layer, number, quick)

    def _took(self, seconds: float) -> None:
        if len(self._timed) < TIMED:
            self._timed.append(seconds)
            self._rank_s = sorted(self._timed)[len(self._timed) // 4]  # the first ones also prepare

    def _guess(self, ranking: Ranking) -> bool:
        """Turn a ranking into guesses as far as slots and the link allow; True once nothing more is to come of it."""
        if ranking.over:
            return True
        if ranking.experts is None:
            return False
        while ranking.next < len(ranking.experts) and ranking.issued < self._room():
            key = Key(ranking.layer, ranking.experts[ranking.next])
            if key not in self._cache:
                if self._transfer.guess(key) is None:
                    return False  # no slot for it now
                ranking.issued += 1
            ranking.next += 1
        self._transfer.read_ahead([Key(ranking.layer, e) for e in ranking.experts[ranking.next :]])
        ranking.over = True
        return True

    def _learn(self, layer: int, began: int, withdrawn: int) -> None:
        """How many guesses about a layer can begin in time."""
        for ranking in self._due:
            if ranking.layer == layer:
                self.too_late += ranking.experts is None
                ranking.over = True
        self._due = [ranking for ranking in self._due if not ranking.over]
        if began or withdrawn:
            self.in_time += 1
            more = began if withdrawn else began + 1
            self._begun = more if self._begun is None else (1 - SLOWLY) * self._begun + SLOWLY * more

    def _drop(self) -> None:
        """The pass is over, with all guesses about it."""
        self._spoken = None
        with self._transfer.lock:
            self._decisions.tick()
            for ranking in self._due:
                ranking.over = True
            self._due.clear()
            self._transfer.settle(None, ())

    def _fail(self, error: Exception) -> None:
        """A predictor that fails is not asked again; tokens do not depend on it."""
        self.error = f"{type(error).__name__}: {error}"
        self.predictor, self._guessing = None, False
