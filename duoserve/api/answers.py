"""The generations of one HTTP request: submitted, merged into one line of events, cancelled together. Knows the service's
events and the event loop; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable

from duoserve.api.errors import of_busy, of_failure
from duoserve.api.metrics import Metrics
from duoserve.service import Busy, End, Event, Piece, Request, Service, Ticket

PING_S = 10.0  # a stream says that it lives, at least so often
RETRY_S = 0.05


class Answers:
    """Choices of one request by index. As many as may be active run at once, the others follow.

    The engine's thread only leaves events here; nobody waits for who reads them. They are bounded by the tokens that
    were asked for.
    """

    def __init__(self, service: Service, requests: list[Request], metrics: Metrics):
        self._service, self._metrics = service, metrics
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._left = deque(enumerate(requests))
        self._running: dict[int, Ticket] = {}
        self._latest: dict[int, float] = {}  # when text last came
        for request in requests:
            service.room(request)  # refuse before anything runs
        at_once = min(len(requests), service.limits.active, service.limits.per_client)
        try:
            for _ in range(at_once):
                self._submit()
        except Busy as busy:
            self.cancel()
            raise of_busy(busy) from busy

    async def events(self) -> AsyncGenerator[tuple[int, Event] | None, None]:
        """Each choice's events up to its End; None where nothing came for a while. Closing it cancels what still runs."""
        try:
            while self._running:
                try:
                    index, event = await asyncio.wait_for(self._inbox.get(), PING_S)
                except TimeoutError:
                    yield None
                    continue
                self._note(index, event)
                yield index, event
                if isinstance(event, End):
                    del self._running[index]
                    await self._follow()
        finally:
            self.cancel()

    def reading(self) -> tuple[int, int] | None:
        """Tokens of the running choices' prompts that were read, and all of them; None once there is text."""
        if self._latest or not self._running:
            return None
        tickets = self._running.values()
        return sum(t.read for t in tickets), sum(len(t.request.ids) for t in tickets)

    def cancel(self) -> None:
        self._left.clear()
        for ticket in self._running.values():
            ticket.cancel()

    async def _follow(self) -> None:
        """Submit the next; where others took the place, wait only if nothing else of ours runs."""
        while self._left:
            try:
                return self._submit()
            except Busy:
                if self._running:
                    return
                if not self._service.open:
                    raise of_failure(None) from None
                await asyncio.sleep(RETRY_S)

    def _note(self, index: int, event: Event) -> None:
        if isinstance(event, End):
            self._metrics.ended(event)
        elif isinstance(event, Piece):
            now = time.perf_counter()
            if index in self._latest:
                self._metrics.between.observe(now - self._latest[index])
            self._latest[index] = now

    def _submit(self) -> None:
        index, request = self._left[0]
        self._running[index] = self._service.submit(request, self._teller(index))
        self._left.popleft()

    def _teller(self, index: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._inbox.put_nowait, (index, event))

        return tell
