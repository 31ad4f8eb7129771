"""How one request's next token is drawn: bias, penalties, temperature, truncation, a seed of its own, and the logprobs of
what was drawn. A logits processor that leaves one token possible, so that transformers' own loop takes it. Knows logits and
token ids; knows nothing of text or other requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from duoserve.settings import GREEDY_BELOW


@dataclass(frozen=True)
class Sampling:
    """What a request may ask. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep all; `logprobs`: alternatives to
    report with each token, None for no logprobs at all. Penalties as OpenAI defines them, `repetition_penalty` as
    transformers does.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None


class Logprob(NamedTuple):
    """Of one token, by the model's own distribution, before anything above changed it; natural logarithms."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # likeliest first


class Draw(LogitsProcessor):
    """Draws the tokens of one sequence; `drawn` has the logprobs where they were asked for.

    `mask`: where given, is told each token and says which may come next (a grammar), as a bool tensor (V,). A model's
    vocabulary may be larger than the tokenizer's that the mask knows: what it does not speak of may not come.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: int, mask: Any = None):
        self._sampling, self._prompt, self._mask = sampling, prompt_tokens, mask
        self._generator: torch.Generator | None = None
        self._warpers = _warpers(sampling)
        self._repetition = None
        if sampling.repetition_penalty != 1.0:
            self._repetition = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        self.drawn: list[Logprob] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(1, S) so far and logits (1, V) -> scores (1, V), finite for the drawn token alone."""
        changed = self._changed(input_ids, scores)
        token = (
            int(changed.argmax()) if self._sampling.temperature < GREEDY_BELOW else self._sampled(input_ids, changed)
        )
        if self._sampling.logprobs is not None:
            self.drawn.append(logprob_of(scores[0], token, self._sampling.logprobs))
        out = torch.full_like(scores, -torch.inf)
        out[0, token] = 0.0
        return out  # type: ignore[return-value]

    def _changed(self, input_ids: torch.Tensor, scores_1V: torch.Tensor) -> torch.Tensor:
        asked, changed = self._sampling, scores_1V
        if self._repetition is not None:
            changed = self._repetition(input_ids, changed)
        if asked.presence_penalty or asked.frequency_penalty:
            times_V = torch.bincount(input_ids[0, self._prompt :], minlength=changed.shape[1])[: changed.shape[1]]
            changed = changed - asked.frequency_penalty * times_V - asked.presence_penalty * (times_V > 0)
        if asked.bias:
            changed = changed.clone()
            for token, bias in asked.bias.items():
                changed[0, token] += bias
        if self._mask is not None:
            spoken_of = self._mask(input_ids[0, self._prompt :])[: changed.shape[1]]
            allowed_V = torch.zeros(changed.shape[1], dtype=torch.bool)
            allowed_V[: len(spoken_of)] = spoken_of
            changed = changed.masked_fill(~allowed_V.to(changed.device), -torch.inf)
        return changed

    def _sampled(self, input_ids: torch.Tensor, scores_1V: torch.Tensor) -> int:
        for warper in self._warpers:
            scores_1V = warper(input_ids, scores_1V)
        if self._generator is None:
            self._generator = torch.Generator(device=scores_1V.device)
            if self._sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._sampling.seed)
        return int(torch.multinomial(scores_1V.softmax(dim=-1), 1, generator=self._generator))


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    if sampling.temperature not in (0.0, 1.0):
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def logprob_of(logits_V: torch.Tensor, token: int, alternatives: int) -> Logprob:
    """Of one token under these logits."""
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    best = logprobs_V.topk(min(alternatives, logprobs_V.shape[0])) if alternatives else None
    top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else []
    return Logprob(token, float(logprobs_V[token]), top)
