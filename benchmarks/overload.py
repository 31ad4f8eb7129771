"""Far more requests than may wait, all at once: how fast the others are turned away, and whether /health answers meanwhile.

    python -m benchmarks.overload [--requests 500] [--rounds 3] [--queue 64] [--active 4] [--fresh]

The server is a process of its own; here one thread with raw sockets, whose bytes were made beforehand, so that the figures
are the server's. Every connection is open when the requests leave; `--fresh` opens them in that moment too. A time is from
the request's last byte to the answer's. Beside it: how long the server's loop ran, and waited for a core, from the first
request to the last refusal; on a busy machine the first of these is the one to read. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.machine import describe
from benchmarks.served import Served, serving

PROBE_S, PATIENCE_S = 0.02, 300.0  # between two looks at /health; what counts as a hang


class Call:
    """One request on a connection of its own, never blocking."""

    def __init__(self, port: int, data: bytes):
        self._port, self._data = port, data
        self.socket: socket.socket | None = None
        self.began = self.seconds = 0.0
        self.answer = b""
        self.done = False

    def connect(self) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect_ex(("127.0.0.1", self._port))

    def send(self) -> bool:
        """False while the connection is not there yet."""
        assert self.socket is not None
        self.began = self.began or time.perf_counter()
        try:
            return self.socket.send(self._data) == len(self._data)
        except BlockingIOError:
            return False

    def receive(self) -> None:
        """All that came; an answer ends with its connection."""
        assert self.socket is not None
        try:
            while piece := self.socket.recv(1 << 16):
                self.answer += piece
        except BlockingIOError:
            return
        except ConnectionError:
            self.answer = self.answer or b"HTTP/1.1 000 "
        self.seconds, self.done = time.perf_counter() - self.began, True
        self.socket.close()

    @property
    def status(self) -> int:
        return int(self.answer[9:12])

    @property
    def retry(self) -> bool:
        return re.search(rb"(?i)\r\nretry-after: [1-9]", self.answer) is not None


class Loop:
    """Sends and receives for many calls until `done`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def begin(self, call: Call) -> None:
        if call.socket is None:
            call.began = time.perf_counter()
            call.connect()
        assert call.socket is not None
        interest = selectors.EVENT_READ if call.send() else selectors.EVENT_WRITE
        self._selector.register(call.socket, interest, call)

    def run(self, done: Callable[[], bool], tick: Callable[[], None], until: float) -> None:
        while not done() and time.perf_counter() < until:
            for key, _ in self._selector.select(PROBE_S / 4):
                self._serve(key.data)
            tick()

    def _serve(self, call: Call) -> None:
        assert call.socket is not None
        descriptor = call.socket
        if not self._selector.get_key(descriptor).events & selectors.EVENT_READ:
            if call.send():
                self._selector.modify(descriptor, selectors.EVENT_READ, call)
            return
        number = descriptor.fileno()
        call.receive()
        if call.done:
            self._selector.unregister(number)


def asked(port: int, number: int, new_tokens: int) -> bytes:
    body = {"model": "demo", "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    body["messages"] = [{"role": "user", "content": f"What is Git, for the {number}th time?"}]
    return _request(port, "POST /v1/chat/completions", json.dumps(body).encode())


def _request(port: int, what: str, body: bytes = b"") -> bytes:
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    return f"{what} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n{kind}\r\n".encode() + body


def storm(served: Served, args: argparse.Namespace) -> dict[str, Any]:
    """One storm, and what came of it."""
    loop, port = Loop(), served.port
    calls = [Call(port, asked(port, n, args.new_tokens)) for n in range(args.requests)]
    probes: list[Call] = []

    def probe() -> None:
        if not probes or (probes[-1].done and time.perf_counter() - probes[-1].began > PROBE_S):
            probes.append(Call(port, _request(port, "GET /health")))
            loop.begin(probes[-1])

    if not args.fresh:
        for call in calls:
            call.connect()
        time.sleep(0.5)
    began, before = time.perf_counter(), served.on_core_s()
    for call in calls:
        loop.begin(call)
    sent = time.perf_counter() - began
    beyond = args.requests - args.queue - args.active
    loop.run(lambda: sum(c.done for c in calls) >= beyond, probe, began + PATIENCE_S)
    ran, waited = (b - a for a, b in zip(before, served.on_core_s(), strict=True))
    loop.run(lambda: all(c.done for c in calls), probe, began + PATIENCE_S)
    rejected = [c for c in calls if c.done and c.status in (429, 503)]
    admitted = [c for c in calls if c.done and c.status == 200]
    return {
        "sent_s": sent,
        "admitted": len(admitted),
        "rejected": len(rejected),
        "other": sorted({c.status for c in calls if c.done} - {200, 429, 503}),
        "hangs": sum(not c.done for c in calls),
        "without_retry_after": sum(not c.retry for c in rejected),
        "rejected_p50_s": quantile([c.seconds for c in rejected], 0.5),
        "rejected_p99_s": quantile([c.seconds for c in rejected], 0.99),
        "rejected_max_s": max((c.seconds for c in rejected), default=None),
        "loop_ran_s": ran,
        "loop_waited_s": waited,
        "health_p99_s": quantile([c.seconds for c in probes if c.done], 0.99),
        "health_n": sum(c.done for c in probes),
        "out_of_turn": inversions([c.began + c.seconds for c in admitted]) if args.active == 1 else None,
        "all_s": time.perf_counter() - began,
    }


def quantile(values: Sequence[float], share: float) -> float | None:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def inversions(ends: Sequence[float]) -> int:
    """How many ended before one that was sent before them."""
    return sum(later < max(ends[:n], default=0.0) for n, later in enumerate(ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--per-client", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    options = ["--predictor", "none", "--parallel", str(args.active), "--queue", str(args.queue)]
    with serving(*options, "--per-client", str(args.per_client)) as served:
        warm = argparse.Namespace(**{**vars(args), "requests": 2 * args.active})
        storm(served, warm)
        found = [storm(served, args) for _ in range(args.rounds)]
    names = ("p50 ms", "p99 ms", "max ms", "loop ran", "loop waited", "health p99 ms", "hangs")
    print(f"{'admitted':>9s}{'rejected':>9s}" + "".join(f"{name:>15s}" for name in names))
    for one in found:
        times = ("rejected_p50_s", "rejected_p99_s", "rejected_max_s", "loop_ran_s", "loop_waited_s", "health_p99_s")
        ms = "".join(f"{1e3 * (one[name] or 0.0):15.1f}" for name in times)
        print(f"{one['admitted']:9d}{one['rejected']:9d}{ms}{one['hangs']:15d}")
    print(json.dumps({"benchmark": "overload", **vars(args), "machine": describe(), "rounds": found}))


if __name__ == "__main__":
    main()
