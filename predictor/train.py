"""From a trace to a predictor. Knows splits, losses and when to stop; knows nothing of serving and of files it writes.

The split is by prompt: equal prompts stay together, so that no row of a validation or test prompt was seen. The split by
token (each row at random, neighbours of the same prompt on both sides) is there to show how much it flatters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from duoserve.core import Phase, Refusal, Route, Step
from duoserve.routers import Router
from predictor.baselines import Popularity, TraceMatching, matrix, normal
from predictor.features import Feature, features, path
from predictor.load import KINDS, Training
from predictor.model import (
    ExpertMLP,
    Head,
    HeadNet,
    Heads,
    MlpNet,
    Shape,
    head_features,
    mlp_sides,
    preattention_features,
)
from predictor.score import slot_recall
from traces.store import Recorded, Traces

TRAIN, VALIDATION, TEST = 0, 1, 2
CENTRES = 128  # matrices of a library for matching
Say = Callable[[str, float], None]  # what is done now, and which share of all work is behind it


class Options(NamedTuple):
    """Of a training run; checked by `check`."""

    kind: str = "head"
    epochs: int = 6
    seed: int = 0
    split: str = "prompt"
    validation: float = 0.1
    test: float = 0.1
    lead: int = 1
    units: int = 64
    tokens: int = 0  # of prompts to learn from, about; 0: all
    batch: int = 1024
    rate: float = 2e-3
    patience: int = 2  # epochs without a better validation recall


def check(options: Options, layers: int) -> None:
    """Refuse what cannot be trained."""

    def need(sound: bool, what: str, remedy: str) -> None:
        if not sound:
            raise Refusal("E_OPTION", what, remedy)

    need(options.kind in KINDS, f"no kind {options.kind!r}", f"kinds: {', '.join(KINDS)}")
    need(options.split in ("prompt", "token"), f"no split {options.split!r}", "give --split prompt or token")
    shares = options.validation > 0 and options.test > 0 and options.validation + options.test < 0.9
    what = f"validation {options.validation:g} and test {options.test:g} leave too little"
    need(shares, what, "each more than 0, together less than 0.9")
    need(1 <= options.lead < layers, f"a lead of {options.lead} with {layers} MoE layers", f"give 1 to {layers - 1}")
    need(1 <= options.epochs <= 10_000, f"{options.epochs} epochs", "give 1 to 10000")
    need(1 <= options.units <= 4096, f"{options.units} units", "give 1 to 4096")


class Data(NamedTuple):
    """Recorded sequences and, for each of their rows, what it is for: TRAIN, VALIDATION or TEST."""

    recorded: list[Recorded]
    part_S: list[torch.Tensor]
    shape: Shape
    routers: list[Router | None]
    inputs: bool  # whether decoder layers' inputs were recorded

    def rows(self, part: int) -> int:
        return sum(int((p == part).sum()) for p in self.part_S)


def train(traces: Traces, options: Options, say: Say) -> tuple[Any, Training]:
    """A predictor and what it was made from. The same seed on the same machine and threads gives the same weights."""
    check(options, len(traces.about.experts))
    if options.kind in ("head", "pre-attention") and not traces.about.hidden:
        raise Refusal("E_TRACE", f"{traces.folder} has no hidden states", "record it with `duoserve trace --hidden`")
    torch.manual_seed(options.seed)
    say("reading", 0.0)
    data = _read(traces, options)
    predictor = _LEARN[options.kind](data, options, say)
    say("measuring", 1.0)
    figures = [_figures(predictor, data, part) for part in (VALIDATION, TEST)]
    return predictor, _training(data, options, figures)


def shape_of(traces: Traces) -> Shape:
    """Of the model that was traced."""
    about = traces.about
    weight = next((r.weight_ED for r in traces.routers() if r is not None), None)
    dim = int(weight.shape[1]) if weight is not None else 0
    return Shape(about.fingerprint, tuple(about.experts), tuple(about.choices), dim)


def _read(traces: Traces, options: Options) -> Data:
    parts = _parts(traces, options)
    recorded: list[Recorded] = []
    of_rows: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(options.seed)
    hidden = options.kind in ("head", "pre-attention")
    for item in traces.sequences(_chosen(traces, parts, options), hidden=hidden):
        n = item.step.rows
        if options.split == "token":
            draw_S = torch.rand(n, generator=generator)
            part_S = torch.full((n,), TRAIN)
            part_S[draw_S < options.validation + options.test] = VALIDATION
            part_S[draw_S < options.test] = TEST
        else:
            part_S = torch.full((n,), parts[item.prompt.index])
        if n:
            recorded.append(item)
            of_rows.append(part_S)
    data = Data(recorded, of_rows, shape_of(traces), traces.routers(), bool(recorded and recorded[0].step.inputs))
    short = [name for name, part in (("train", TRAIN), ("validate", VALIDATION), ("test", TEST)) if not data.rows(part)]
    if short:
        what = f"{traces.folder} has {len(traces.prompts)} prompts, none to {short[0]} on"
        raise Refusal("E_TRACE", what, "record more prompts")
    return data


def _chosen(traces: Traces, parts: dict[int, int], options: Options) -> set[int]:
    """Which prompts are read: with a bound on the tokens, training prompts at random, so that no domain is left out."""
    learn = [p for p in traces.prompts if options.split == "token" or parts[p.index] == TRAIN]
    share = 1 - options.validation - options.test if options.split == "token" else 1.0
    order = np.random.default_rng(options.seed).permutation(len(learn))
    chosen = {index for index, part in parts.items() if options.split == "prompt" and part != TRAIN}
    tokens = 0.0
    for at in order.tolist():
        if options.tokens and tokens >= options.tokens:
            break
        chosen.add(learn[at].index)
        tokens += learn[at].n_tokens * share
    return chosen


def _parts(traces: Traces, options: Options) -> dict[int, int]:
    """Which prompt is for what."""
    from sklearn.model_selection import GroupShuffleSplit

    n = len(traces.prompts)
    groups = np.array([prompt.digest for prompt in traces.prompts])
    if len(set(groups)) < 3:
        raise Refusal("E_TRACE", f"{traces.folder} has {len(set(groups))} different prompts", "record at least 3")
    everything = np.arange(n)

    def cut(indices: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        splitter = GroupShuffleSplit(n_splits=1, test_size=share, random_state=seed)
        rest, taken = next(splitter.split(indices, groups=groups[indices]))
        return indices[rest], indices[taken]

    rest, test = cut(everything, options.test, options.seed)
    learn, validation = cut(rest, options.validation / (1 - options.test), options.seed)
    named = ((learn, TRAIN), (validation, VALIDATION), (test, TEST))
    return {int(i): part for indices, part in named for i in indices}


def _training(data: Data, options: Options, figures: list[dict[str, float]]) -> Training:
    digest = hashlib.sha256((data.shape.fingerprint or "").encode())
    seen: list[Recorded] = []
    for item, part_S in zip(data.recorded, data.part_S, strict=True):
        if bool((part_S == TEST).all()):
            continue
        seen.append(item)
        for ids in (item.step.ids_BS, *(route.ids_TK for route in item.step.routes)):
            digest.update(ids.numpy().tobytes() if ids is not None else b"")
        digest.update(part_S.numpy().tobytes())
    return Training(
        digest.hexdigest(),
        options.seed,
        options.split,
        data.rows(TRAIN),
        sorted({item.prompt.digest for item in seen}),
        sorted({item.prompt.domain for item in seen}),
        *figures,
    )


def _figures(predictor: Any, data: Data, part: int) -> dict[str, float]:
    """Slot recall and exact top-k by scikit-learn, averaged over the layers behind the first that are covered."""
    from sklearn.metrics import accuracy_score, recall_score

    recalls, exacts = [], []
    for layer in range(1, len(data.shape.experts)):
        if predictor.when(layer) is None:
            continue
        k, e = data.shape.choices[layer], data.shape.experts[layer]
        guessed, chosen = [], []
        for item, part_S in zip(data.recorded, data.part_S, strict=True):
            if not bool((part_S == part).any()):
                continue
            scores_TE = predictor.rank_rows(item.step, layer)[part_S == part]
            guessed.append(_indicators(scores_TE.topk(k, dim=1).indices, e))
            chosen.append(_indicators(_ids(item.step, layer)[part_S == part], e))
        truth, guess = np.concatenate(chosen), np.concatenate(guessed)
        recalls.append(float(recall_score(truth, guess, average="micro", zero_division=0)))
        exacts.append(float(accuracy_score(truth, guess)))
    return {"slot_recall": round(float(np.mean(recalls)), 6), "exact": round(float(np.mean(exacts)), 6)}


def _indicators(ids_TK: torch.Tensor, e: int) -> np.ndarray:
    array: np.ndarray = torch.zeros(len(ids_TK), e + 1, dtype=torch.bool).scatter_(1, ids_TK, True)[:, :e].numpy()
    return array


def _ids(step: Step, layer: int) -> torch.Tensor:
    route = step.route(layer)
    assert route is not None, layer
    return route.ids_TK


# Heads


def _learn_heads(data: Data, options: Options, say: Say) -> Heads:
    n = len(data.shape.experts)
    if options.kind == "pre-attention" and not data.inputs:
        raise Refusal(
            "E_TRACE", "the trace has no inputs of decoder layers", "record it with `duoserve trace --hidden`"
        )
    heads: list[Head | None] = []
    for layer in range(n):
        pre = options.kind == "pre-attention"
        wanted = preattention_features(layer) if pre else head_features(layer, options.lead, data.inputs)
        told = _told(say, f"layer {layer}", layer / n, 1 / n)
        heads.append(_learn_head(data, options, layer, wanted, told) if wanted else None)
    name = options.kind if options.lead == 1 else f"{options.kind} (lead {options.lead})"
    return Heads(name, data.shape, options.lead, heads)


def _told(say: Say, what: str, start: float, share: float) -> Say:
    return lambda detail, done: say(f"{what}, {detail}", start + share * done)


def _learn_head(data: Data, options: Options, layer: int, wanted: tuple[Feature, ...], say: Say) -> Head:
    torch.manual_seed(options.seed * 1000 + layer)
    parts = [_matrix(data, layer, wanted, part) for part in (TRAIN, VALIDATION)]
    (x_TN, ids_TK), (x_VN, ids_VK) = parts
    e = data.shape.experts[layer]
    y_TE = torch.from_numpy(_indicators(ids_TK, e))
    std_N, mean_N = torch.std_mean(x_TN, dim=0)
    net = HeadNet(*_base(data, layer, wanted), options.units, mean_N, std_N.clamp_min(1e-3))
    nn.init.constant_(net.linear.bias, -2.0)  # a gate's logits lie around 0, few experts are chosen
    generator = torch.Generator().manual_seed(options.seed)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.randperm(len(x_TN), generator=generator).split(options.batch):
            yield x_TN[rows], y_TE[rows].float()

    def recall() -> float:
        return slot_recall(torch.cat([net(x) for x in x_VN.split(8192)]), ids_VK)

    _fit(net, batches, math.ceil(len(x_TN) / options.batch), recall, options, say)
    stored = {name: t.to(torch.bfloat16).float() for name, t in net.folded().items()}  # as it will be read again
    return Head(wanted, **stored)


def _matrix(data: Data, layer: int, wanted: tuple[Feature, ...], part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, columns) and the ids chosen, (N, K), of all rows of one part; rows with infinities are left out."""
    rows, ids = [], []
    for item, part_S in zip(data.recorded, data.part_S, strict=True):
        mask_S = part_S == part
        if bool(mask_S.any()):
            rows.append(features(item.step, wanted, data.shape.experts, data.shape.dim)[mask_S])
            ids.append(_ids(item.step, layer)[mask_S])
    x_TN, ids_TK = torch.cat(rows), torch.cat(ids)
    sound_T = x_TN.isfinite().all(dim=1)
    return (x_TN, ids_TK) if bool(sound_T.all()) else (x_TN[sound_T], ids_TK[sound_T])


