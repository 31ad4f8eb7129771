"""How far something is, on stderr: bars and changing lines in a terminal, else lines. Knows bytes, shares, seconds and a
stream; knows nothing of what is done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from duoserve.pulse import Progress


class Line:
    """One line that changes in a terminal; elsewhere one more every 5 s. The last is always said."""

    def __init__(self) -> None:
        self._began, self._said = time.monotonic(), float("-inf")
        self._terminal = sys.stderr.isatty()

    def say(self, text: str, last: bool = False) -> None:
        now = time.monotonic()
        if now - self._said < (0.2 if self._terminal else 5) and not last:
            return
        self._said = now
        shown, end = (f"\r\x1b[K{text}", "\n" * last) if self._terminal else (text, "\n")
        print(shown, end=end, file=sys.stderr, flush=True)

    def left(self, share: float) -> str:
        """The time that the rest takes, where a `share` is done."""
        return f"{(time.monotonic() - self._began) * (1 - share) / share:.0f} s left"


class Interrupted(Exception):
    """Ctrl-C where it matters to know what of the work is lost."""


@contextmanager
def shown() -> Iterator[Progress]:
    """Progress of fetching and converting, both of which go on where they were interrupted."""
    try:
        with _told() as progress:
            yield progress
    except KeyboardInterrupt as interrupt:
        raise Interrupted("the same command goes on where it stopped") from interrupt


@contextmanager
def _told() -> Iterator[Progress]:
    """Progress on stderr: a bar with ETA in a terminal, else a line every 5 s."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
        return
    began = said = time.monotonic()

    def line(done: int, total: int, what: str) -> None:
        nonlocal said
        now = time.monotonic()
        if not total:  # nothing to count: waiting for another process, which nobody else will say
            print(what, file=sys.stderr, flush=True)
        elif now - said >= 5:
            said = now
            left = f", {(now - began) * (total - done) / done:.0f} s left" if done else ""
            print(f"{what}: {done >> 20} of {total >> 20} MiB{left}", file=sys.stderr, flush=True)

    yield line
