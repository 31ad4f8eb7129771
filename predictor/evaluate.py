"""How good predictors are on a trace, and what a call costs as serving makes it. Knows rankings and truths; knows no files
of predictors and no pictures.

All figures are shares of 0 to 1. `slot_recall`: of the experts chosen, those among the first K guesses. `exact`: rows whose
first K guesses are the K chosen. `half`: rows with at least half of them. `recall_k2`: of the experts chosen, those among
the first K + 2 guesses. `ready`: of the experts chosen, those among the guesses that cross the link in one layer's time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from duoserve.core import Phase, Route, Step
from duoserve.routers import Router
from predictor.baselines import AlwaysWrong, Control, Gate, Oracle, Popularity, PreviousToken, TraceMatching
from predictor.model import Shape
from predictor.score import hits
from traces.store import PromptInfo, Recorded

TIMED_TOKENS = 48  # single-row steps that calls are timed on
MOST = 32  # guesses of the curve over their number


class Counts:
    """Of rows at one layer and of prompts of one domain. `hits_E`: rows' chosen experts found, by rank of the guess."""

    def __init__(self, experts: int):
        self.rows = self.chosen = self.exact = self.half = 0
        self.hits_E = torch.zeros(experts, dtype=torch.long)

    def add(self, scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> None:
        found_TE = hits(scores_TE, ids_TK)
        k = ids_TK.shape[1]
        first_T, chosen_T = found_TE[:, :k].sum(dim=1), found_TE.sum(dim=1)
        self.rows += len(ids_TK)
        self.chosen += int(chosen_T.sum())
        self.exact += int((first_T == chosen_T).sum())
        self.half += int((2 * first_T >= chosen_T).sum())
        self.hits_E += found_TE.sum(dim=0)

    def figures(self, k: int, arrive: int) -> dict[str, float]:
        recall = self.curve()

        def at(n: int) -> float:
            return recall[min(n, len(recall)) - 1]

        rows = max(self.rows, 1)
        return {
            "slot_recall": at(k),
            "exact": self.exact / rows,
            "half": self.half / rows,
            "recall_k2": at(k + 2),
            "ready": at(arrive),
        }

    def curve(self) -> list[float]:
        """Recall among the first 1, 2, 3, ... guesses."""
        shares: list[float] = (self.hits_E.cumsum(dim=0) / max(self.chosen, 1)).tolist()
        return shares

    def __iadd__(self, other: Counts) -> Counts:
        for name in ("rows", "chosen", "exact", "half"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.hits_E += other.hits_E
        return self


METRICS = ("slot_recall", "exact", "half", "recall_k2", "ready")


class Entry(NamedTuple):
    """A predictor under test: `domains` it was trained on, None where it was not trained."""

    name: str
    predictor: Any
    domains: frozenset[str] | None = None


class Report:
    """One predictor's counts, by layer and domain."""

    def __init__(self, entry: Entry, shape: Shape, arrive: int):
        self.entry, self.shape, self.arrive = entry, shape, arrive
        self.name = entry.name
        self.layers = [n for n in range(len(shape.experts)) if entry.predictor.when(n) is not None]
        self.counts: dict[tuple[int, str], Counts] = {}
        self.us_per_call = 0.0

    def note(self, item: Recorded, mask_S: torch.Tensor) -> None:
        for layer in self.layers:
            route = item.step.route(layer)
            assert route is not None, layer
            scores_TE = self.entry.predictor.rank_rows(item.step, layer)[mask_S].float()
            at = (layer, item.prompt.domain)
            self.counts.setdefault(at, Counts(self.shape.experts[layer])).add(scores_TE, route.ids_TK[mask_S])

    @property
    def compared(self) -> list[int]:
        """The layers that the headline averages over: all that are covered, but for the first."""
        return [layer for layer in self.layers if layer > 0]

    def domains(self) -> list[str]:
        return sorted({domain for _, domain in self.counts})

    def at(self, layer: int, domains: Iterable[str] | None = None) -> Counts:
        total = Counts(self.shape.experts[layer])
        for (of, domain), counts in self.counts.items():
            if of == layer and (domains is None or domain in domains):
                total += counts
        return total

    def figures(self, layers: Sequence[int], domains: Iterable[str] | None = None) -> dict[str, float]:
        """Means over layers, each counting alike."""
        found = [self.at(layer, domains).figures(self.shape.choices[layer], self.arrive) for layer in layers]
        return {name: statistics.fmean(f[name] for f in found) if found else 0.0 for name in METRICS}

    def curve(self, domains: Iterable[str] | None = None) -> list[float]:
        curves = [self.at(layer, domains).curve()[:MOST] for layer in self.compared]
        n = min((len(c) for c in curves), default=0)
        return [statistics.fmean(c[i] for c in curves) for i in range(n)]

    def trained_on(self, domain: str) -> bool | None:
        """Whether the predictor saw other prompts of this domain; None where it was not trained."""
        return None if self.entry.domains is None else domain in self.entry.domains

    def to_json(self) -> dict[str, Any]:
        whole = {name: round(value, 6) for name, value in self.figures(self.compared).items()}
        covered = {name: round(value, 6) for name, value in self.figures(self.layers).items()}
        by_layer = {}
        for layer in self.layers:
            found = self.at(layer).figures(self.shape.choices[layer], self.arrive)
            by_layer[str(layer)] = {name: round(value, 6) for name, value in found.items()}
        by_domain = {}
        for domain in self.domains():
            found = self.figures(self.compared, [domain])
            rounded: dict[str, Any] = {name: round(value, 6) for name, value in found.items()}
            by_domain[domain] = rounded | {"in_domain": self.trained_on(domain)}
        return {
            "name": self.name,
            **whole,
            "us_per_call": round(self.us_per_call, 1),
            "params": int(self.entry.predictor.n_params),
            "bytes": int(self.entry.predictor.n_bytes),
            "layers": self.compared,
            "covers": self.layers,
            "covered": covered,
            "rows": max((self.at(layer).rows for layer in self.layers), default=0),
            "arrive": self.arrive,
            "by_layer": by_layer,
            "by_domain": by_domain,
        }


class Request(NamedTuple):
    """What to evaluate on, and how."""

    sequences: Callable[[Sequence[int]], Iterable[Recorded]]  # of prompts, by index
    prompts: Sequence[PromptInfo]
    shape: Shape
    arrive: int
    phase: str = "all"


def evaluate(entries: Sequence[Entry], request: Request, online: Sequence[Any] = ()) -> list[Report]:
    """A report per entry, in order. `online` predictors learn from each sequence once all have been asked about it."""
    reports = [Report(entry, request.shape, request.arrive) for entry in entries]
    timed: list[Recorded] = []
    for item in request.sequences([prompt.index for prompt in request.prompts]):
        mask_S = rows_of(item, request.phase)
        if bool(mask_S.any()):
            for report in reports:
                if isinstance(report.entry.predictor, Oracle):
                    report.entry.predictor.remember([item.step])
                report.note(item, mask_S)
        for learner in online:
            learner.learn(item.step)
        if len(timed) < 4:
            timed.append(item)
    for report in reports:
        report.us_per_call = microseconds(report.entry.predictor, [item.step for item in timed], report.layers)
    return reports


def rows_of(item: Recorded, phase: str) -> torch.Tensor:
    """(S,) bool: the rows of a phase."""
    if phase == "all":
        return torch.ones(item.step.rows, dtype=torch.bool)
    return item.decode_S if phase == "decode" else ~item.decode_S


def untrained(routers: Sequence[Router | None], shape: Shape, hidden: bool) -> list[Entry]:
    """Predictors that need no training, and the control; those that look at hidden states where there are some."""
    seen = [Gate(routers), *([Gate(routers, 2)] if len(shape.experts) > 2 else [])] if hidden else []
    plain = [PreviousToken(shape), Oracle([], shape.experts), AlwaysWrong([], shape.experts)]
    control = [Control(routers)] if hidden else []
    return [Entry(p.name, p) for p in (*seen, *plain, *control)]


def learning(shape: Shape) -> list[Entry]:
    """Statistics that learn from the prompts before."""
    found = [Popularity(shape, name="popularity (online)"), TraceMatching(shape, name="matching (online)")]
    return [Entry(p.name, p) for p in found]


def microseconds(predictor: Any, steps: Sequence[Step], layers: Sequence[int]) -> float:
    """Median of `rank` on steps of one row, each with the one before, as decode asks: on one thread."""
    taken: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in steps:
            for single in singles(step)[:TIMED_TOKENS]:
                _ask(predictor, single, layers, taken)
                predictor.observe(single)
    finally:
        torch.set_num_threads(threads)
    return 1e6 * statistics.median(taken) if taken else 0.0


def _ask(predictor: Any, single: Step, layers: Sequence[int], taken: list[float]) -> None:
    """Time a call per layer, on what is known by then."""
    peeks = isinstance(predictor, Control)
    for layer in layers:
        known = [route for route in single.routes if route.layer < layer or peeks]
        inputs = {of: x_TD for of, x_TD in single.inputs.items() if of <= layer}
        now = Step(
            single.index, single.phase, 1, 1, single.ids_BS, single.positions_BS, None, known, inputs, single.previous
        )
        began = time.perf_counter()
        predictor.rank(now, layer)
        taken.append(time.perf_counter() - began)


def singles(step: Step) -> list[Step]:
    """A recorded sequence as decode would run it: steps of one row, each with the one before."""
    found: list[Step] = []
    for row in range(step.rows):
        at = slice(row, row + 1)
        routes = [
            Route(r.layer, r.ids_TK[at], r.weights_TK[at], r.hidden_TD[at] if r.hidden_TD is not None else None)
            for r in step.routes
        ]
        found.append(
            Step(
                row,
                Phase.DECODE if row else Phase.PREFILL,
                1,
                1,
                step.ids_BS[:, at] if step.ids_BS is not None else None,
                step.positions_BS[:, at] if step.positions_BS is not None else None,
                None,
                routes,
                {layer: x_TD[at] for layer, x_TD in step.inputs.items()},
                found[-1] if found else None,
            )
        )
    return found


def arrivals(layer_s: float | None, slab_s: float | None) -> int:
    """Slabs that cross the link in one layer's time, at least one; 1 where the trace has not measured it."""
    return max(1, int(layer_s / slab_s)) if layer_s and slab_s else 1


def left_out(prompts: Sequence[PromptInfo], trained: set[str]) -> tuple[list[PromptInfo], int]:
    """The prompts that no predictor was trained on, and how many others there are."""
    fair = [prompt for prompt in prompts if prompt.digest not in trained]
    return fair, len(prompts) - len(fair)
