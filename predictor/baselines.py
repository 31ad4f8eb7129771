"""Predictors to compare with. Knows Steps and routers; knows no files and no training loops.

Gate            the layer's own router on what the router `lead` layers before read; no training
Popularity      how often each expert was chosen
PreviousToken   what the token before chose
TraceMatching   MoE-Infinity's: the request so far, as a layers x experts matrix, against a library of such matrices
Oracle          the truth, looked up by the tokens so far; AlwaysWrong: its opposite
Control         the layer's own router on its own input: what must read 100 %, else the harness is wrong
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch

from duoserve.core import Step, When
from duoserve.routers import Router
from predictor.features import before, real_rows, route_weights, summed
from predictor.model import Shape

NOTHING: frozenset[str] = frozenset()


class _Plain(ABC):
    """What most baselines answer alike; each ranks rows in its own way."""

    name = "plain"
    lead = 1
    wants = NOTHING
    fingerprint: str | None = None
    n_bytes = n_params = 0

    def when(self, layer: int) -> When | None:
        return When.START

    @abstractmethod
    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        """(T, E): how likely each row is to choose each expert of the layer."""

    @torch.inference_mode()
    def rank(self, step: Step, layer: int) -> torch.Tensor:
        return summed(step, self.rank_rows(step, layer))

    def observe(self, step: Step) -> None:  # noqa: B027
        """Most remember nothing."""


class Gate(_Plain):
    """The next layer's gate on this layer's router input. Scores: 0 to 1, a half between the last chosen and the next."""

    wants = frozenset({"hidden"})

    def __init__(self, routers: Sequence[Router | None], lead: int = 1):
        self.routers, self.lead = list(routers), lead
        self.name = "gate" if lead == 1 else f"gate (lead {lead})"

    def when(self, layer: int) -> When | None:
        inside = self.lead <= layer < len(self.routers) and self.routers[layer] is not None
        return When.ROUTE if inside else None

    @torch.inference_mode()
    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        return self._scores(step, layer, layer - self.lead)

    def _scores(self, step: Step, layer: int, source: int) -> torch.Tensor:
        router, route = self.routers[layer], step.route(source)
        assert router is not None, layer
        if route is None or route.hidden_TD is None:
            return torch.zeros(step.rows, router.weight_ED.shape[0])
        scores_TE = router.scores(route.hidden_TD).cpu()
        k = min(route.ids_TK.shape[1], scores_TE.shape[1] - 1)
        edge_T2 = scores_TE.topk(k + 1, dim=1).values[:, -2:]
        return (scores_TE - edge_T2.mean(dim=1, keepdim=True)).sigmoid_()


class Control(Gate):
    """Not a predictor: it looks at the answer's own input."""

    def __init__(self, routers: Sequence[Router | None]):
        super().__init__(routers, 0)
        self.name = "control (zero staleness)"

    @torch.inference_mode()
    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        router, route = self.routers[layer], step.route(layer)
        assert router is not None and route is not None and route.hidden_TD is not None, layer
        scores_TE = router.scores(route.hidden_TD).cpu()
        top_TK = scores_TE.topk(
            route.ids_TK.shape[1], dim=1
        ).indices  # scores in bf16 tie; they break as the router's do
        return scores_TE.softmax(dim=1).scatter_add(1, top_TK, torch.ones(top_TK.shape))


class Popularity(_Plain):
    """Shares of a layer's choices, (L, E)."""

    name = "popularity"

    def __init__(self, shape: Shape, counts_LE: torch.Tensor | None = None, name: str = "popularity"):
        self.shape, self.fingerprint, self.name = shape, shape.fingerprint, name
        empty = torch.zeros(len(shape.experts), max(shape.experts))
        self.counts_LE = counts_LE.float() if counts_LE is not None else empty
        self.n_params, self.n_bytes = empty.numel(), 4 * empty.numel()

    def learn(self, step: Step) -> None:
        """Count one more recorded sequence."""
        self.counts_LE = self.counts_LE + matrix(step, self.shape)

    @torch.inference_mode()
    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        counts_E = self.counts_LE[layer, : self.shape.experts[layer]]
        share_E = counts_E / counts_E.sum().clamp_min(1) * self.shape.choices[layer]
        return share_E.expand(step.rows, -1)


