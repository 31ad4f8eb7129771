"""Routes that no model made, with the habits of real ones: skewed popularity, documents with topics, tokens of recurring
kinds and memory of the last tokens. Knows routes and figures of `stats`; knows no machines and no policies.

For every token and layer the K experts with the largest scores are chosen, where an expert's score is the sum of

    skew   * how popular it is                 one standard normal per (layer, expert), the same for all sequences
    topic  * how much its document wants it    one per (sequence, layer, expert)
    kind   * how much this kind of token does  one per (kind, layer, expert); kinds recur by Zipf's law over KINDS of them
    last   * whether the token before chose it
    recent * how often the last tokens did     a mean that decays by DECAY a token
    bond   * how near it is to the token       in SPACE dimensions, of which each (layer, expert) has a direction
    a Gumbel number                            so that what remains is drawn in proportion to exp(score)

A token's kind and its point are the same in all layers: that is what makes layers depend on each other. Kinds come again, so
that they repeat choices; points do not, and in few dimensions an expert's neighbours in the next layer are few, so that it
has likely followers (layer affinity) without either. The six strengths are a `Law`;
`fit` finds them from figures that were published, or from a trace. Vectorised over layers and experts, one turn per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from duoserve.core import Phase, Refusal, Route, Step
from traces.stats import LruDepths, Stats
from traces.store import Recorded, Traces

KINDS, DECAY, SPACE = 256, 0.9, 3
SHAPE_SEED = 20251  # of what all sequences of a shape share: popularity and kinds
PROMPT = 512  # tokens in which `touched` counts distinct experts
_LAYERS, _SEQUENCES, _EVALUATIONS = 4, 5, 90  # of one fit
_LEAST = 5e-3  # a share that is nearer to its goal is as good as there
_TURNED = 0.4  # how far a fit's first steps go


@dataclass(frozen=True)
class Law:
    """The strengths of what a router's choice depends on; all zero chooses at random."""

    skew: float = 0.0
    topic: float = 0.0
    kind: float = 0.0
    last: float = 0.0
    recent: float = 0.0
    bond: float = 0.0


class Shape(NamedTuple):
    """Experts and choices of each MoE layer."""

    experts: tuple[int, ...]
    choices: tuple[int, ...]


class Goal(NamedTuple):
    """A figure to come near to, and how near counts as one error."""

    value: float
    within: float


# Where a fit to a trace begins: layers of a trained router depend on each other.
_BEGIN = Law(0.5, 0.5, 0.5, 0.5, 0.5, 3.0)

# Found by `fit` for what shared notes publish (peers.md, "Routing statistics to calibrate a generator with").
QWEN3 = Law(1.80, 3.39, 3.75, 1.80, 1.24)
QWEN3_GOALS = {
    "needed": Goal(65, 5), "top": Goal(0.053, 0.01), "repeated_1": Goal(0.44, 0.02), "repeated_8": Goal(0.80, 0.02),
    "touched": Goal(84, 12), "lru_19": Goal(0.74, 0.04), "lru_38": Goal(0.89, 0.04),
}  # fmt: skip
MIXTRAL = Law(0.02, 0.26, 0.07, 0.58, 0.52)
MIXTRAL_GOALS = {"needed": Goal(7.7, 0.5), "top": Goal(0.15, 0.02), "lru_50": Goal(0.577, 0.02)}
GPT_OSS = Law(1.3, 2.4, 2.9, 0.2, 0.05)
GPT_OSS_GOALS = {"repeated_1": Goal(0.18, 0.01), "touched": Goal(84, 12), "needed": Goal(65, 8)}

# Whose figures nobody published gets the law of the model most like it; `law_of` says which.
LAWS = {
    "mixtral-8x7b": MIXTRAL, "mixtral-8x22b": MIXTRAL, "qwen3-30b-a3b": QWEN3, "gpt-oss-120b": GPT_OSS,
    "gpt-oss-20b": GPT_OSS, "deepseekmoe-16b": QWEN3, "deepseek-v2-lite": QWEN3,
}  # fmt: skip
_FEW = 16  # experts up to which routers are near uniform, as Mixtral's


def law_of(name: str, shape: Shape) -> Law:
    """Of a known model, else Mixtral's for few experts and Qwen3's for many."""
    return LAWS.get(name, MIXTRAL if max(shape.experts) <= _FEW else QWEN3)


