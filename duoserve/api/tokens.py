"""A token as replies show it: its text, its bytes, its logprobs. Knows a tokenizer; knows nothing of requests."""

from __future__ import annotations

import re
from typing import Any

from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from duoserve.sampling import Logprob
from duoserve.stopping import BROKEN

LEAST = -9999.0  # for what cannot come: JSON has no infinity


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes, which byte-level tokenizers still use."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


BYTES = _byte_letters()
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokens:
    """The vocabulary, for people."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False) if self._tokenizer else str(token)

    def bytes(self, token: int) -> list[int]:
        """Those of a part of a character are found in the token's own spelling."""
        text = self.text(token)
        if BROKEN not in text or self._tokenizer is None:
            return list(text.encode())
        spelled = self._tokenizer.convert_ids_to_tokens(token)
        if found := BYTE.fullmatch(spelled):
            return [int(found[1], 16)]
        known = [BYTES.get(letter) for letter in spelled]
        return [b for b in known if b is not None] if None not in known else list(text.encode())

    def chat(self, drawn: list[Logprob]) -> list[ChatCompletionTokenLogprob]:
        return [
            ChatCompletionTokenLogprob(
                token=self.text(p.token),
                bytes=self.bytes(p.token),
                logprob=_finite(p.logprob),
                top_logprobs=[
                    TopLogprob(token=self.text(t), bytes=self.bytes(t), logprob=_finite(value)) for t, value in p.top
                ],
            )
            for p in drawn
        ]

    def completion(self, drawn: list[Logprob | int], offset: int) -> Logprobs:
        """`drawn` may begin with a bare token: the first of a prompt, which nothing came before. `offset` in the text."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for item in drawn:
            text = self.text(item if isinstance(item, int) else item.token)
            found["tokens"].append(text)
            found["text_offset"].append(offset)
            offset += len(text)
            if isinstance(item, int):
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
            else:
                found["token_logprobs"].append(_finite(item.logprob))
                found["top_logprobs"].append(self._top(item))
        return Logprobs.construct(**found)

    def _top(self, drawn: Logprob) -> dict[str, float]:
        """By text; of two tokens that read alike, the likelier. The drawn one is always there, as OpenAI has it."""
        found: dict[str, float] = {}
        for token, value in [*drawn.top, (drawn.token, drawn.logprob)]:
            text = self.text(token)
            found[text] = max(_finite(value), found.get(text, LEAST))
        return found


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
