"""How far a prompt has been read, told in the stream of who asks for it: a chunk without choices, as llama.cpp has it
(`return_progress`, `prompt_progress`). Knows chunks and the answers they tell of; knows nothing of models.

Only who asked gets such chunks. To others a stream says `: still here`, which clients pass over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator

from duoserve.api.answers import Answers
from duoserve.api.stream import event

EVERY_S = 0.5


async def with_progress(events: AsyncGenerator[bytes, None], answers: Answers) -> AsyncGenerator[bytes, None]:
    """The stream's events, and until its first token how many tokens of the prompt have been read, where that changed.
    Behind the first event, whose fields these chunks share.
    """
    began, about, told = time.perf_counter(), None, None
    async with contextlib.aclosing(events):
        async for body in events:
            about = json.loads(body.removeprefix(b"data: "))
            yield body
            break
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while about is not None:
                await asyncio.wait({coming}, timeout=EVERY_S if answers.reading() is not None else None)
                if not coming.done():
                    found = answers.reading()
                    if found is not None and found != told:
                        told = found
                        yield _chunk(about, *found, time.perf_counter() - began)
                    continue
                following = coming.result()
                if following is None:
                    return
                yield following
                coming = asyncio.ensure_future(anext(events, None))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def _chunk(about: dict[str, object], read: int, total: int, seconds: float) -> bytes:
    progress = {"total": total, "cache": 0, "processed": read, "time_ms": round(1000 * seconds)}
    return event(about | {"choices": [], "prompt_progress": progress})
