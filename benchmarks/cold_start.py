"""From nothing to the first token of the demo: home and cache are empty folders, the process is new. And when it gives a
sign of life meanwhile: what a person sees in a terminal or a pipe, and what /health says of a server that loads.

    python -m benchmarks.cold_start [--rounds 3]

`chat` in a terminal (a pseudo-terminal) and in a pipe, then `serve` with one streamed question. A table, then one JSON line.
What the machine's page cache holds of torch itself is as it was: the first round may be slower than the others.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.machine import describe
from benchmarks.served import ROOT, ready

QUESTION = "What is Git?"
PATIENCE_S = 120.0


def fresh(folder: str) -> dict[str, str]:
    """The environment of somebody who has never run this program."""
    kept = {
        name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS", "LD_LIBRARY_PATH") if name in os.environ
    }
    return kept | {"HOME": folder, "DUOSERVE_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT), "TERM": "xterm"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "duoserve.cli", *arguments]


def chat(terminal: bool) -> dict[str, Any]:
    """Times of whatever `duoserve chat` writes, and of its first word on stdout."""
    with tempfile.TemporaryDirectory() as home:
        out, out_in = os.pipe()
        err, err_in = pty.openpty() if terminal else os.pipe()
        began = time.perf_counter()
        process = subprocess.Popen(
            command("chat", "-p", QUESTION),
            env=fresh(home),
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=out_in,
            stderr=err_in,
        )
        os.close(out_in)
        os.close(err_in)
        signs, first = watched({out, err}, out, lambda: time.perf_counter() - began)
        process.wait(PATIENCE_S)
    return {
        "first_token_s": first,
        "first_sign_s": signs[0],
        "longest_silence_s": silence(signs, first),
        "signs": len(signs),
    }


def watched(files: set[int], answer: int, clock: Callable[[], float]) -> tuple[list[float], float]:
    """When something came until the first word of the answer, and when that was."""
    signs: list[float] = []
    first = None
    open_files = set(files)
    while open_files:
        ready_files, _, _ = select.select(list(open_files), [], [], PATIENCE_S)
        for file in ready_files:
            try:
                data = os.read(file, 1 << 12)
            except OSError:  # a terminal that nobody writes to any more
                data = b""
            if not data:
                open_files.discard(file)
                os.close(file)
                continue
            if first is None:
                signs.append(clock())
            if file == answer and first is None:
                first = clock()
    if first is None:
        raise RuntimeError("chat ended without an answer")
    return signs, first


def serve() -> dict[str, Any]:
    """Times of stderr's lines and of /health's answers, and of a streamed question's first token."""
    with tempfile.TemporaryDirectory() as home:
        began = time.perf_counter()
        process = subprocess.Popen(
            command("serve", "--port", "0"), env=fresh(home), cwd=home, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            lines, healths = [time.perf_counter() - began], []
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found is None:
                raise RuntimeError(line + process.stderr.read())
            reader = threading.Thread(
                target=lambda: lines.extend(time.perf_counter() - began for _ in process.stderr or ())
            )
            reader.start()
            port = int(found[1])
            while not ready(port):
                if alive(port):
                    healths.append(time.perf_counter() - began)
                if process.poll() is not None or time.perf_counter() - began > PATIENCE_S:
                    raise RuntimeError("the server did not become ready")
                time.sleep(0.05)
            answers = time.perf_counter() - began
            first_token(port)
            first = time.perf_counter() - began
        finally:
            process.terminate()
            process.wait(30)
        reader.join(10)
    signs = sorted([*lines, *healths])
    silent = silence([s for s in signs if s <= first], first)
    more = {"ready_s": answers, "first_health_s": healths[0] if healths else answers, "lines": len(lines)}
    return {"first_token_s": first, "first_sign_s": signs[0], "longest_silence_s": silent, "signs": len(signs)} | more


def alive(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return bool(json.loads(connection.getresponse().read())["live"])
    except OSError:
        return False
    finally:
        connection.close()


def first_token(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    asked = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    while not re.search(rb'"content":"[^"]', answer.readline()):
        pass
    connection.close()


def silence(signs: Sequence[float], until: float) -> float:
    """The longest time without a sign, from the start to the first token."""
    at = [0.0, *signs, until]
    return max(b - a for a, b in pairwise(at))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ways = {"chat, terminal": lambda: chat(True), "chat, pipe": lambda: chat(False), "serve": serve}
    found = {name: [way() for _ in range(args.rounds)] for name, way in ways.items()}
    print(f"{'':16s}{'first token s':>14s}{'first sign s':>14s}{'longest silence s':>19s}   (worst of {args.rounds})")
    for name, rounds in found.items():
        worst = [max(one[k] for one in rounds) for k in ("first_token_s", "first_sign_s", "longest_silence_s")]
        print(f"{name:16s}{worst[0]:14.2f}{worst[1]:14.2f}{worst[2]:19.2f}")
    print(json.dumps({"benchmark": "cold_start", **vars(args), "machine": describe(), "found": found}))


if __name__ == "__main__":
    main()