def generate(
    law: Law, shape: Shape, tokens: int, seed: int, popularity_LE: np.ndarray | None = None
) -> list[np.ndarray]:
    """One sequence's choices by layer, (tokens, K) int64 each, in falling order of score.

    `popularity_LE`: standardised log-shares to use instead of random ones; -inf where a layer has no such expert.
    """
    layers, width, most = len(shape.experts), max(shape.experts), max(shape.choices)
    shared, own = np.random.default_rng(SHAPE_SEED), np.random.default_rng((SHAPE_SEED, seed))
    size = (layers, width)
    drawn_LE = shared.standard_normal(size, dtype=np.float32)
    popular_LE = drawn_LE if popularity_LE is None else popularity_LE.astype(np.float32)
    absent_LE = np.arange(width) >= np.array(shape.experts)[:, None]
    base_LE = law.skew * popular_LE + law.topic * own.standard_normal(size, dtype=np.float32)
    base_LE[absent_LE] = -np.inf
    kinds_CLE = np.float32(law.kind) * shared.standard_normal((KINDS, *size), dtype=np.float32)
    zipf_C = 1 / np.arange(1, KINDS + 1)
    kind_T = own.choice(KINDS, tokens, p=zipf_C / zipf_C.sum())
    near_LES, about_TS = _points(law.bond, size, tokens, seed)
    before_LE, recent_LE = np.zeros(size, np.float32), np.zeros(size, np.float32)
    chosen_TLK = np.empty((tokens, layers, most), np.int64)
    for token in range(tokens):
        score_LE = base_LE + kinds_CLE[kind_T[token]]
        if law.bond:
            score_LE += near_LES @ about_TS[token]
        score_LE += law.last * before_LE
        score_LE += law.recent * recent_LE
        score_LE -= np.log(np.maximum(own.standard_exponential(size, dtype=np.float32), 1e-30))
        chosen_LK = _largest(score_LE, most)
        chosen_TLK[token] = chosen_LK
        before_LE[:] = 0
        np.put_along_axis(before_LE, chosen_LK, 1, axis=1)
        recent_LE *= DECAY
        recent_LE += (1 - DECAY) * before_LE
    return [chosen_TLK[:, layer, :k] for layer, k in enumerate(shape.choices)]


