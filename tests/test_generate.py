"""Routes that no model made: they have the figures that were published, or those of the trace they were fitted to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_traces import recorder

from duoserve.core import Phase, When
from predictor.stated import StatedPredictor
from traces.generate import (
    GPT_OSS,
    GPT_OSS_GOALS,
    MIXTRAL,
    MIXTRAL_GOALS,
    QWEN3,
    QWEN3_GOALS,
    Goal,
    Law,
    Shape,
    figures,
    fit,
    fit_sequences,
    fit_trace,
    generate,
    passes,
    replayed,
)
from traces.store import Traces

SHAPE = Shape((128,) * 12, (8,) * 12)
UNEVEN = Shape((8, 6, 8), (2, 3, 2))


def measured(law: Law, shape: Shape, sequences: int = 6, tokens: int = 512) -> dict[str, float]:
    return figures([generate(law, shape, tokens, seed) for seed in range(100, 100 + sequences)], shape)


# Tolerances: what the sources' own figures differ by between texts, or two errors of the fit.
@pytest.mark.parametrize(
    ("law", "shape", "goals"),
    [
        (QWEN3, SHAPE, QWEN3_GOALS),
        (MIXTRAL, Shape((8,) * 32, (2,) * 32), MIXTRAL_GOALS),
        (GPT_OSS, Shape((128,) * 12, (4,) * 12), GPT_OSS_GOALS),
    ],
    ids=["qwen3", "mixtral", "gpt-oss"],
)
def test_generated_routes_have_the_published_figures(law: Law, shape: Shape, goals: dict[str, Goal]) -> None:
    """Measured with `stats`, on sequences that the fit has not seen."""
    found = measured(law, shape)
    for name, goal in goals.items():
        assert found[name] == pytest.approx(goal.value, abs=2 * goal.within), (name, found)


def test_a_prompt_touches_as_many_experts_as_real_ones_do() -> None:
    """peers.md: 512 tokens touch 72 to 95 of 128 experts; a router without habits would touch all."""
    assert 72 <= measured(QWEN3, SHAPE)["touched"] <= 95
    assert measured(Law(), SHAPE)["touched"] == 128


def test_layers_depend_on_each_other_because_tokens_have_kinds() -> None:
    shape = Shape((32,) * 4, (4,) * 4)
    alike, apart = (measured(Law(0.0, 0.0, kind, 0.0, 0.0), shape, 2) for kind in (3.0, 0.0))
    assert alike["affinity"] > apart["affinity"] + 0.05


def test_a_law_of_zeros_is_a_uniform_router() -> None:
    found = measured(Law(), Shape((16,) * 4, (2,) * 4))
    assert found["repeated_1"] == pytest.approx(2 / 16, abs=0.01)
    assert found["lru_50"] == pytest.approx(0.5, abs=0.04)


def test_the_same_seed_makes_the_same_routes_and_another_seed_another_document() -> None:
    one, same, other = (generate(QWEN3, UNEVEN, 40, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one[0], other[0])


def test_choices_are_distinct_experts_of_their_layer() -> None:
    for layer, ids in enumerate(generate(QWEN3, UNEVEN, 50, 0)):
        assert ids.shape == (50, UNEVEN.choices[layer])
        assert ids.max() < UNEVEN.experts[layer] and ids.min() >= 0
        assert all(len(set(row)) == UNEVEN.choices[layer] for row in ids.tolist())


def test_passes_have_every_choice_once_and_in_order() -> None:
    made = [generate(QWEN3, UNEVEN, 12, seed) for seed in (3, 4)]
    steps = list(passes(made, prompt=9))
    assert [(s.phase, s.rows, s.batch) for s in steps] == [(Phase.PREFILL, 18, 2)] + [(Phase.DECODE, 2, 2)] * 3
    first, last = steps[0].routes[1].ids_TK.numpy(), steps[-1].routes[1].ids_TK.numpy()
    assert np.array_equal(first, np.concatenate([ids[1][:9] for ids in made]))
    assert np.array_equal(last, np.stack([ids[1][11] for ids in made]))


@pytest.mark.parametrize("recall", [0.0, 0.6, 1.0])
def test_a_stated_predictor_reaches_its_recall(recall: float) -> None:
    shape = Shape((16,) * 3, (4,) * 3)
    steps = list(passes([generate(Law(), shape, 300, 0)], prompt=100))
    predictor = StatedPredictor(steps, shape.experts, recall)
    assert predictor.when(0) is None and predictor.when(1) is When.ROUTE
    named = right = 0
    for step in steps:
        true_TK = step.routes[2].ids_TK
        guessed_TE = predictor.rank_rows(step, 2)
        assert torch.equal(guessed_TE, predictor.rank_rows(step, 2))
        right += int((guessed_TE.gather(1, true_TK) > 0).sum())
        named += true_TK.numel()
        assert recall == 0 or bool(((guessed_TE > 0).sum(dim=1) == 4).all())
    assert right / named == pytest.approx(recall, abs=0.03)


def test_a_fit_finds_a_law_again() -> None:
    shape, law = Shape((32,) * 3, (4,) * 3), Law(0.8, 1.0, 1.0, 0.9, 0.4)
    wanted = measured(law, shape, 5, 100)
    goals = {n: Goal(wanted[n], 0.03 * wanted[n]) for n in ("needed", "repeated_1", "repeated_8", "touched")}
    found = measured(fit(goals, shape, 100, Law(0.3, 0.3, 0.3, 0.3, 0.3), evaluations=40), shape, 5, 100)
    for name, goal in goals.items():
        assert found[name] == pytest.approx(goal.value, rel=0.1), name


def follows(tokens: int, seed: int, layers: int = 4, experts: int = 16, k: int = 2) -> list[np.ndarray]:
    """Another kind of router: popular experts, some of the last token's, and mostly the followers of what the layer before
    chose."""
    shared, rng = np.random.default_rng(5), np.random.default_rng(seed)
    follower_LE = np.array([shared.permutation(experts) for _ in range(layers)])
    weights_LE = np.array([shared.permutation(1 / (np.arange(experts) + 6.0)) for _ in range(layers)])
    ids = np.zeros((layers, tokens, k), np.int64)
    for token in range(tokens):
        for layer in range(layers):
            score_E = np.log(weights_LE[layer]) + rng.gumbel(size=experts)
            if layer:
                score_E[follower_LE[layer][ids[layer - 1, token]]] += 2.5
            if token:
                score_E[ids[layer, token - 1]] += 0.8
            ids[layer, token] = np.argsort(-score_E)[:k]
    return list(ids)


def test_a_fitted_generator_has_popularity_repeats_and_affinity_of_what_it_was_fitted_to() -> None:
    """Of routes that another mechanism made, on sequences that the fit has not seen: popularity and repeats within a fifth,
    affinity within a third."""
    shape, unseen = Shape((16,) * 4, (2,) * 4), range(50, 56)
    fitted = fit_sequences([follows(100, seed) for seed in range(5)], shape, evaluations=60)
    wanted = figures([follows(100, seed) for seed in unseen], shape)
    found = figures([generate(fitted.law, shape, 100, seed, fitted.popularity_LE) for seed in unseen], shape)
    for name in ("needed", "top", "repeated_1", "repeated_8"):
        assert found[name] == pytest.approx(wanted[name], rel=0.2), (name, found, wanted, fitted.law)
    assert wanted["affinity"] > 0.25
    assert found["affinity"] == pytest.approx(wanted["affinity"], rel=0.34), (found, wanted, fitted.law)


def test_a_traces_habits_are_learned(toy: Any, load: Any, tmp_path: Path) -> None:
    """Recorded from a model that runs; what is generated then has the trace's own figures."""
    with load(toy("mixtral"), budget="1GiB") as engine:
        watching = recorder(engine, tmp_path / "t")
        for seed in range(6):
            watching.expect(str(seed), "test")
            ids_1S = torch.randint(0, 128, (1, 60), generator=torch.Generator().manual_seed(seed))
            engine.generate(input_ids=ids_1S, max_new_tokens=20, eos_token_id=-1)
        watching.close(None, None)
    traces = Traces(tmp_path / "t")
    fitted = fit_trace(traces, evaluations=50)
    made = [generate(fitted.law, fitted.shape, fitted.tokens, seed, fitted.popularity_LE) for seed in range(5)]
    found = figures(made, fitted.shape)
    for name in ("needed", "repeated_1", "repeated_8", "lru_50"):
        assert found[name] == pytest.approx(fitted.goals[name].value, rel=0.15), (name, found, fitted)
    steps = list(replayed(next(traces.sequences())))
    assert steps[0].phase is Phase.PREFILL and steps[0].rows == 60
    assert all(step.phase is Phase.DECODE and step.rows == 1 for step in steps[1:])