def _base(data: Data, layer: int, wanted: tuple[Feature, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's gate as a matrix over the features, (E, columns), and its bias: what training begins from."""
    e, router = data.shape.experts[layer], data.routers[layer]
    sides = [f.width(data.shape.experts, data.shape.dim) for f in wanted]
    base_EN, base_E = torch.zeros(e, sum(sides)), torch.zeros(e)
    if router is not None and sides[0] == router.weight_ED.shape[1]:
        base_EN[:, : sides[0]] = router.weight_ED.float()
        base_E = router.bias_E.float() if router.bias_E is not None else base_E
    return base_EN, base_E


def _fit(
    net: nn.Module,
    batches: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]],
    per_epoch: int,
    recall: Callable[[], float],
    options: Options,
    say: Say,
) -> None:
    """Multi-label binary cross-entropy by AdamW; keeps the weights with the best validation recall."""
    steps = options.epochs * per_epoch
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps + 1, pct_start=0.05)
    best, best_state, since, done = -1.0, {}, 0, 0
    for epoch in range(options.epochs):
        net.train()
        for x_TN, y_TE in batches():
            loss = F.binary_cross_entropy_with_logits(net(x_TN), y_TE)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            say(f"epoch {epoch + 1} of {options.epochs}, recall {max(best, 0):.3f}", done / steps)
        net.eval()
        with torch.no_grad():
            found = recall()
        since = 0 if found > best else since + 1
        if found > best:
            best, best_state = found, {name: value.clone() for name, value in net.state_dict().items()}
        if since >= options.patience:
            break
    net.load_state_dict(best_state)
    net.eval()


