"""How fast what is beyond a limit is refused: each limit of the server at -1, +1, huge, NaN and of a wrong type, the worst
time beside each, and whether the model heard of any. That the limits themselves are taken, tests say.

    python -m benchmarks.limits [--rounds 5]

The server is a process of its own; each request has a connection of its own, its bytes made beforehand. A time is from the
request's first byte to the answer's last. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.machine import describe
from benchmarks.served import serving

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "Hi"}]
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "demo", "messages": HELLO, "max_tokens": 1},
    COMPLETIONS: {"model": "demo", "prompt": "Hi", "max_tokens": 1},
    RESPONSES: {"model": "demo", "input": "Hi", "max_output_tokens": 1},
}
NAN = "NAN"  # written as the bare word
MAX_BODY, MAX_HEADERS, CTX = 8 << 20, 64 << 10, 4096
NUMBERS: list[tuple[str, str, float, float]] = [
    (CHAT, "n", 1, 8),
    (CHAT, "temperature", 0, 2),
    (CHAT, "top_p", 0.001, 1),
    (CHAT, "top_k", 0, 2**31 - 1),
    (CHAT, "min_p", 0, 1),
    (CHAT, "repetition_penalty", 0.1, 10),
    (CHAT, "presence_penalty", -2, 2),
    (CHAT, "frequency_penalty", -2, 2),
    (CHAT, "seed", -(2**63), 2**63 - 1),
    (CHAT, "max_tokens", 1, 2**31 - 1),
    (CHAT, "max_completion_tokens", 1, 2**31 - 1),
    (CHAT, "top_logprobs", 0, 20),
    (COMPLETIONS, "logprobs", 0, 20),
    (COMPLETIONS, "n", 1, 8),
    (RESPONSES, "max_output_tokens", 1, 2**31 - 1),
]


class Case(NamedTuple):
    """What is beyond one limit: whole requests, but for the Host."""

    limit: str
    beyond: list[bytes]


def post(path: str, body: bytes, headers: str = "") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n{headers}"
    )
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def asked(path: str, **more: Any) -> bytes:
    return post(path, json.dumps(ASKED[path] | more).replace(f'"{NAN}"', "NaN").encode())


def cases(ctx: int) -> Iterator[Case]:
    for path, name, least, most in NUMBERS:
        step = 1 if isinstance(most, int) and name not in ("temperature", "min_p", "top_p") else 0.001
        beside = {"logprobs": True} if name == "top_logprobs" else {}
        wrong = [least - step, most + step, -(2**65), 2**65, 10**50, NAN, "1", [], {}]
        yield Case(f"{name} of {path[4:]}", [asked(path, **beside, **{name: value}) for value in wrong])
    yield Case("stop", [asked(CHAT, stop=s) for s in (["a"] * 5, "x" * 257, "", [1], {}, "x" * (1 << 20))])
    bias = [{str(n): 1 for n in range(n)} for n in (1025, 100_000)]
    yield Case(
        "logit_bias", [asked(CHAT, logit_bias=b) for b in (*bias, {"1": -101}, {"1": NAN}, {"a": 1}, {"1": "1"}, [])]
    )
    many = [HELLO * 4097, HELLO * 100_000, [], "Hi", [1], [{"role": "user"}]]
    yield Case("messages", [asked(CHAT, messages=m) for m in many])
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    yield Case("tools", [asked(CHAT, tools=t) for t in ([tool] * 129, [tool] * 10_000, [1], {}, "f")])
    yield Case("schema", [asked(CHAT, response_format=form(s)) for s in schemas()])
    yield Case(
        "prompt tokens",
        [asked(COMPLETIONS, prompt=p) for p in ([5] * ctx, [5] * 100_000, "ab " * (2 << 20), [-1], [2**40])],
    )
    yield Case("prompts", [asked(COMPLETIONS, prompt=p) for p in (["a"] * 129, ["a"] * 100_000, [], [[]], {})])
    yield Case("body", [post(CHAT, b"x" * (MAX_BODY + 1)), post(CHAT, b"x" * (20 << 20)), post(CHAT, b"")])
    yield Case("headers", [post(CHAT, b"{}", f"X: {'y' * n}\r\n") for n in (MAX_HEADERS, 70 << 10)])
    depths = [b'{"a":' * n + b"1" + b"}" * n for n in (65, 10_000)]
    yield Case("depth", [post(CHAT, body) for body in (*depths, b"[" * 100_000 + b"]" * 100_000)])
    broken = [
        b'{"n": NaN}',
        b'{"n": 1e999}',
        b'{"n": ' + b"9" * 10_000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"a": 1, "a": 2}',
        b"\xff",
    ]
    yield Case("numbers and characters", [post(CHAT, body) for body in (*broken, b"[" + b"1," * 2_000_000 + b"1]")])


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


def schemas() -> Iterator[Any]:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(33):
        deep = {"type": "object", "properties": {"a": deep}}
    yield deep
    yield {"enum": ["x" * 100] * 700}
    yield {"type": "string", "pattern": "a" * 4097}
    yield {"type": "nothing"}
    yield "text"
    yield []


def timed(port: int, data: bytes) -> tuple[int, float]:
    """Status and seconds."""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):  # it may refuse before all was sent
            connection.sendall(data)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                answer += piece
    return int(answer[9:12] or 0), time.perf_counter() - began


def heard(port: int) -> float:
    """How many generations the model has ended."""
    get = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(get)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    return sum(float(value) for value in re.findall(rb"duoserve_generations_total\{[^}]*\} (\S+)", answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with serving("--predictor", "none", "--per-client", "64", "--ctx", str(CTX)) as served:
        port = served.port
        for path in ASKED:
            assert timed(port, asked(path))[0] == 200
        before = heard(port)
        for case in cases(CTX):
            found = [[timed(port, data) for _ in range(args.rounds)] for data in case.beyond]
            statuses = sorted({status for one in found for status, _ in one})
            worst = [max(seconds for _, seconds in one) for one in found]
            sizes = [len(data) for data in case.beyond]
            slowest = max(range(len(worst)), key=worst.__getitem__)
            rows.append(
                {
                    "limit": case.limit,
                    "n": len(worst),
                    "statuses": statuses,
                    "worst_s": worst[slowest],
                    "bytes": sizes[slowest],
                }
            )
        unheard = heard(port) == before
    print(f"{'limit':32s}{'cases':>6s}{'worst ms':>10s}{'its bytes':>12s}  statuses")
    for row in rows:
        print(f"{row['limit']:32s}{row['n']:6d}{1e3 * row['worst_s']:10.1f}{row['bytes']:12,d}  {row['statuses']}")
    worst_s, count = max(row["worst_s"] for row in rows), sum(row["n"] for row in rows)
    print(f"{count} cases; worst {1e3 * worst_s:.1f} ms; the model heard of {'none' if unheard else 'some'}")
    about = {**vars(args), "machine": describe(), "worst_s": worst_s, "unheard": unheard, "rows": rows}
    print(json.dumps({"benchmark": "limits", **about}))


if __name__ == "__main__":
    main()