def _points(bond: float, size: tuple[int, int], tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where experts and tokens lie: their product has deviation `bond`. Drawn apart, so that nothing changes without."""
    shared, own = np.random.default_rng((SHAPE_SEED, SPACE)), np.random.default_rng((SHAPE_SEED, seed, SPACE))
    near_LES = shared.standard_normal((*size, SPACE), dtype=np.float32)
    near_LES *= np.float32(bond) / np.linalg.norm(
        near_LES, axis=2, keepdims=True
    )  # equally long: none is more popular for it
    return near_LES, own.standard_normal((tokens, SPACE), dtype=np.float32)


def _largest(score_LE: np.ndarray, k: int) -> np.ndarray:
    """(L, K) indices of the largest, in falling order."""
    found_LK = np.argpartition(-score_LE, k - 1, axis=1)[:, :k]
    order_LK = np.argsort(-np.take_along_axis(score_LE, found_LK, axis=1), axis=1)
    return np.take_along_axis(found_LK, order_LK, axis=1)


def passes(sequences: Sequence[list[np.ndarray]], prompt: int) -> Iterator[Step]:
    """Choices of a batch of equally long sequences as the passes that a model would make: one over all prompts of `prompt`
    tokens, then one for each further token. Weights are alike; ids of tokens are unknown."""
    length = len(sequences[0][0])
    starts = [(0, prompt), *((at, at + 1) for at in range(prompt, length))]
    for index, (start, stop) in enumerate(starts):
        phase = Phase.PREFILL if index == 0 and prompt else Phase.DECODE
        step = Step(index, phase, (stop - start) * len(sequences), len(sequences))
        step.positions_BS = torch.arange(start, stop).expand(len(sequences), -1)
        for layer in range(len(sequences[0])):
            ids_TK = torch.from_numpy(np.concatenate([ids[layer][start:stop] for ids in sequences]))
            step.routes.append(Route(layer, ids_TK, torch.full(ids_TK.shape, 1 / ids_TK.shape[1])))
        yield step


def replayed(recorded: Recorded) -> Iterator[Step]:
    """A recorded sequence as the passes that made it: its prompt, then token by token."""
    ids = [route.ids_TK.numpy() for route in recorded.step.routes]
    yield from passes([ids], int((~recorded.decode_S).sum()))


def figures(sequences: Sequence[list[np.ndarray]], shape: Shape, pools: bool = True) -> dict[str, float]:
    """What `stats` measures of these sequences, one number each; medians over layers. `touched`: distinct experts of a layer
    in the first PROMPT tokens. `affinity`: how much likelier the likeliest follower in the next layer is than that layer's
    most popular expert. `pools`: LRU's hits, too."""
    stats = Stats(list(shape.experts))
    pool = LruDepths(stats)
    touched = []
    for ids in sequences:
        stats.add(ids)
        if pools:
            pool.add(ids)
        touched.append(np.mean([len(np.unique(chosen[:PROMPT])) for chosen in ids]))
    once, eight = stats.repeated_A
    found = {
        "needed": float(np.mean(stats.needed_L)),
        "top": float(np.median(stats.share_LE.max(1))),
        "repeated_1": float(once),
        "repeated_8": float(eight),
        "touched": float(np.mean(touched)),
        "affinity": _affinity(stats),
    }
    return found | ({f"lru_{r}": stats.lru(r / 100) for r in (19, 25, 38, 50, 64)} if pools else {})


def _affinity(stats: Stats) -> float:
    return float(np.mean(stats.follower_L) - np.mean(stats.popular_L[1:])) if len(stats.experts) > 1 else 0.0


def fit(
    goals: dict[str, Goal],
    shape: Shape,
    tokens: int = PROMPT,
    begin: Law = QWEN3,
    popularity_LE: np.ndarray | None = None,
    evaluations: int = _EVALUATIONS,
) -> Law:
    """The law whose sequences come nearest to `goals`, by Nelder and Mead's simplex over the same random numbers."""
    from scipy.optimize import minimize

    few = _some_layers(shape)
    popular = popularity_LE[few] if popularity_LE is not None else None
    small = Shape(tuple(shape.experts[i] for i in few), tuple(shape.choices[i] for i in few))

    def error(strengths: np.ndarray) -> float:
        law = Law(*(float(s) for s in np.abs(strengths)))
        made = [generate(law, small, tokens, seed, popular) for seed in range(_SEQUENCES)]
        found = figures(made, small, any(name.startswith("lru") for name in goals))
        return sum(((found[name] - goal.value) / goal.within) ** 2 for name, goal in goals.items())

    first = np.array(astuple(begin))
    corners = [first, *(first + _TURNED * np.eye(len(first))[i] for i in range(len(first)))]
    options: dict[str, Any] = {"maxfev": evaluations, "initial_simplex": np.array(corners)}
    best = minimize(error, first, method="Nelder-Mead", options=options)
    return Law(*(round(float(s), 3) for s in np.abs(best.x)))


def _some_layers(shape: Shape) -> list[int]:
    """A few layers next to each other: neighbours are what `affinity` looks at."""
    return list(range(min(_LAYERS, len(shape.experts))))


class Fitted(NamedTuple):
    """What a trace's routers do: a law, its shape, and the popularity that was seen."""

    law: Law
    shape: Shape
    popularity_LE: np.ndarray
    goals: dict[str, Goal]
    tokens: int  # of a sequence, on average


_NEAR: dict[str, float] = {  # relative, of what a fit to a trace looks at
    "needed": 0.05, "top": 0.1, "repeated_1": 0.03, "repeated_8": 0.03, "touched": 0.05, "affinity": 0.1, "lru_25": 0.05,
    "lru_50": 0.05,
}  # fmt: skip


def fit_trace(traces: Traces, evaluations: int = _EVALUATIONS) -> Fitted:
    """Learn a law from recorded sequences, prompts and answers alike."""
    shape = Shape(tuple(traces.about.experts), tuple(traces.about.choices))
    sequences = [[r.ids_TK.numpy() for r in recorded.step.routes] for recorded in traces.sequences(hidden=False)]
    sequences = [ids for ids in sequences if len(ids[0])]
    if not sequences:
        raise Refusal("E_TRACE", f"{traces.folder} holds 0 sequences", "record some first", 3)
    return fit_sequences(sequences, shape, evaluations)


def fit_sequences(sequences: Sequence[list[np.ndarray]], shape: Shape, evaluations: int = _EVALUATIONS) -> Fitted:
    """Learn a law from choices by layer, (S, K) each, of one sequence or more."""
    stats = Stats(list(shape.experts))
    for ids in sequences:
        stats.add(ids)
    tokens = round(float(np.mean([len(ids[0]) for ids in sequences])))
    seen = figures(sequences[:_SEQUENCES], shape)
    goals = {name: Goal(seen[name], max(near * seen[name], _LEAST)) for name, near in _NEAR.items()}
    popularity_LE = _standardised(stats)
    return Fitted(fit(goals, shape, tokens, _BEGIN, popularity_LE, evaluations), shape, popularity_LE, goals, tokens)


def _standardised(stats: Stats) -> np.ndarray:
    """(L, E): logarithms of shares, each layer with mean 0 and deviation 1; what was never seen counts half a time."""
    out = np.full(stats.chosen_LE.shape, -np.inf)
    for layer, n in enumerate(stats.experts):
        log_E = np.log(np.maximum(stats.chosen_LE[layer, :n], 0.5))
        out[layer, :n] = (log_E - log_E.mean()) / max(float(log_E.std()), 1e-6)
    return out