class PreviousToken(_Plain):
    """What the token before chose, the larger weight first; nothing of a first token."""

    name = "previous token"

    def __init__(self, shape: Shape):
        self.shape = shape

    @torch.inference_mode()
    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        n = self.shape.experts[layer]
        found = before(step, lambda s: route_weights(s, layer, n))
        return found.clamp(max=1) if found is not None else torch.zeros(step.rows, n)


class TraceMatching(_Plain):
    """Scores are the target layer's row of the library's matrix most like the request so far, by cosine.

    `library_CLE`: matrices of whole requests, each layer's row summing to 1 (cluster centres, where there were many).
    """

    name = "matching"

    def __init__(self, shape: Shape, library_CLE: torch.Tensor | None = None, lead: int = 1, name: str = "matching"):
        self.shape, self.fingerprint, self.lead, self.name = shape, shape.fingerprint, lead, name
        empty = torch.zeros(0, len(shape.experts), max(shape.experts))
        self.library_CLE = library_CLE.float() if library_CLE is not None else empty
        self.n_params, self.n_bytes = self.library_CLE.numel(), 4 * self.library_CLE.numel()
        self._seen_BLE: torch.Tensor | None = None

    def when(self, layer: int) -> When | None:
        return When.START if layer < self.lead else When.ROUTE

    def learn(self, step: Step) -> None:
        """Put one more recorded sequence into the library."""
        self.library_CLE = torch.cat([self.library_CLE, normal(matrix(step, self.shape))[None]])

    def observe(self, step: Step) -> None:
        """Add a finished pass to its requests; one that does not go on with them begins new ones."""
        counts_BLE = _hot(step, self.shape, len(self.shape.experts)).unflatten(0, (step.batch, -1)).sum(dim=1)
        goes_on = step.previous is not None and self._seen_BLE is not None and len(self._seen_BLE) == step.batch
        self._seen_BLE = self._seen_BLE + counts_BLE if goes_on and self._seen_BLE is not None else counts_BLE

    @torch.inference_mode()
    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        n = self.shape.experts[layer]
        if not len(self.library_CLE):
            return torch.zeros(step.rows, n)
        partial_TLE = self._partial(step, layer)
        partial_TN = partial_TLE.flatten(1)
        library_CN = self.library_CLE.flatten(1)
        norm_C = library_CN.norm(dim=1).clamp_min(1e-6)
        best_T = (partial_TN @ library_CN.T / norm_C).argmax(dim=1)
        return self.library_CLE[best_T, layer, :n] * self.shape.choices[layer]

    def _partial(self, step: Step, layer: int) -> torch.Tensor:
        """(T, L, E): all tokens of the request before this row, and this row's layers before the target."""
        known = layer - self.lead + 1  # layers of the row itself
        own_TLE = _hot(step, self.shape, max(known, 0))
        length = step.rows // step.batch
        if length == 1:
            before_TLE = torch.zeros_like(own_TLE)
        else:
            whole = _hot(step, self.shape, len(self.shape.experts)).unflatten(0, (step.batch, -1))
            before_TLE = (whole.cumsum(dim=1) - whole).flatten(0, 1)
        if step.previous is not None and self._seen_BLE is not None and len(self._seen_BLE) == step.batch:
            before_TLE = before_TLE + self._seen_BLE.repeat_interleave(length, dim=0)
        return before_TLE + own_TLE


def matrix(step: Step, shape: Shape) -> torch.Tensor:
    """(L, E) counts of one pass."""
    return _hot(step, shape, len(shape.experts)).sum(dim=0)


def normal(counts_LE: torch.Tensor) -> torch.Tensor:
    """Each row's sum 1."""
    return counts_LE / counts_LE.sum(dim=-1, keepdim=True).clamp_min(1e-6)


