"""What a demo would say if it were larger: each text where the prompt asks for it, token by token through the whole server
(grammar masks, parsers and streams are real). For clients whose own tests expect a model that can count.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from duoserve.sampling import Draw


def call(name: str, **arguments: Any) -> str:
    said = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{said}\n</tool_call>"


JOKE = {"setup": "Why do cats purr?", "punchline": "They know."}
SAID: list[tuple[tuple[str, ...], str]] = [  # the first whose words are all in the prompt
    (("<tool_response>",), "It is sunny."),
    (("magic_function_no_args()",), call("magic_function_no_args")),
    (("magic_function(3)",), call("magic_function", input=3)),
    (("Pirate greeting", "<tools>"), call("greeting_generator", answer_style="Pirate")),
    *(
        ((name, "<tools>"), call("unicode_customer", customer_name=name, description="A company"))
        for name in ("你好啊集团", "こんにちは株式会社")
    ),
    (("weather in San Francisco", "<tools>"), call("get_weather", location="San Francisco, CA")),
    (("joke about cats", "<tools>"), call("Joke", **JOKE)),
    (("joke about cats",), json.dumps(JOKE)),
]


class Prompted(Draw):
    """Draws the tokens of what is to be said, as far as the grammar lets it; else as `Draw` does."""

    tokenizer: Any

    def _changed(self, input_ids: torch.Tensor, scores_1V: torch.Tensor) -> torch.Tensor:
        changed = super()._changed(input_ids, scores_1V)
        token = self._next(input_ids[0].tolist())
        if token is None or changed[0, token] == -torch.inf:
            return changed
        alone = torch.full_like(changed, -torch.inf)
        alone[0, token] = 0.0
        return alone

    def _next(self, ids: list[int]) -> int | None:
        prompt = self.tokenizer.decode(ids[: self._prompt])
        said = next((text for words, text in SAID if all(word in prompt for word in words)), None)
        if said is None:
            return None
        script = [*self.tokenizer(said, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        at = len(ids) - self._prompt
        return script[at] if at < len(script) and ids[self._prompt :] == script[:at] else None


def prompt(engine: Any, patch: pytest.MonkeyPatch) -> None:
    """Let this engine's services say so."""
    patch.setattr("duoserve.service.Draw", type("Prompted", (Prompted,), {"tokenizer": engine.tokenizer}))
