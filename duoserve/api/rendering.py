"""Messages and texts become token ids, off the event loop and within a bound. Knows one engine's tokenizer and template.

A chat template is a program of the model's author: transformers runs it in a sandbox (`ImmutableSandboxedEnvironment`), and
here it has two seconds. Its lines are counted by the interpreter's own tracing, on its thread alone.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from duoserve.api.calls import Format
from duoserve.api.errors import of_busy
from duoserve.api.grammar import Mask
from duoserve.api.thoughts import Thought
from duoserve.api.tools import prepare
from duoserve.core import Refusal
from duoserve.engine import Engine
from duoserve.service import Busy

RENDER_S = 2.0
MAX_TEMPLATE = 1 << 20  # bytes

T = TypeVar("T")


class Prompt(NamedTuple):
    """A prompt for the service, what may answer it, and how the answer is read. A mask serves one answer: `again`."""

    ids: list[int]
    mask: Mask | None = None
    format: Format | None = None
    visible: frozenset[int] = frozenset()
    thought: Thought | None = None


class Rendering:
    """One thread at a time: tokenizers are not made for more."""

    def __init__(self, engine: Engine, ends: set[int]):
        self._engine, self._ends, self._turn = engine, sorted(ends), threading.Lock()
        vocabulary = engine.tokenizer.get_vocab() if engine.tokenizer is not None else {}
        self._longest = max(map(len, vocabulary), default=1)
        template = getattr(engine.tokenizer, "chat_template", None) or ""
        n_bytes = len(str(template).encode())
        if n_bytes > MAX_TEMPLATE:
            raise Refusal("E_TEMPLATE", f"the chat template has {n_bytes:,} bytes, at most {MAX_TEMPLATE:,}", "cut it")

    async def text(self, text: str) -> list[int]:
        self._refuse_huge(len(text))
        return await asyncio.to_thread(self._within, lambda: self._engine.encode(text)[0].tolist())

    async def chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        choice: Any = None,
        parallel: bool = True,
        answer: dict[str, Any] | None = None,
    ) -> Prompt:
        """`answer` is OpenAI's response_format. A `Busy` becomes the ApiError that it stands for."""
        self._refuse_huge(sum(len(str(m.get("content", ""))) for m in messages))
        if self._engine.tokenizer is None:
            raise Refusal("E_TOKENIZER", "the model has 0 tokenizer files", "send token ids to /v1/completions", 3)
        try:
            return await asyncio.to_thread(self._chat, messages, tools, choice, parallel, answer)
        except Busy as busy:
            raise of_busy(busy) from busy

    def _chat(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, choice: Any, parallel: bool, answer: Any
    ) -> Prompt:
        tokenizer = self._engine.tokenizer
        prepared = prepare(messages, tools, choice, tokenizer, self._ends, parallel, self._within, answer)
        return Prompt(prepared.ids, prepared.mask, prepared.format, prepared.visible, prepared.thought)

    def _within(self, render: Callable[[], list[int]]) -> list[int]:
        with self._turn:
            return _bounded(render, RENDER_S)

    def _refuse_huge(self, characters: int) -> None:
        """Before a tokenizer spends seconds on it: no token has more characters than the longest."""
        least, ctx = characters // self._longest, self._engine.plan.ctx
        if least > 2 * ctx:
            what = f"the prompt has at least {least} tokens, the context {ctx}"
            raise Refusal("E_CTX", what, "shorten it, or start the server with a larger --ctx", 4)


def _bounded(work: Callable[[], T], seconds: float) -> T:
    until = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > until:
            raise TimeoutError(f"it took more than {seconds:.0f} s")
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        return work()
    finally:
        sys.settrace(former)
