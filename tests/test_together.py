"""Generations that meet at the experts: each answers as if it were alone, whoever joins, leaves, is cancelled or fails."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

import duoserve
from duoserve.core import Predictor
from duoserve.moe import Cancelled
from duoserve.together import Together
from predictor.baselines import Gate
from predictor.load import load as load_predictor

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss", "qwen3_next"]


def generation(engine: Any, prompt: list[int], new: int) -> Any:
    """A generation as a job: the ids it made."""
    ids_1S = torch.tensor([prompt])

    def work() -> list[int]:
        out = engine.model.generate(
            input_ids=ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        return out[0, len(prompt) :].tolist()

    return work


class Results(dict[int, Any]):
    """What became of jobs, by number."""

    def of(self, number: int) -> Any:
        def over(result: Any, error: BaseException | None) -> None:
            assert number not in self, "told twice"
            self[number] = error if error is not None else result

        return over


def prompts(n: int, seed: int) -> list[tuple[list[int], int]]:
    rng = random.Random(seed)
    return [
        ([rng.randrange(3, toys.VOCAB) for _ in range(rng.choice((1, 3, 9, 30)))], rng.randint(1, 12)) for _ in range(n)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_answers_as_if_alone(family: str, tmp_path: Path) -> None:
    folder = toys.make(tmp_path / "model", family)
    asked = prompts(7, seed=1)
    with duoserve.load(folder, dtype="float32", budget="half", cache_dir=str(tmp_path / "cache")) as engine:
        with torch.inference_mode():
            want = [generation(engine, *each)() for each in asked]
            together, results = Together(engine.runtime), Results()
            for number, each in enumerate(asked):  # one joins with every round
                together.add(generation(engine, *each), results.of(number))
                together.round()
            while together.jobs:
                together.round()
        assert [results[n] for n in range(len(asked))] == want
        engine.runtime.cache.check()


@pytest.mark.parametrize("guessing", ["head", "gate"])
def test_the_demo_answers_the_same_with_company_and_guesses(guessing: str) -> None:
    texts = ["What is Git?", "How do I copy a file?", "What does the command ls do?"]
    with duoserve.load(None, predictor="none") as engine, torch.inference_mode():
        asked = [(engine.encode(text)[0].tolist(), 12) for text in texts]
        want = [generation(engine, *each)() for each in asked]
        head = Path(duoserve.__file__).parent / "demo" / "predictor"
        predictor: Predictor = load_predictor(head) if guessing == "head" else Gate(engine.routers())
        engine.predict(predictor, always=True)
        together, results = Together(engine.runtime), Results()
        for number, each in enumerate(asked):
            together.add(generation(engine, *each), results.of(number))
        while together.jobs:
            together.round()
        assert [results[n] for n in range(len(asked))] == want
        assert engine.runtime.ahead.error is None
        assert engine.stats()["guesses_ready"] > 0


def test_the_cancelled_and_the_failing_leave_the_others_alone(tmp_path: Path) -> None:
    folder = toys.make(tmp_path / "model", "qwen3_moe")
    asked = prompts(4, seed=2)
    with duoserve.load(folder, dtype="float32", budget="half", cache_dir=str(tmp_path / "cache")) as engine:
        with torch.inference_mode():
            want = [generation(engine, *each)() for each in asked]
            together, results = Together(engine.runtime), Results()
            jobs = [together.add(generation(engine, p, 12), results.of(n)) for n, (p, _) in enumerate(asked)]
            together.add(generation(engine, [5] * 300, 1), results.of(99))  # more than the context holds
            together.round()
            jobs[1].cancel()
            together.round()
            assert isinstance(results[1], Cancelled)
            while together.jobs:
                together.round()
        assert isinstance(results[99], Exception)
        for n in (0, 2, 3):
            assert results[n][: asked[n][1]] == want[n]
        engine.runtime.cache.check()
