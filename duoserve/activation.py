"""MoE-Infinity's policy (MIF, arXiv 2401.14361): requests that choose alike so far choose alike later. Chooses; moves no
bytes itself.

    so far     how often the running request's tokens chose each expert, layers x experts; several sequences in one
    library    such matrices of finished requests; the one most like it (cosine) tells each expert's share of its layer
    priority   share x (1 - layers until its turn / layers): what to fetch next, and what goes last

Without a stored request, what this one chose so far is its own forecast. A predictor, if there is one, takes the place of
the library for the layers next to come. There is no measuring whether it pays: it always fetches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from duoserve.cache import NOTHING, ExpertCache
from duoserve.core import Phase, Predictor, Step
from duoserve.device import Event
from duoserve.foresight import Foresight
from duoserve.transfer import Transfer

REQUESTS = 128  # that the library holds; then the oldest goes
AT_ONCE = 4  # guesses under way: few, since each router that speaks changes their order
NEAR = 3  # layers ahead that a predictor is asked about


class Activation(Foresight):
    """Wants a pool that keeps what it is told to, and guesses that trade (`transfer.Manners`)."""

    def __init__(
        self,
        cache: ExpertCache,
        transfer: Transfer,
        experts_per_layer: list[int],
        think: Callable[[Callable[[], None], int, int, bool], object],
    ):
        self._cache, self._transfer, self._experts, self._think = cache, transfer, experts_per_layer, think
        self._first = np.cumsum([0, *experts_per_layer])
        self._layer = np.repeat(np.arange(len(experts_per_layer)), experts_per_layer)  # of each expert
        self._so_far = np.zeros(len(self._layer))
        self._library = np.zeros((0, len(self._layer)))  # shares, each of length 1
        self._alike = np.zeros(0)  # what the request so far and each of the library have in common
        self._near: dict[int, np.ndarray] = {}  # shares that a predictor told, by layer
        self._turn = 0  # the layer whose router has spoken last
        self._spoken: tuple[Step, int] | None = None
        self._under_way: deque[Event] = deque()
        self.error: str | None = None
        self._asked = 0  # times that the predictor was

    def use(self, predictor: Predictor | None, always: bool) -> None:
        """It is asked about every layer of every pass from the next on, whether that pays or not."""
        self.predictor, self.error = predictor, None
        self._near.clear()

    def begin(self, step: Step) -> None:
        if step.phase is Phase.PREFILL:
            with self._transfer.lock:
                self._remember()

    def spoken(self, step: Step | None, layer: int, tokens: Mapping[int, int]) -> None:
        chosen = self._first[layer] + np.fromiter(tokens, np.int64, len(tokens))
        rows = np.fromiter(tokens.values(), np.float64, len(tokens))
        with self._transfer.lock:
            self._so_far[chosen] += rows
            self._alike += self._library[:, chosen] @ rows
            self._turn = layer
            self._transfer.settle(layer, tokens)
            self._appraise()
        self._spoken = (step, layer) if step is not None else None

    def ask(self) -> None:
        if self._spoken is not None and self.predictor is not None:
            step, layer = self._spoken
            self._asked += 1
            number = self._asked
            self._think(lambda: self._rank(step, layer, number), layer + 1, number, False)
        self._spoken = None
        self.push()

    def push(self) -> None:
        decisions = self._transfer.decisions
        with self._transfer.lock:
            decisions.tick()
            while self._under_way and decisions.said("arrived", self._under_way[0].done):
                self._under_way.popleft()
            while len(self._under_way) < AT_ONCE:
                key = self._cache.wanted()
                slot = self._transfer.guess(key) if key is not None else None
                if slot is None:
                    return
                self._under_way.append(slot.ready)

    def finish(self, step: Step, seconds: float) -> None:
        if self.predictor is not None:
            self.predictor.observe(step)

    def stats(self) -> dict[str, Any] | None:
        """Whose forecasts these are."""
        name = self.predictor.name if self.predictor is not None else "requests so far"
        return {"predictor": name, "error": self.error, "requests": len(self._library)}

    def _remember(self) -> None:
        """A new request begins: the former one goes to the library."""
        if self._so_far.any():
            share = self._shares(self._so_far)
            self._library = np.concatenate([self._library[-REQUESTS + 1 :], share[None] / np.linalg.norm(share)])
        self._so_far[:] = 0
        self._alike = np.zeros(len(self._library))
        self._near.clear()

    def _shares(self, counts: np.ndarray) -> np.ndarray:
        """Of each expert in its layer."""
        sums = np.add.reduceat(counts, self._first[:-1])
        return counts / np.maximum(sums, 1e-9)[self._layer]

    def _appraise(self) -> None:
        """Tell the pool each expert's priority; of those that nobody is expected to choose, the farthest goes first."""
        counts = self._library[self._alike.argmax()] if len(self._library) else self._so_far
        share = self._shares(counts)
        for near, told in self._near.items():
            share[self._first[near] : self._first[near + 1]] = told
        layers = len(self._experts)
        until = (self._layer - self._turn - 1) % layers / layers
        self._cache.appraise(np.where(share > 0, share * (1 - until), NOTHING * (1 + until)))

    def _rank(self, step: Step, layer: int, number: int) -> None:
        """What the predictor says of the layers next to come; on its thread."""
        told = self._told(step, layer)
        with self._transfer.lock:
            self._transfer.decisions.ranked(number, [])
            self._near |= told
            self._appraise()

    def _told(self, step: Step, layer: int) -> dict[int, np.ndarray]:
        """Shares, by layer."""
        found: dict[int, np.ndarray] = {}
        predictor = self.predictor
        for near in range(layer + 1, min(layer + 1 + NEAR, len(self._experts))):
            if predictor is None or predictor.when(near) is None:
                continue
            try:
                scores = predictor.rank(step, near).clamp(min=0).double().numpy()
            except Exception as error:  # tokens do not depend on it
                self.error, self.predictor = f"{type(error).__name__}: {error}", None
                break
            found[near] = scores / max(scores.sum(), 1e-9)
        return found
