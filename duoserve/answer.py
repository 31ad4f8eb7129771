"""One call of transformers' `generate`: what may be asked of it, its text while it is made, and what came back. Knows
options, tokens and seconds; knows nothing of how a model is run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from duoserve.core import Refusal, nearest
from duoserve.sizing import CACHE
from duoserve.stopping import special_ids

DEFAULT_NEW_TOKENS = 512
_OBJECTS = {"logits_processor", "stopping_criteria", "generation_config", "assistant_model", "past_key_values", CACHE}


@dataclass(frozen=True)
class Answer:
    """What came back, and how long it took. `finish` is "stop", "length" or "cancelled".

    `ttft_s`: seconds from the call to the first token. `decode_tok_s`: tokens after the first, per second; None where
    there was only one.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tok_s: float | None
    finish: str
    token_ids: list[int] = field(default_factory=list, repr=False)
    reasoning: str = ""  # what the model wrote for itself, where somebody told it apart

    def __str__(self) -> str:
        return self.text


class Meter(transformers.TextStreamer):
    """Passes text on as it becomes whole words or lines, and notes when tokens came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None, visible: Collection[int] = ()):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=not visible)
        self._hidden = torch.tensor(sorted(special_ids(tokenizer) - set(visible)) if visible else [])
        self._on_text = on_text
        self._began = self._first = self._latest = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._latest = time.perf_counter()
            self._first = self._first or self._latest
            value = self._shown(value)
        super().put(value)

    def decoded(self, ids: torch.Tensor) -> str:
        return str(self.tokenizer.decode(self._shown(ids), **self.decode_kwargs))

    def _shown(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[~torch.isin(ids, self._hidden.to(ids))] if len(self._hidden) else ids

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._on_text and text:
            self._on_text(text)

    @property
    def ttft_s(self) -> float:
        return self._first - self._began if self._first else 0.0

    def rate(self, n: int) -> float | None:
        return (n - 1) / (self._latest - self._first) if n > 1 and self._latest > self._first else None


class Cancel(transformers.StoppingCriteria):
    def __init__(self, cancelled: Callable[[], bool]):
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._cancelled(), dtype=torch.bool, device=input_ids.device)


def asked_tokens(options: dict[str, Any], prompt_tokens: int) -> int | None:
    """New tokens asked for, in whichever of transformers' ways; None where nothing was said."""
    config = options.get("generation_config")
    asked = options.pop("max_new_tokens", None)
    if asked is None and options.get("max_length") is not None:
        asked = max(0, options.pop("max_length") - prompt_tokens)
    if asked is None and config is not None:
        asked = config.max_new_tokens
    return asked


def check_options(options: dict[str, Any]) -> None:
    known = {name for name in transformers.GenerationConfig().to_dict() if not name.startswith("_")} | _OBJECTS
    for name in options:
        if name not in known:
            raise Refusal("E_OPTION", f"unknown generation option {name!r}", nearest(name, sorted(known)))
    if options.get("num_return_sequences", 1) != 1:
        n = options["num_return_sequences"]
        raise Refusal(
            "E_OPTION", f"num_return_sequences={n}, an Answer holds 1", "call generate(input_ids=...) for tensors"
        )
    if options.get("return_dict_in_generate"):
        raise Refusal(
            "E_OPTION", "an Answer holds 0 scores", "call generate(input_ids=...) for transformers' own output"
        )


def refused(error: ValueError) -> Refusal:
    """What transformers says of options before its first pass."""
    reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
    what = f"transformers refuses these generation options ({reason})"
    return Refusal("E_OPTION", what, "correct the option, or the checkpoint's generation_config.json")


def room(ctx: int, prompt_tokens: int, asked: int | None) -> int:
    """How many tokens may be made: as many as asked, or as fit."""
    left = ctx - prompt_tokens
    if left < 1:
        what = f"the prompt has {prompt_tokens} tokens, the context {ctx}"
        raise Refusal("E_CTX", what, "shorten it, or load with a larger --ctx", 4)
    if asked is not None and asked < 1:
        raise Refusal("E_OPTION", f"max_new_tokens={asked} leaves nothing to answer with", "ask for at least 1")
    return min(left, DEFAULT_NEW_TOKENS if asked is None else asked)


def ends(config: transformers.GenerationConfig) -> list[int]:
    """Tokens that end an answer, by a model's generation config."""
    eos = config.eos_token_id
    return list(eos) if isinstance(eos, list) else [] if eos is None else [int(eos)]


def padding(config: transformers.GenerationConfig) -> int | None:
    """The token that fills up shorter rows: its own, else one that ends an answer."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    return next(iter(ends(config)), None)
