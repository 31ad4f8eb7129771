"""From the fields of a request to what the service is asked. Knows both; knows nothing of replies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from duoserve.api.errors import ApiError
from duoserve.api.responses_input import ResponsesRequest
from duoserve.api.schema import Sampled
from duoserve.engine import Engine
from duoserve.sampling import Sampling

SEED_BITS = 2**63


def sampling(asked: Sampled | ResponsesRequest, engine: Engine, logprobs: int | None = None) -> Sampling:
    """What is not said is the model's own, as `duoserve chat` has it."""
    own = engine.model.generation_config
    given = asked.model_dump(exclude_none=True)

    def value(name: str, neutral: Any) -> Any:
        theirs = getattr(own, name, None)
        return given.get(name, neutral if theirs is None or not own.do_sample else theirs)

    biases = asked.biases if isinstance(asked, Sampled) else {}
    vocabulary = engine.model.config.get_text_config().vocab_size
    if biases and max(biases) >= vocabulary:
        raise ApiError(
            400,
            f"logit_bias: token {max(biases)} is beyond the vocabulary of {vocabulary}",
            param="logit_bias",
            code="invalid_value",
        )
    return Sampling(
        temperature=float(given.get("temperature", (own.temperature or 1.0) if own.do_sample else 0.0)),
        top_p=float(value("top_p", 1.0)),
        top_k=int(value("top_k", 0)),
        min_p=float(value("min_p", 0.0)),
        repetition_penalty=float(given.get("repetition_penalty", own.repetition_penalty or 1.0)),
        presence_penalty=float(given.get("presence_penalty", 0.0)),
        frequency_penalty=float(given.get("frequency_penalty", 0.0)),
        seed=given.get("seed"),
        bias=biases,
        logprobs=logprobs,
    )


def seeded(base: Sampling, choice: int) -> Sampling:
    """Each choice draws by a seed of its own."""
    if base.seed is None or choice == 0:
        return base
    return replace(base, seed=(base.seed + choice + SEED_BITS) % (2 * SEED_BITS) - SEED_BITS)
