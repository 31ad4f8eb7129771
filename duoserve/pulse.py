"""Signs of life on stderr while something takes long that says nothing itself, as the import of torch. Knows seconds and a
stream; knows nothing of what is done. Imports no torch.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 1.0  # an import may keep the interpreter for as long again: silence stays under 2 s
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all (0: not counted), what is being done


class Pulse:
    """Says each second what is done and for how long: in a terminal on one line, which it wipes, else on a line each."""

    def __init__(self, what: str):
        self._what, self._began, self._heard = what, time.monotonic(), 0.0
        self._lock, self._over, self._shown = threading.Lock(), False, 0
        self._terminal = sys.stderr.isatty()

    def beside(self, progress: Progress) -> Progress:
        """That progress, during which this keeps quiet."""

        def tell(done: int, total: int, what: str) -> None:
            self._heard = time.monotonic()
            progress(done, total, what)

        return tell

    def tell(self, done: int, total: int, what: str) -> None:
        """A `Progress` that is said with the next beat."""
        self._what = f"{what}: {done >> 20} of {total >> 20} MiB" if total else what

    def begin(self) -> None:
        self._timer = threading.Timer(EVERY_S, self._beat)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._over = True
            self._write("")

    def _beat(self) -> None:
        with self._lock:
            if self._over:
                return
            now = time.monotonic()
            if now - self._heard > EVERY_S:
                self._write(f"{self._what} ... {now - self._began:.0f} s")
            self.begin()

    def _write(self, line: str) -> None:
        if self._terminal:
            wiped = f"\r{' ' * self._shown}\r" if self._shown else ""
            self._shown = len(line)
            print(wiped + line, end="", file=sys.stderr, flush=True)
        elif line:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def pulsing(what: str, terminals: bool = True) -> Iterator[Pulse]:
    """`terminals` False: in a terminal something else shows that it lives."""
    pulse = Pulse(what)
    if not terminals and sys.stderr.isatty():
        yield pulse
        return
    pulse.begin()
    try:
        yield pulse
    finally:
        pulse.end()