# ExpertMLP


def _learn_mlp(data: Data, options: Options, say: Say) -> ExpertMLP:
    popularity_LE, affinity_LEE = statistics(data, options.lead)
    sides = mlp_sides(data.shape)
    net = MlpNet(sides[0], sides[-1])
    learn, held = _joined(data, TRAIN), _joined(data, VALIDATION)
    layers = range(options.lead, len(data.shape.experts))
    per_layer = max(2, options.batch // len(layers))
    generator = torch.Generator().manual_seed(options.seed)

    def state(step: Step, layer: int) -> torch.Tensor:
        return path(step, layer, popularity_LE, affinity_LEE, options.lead, max(data.shape.choices))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.randperm(learn.rows, generator=generator).split(per_layer):
            some = _picked(learn, rows)
            targets = [torch.from_numpy(_indicators(_ids(some, n), sides[-1])).float() for n in layers]
            if len(rows) * len(layers) > 1:  # a batch of one has no variance
                yield torch.cat([state(some, n) for n in layers]), torch.cat(targets)

    def recall() -> float:
        few = _picked(held, torch.arange(min(held.rows, 20_000)))
        found = [slot_recall(net(state(few, n))[:, : data.shape.experts[n]], _ids(few, n)) for n in layers]
        return float(np.mean(found))

    _fit(net, batches, math.ceil(learn.rows / per_layer), recall, options, say)
    linears = [(w.to(torch.bfloat16).float(), b.to(torch.bfloat16).float()) for w, b in net.folded()]
    name = "mlp" if options.lead == 1 else f"mlp (lead {options.lead})"
    return ExpertMLP(name, data.shape, options.lead, popularity_LE, affinity_LEE, linears)


def statistics(data: Data, lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Popularity (L, E), each layer's sum 1, and affinity (L, E, E): P(j at l + lead | i at l), of the training rows."""
    n, e = len(data.shape.experts), max(data.shape.experts)
    step = _joined(data, TRAIN)
    hot_LTE = [torch.from_numpy(_indicators(_ids(step, layer), e)).float() for layer in range(n)]
    popularity_LE = normal(torch.stack([hot_TE.sum(dim=0) for hot_TE in hot_LTE]))
    affinity_LEE = torch.zeros(n, e, e)
    for layer in range(n - lead):
        together_EE = hot_LTE[layer].T @ hot_LTE[layer + lead]
        affinity_LEE[layer] = together_EE / hot_LTE[layer].sum(dim=0).clamp_min(1)[:, None]
    return popularity_LE, affinity_LEE


def _joined(data: Data, part: int) -> Step:
    """All rows of one part as if of one pass; for features that look at one row only."""
    masks = [part_S == part for part_S in data.part_S]
    chosen = [(item.step, mask) for item, mask in zip(data.recorded, masks, strict=True) if bool(mask.any())]
    step = Step(0, Phase.PREFILL, sum(int(mask.sum()) for _, mask in chosen))
    for layer in range(len(data.shape.experts)):
        routes = [(s.routes[layer], mask) for s, mask in chosen]
        ids_TK = torch.cat([route.ids_TK[mask] for route, mask in routes])
        step.routes.append(Route(layer, ids_TK, torch.cat([route.weights_TK[mask] for route, mask in routes])))
    return step


def _picked(step: Step, rows: torch.Tensor) -> Step:
    routes = [Route(r.layer, r.ids_TK[rows], r.weights_TK[rows]) for r in step.routes]
    return Step(0, Phase.PREFILL, len(rows), routes=routes)


# Statistics


def _learn_popularity(data: Data, options: Options, say: Say) -> Popularity:
    predictor = Popularity(data.shape)
    for step in _whole(data):
        predictor.learn(step)
    return predictor


def _learn_matching(data: Data, options: Options, say: Say) -> TraceMatching:
    from sklearn.cluster import KMeans

    matrices_CLE = torch.stack([normal(matrix(step, data.shape)) for step in _whole(data)])
    if len(matrices_CLE) > CENTRES:
        say("clustering", 0.5)
        means = KMeans(CENTRES, n_init=1, random_state=options.seed).fit(matrices_CLE.flatten(1).numpy())
        centres = torch.from_numpy(means.cluster_centers_).float()
        matrices_CLE = centres.view(CENTRES, *matrices_CLE.shape[1:])
    return TraceMatching(data.shape, matrices_CLE.to(torch.bfloat16).float(), options.lead)


def _whole(data: Data) -> Sequence[Step]:
    """The sequences learned from: those with a row to train on."""
    return [item.step for item, part in zip(data.recorded, data.part_S, strict=True) if bool((part == TRAIN).any())]


_LEARN: dict[str, Callable[[Data, Options, Say], Any]] = {
    "head": _learn_heads,
    "pre-attention": _learn_heads,
    "mlp": _learn_mlp,
    "matching": _learn_matching,
    "popularity": _learn_popularity,
}
