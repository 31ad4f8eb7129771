"""Prompts as token ids: a folder's tokenizer and its chat template. Knows transformers' tokenizers; knows no models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from duoserve.core import Refusal

Prompt = str | Sequence[dict[str, str]]  # a text, or chat messages ({"role", "content"})


def read_tokenizer(folder: Path) -> Any:
    if not any(folder.glob("tokenizer*")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise Refusal(
            "E_TOKENIZER", f"{folder} has a tokenizer that cannot be read ({reason})", "fetch it again", 5
        ) from error


def encode(tokenizer: Any, prompt: Prompt) -> torch.Tensor:
    """Token ids (1, S) of a text, or of messages through the chat template."""
    if isinstance(prompt, str):
        ids_1S = tokenizer(prompt.encode(errors="replace").decode(), return_tensors="pt")["input_ids"]
    else:
        ids_1S = _templated(tokenizer, list(prompt))
    if ids_1S.shape[1] == 0:
        raise Refusal("E_PROMPT", "the prompt has 0 tokens", "write at least one word")
    return ids_1S


def _templated(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    if not tokenizer.chat_template:
        raise Refusal("E_TEMPLATE", "the model has 0 chat templates", "pass a text instead of messages")
    if not messages or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
        raise Refusal(
            "E_TEMPLATE", f"{len(messages)} messages, or some that are none", 'pass {"role": ..., "content": ...}'
        )
    clean = [m | {"content": m["content"].encode(errors="replace").decode()} for m in messages]
    try:
        encoded = tokenizer.apply_chat_template(
            clean, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # templates are programs of their authors
        raise Refusal(
            "E_TEMPLATE", f"the chat template refused {len(clean)} messages ({error})", "check the roles"
        ) from error
    return encoded["input_ids"]
