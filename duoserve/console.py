"""The standard streams as a command finds them, made fit to be used: closed ones, narrow encodings, warnings of two lines.
Knows the process; knows nothing of what is printed. Imports no torch.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import IO, Any

from duoserve.core import one_line

_STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))


def prepare() -> None:
    """Once, before a command does anything."""
    for number, name, mode in _STREAMS:
        if getattr(sys, name) is None:
            setattr(sys, name, _nothing(number, mode))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what another alphabet cannot show is no reason to end
    warnings.showwarning = _show


def _nothing(number: int, mode: str) -> IO[Any]:
    """In the place of a stream that was closed: else the next file that is opened, a store's perhaps, gets its number and
    what is printed goes there."""
    file = os.open(os.devnull, os.O_RDWR)
    if file != number:
        os.dup2(file, number)
        os.close(file)
    return open(number, mode, closefd=False)


def _show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    text = str(message).strip().splitlines() or [category.__name__]
    print(f"warning: {one_line(text[0])}", file=sys.stderr)
