"""Faults at the moments that count: before and after every write, sync, rename and removal of a conversion.

`Faults` counts those moments and strikes at one of them. `Forks` runs conversions as processes of their own that a test can
kill: a server that has imported everything forks one for each, so that a hundred kills take seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent


class Faults:
    """Numbers the moments of a conversion; calls `strike(moment, what)` at each, before the real call.

    `what` is "write", "fsync", "replace", "rename", "truncate" or "unlink".
    """

    def __init__(self, strike: Callable[[int, str], None]):
        self.moments = 0
        self._strike = strike

    def at(self, what: str) -> None:
        self.moments += 1
        self._strike(self.moments, what)

    @contextlib.contextmanager
    def installed(self) -> Iterator[Faults]:
        from duoserve import durable

        with contextlib.ExitStack() as stack:
            for what in ("fsync", "replace", "rename", "truncate", "unlink"):
                stack.enter_context(mock.patch.object(os, what, self._around(what, getattr(os, what))))
            stack.enter_context(mock.patch.object(durable, "open", self._open, create=True))
            yield self

    def _around(self, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.at(what)
            return real(*args, **options)

        return call

    def _open(self, path: Any, mode: str = "r") -> Any:
        return _File(open(path, mode), self) if "w" in mode else open(path, mode)


class _File:
    """A file whose every write is a moment, and which then lies half on the disk if the process dies."""

    def __init__(self, file: Any, faults: Faults):
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._faults.at("write")
        return half + self._file.write(data[half:])

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *exc: Any) -> Any:
        return self._file.__exit__(*exc)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Child:
    """One conversion under way."""

    def __init__(self, server: Forks, pid: int, log: Path):
        self.server, self.pid, self.log = server, pid, log

    def kill(self, signal: int = 9) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal)

    def wait(self) -> int:
        """Its exit status; -9 where it was killed."""
        return int(self.server.ask({"wait": self.pid})["status"])

    @property
    def said(self) -> str:
        return self.log.read_text()


class Forks:
    """Starts `duoserve ...` as forked processes."""

    def __init__(self, folder: Path):
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self._folder, self._n = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def start(self, *args: object, kill_at: int = 0, slow: float = 0.0) -> Child:
        """`kill_at`: the moment at which it kills itself; `slow`: seconds that it sleeps at each."""
        self._n += 1
        log = self._folder / f"said-{self._n}.txt"
        about = {"args": [str(a) for a in args], "kill_at": kill_at, "slow": slow, "log": str(log)}
        return Child(self, self.ask(about)["pid"], log)

    def run(self, *args: object, **how: Any) -> tuple[int, str]:
        child = self.start(*args, **how)
        return child.wait(), child.said

    def ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=30)


def _serve() -> None:
    import duoserve.convert
    import duoserve.engine  # noqa: F401  imported here, so that no child has to

    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                _child(question)
        print(json.dumps(answer), flush=True)


def _child(question: dict[str, Any]) -> None:
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def strike(moment: int, what: str) -> None:
        time.sleep(question["slow"])
        if moment == question["kill_at"]:
            os.kill(os.getpid(), 9)

    from duoserve import cli

    sys.argv = ["duoserve", *question["args"]]
    faults, status = Faults(strike), 1
    try:
        with faults.installed():
            cli.main()
            status = 0
    except SystemExit as done:
        status = int(done.code or 0)
    sys.stdout.flush()
    print(f"moments {faults.moments}", file=sys.stderr, flush=True)
    os._exit(status)


if __name__ == "__main__":
    _serve()