def _hot(step: Step, shape: Shape, layers: int) -> torch.Tensor:
    """(T, L, E) of the layers below `layers`, padding left out."""
    e = max(shape.experts)
    out = torch.zeros(step.rows, len(shape.experts), e + 1)
    for route in step.routes:
        if route.layer < layers:
            out[:, route.layer].scatter_(1, route.ids_TK.where(route.ids_TK < shape.experts[route.layer], e), 1.0)
    real_T = real_rows(step)
    return out[:, :, :e] if real_T is None else out[:, :, :e] * real_T[:, None, None]


class Oracle(_Plain):
    """What recorded sequences chose, found again by the tokens from a sequence's beginning on; 0 where none was recorded."""

    name = "oracle"
    chosen, others = 1.0, 0.0

    def __init__(self, recorded: Iterable[Step], experts: Sequence[int]):
        self.experts = list(experts)
        self.remember(recorded)

    def remember(self, recorded: Iterable[Step]) -> None:
        """Know these sequences, and no others."""
        self._steps = list(recorded)
        self._at: dict[int, tuple[int, int]] = {}  # of all tokens up to a row: which step, which row
        for number, step in enumerate(self._steps):
            for row, key in enumerate(_flat(_keys(step, []))):
                if key is not None:
                    self._at.setdefault(key, (number, row))
        self._so_far: list[list[int]] = []  # by sequence and position
        self._asked: tuple[Step, list[list[int | None]]] | None = None

    @torch.inference_mode()
    def rank_rows(self, step: Step, layer: int) -> torch.Tensor:
        n = self.experts[layer]
        out_TE = torch.zeros(step.rows, n)
        for row, key in enumerate(_flat(self._running(step))):
            at = self._at.get(key) if key is not None else None
            route = self._steps[at[0]].route(layer) if at is not None else None
            if at is not None and route is not None:
                ids_K = route.ids_TK[at[1]]
                out_TE[row] = self.others
                out_TE[row, ids_K[ids_K < n]] = self.chosen
        return out_TE

    def observe(self, step: Step) -> None:
        """Remember the running sequences' tokens."""
        keys, starts = self._running(step), _starts(step)
        former = self._so_far if len(self._so_far) == step.batch else [[] for _ in range(step.batch)]
        self._so_far = [
            before[:start] + [key for key in of if key is not None]
            for before, start, of in zip(former, starts, keys, strict=True)
        ]

    def _running(self, step: Step) -> list[list[int | None]]:
        if self._asked is None or self._asked[0] is not step:
            self._asked = (step, _keys(step, self._so_far))
        return self._asked[1]


class AlwaysWrong(Oracle):
    """The experts that will not be chosen: what prefetching must survive."""

    name = "always wrong"
    chosen, others = 0.0, 1.0


def _starts(step: Step) -> list[int]:
    """Position of each sequence's first real row."""
    if step.positions_BS is None:
        return [0] * step.batch
    real_BS = ~step.padding_BS if step.padding_BS is not None else torch.ones_like(step.positions_BS, dtype=torch.bool)
    found = real_BS.long().argmax(dim=1, keepdim=True)
    starts: list[int] = step.positions_BS.gather(1, found).flatten().tolist()
    return starts


def _keys(step: Step, so_far: list[list[int]]) -> list[list[int | None]]:
    """By sequence and row: a number that stands for all its tokens up to there; None where unknown, or for padding."""
    if step.ids_BS is None:
        return [[None] * (step.rows // step.batch)] * step.batch
    padding = step.padding_BS.tolist() if step.padding_BS is not None else None
    found: list[list[int | None]] = []
    for b, (start, tokens) in enumerate(zip(_starts(step), step.ids_BS.tolist(), strict=True)):
        known = start == 0 or (len(so_far) == step.batch and len(so_far[b]) >= start)
        key = so_far[b][start - 1] if known and start else 0
        keys: list[int | None] = []
        for s, token in enumerate(tokens):
            if not known or (padding is not None and padding[b][s]):
                keys.append(None)
                continue
            key = hash((key, token))
            keys.append(key)
        found.append(keys)
    return found


def _flat(keys: list[list[int | None]]) -> list[int | None]:
    return [key for of in keys for key in of]
