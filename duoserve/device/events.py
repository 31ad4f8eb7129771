"""What work waits for: something that will have happened, on the host or on a GPU. Knows nothing of what it was."""

from __future__ import annotations

import threading

import torch

from duoserve.timeline import COMPUTE, Why

_COMPUTED = Why(COMPUTE)


class Event:
    """Something that will have happened, and why it was begun. On a GPU: `issued` by the host, later done on the device."""

    __slots__ = ("_issued", "_mark", "error", "why")

    def __init__(self, why: Why = _COMPUTED) -> None:
        self.why = why
        self._issued = threading.Event()
        self._mark: torch.cuda.Event | None = None
        self.error: BaseException | None = None

    def set(self, mark: torch.cuda.Event | None = None, error: BaseException | None = None) -> None:
        self._mark, self.error = mark, error
        self._issued.set()

    @property
    def issued(self) -> bool:
        return self._issued.is_set()

    @property
    def done(self) -> bool:
        return self._issued.is_set() and (self._mark is None or self._mark.query())

    def wait(self) -> None:
        """Block this host thread until it happened; raises what the work raised."""
        self._issued.wait()
        if self.error is not None:
            raise self.error
        if self._mark is not None:
            self._mark.synchronize()

    def order(self, stream: torch.cuda.Stream | None, needed: bool = True) -> None:
        """Make later work wait: on `stream` for device marks, on this thread for anything the host does.

        Where its result is `needed`, its failure rises here; else it only has to be over.
        """
        self._issued.wait()
        if self.error is not None:
            if needed:
                raise self.error
            return
        if self._mark is not None:
            stream.wait_event(self._mark) if stream is not None else self._mark.synchronize()


def _happened() -> Event:
    event = Event()
    event.set()
    return event


DONE = _happened()  # what holds before anything was submitted


def marked(stream: torch.cuda.Stream | None) -> Event:
    """Happens once all that `stream` was given so far is done; without one, that is now."""
    if stream is None:
        return DONE
    event = Event()
    event.set(mark=stream.record_event())
    return event
