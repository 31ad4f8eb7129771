"""The demo with its own predictor: the same tokens whatever guesses, over real prompts; its bytes in the budget; what a
person sees of the decision. The oracle and its opposite replay a recorded run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import duoserve
from duoserve import engine as engines
from duoserve.benefit import BLOCK, BLOCKS, WINDOW
from duoserve.core import Refusal, Step
from predictor.baselines import AlwaysWrong, Gate, Oracle
from predictor.load import load as load_predictor
from traces.record import Recorder, about
from traces.store import Traces

PROMPTS = Path(__file__).parent.parent / "benchmarks" / "prompts" / "documentation.jsonl"
HEAD = engines.DEMO / "predictor"
LONGEST_TRIAL = BLOCKS * len(BLOCK) * WINDOW  # tokens: by then the switch has decided, and no next trial has
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": -1}


def prompts(n: int) -> list[str]:
    return [json.loads(line)["text"] for line in PROMPTS.read_text().splitlines()[:n]]


def recorded(engine: Any, text: str, folder: Path) -> tuple[list[int], Step]:
    """The answer's tokens, and the run as a trace gives it back."""
    experts = [layer.n_experts for layer in engine.store.layers]
    recorder = Recorder(
        folder, about(engine.store.fingerprint, engine.dtype, experts, [4] * len(experts), False), engine.routers()
    )
    engine.runtime.observers.append(recorder)
    tokens = engine.generate(text, **GREEDY).token_ids
    engine.runtime.observers.clear()
    recorder.close()
    (item,) = Traces(folder).sequences()
    return tokens, item.step


def same_tokens(cache: Path, tmp_path: Path, n: int) -> dict[str, int]:
    """Asserts them; returns how many guesses were needed and there, by who guessed."""
    ready = {}
    with duoserve.load(None, predictor="none", cache_dir=str(cache)) as engine:
        experts = [layer.n_experts for layer in engine.store.layers]
        head, gate = load_predictor(HEAD), Gate(engine.routers())
        for number, text in enumerate(prompts(n)):
            engine.predict(None)
            want, step = recorded(engine, text, tmp_path / f"{number}")
            guessing = {
                "head": head,
                "gate": gate,
                "oracle": Oracle([step], experts),
                "wrong": AlwaysWrong([step], experts),
            }
            for name, predictor in guessing.items():
                engine.predict(predictor, always=True)
                before = engine.runtime.transfer.counts()
                assert engine.generate(text, **GREEDY).token_ids == want, (number, name)
                after = engine.runtime.transfer.counts()
                ready[name] = ready.get(name, 0) + after.ready + after.late - before.ready - before.late
                assert name != "oracle" or after.misses - before.misses <= 4 * len(experts) * len(want)
            engine.runtime.cache.check()
    return ready


def test_the_demo_answers_alike_whatever_guesses(cache: Path, tmp_path: Path) -> None:
    ready = same_tokens(cache, tmp_path, 8)
    assert ready["oracle"] > 0 and ready["head"] > 0, ready


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_answers_200_prompts_alike_whatever_guesses(cache: Path, tmp_path: Path) -> None:
    ready = same_tokens(cache, tmp_path, 200)
    print(ready)
    assert ready["oracle"] > ready["wrong"], ready


def test_the_demo_guesses_by_itself_and_says_what_it_decided(cache: Path) -> None:
    with duoserve.load(None, cache_dir=str(cache)) as engine:
        engine.generate("A list is", **GREEDY | {"max_new_tokens": LONGEST_TRIAL + 1})
        stats = engine.stats()
    said = stats["prediction"]
    assert said["predictor"] == "head" and said["decision"] in ("on", "off") and said["trials"] == 1
    assert said["with_s"] > 0 and said["without_s"] > 0
    assert said["tokens_with"] + said["tokens_without"] == LONGEST_TRIAL


def test_the_predictors_bytes_are_in_the_budget(cache: Path) -> None:
    n_bytes = load_predictor(HEAD).n_bytes
    with duoserve.load(None, predictor="none", cache_dir=str(cache)) as engine:
        budget, slots = engine.plan.budget_bytes, engine.plan.slots
        assert engine.stats()["used"]["predictor_bytes"] == 0
    with duoserve.load(None, budget=budget, cache_dir=str(cache)) as engine:
        assert engine.plan.predictor_bytes == engine.stats()["used"]["predictor_bytes"] == n_bytes > 0
        assert engine.plan.planned_bytes <= budget
        assert engine.plan.slots == slots - -(-n_bytes // engine.plan.slot_bytes)


def test_another_models_predictor_is_refused(toy: Any, cache: Path) -> None:
    with pytest.raises(Refusal, match=r"E_PREDICTOR_MODEL: .*[0-9a-f]{32}.*[0-9a-f]{32}"):
        duoserve.load(toy("qwen3_moe"), predictor=HEAD, cache_dir=str(cache))


def test_a_head_ranks_one_row_as_it_ranks_many(cache: Path, tmp_path: Path) -> None:
    """The numpy path of decode against the torch path of training."""
    head, steps = load_predictor(HEAD), []
    with duoserve.load(None, predictor=head, cache_dir=str(cache)) as engine:
        kept: list[tuple[Any, ...]] = []
        rank = head.rank

        def both(step: Step, layer: int) -> torch.Tensor:
            kept.append((rank(step, layer), head.rank_rows(step, layer)[0]))
            return kept[-1][0]

        head.rank = both  # type: ignore[method-assign]
        engine.predict(head, always=True)
        engine.generate("A list is", **GREEDY)
        steps = kept
    assert len(steps) > 50
    for one, many in steps:
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)
