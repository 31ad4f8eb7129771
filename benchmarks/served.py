"""`duoserve serve` as a process of its own, for those who measure it from outside. Knows its command line and /health;
knows nothing of what is asked of it.
"""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Served(NamedTuple):
    """Where it listens, and its process."""

    port: int
    pid: int

    def on_core_s(self) -> tuple[float, float]:
        """Seconds that the thread of its event loop has run, and waited for a core while it could: Linux alone tells."""
        try:
            told = Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()
        except OSError:
            return 0.0, 0.0
        return int(told[0]) / 1e9, int(told[1]) / 1e9


@contextmanager
def serving(*options: str, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Once it answers; RuntimeError with what it said where it ends before."""
    command = [sys.executable, "-m", "duoserve.cli", "serve", "--port", "0", *options]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    with subprocess.Popen(command, env=settings, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            first = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", first)
            if found is None:
                raise RuntimeError(first + process.stderr.read())
            port = int(found[1])
            while not ready(port):
                if process.poll() is not None:
                    raise RuntimeError(process.stderr.read())
                time.sleep(0.1)
            yield Served(port, process.pid)
        finally:
            process.terminate()
            process.wait(30)


def ready(port: int) -> bool:
    """Whether /health says that the model answers. The port is bound before anything listens on it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
