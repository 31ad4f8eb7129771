"""A rank of `python -m dep_extension` that is killed (kill -9, by itself) where a test says: for tests.

DOOMED in the environment: {"launch rank": [a function of dep_extension as "module:name", at which of its calls]}
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import signal
from typing import Any


def doom(where: str, call: int) -> None:
    module, _, name = where.partition(":")
    owner: Any = importlib.import_module(f"dep_extension.{module}")
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, last), itertools.count(1)

    @functools.wraps(real)
    def fatal(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(owner, last, fatal)


def main() -> None:
    from dep_extension.__main__ import main as run

    doomed = json.loads(os.environ["DOOMED"])
    if os.environ["RANK"] in doomed:
        doom(*doomed[os.environ["RANK"]])
    run()


if __name__ == "__main__":
    main()
