"""Messages and texts become token ids, off the event loop and within a bound. Knows one engine's tokenizer and template.

A chat template is a program of the model's author: transformers runs it in a sandbox (`ImmutableSandboxedEnvironment`), and
here it has two seconds. Its lines are counted by the interpreter's own tracing, on its thread alone.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from duoserve.core import Refusal
from duoserve.engine import Engine

RENDER_S = 2.0
MAX_TEMPLATE = 1 << 20  # bytes

T = TypeVar("T")


class Rendering:
    """One at a time: tokenizers are not made for more."""

    def __init__(self, engine: Engine):
        self._engine, self._turn = engine, asyncio.Lock()
        vocabulary = engine.tokenizer.get_vocab() if engine.tokenizer is not None else {}
        self._longest = max(map(len, vocabulary), default=1)
        template = getattr(engine.tokenizer, "chat_template", None) or ""
        if len(str(template).encode()) > MAX_TEMPLATE:
            n_bytes = len(str(template).encode())
            raise Refusal("E_TEMPLATE", f"the chat template has {n_bytes:,} bytes, at most {MAX_TEMPLATE:,}", "cut it")

    async def messages(self, messages: list[dict[str, Any]]) -> list[int]:
        self._refuse_huge(sum(len(m["content"]) for m in messages))
        return await self.run(lambda: self._engine.encode(messages)[0].tolist())

    async def text(self, text: str) -> list[int]:
        self._refuse_huge(len(text))
        return await self.run(lambda: self._engine.encode(text)[0].tolist())

    async def run(self, work: Callable[[], T]) -> T:
        """On another thread, at most `RENDER_S` of Python."""
        async with self._turn:
            return await asyncio.to_thread(_bounded, work, RENDER_S)

    def _refuse_huge(self, characters: int) -> None:
        """Before a tokenizer spends seconds on it: no token has more characters than the longest."""
        least, ctx = characters // self._longest, self._engine.plan.ctx
        if least > 2 * ctx:
            raise Refusal(
                "E_CTX",
                f"the prompt has at least {least} tokens, the context {ctx}",
                "shorten it, or a larger --ctx",
                4,
            )


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
