"""A conversation that keeps its keys and values between turns, so that only new tokens are read again. Knows messages, one
engine and what a model writes for itself; knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers

from duoserve.api.calls import Content, Delta, Parser, Reasoning
from duoserve.api.tools import plain_reader
from duoserve.engine import Answer, Engine
from duoserve.sizing import CACHE


class Conversation:
    """Turns of one chat. `messages` is what the template sees: {"role", "content"}, oldest first. What a model reasoned
    before an answer is told apart and not read again.

    Reading only what is new computes old tokens in another batch shape than reading all at once would; in bfloat16 an
    answer may therefore differ from `Engine.generate` on the same messages. `reuse=False` reads all, every time.
    """

    unit = "layer"  # what `on_layer` counts

    def __init__(self, engine: Engine, system: str | None = None, reuse: bool = True):
        self.engine, self.reuse = engine, reuse
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.reused_tokens = 0
        self._ids: list[int] = []
        self._cache: Any = None

    def say(self, text: str, **options: Any) -> Answer:
        """Add the user's text, answer it, add the answer. A cancelled answer stays as far as it came.

        `options` as in `Engine.generate`; `on_reasoning` receives what the model writes for itself. Raises what that
        raises, with the user's text taken back.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._answer(**options)
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer

    def retry(self, **options: Any) -> Answer | None:
        """Answer the last user text again; None where there was none."""
        if not self.messages:
            return None
        *self.messages, question, former = self.messages
        try:
            return self.say(question["content"], **options)
        except BaseException:
            self.messages += [question, former]
            raise

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages.clear()
        self._forget()

    def prompt(self) -> str | list[dict[str, str]]:
        """What the model reads: messages where it has a chat template, else the texts one after the other."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        if self.engine.tokenizer is not None and self.engine.tokenizer.chat_template:
            return system + self.messages
        return "\n\n".join(message["content"] for message in system + self.messages)

    def seed(self, value: int) -> None:
        """Make sampling repeatable."""
        torch.manual_seed(value)

    def _answer(
        self,
        *,
        on_text: Callable[[str], None] | None = None,
        on_reasoning: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Answer:
        prompt = self.prompt()
        ids = self.engine.encode(prompt)[0].tolist()
        parser, visible = plain_reader(ids, self.engine.tokenizer)
        if parser is None:
            return self._generated(prompt, ids, on_text=on_text, **options)
        reading = _Reading(parser, on_text, on_reasoning)
        answer = self._generated(prompt, ids, on_text=reading.put, visible=visible, **options)
        if self._beams(options) > 1:  # they have no text until the end
            reading.put(answer.text)
        reading.end(answer.finish)
        return replace(answer, text=reading.text, reasoning=reading.reasoning)

    def _generated(self, prompt: str | list[dict[str, str]], ids: list[int], **options: Any) -> Answer:
        if not self.reuse or self._beams(options) > 1:  # they reorder their cache
            self._forget()
            return self.engine.generate(prompt, **options)
        cache = self._kept(ids)
        self._forget()  # whatever interrupts a pass leaves its cache half written
        answer: Answer = self.engine.generate(prompt, **{CACHE: cache}, **options)
        if answer.new_tokens:  # else the reading of the prompt was cancelled between layers
            self._ids, self._cache = (ids + answer.token_ids)[: cache.get_seq_length()], cache
        return answer

    def _beams(self, options: dict[str, Any]) -> int:
        """As asked for, else as the model's publisher says."""
        return options.get("num_beams") or self.engine.model.generation_config.num_beams or 1

    def _forget(self) -> None:
        self._ids, self._cache = [], None

    def _kept(self, ids: list[int]) -> Any:
        """The cache of the longest common beginning, cropped to it, or a new one where it cannot be cropped."""
        same = next(
            (i for i, (a, b) in enumerate(zip(self._ids, ids, strict=False)) if a != b), min(len(self._ids), len(ids))
        )
        same = min(same, len(ids) - 1)
        cache = self._cache
        if cache is not None and 0 < same < len(self._ids):
            if all(type(layer) is transformers.cache_utils.DynamicLayer for layer in cache.layers):
                cache.crop(same - len(self._ids))  # below zero: how many to drop
            else:
                cache = None
        if cache is None or same == 0:
            cache, same = transformers.DynamicCache(config=self.engine.model.config.get_text_config()), 0
        self.reused_tokens = same
        return cache


class _Reading:
    """One answer on its way: what is reasoning goes to one listener, what is the answer to the other."""

    def __init__(
        self, parser: Parser, on_text: Callable[[str], None] | None, on_reasoning: Callable[[str], None] | None
    ):
        self._parser, self._on_text, self._on_reasoning = parser, on_text, on_reasoning
        self.text = self.reasoning = ""

    def put(self, text: str) -> None:
        self._hear(self._parser.put(text))

    def end(self, finish: str) -> None:
        self._hear(self._parser.end(finish))

    def _hear(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, Reasoning):
                self.reasoning += delta.text
                if self._on_reasoning:
                    self._on_reasoning(delta.text)
            elif isinstance(delta, Content):
                self.text += delta.text
                if self._on_text:
                    self._on_text(delta.text)
