"""Which models think before they answer, and between which words: found in the model's own chat template. Knows templates'
words; knows no tokens, requests or models. gpt-oss thinks in a channel of its format instead (`formats.Harmony`).

    prompt ends         the answer's text                          begun
    <assistant>         <think>\\nHm.\\n</think>\\n\\nYes.             no: it may also answer at once
    <think>\\n           Hm.\\n</think>\\n\\nYes.                       yes
    </think>\\n\\n        Yes.                                       none: the template closed it
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Thought:
    """What the model writes for itself stands between `opens` and `closes`. `begun`: the prompt ends inside it."""

    opens: str
    closes: str
    begun: bool = False


KNOWN = (
    Thought("<think>", "</think>"),  # Qwen3, DeepSeek R1 and V3.1, GLM-4.5, MiniMax M2, Kimi K2 Thinking
    Thought("[THINK]", "[/THINK]"),  # Magistral
    Thought("<seed:think>", "</seed:think>"),  # Seed-OSS
)


def thought_of(template: str, prompt_end: str) -> Thought | None:
    """How an answer to a prompt that ends so is thought about; None where it is not."""
    found = next((thought for thought in KNOWN if thought.closes in template), None)
    if found is None or prompt_end.rstrip().endswith(found.closes):
        return None
    return replace(found, begun=prompt_end.rstrip().endswith(found.opens))
